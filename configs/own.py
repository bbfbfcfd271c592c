"""
Your own recordings on a laptop: train.py's defaults for pictures of 224 pixels, with clips and
interleaved moments.

    python data.py video --name films --videos DIR --transcripts DIR2
    python train.py configs/own.py --data data/films --out out/films

Or pictures with captions: `python data.py pairs --size 224 ...`. How long it takes here, and in how
many passes: add --plan.
"""

data = "data/video"
out = "out/own"
patch = 28  # 224 / 28 = 8: 64 patches
image_pool = 2  # 16 tokens a picture, 8 pictures of a clip 128
block_size = 512  # a clip, or 6 moments of 16 tokens and an utterance each
vision_steps = 1000
language_batch = 4  # rows of 512 tokens
language_steps = 200
phase2_steps = 1500
eval_every = 250
keep = "best"  # a small corpus is soon learnt by heart
