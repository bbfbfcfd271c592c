"""
The toy world with more scenes and more steps: the recipe of toy.py, twice as long.

    python data.py toy --name toy_hour --scenes 16000 && python train.py configs/toy_hour.py
"""

data = "data/toy_hour"
out = "out/toy_hour"
optimizer = "muon"
muon_rate = 2.0
student_mask = 0.5
vision_steps = 1500
language_steps = 100
image_pool = 2  # 64 patches, 16 tokens a picture
phase2_steps = 4000
phase2_lr = 1e-3
phase2_batch = 32
save_every = 500  # an interruption loses up to a minute
