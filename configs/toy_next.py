"""
A toy version of LLaVA-NeXT: large pictures in tiles, unpadded, a learnt newline after each row; the
tower is trained too, at its own rate. It starts from a finished phase 2.

    python train.py configs/toy.py
    python data.py toy_chat --name toy_tiles --canvases 128x64 64x128 128x128
    python train.py configs/toy_next.py
    python eval.py --checkpoint out/toy_next/phase3.pt --task choice
"""

phase = "3"
data = "data/toy_tiles"
out = "out/toy_next"
init = "out/toy/phase2.pt"
block_size = 256  # the whole 16, four tiles 64 and 8 newlines, five turns of some 15
phase3_steps = 900
phase3_lr = 2e-3
phase3_batch = 16
phase3_learn = ("projector", "gpt", "tower=2e-4")  # in LLaVA-NeXT 1e-5 and 2e-6
eval_every = 500
