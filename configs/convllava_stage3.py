"""
ConvLLaVA, stage 3, at its published rates: projector and GPT on conversations, the tower frozen.

    python data.py llava --name convllava_chat --json llava_v1_5_mix665k.json --images DIR \
        --image_first --like vicuna-7b-v1.5 --template v1 --system "$A $B" --size 768 --norm clip
    torchrun --nproc_per_node=8 train.py configs/convllava_stage3.py

The system text is that of configs/llava15_stage2.py. Nobody has run it here.
"""

phase = "3"
data = "data/convllava_chat"
out = "out/convllava"
truncate = True  # where LLaVA cuts too, at block_size, but after an answer
features = "live"  # stored they would take 665298 * 144 * 3072 * 2 bytes = 589 GB
phase3_lr = 2e-5
phase3_batch = 128
phase3_epochs = 1  # of 665,298 conversations: 5,198 steps
warmup = 0.03
weight_decay = 0.0
beta2 = 0.999
recompute = True
