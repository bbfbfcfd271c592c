"""
Phase 0 at BabyLLaVA-V2's published sizes and rates: TinyLlama's shape, from random weights, on the
transcripts, and a published tower. Nobody has run it here.

    python data.py saycam --frames frames.txt --annotations images.json clips.json moments.json \
        --fit pad --template baby_v1 --name saycam_v2    # V2's three JSON files

Parameters: 2 * 6000 * 2048 embedding and head (here one matrix: 6000 * 2048) + 22 * (2048 * (2048 +
2 * 256) + 2048 * 2048 of attention + 3 * 2048 * 5632 of the MLP + 2 * 2048) + 2048 = 981 million.
"""

phase = "0"
data = "data/saycam_v2"
out = "out/saycam_v2"
vision_weights = "dino_vitl16_saycam.pth"  # ViT-L/16 of DINO; none: train one
n_layer = 22
n_head = 32  # of width 64
n_kv_head = 4
n_embd = 2048
n_hidden = 5632
block_size = 8192
language_lr = 2e-4  # or 2e-5: both were swept
language_batch = 4  # x 8192 tokens; of all processes together: with 8 GPUs say 8
language_epochs = 10  # of some 375,000 tokens: about 115 steps
weight_decay = 0.1
