"""
LLaVA-1.5, stage 1, at its published rates: the projector alone, on 558,128 captioned pictures, CLIP
ViT-L/14 at 336 pixels and Vicuna 7B frozen. Both are Hugging Face folders with safetensors and a
tokenizer.json; transformers' save_pretrained writes these for folders that have neither.

    python data.py llava --name llava15_captions --json blip_laion_cc_sbu_558k.json --images DIR \
        --like vicuna-7b-v1.5 --template plain --size 336 --norm clip
    torchrun --nproc_per_node=8 train.py configs/llava15_stage1.py

Nobody has run it here.
"""

phase = "1"
data = "data/llava15_captions"
out = "out/llava15"
vision_weights = "clip-vit-large-patch14-336"
language_weights = "vicuna-7b-v1.5"
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
