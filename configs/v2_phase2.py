"""
Phase 2 of BabyLLaVA-V2: projector and language model, on all three kinds of data, one list. After
phase 1. A clip is 8 pictures, 8 * 197 = 1,576 tokens; moments are 4 to 8 pictures.
"""

phase = "2"
data = "data/saycam_v2"
out = "out/saycam_v2"
phase2_lr = 2e-4  # 2e-3, 2e-4 and 2e-5 were swept
phase2_batch = 64  # published: 32 a device, two steps added up
phase2_epochs = 5  # of 768,000 + 181,000 + 63,000 samples: 79,062 steps
weight_decay = 0.0
beta2 = 0.999
recompute = True
