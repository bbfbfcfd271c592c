"""Phase 1 of BabyLLaVA-V2: the projector, on single pictures. After phase 0."""

phase = "1"
data = "data/saycam_v2"
out = "out/saycam_v2"
select_layer = -2  # the block before the last, without the final norm
keep_cls = True  # 1 + 14 * 14 = 197 tokens an image
projector = "mlp2x_gelu"  # 1024 -> 2048 -> 2048
phase1_lr = 3e-3
phase1_batch = 32  # of all processes together; published: 32 a device
phase1_epochs = 5  # of 768,000 pairs: 120,000 steps
weight_decay = 0.0
beta2 = 0.999
