"""
LLaVA-NeXT with Llama 3 8B, its first stage: the projector, at LLaVA-1.5's published rates. CLIP and
Llama are Hugging Face folders with safetensors and a tokenizer.json.

    python data.py llava --name llava_next_captions --json blip_laion_cc_sbu_558k.json \
        --images DIR --like Meta-Llama-3-8B-Instruct --template plain --size 336 --norm clip
    torchrun --nproc_per_node=8 train.py configs/llava_next_stage1.py

Nobody has run it here.
"""

phase = "1"
data = "data/llava_next_captions"
out = "out/llava_next"
vision_weights = "clip-vit-large-patch14-336"
language_weights = "Meta-Llama-3-8B-Instruct"
select_layer = -2  # the layer before the last, patches only: (336 / 14)^2 = 576 tokens
projector = "mlp2x_gelu"  # (1024 + 1) * 4096 + (4096 + 1) * 4096 = 20,979,712 parameters
features = "live"  # stored they would take 558128 * 576 * 1024 * 2 bytes = 658 GB
phase1_lr = 1e-3
phase1_batch = 256
phase1_epochs = 1  # of 558,128 pairs: 2,180 steps
warmup = 0.03
weight_decay = 0.0
beta2 = 0.999
recompute = True
