"""
Phase 3 of BabyLLaVA-V2: all of it, the tower too, on the training parts of the ten tests, mixed.

    python data.py llava --json tuning.json --images DIR --like out/saycam_v2/phase2.pt \
        --template baby_v1 --name toolbox
    torchrun --nproc_per_node=8 train.py configs/v2_phase3.py

The original means to give the tower a rate of its own, but through a wrong name it has the others'
5e-5; here it has the intended rate.
"""

phase = "3"
data = "data/toolbox"
out = "out/saycam_v2"
phase3_learn = ("projector", "gpt", "tower=1e-5")
phase3_lr = 5e-5
phase3_batch = 128
phase3_epochs = 5  # of 113,211 items, mixed: 4,422 steps; 10 of one test alone
weight_decay = 0.0
beta2 = 0.999
recompute = True
