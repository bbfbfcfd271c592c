"""Phase 1 of EgoBabyLLaVA: the projector alone, on pairs of one frame. After ego/phase0.py."""

phase = "1"
data = "data/babyview"
out = "out/ego"
select_layer = -1  # the last block, after the final norm
keep_cls = True  # 1 + 16 * 16 = 257 tokens an image
projector = "mlp2x_gelu"  # (768 + 1) * 768 + (768 + 1) * 768 = 1,181,184 parameters
phase1_lr = 3e-3
phase1_batch = 32  # of all processes together
phase1_epochs = 5  # of N pairs, one frame each: 189,922 steps
weight_decay = 0.0
beta2 = 0.999
