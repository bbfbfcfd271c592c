"""
Phase 0 at BabyLLaVA's published sizes and rates: the GPT on transcripts, and a published tower.

The repository's language model: 6,000 BPE tokens, context 2,048, 8 layers of 256. GPT-2 has
6000 * 256 + 2048 * 256 + 8 * 789760 + 512 = 8,378,880 parameters of these; ours, without learnt
positions, 6000 * 256 + 8 * (4 * 256 * 256 + 3 * 256 * 704 + 2 * 256) + 256 = 7,962,880.
The paper's, words instead of BPE: add configs/words.py after this file.
"""

phase = "0"
data = "data/saycam"
out = "out/saycam"
# from github.com/eminorhan/silicon-menagerie: 7 * 7 = 49 tokens x 2048; none: train a ViT-S/16
vision_weights = "dino_sfp_resnext50.pth"
n_layer = 8
n_head = 8  # of width 32; BabyLLaVA has 32 heads of width 8
n_embd = 256
block_size = 2048
dropout = 0.15
language_lr = 5e-4
language_batch = 8  # x 2048 = 16,384 tokens a step
language_epochs = 10  # of 37,486 utterances of some 10 tokens: about 229 steps
patch = 16  # if a ViT is trained: 224 / 16 = 14, so P = 196
vision_width = 384
vision_depth = 12
vision_heads = 6
vision_lr = 5e-4
vision_batch = 256
vision_epochs = 10  # of the frames of the pairs; of all 600,285 of SAYCam: 23,448 steps
prototypes = 4096
local_views = 8
momentum = 0.996
