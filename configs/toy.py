"""
The whole recipe on the toy world. docs/recipe.md says how these settings were chosen; others are
train.py's defaults.
"""

data = "data/toy"
out = "out/toy"
optimizer = "muon"
muon_rate = 2.0
student_mask = 0.5  # DINO's student sees half of the patches
vision_steps = 1000
language_steps = 75
image_pool = 2  # 64 patches, 16 tokens a picture
phase2_steps = 2300
phase2_lr = 1e-3
phase2_batch = 32
