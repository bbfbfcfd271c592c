"""
LLaVA-NeXT with Llama 3 8B, its second stage, by the command on its model card.

    A="You are a helpful language and visual assistant. You are able to understand the visual"
    B="content that the user provides, and assist the user with a variety of tasks using natural"
    python data.py llava --name llava_next --json llava_1_6.json --images DIR \
        --image_first --template llama3 --system "$A $B language." --like out/llava_next/phase1.pt \
        --size 336 --norm clip --canvases 336x672 672x336 672x672 1008x336 336x1008
    torchrun --nproc_per_node=8 train.py configs/llava_next.py

Stage 1 is configs/llava_next_stage1.py. The card's flags, and what they are here:

    --model_name_or_path, --vision_tower, --pretrain_mm_mlp_adapter: init
    --version llava_llama_3: data.py's --template llama3
    --data_path, --image_folder: data.py's --json, --images
    --mm_tunable_parts, --mm_vision_tower_lr: phase3_learn
    --mm_projector_type, --mm_vision_select_layer: inherited from stage 1
    --image_aspect_ratio anyres, --image_grid_pinpoints: data.py's --canvases, as the code of
        that card reads them, (width, height); transformers reads (height, width), which of two
        canvases that suit a picture equally well takes the other
    --mm_patch_merge_type spatial_unpad: what tiles do here
    --group_by_modality_length: what batches do here
    --bf16, --tf32, --torch_compile: what a GPU gets by itself
    --num_train_epochs, --per_device_train_batch_size: phase3_epochs, phase3_batch
    --gradient_accumulation_steps, --gradient_checkpointing: grad_accum, recompute
    --learning_rate, --weight_decay, --warmup_ratio: phase3_lr, weight_decay, warmup
    --lr_scheduler_type cosine: the schedule there is
    --model_max_length: the context of Llama 3, 8192
    --output_dir, --save_steps, --logging_steps: out, save_every, log_every
    --deepspeed with ZeRO-3: shard, which is on by itself where one GPU does not hold the phase

Without a meaning here: --mm_use_im_start_end and --mm_use_im_patch_token (False there; there are
no such tokens), --evaluation_strategy (there is always a validation), --save_strategy and
--save_total_limit (one save, replaced), --dataloader_num_workers, --lazy_preprocess and
--dataloader_drop_last (data lie prepared and mapped), --report_to and --run_name (log.jsonl, out).
Nobody has run it here.
"""

phase = "3"
data = "data/llava_next"
out = "out/llava_next"
init = "out/llava_next/phase1.pt"
phase3_learn = ("projector", "gpt", "tower=2e-6")
truncate = True  # where LLaVA cuts too, at block_size, but after an answer
phase3_lr = 1e-5
phase3_batch = 32  # 4 a GPU, of eight
phase3_epochs = 1  # of about 760,000 conversations: 23,750 steps
warmup = 0.03
weight_decay = 0.0
beta2 = 0.999
save_every = 3000
log_every = 1
recompute = True
