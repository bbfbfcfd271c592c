"""
LLaVA-1.5's recipe in miniature: the layer before the last, patches only, mlp2x_gelu, pictures padded
to a square; the projector on captions, then all but the tower on conversations.

    python train.py configs/toy.py && python data.py toy_chat && python train.py configs/toy_llava15.py
"""

data = "data/toy_chat"
out = "out/toy_llava15"
vision_weights = "out/toy/vision.pt"
select_layer = -2
projector = "mlp2x_gelu"
block_size = 256  # two pictures of 64 tokens and four turns of some 30
phase0_batch = 8  # rows of 256 tokens
phase1_steps = 150
phase2_steps = 0  # LLaVA-1.5 has two stages: from captions straight to conversations
phase3_steps = 3000
phase3_lr = 2e-3
phase3_batch = 16
eval_every = 1000
