"""
A toy version of LLaVA-1.5: the block before the last, patches only, mlp2x_gelu, pictures padded to
a square; the projector on captions, then all but the tower on conversations.

    python train.py configs/toy.py && python data.py toy_chat
    python train.py configs/toy_llava15.py
"""

data = "data/toy_chat"
out = "out/toy_llava15"
init = "out/toy"  # its tower and its language model
projector = "mlp2x_gelu"
block_size = 256  # two pictures of 64 tokens, five turns of some 15
phase1_steps = 150
phase2_steps = 0  # LLaVA-1.5 has two stages: from captions straight to conversations
phase3_steps = 2600
phase3_lr = 2e-3
phase3_batch = 16
eval_every = 1000
