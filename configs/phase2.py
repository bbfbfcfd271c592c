"""Phase 2 at BabyLLaVA's rates: projector and GPT together, on the same pairs. After phase 1."""

phase = "2"
data = "data/saycam"
out = "out/saycam"
phase2_lr = 2e-3  # the checkpoint that was published: 2e-4, at a batch of 128
phase2_batch = 64  # of all processes together; BabyLLaVA's is 64 a GPU
phase2_epochs = 5  # of about 67,000 pairs: 5,234 steps
dropout = 0.15  # of the GPT, as in phase 0
weight_decay = 0.0
beta2 = 0.999
