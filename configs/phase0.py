"""Phase 0 at BabyLLaVA's language-model size: the GPT on transcripts, and the eye on frames."""
phase = "0"
data = "data/saycam"
out = "out/saycam"
n_layer = 8
n_head = 8  # of width 32; BabyLLaVA has 32 heads of width 8
n_embd = 256
block_size = 1024
dropout = 0.15
phase0_lr = 5e-4
phase0_batch = 16  # x 1024 = 16,384 tokens a step, as 8 x 2048
phase0_steps = 10 * 37486 * 10 // 16384  # 10 passes of 37,486 utterances of some 10 tokens: 228
patch = 16  # 224 / 16 = 14, so P = 196
vision_width = 384  # DINO's ViT-S/16
vision_depth = 12
vision_heads = 6
vision_lr = 5e-4
vision_batch = 256
vision_steps = 10 * 600285 // 256  # 10 passes of SAYCam's frames: 23,448
prototypes = 4096
local_views = 8
momentum = 0.996
