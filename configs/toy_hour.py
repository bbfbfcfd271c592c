"""
The toy world again, with an hour instead of minutes: twice the scenes, a longer look, more reading.

    python data.py toy --name toy_hour --scenes 12000 && python train.py configs/toy_hour.py
"""

data = "data/toy_hour"
out = "out/toy_hour"
vision_steps = 4000
phase0_steps = 600
phase1_steps = 200
phase2_steps = 6000
eval_every = 500
