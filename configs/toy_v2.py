"""
BabyLLaVA-V2's recipe in miniature: single pictures, then clips and interleaved moments too, then
games of yes and no, and the tests' own training parts, all of them together.

    python train.py configs/toy_v2.py      # draws data/toy_v2, trains, is tested

Unlike the original's, the tower stays frozen in phase 3: there it would cost most, 29 pictures a
Memory dialogue.
"""

data = "data/toy_v2"
out = "out/toy_v2"
n_embd = 96  # small, so that many samples are seen in these minutes
block_size = 512  # Memory: 29 pictures of 4 tokens, 15 rounds of some 22
image_pool = 4  # 64 patches, 4 tokens a picture
vision_steps = 1000
vision_lr = 5e-4  # at 1e-3 DINO now and then gets stuck here, all targets alike
language_steps = 250
language_batch = 4  # rows of 512 tokens
phase1_lr = 1e-3  # the projector's output must not drown what blocks add to it:
phase2_learn = ("projector=5e-4", "gpt")  # at 2e-3 it grew ten times as long as a word's vector
phase2_steps = 3500
phase3_learn = ("projector=5e-4", "gpt")
phase3_steps = 7600  # the games in their order take the first 1,937
phase3_lr = 2e-3
phase3_batch = 32
eval_every = 1000
