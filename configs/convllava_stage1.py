"""
ConvLLaVA, stage 1, at its published rates: the projector and a fifth stage on CLIP's ConvNeXt-L. A
picture of 768 pixels is then (768 / 64)^2 = 144 tokens, of 1,024 it is 256, of 1,536
it is 576.

    python data.py llava --name convllava_captions --json captions.json --images DIR \
        --like vicuna-7b-v1.5 --template plain --size 768 --norm clip
    torchrun --nproc_per_node=8 train.py configs/convllava_stage1.py

Nobody has run it here.
"""

phase = "1"
data = "data/convllava_captions"
out = "out/convllava"
vision_weights = "convnext_large_clip.safetensors"  # widths 192 to 1536, depths 3, 3, 27, 3
language_weights = "vicuna-7b-v1.5"
select_layer = -1  # a ConvNeXt gives its last map alone
extra_stage = 6  # blocks, 3072 wide
projector = "mlp2x_gelu"
phase1_learn = ("projector", "tower.stages.4")
phase1_lr = 3e-4
phase1_batch = 256
phase1_epochs = 1  # of about two million captions: 7,812 steps
warmup = 0.03
weight_decay = 0.0
beta2 = 0.999
recompute = True
