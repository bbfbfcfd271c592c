"""
Opening a published tower: a file, a Hugging Face folder, or any checkpoint of ours.

    python train.py configs/phase0.py --vision_weights dino_deitsmall16_pretrain.pth
"""

from pathlib import Path

import checkpoint
from config import UserError
from pretrained import huggingface
from pretrained.tower_names import DoesNotFit, read_file, tower_of


def load_tower(path):
    """Opening a published tower: a file, a Hugging Face folder, or any checkpoint of ours. Raises
    UserError."""
    if not Path(path).exists():
        raise UserError(
            f"no {path}: fetch that checkpoint, name another with --vision_weights, or train a "
            "tower with --vision_weights none"
        )
    if Path(path).is_dir():
        return huggingface.load_tower(path)
    state = read_file(path)
    if isinstance(state, dict) and "format" in state:
        tower = checkpoint.load(path).model.tower
        if tower is None:
            raise UserError(f"{path}: a checkpoint without a tower")
        return tower
    try:
        return tower_of(state)
    except DoesNotFit as error:
        raise UserError(f"{path}: {error}") from None
