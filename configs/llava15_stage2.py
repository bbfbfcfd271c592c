"""
LLaVA-1.5, stage 2, at its published rates: projector and GPT, on 665,298 conversations.

    A="A chat between a curious user and an artificial intelligence assistant."
    B="The assistant gives helpful, detailed, and polite answers to the user's questions."
    python data.py llava --name llava15_chat --json llava_v1_5_mix665k.json --images DIR \
        --image_first --like vicuna-7b-v1.5 --template v1 --system "$A $B" \
        --size 336 --fit pad --norm clip
    torchrun --nproc_per_node=8 train.py configs/llava15_stage2.py

With LoRA, as its authors' second script has it, add: --lora_rank 128 --lora_alpha 256
--phase3_lr 2e-4 --phase3_learn projector=2e-5 gpt. Nothing is sharded here: weights, gradients and
AdamW's two moments of all 7 billion parameters are 7e9 * 16 bytes = 112 GB on each GPU, with LoRA
the weights alone 28. Nobody has run it here.
"""

phase = "3"
data = "data/llava15_chat"
out = "out/llava15"
init = "out/llava15/phase1.pt"  # of stage 1, with the same image format
truncate = True  # where LLaVA cuts too, at block_size, but after an answer
features = "live"  # stored they would take 665298 * 576 * 1024 * 2 bytes = 785 GB
phase3_lr = 2e-5
phase3_batch = 128
phase3_epochs = 1  # of 665,298 conversations: 5,198 steps
warmup = 0.03
weight_decay = 0.0
beta2 = 0.999
recompute = True
