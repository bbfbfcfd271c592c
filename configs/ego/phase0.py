"""
Phase 0 of EgoBabyVLM's EgoBabyLLaVA, for the EgoBabyVLM challenge: a GPT of GPT-2-small's size on
BabyView's utterances, and a tower. Nobody has run it here.

    python data.py babyview --images frames --transcripts whisperx --rttm vtc --fit centre
    torchrun --nproc_per_node=8 train.py configs/ego/phase0.py     # then phase1.py, phase2.py

Parameters: 52000 * 768 embedding and head, one matrix + 12 * (4 * 768 * 768 of attention + 3 * 768
* 2048 of the MLP + 2 * 768) + 768 = 124,889,856. (GPT-2 small with 52,000 tokens has 125,778,432:
learnt positions, biases and another MLP.)

The steps in the comments are of N = 1,215,500 utterances, 85 % of the 1.43 million that BabyVLM's
authors cut from BabyView, and of one pair for each; --plan prints those of your data (data.py
writes a pair for each frame that an utterance is said over). The original's tower is a
ViT-B/14 by DINOv2 (500 * 1,812 steps); ours would be trained by DINO, with its figures below, if
vision_weights is none. A tower that saw other pictures than BabyView's disqualifies a run.
"""

phase = "0"
data = "data/babyview"
out = "out/ego"
vision_weights = "dinov2_vitb14_babyview.pth"  # yours; none: train one by DINO
patch = 14  # 224 / 14 = 16: 256 patches
vision_width = 768
vision_depth = 12
vision_heads = 12
vision_lr = 8e-5
vision_batch = 256
vision_steps = 500 * 1812
prototypes = 131072
local_views = 8
momentum = 0.994
n_layer = 12
n_head = 12  # of width 64
n_embd = 768
block_size = 1024
dropout = 0.1
language_lr = 1e-4  # linear in the original, a cosine here
language_batch = 64  # x 1024 = 65,536 tokens a step; published: 16 a device, four added up
language_epochs = 30  # of N = 1,215,500 utterances of some 10 tokens: 5,564 steps
weight_decay = 0.3
beta2 = 0.999
keep = "best"  # published: the best checkpoint, else 5 to 10 points are lost
