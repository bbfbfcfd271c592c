"""
The toy world with half an hour of training: more scenes and more steps in each phase.

    python data.py toy --name toy_hour --scenes 16000 && python train.py configs/toy_hour.py
"""

data = "data/toy_hour"
out = "out/toy_hour"
vision_steps = 3000
language_steps = 400
phase1_steps = 200
phase2_steps = 8000
phase2_batch = 32
save_every = 500  # an interruption loses up to a minute
