"""
Phase 2 of EgoBabyLLaVA: projector and GPT together, the tower frozen. After ego/phase1.py.

It is here that the original forgets language: 58.8 after phase 0, 54.6 after phase 2. What replay
does about it (`data.py babyview --replay 1`): docs/results.md.
"""

phase = "2"
data = "data/babyview"
out = "out/ego"
phase2_lr = 2e-3
phase2_batch = 16  # of all processes together
phase2_epochs = 5  # of N pairs, one frame each: 379,844 steps
dropout = 0.1
weight_decay = 0.0
beta2 = 0.999
