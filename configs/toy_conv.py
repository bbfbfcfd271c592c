"""
A toy version of ConvLLaVA: a ConvNeXt, here trained by DINO, gets one more stage, which halves the
map again. First that stage and the projector are trained, then also the GPT and the tower from its
third stage on, then, on conversations, all but the tower.

    python data.py toy_chat --name toy_conv --size 128 && python train.py configs/toy_conv.py
"""

data = "data/toy_conv"
out = "out/toy_conv"
vision_tower = "convnext"
conv_stages = (1, 1, 2, 1)  # ConvNeXt-L: 3, 3, 27, 3
vision_width = 16  # 16, 32, 64, 128; the extra stage 256
patch = 2  # pixels a side of the stem: 2 * 2^4 = 32 a token, 16 tokens of 128 pixels
extra_stage = 1
select_layer = -1  # a ConvNeXt gives its last map alone
vision_steps = 80
vision_batch = 32
block_size = 160  # two pictures of 16 tokens, five turns of some 15
phase1_learn = ("projector", "tower.stages.4")
phase1_steps = 100
phase1_batch = 16
phase2_learn = ("projector", "gpt", "tower.stages.2", "tower.stages.3", "tower.stages.4")
phase2_steps = 2600  # mostly for the tower
phase3_steps = 1500
phase3_lr = 2e-3
phase3_batch = 16
eval_every = 1000
