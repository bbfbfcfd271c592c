"""
The whole recipe on the toy world, with the settings that learnt it fastest on two CPU cores.
docs/recipe.md says what each of them buys; the other defaults of train.py are made for this world.
"""

data = "data/toy"
out = "out/toy"
optimizer = "muon"
muon_rate = 2.0
student_mask = 0.5  # DINO's student sees half of the patches
vision_steps = 1000
image_pool = 2  # 64 patches, 16 tokens a picture
phase2_steps = 1900
phase2_lr = 1e-3
phase2_batch = 32
