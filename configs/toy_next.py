"""
LLaVA-NeXT's recipe in miniature: large pictures in tiles, unpadded, a learnt newline after each row;
the tower learns too, at its own rate.

    python train.py configs/toy.py
    python data.py toy_chat --name toy_tiles --fit squash --canvases 128x64 64x128 128x128
    python train.py configs/toy_next.py
"""

data = "data/toy_tiles"
out = "out/toy_next"
vision_weights = "out/toy/vision.pt"
select_layer = -2
block_size = 480  # the whole 64, four tiles 256 and 16 newlines, four turns of some 30
phase0_batch = 4  # rows of 480 tokens
phase1_steps = 40
phase1_batch = 16
phase2_steps = 0  # from captions straight to conversations
phase3_steps = 1000
phase3_lr = 2e-3
phase3_batch = 16
phase3_learn = ("projector", "gpt", "tower=2e-4")  # in LLaVA-NeXT 1e-5 and 2e-6
eval_every = 500
