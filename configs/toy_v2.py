"""
BabyLLaVA-V2's recipe in miniature: single pictures, then clips and interleaved moments too, then
the tests' own training parts, all of it together.

    python train.py configs/toy_v2.py      # draws data/toy_v2, trains, is tested
"""

data = "data/toy_v2"
out = "out/toy_v2"
block_size = 832  # Memory: 29 pictures of 16 tokens, 15 rounds of some 22
image_pool = 2  # 64 patches, 16 tokens a picture
vision_steps = 1000
phase0_batch = 4  # rows of 768 tokens
phase2_steps = 1500
phase3_steps = 3000
phase3_lr = 2e-3
phase3_batch = 16
eval_every = 1000
