"""Phase 1 at BabyLLaVA's rates: the projector alone, on pairs. Starts from phase 0."""

phase = "1"
data = "data/saycam"
out = "out/saycam"
select_layer = -1  # a ResNeXt gives its last map; BabyLLaVA asks for -2, which its code ignores
projector = "mlp2x_gelu"  # (2048 + 1) * 256 + (256 + 1) * 256 = 590,336 parameters
phase1_lr = 3e-3
phase1_batch = 40  # of all processes together; BabyLLaVA's is 40 a GPU
phase1_epochs = 5  # of about 67,000 pairs: 8,375 steps
weight_decay = 0.0
beta2 = 0.999
