"""
ConvLLaVA, stage 2, at its published rates: projector, GPT, and the tower from its third stage on.

    torchrun --nproc_per_node=8 train.py configs/convllava_stage2.py

Nobody has run it here.
"""

phase = "2"
data = "data/convllava_captions"
out = "out/convllava"
phase2_learn = ("projector", "gpt", "tower.stages.2", "tower.stages.3", "tower.stages.4")
phase2_lr = 2e-5
phase2_batch = 256
phase2_epochs = 1  # of about two million captions: 7,812 steps
warmup = 0.03
weight_decay = 0.0
beta2 = 0.999
recompute = True
