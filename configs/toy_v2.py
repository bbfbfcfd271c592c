"""
A toy version of BabyLLaVA-V2: single pictures, then also clips and interleaved moments, then a
curriculum of games and the training parts of the tests.

    python train.py configs/toy_v2.py      # draws data/toy_v2, trains, tests

Unlike in the original, the tower stays frozen in phase 3, where it would be slowest: a Memory
dialogue has 29 pictures.
"""

data = "data/toy_v2"
out = "out/toy_v2"
n_embd = 96  # small, so that many samples are seen in a few minutes
block_size = 512  # Memory: 29 pictures of 4 tokens, 15 rounds of some 22
image_pool = 4  # 64 patches, 4 tokens a picture
vision_steps = 1000
vision_lr = 5e-4  # at 1e-3 DINO sometimes collapses here
language_steps = 250
language_batch = 4  # rows of 512 tokens
phase1_lr = 1e-3  # with a rate of 2e-3 the projector's output grew
phase2_learn = ("projector=5e-4", "gpt")  # ten times as long as a word's embedding
phase2_steps = 3500
phase3_learn = ("projector=5e-4", "gpt")
phase3_steps = 7600  # the curriculum takes the first 1,937
phase3_lr = 2e-3
phase3_batch = 32
eval_every = 1000
