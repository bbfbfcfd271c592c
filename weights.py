"""
Other people's weights, in and out: where they are opened, whatever form they are in.

    python train.py configs/phase0.py --vision_weights dino_deitsmall16_pretrain.pth
    python sample.py --image img.jpg --checkpoint DIR     # a LLaVA's folder, see huggingface.py
    python weights.py export out/toy/phase2.pt DIR        # a folder that transformers opens
"""

from pathlib import Path

import checkpoint
import config
import export
import huggingface
from config import UserError
from files import read_json
from towers import DoesNotFit, read_file, tower_of


def load_tower(path):
    """The tower of a published file or folder, or of any checkpoint of ours. Raises UserError."""
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


def open_model(path, device="cpu", dtype=""):
    """The checkpoint.Loaded of a file that train.py wrote or of a LLaVA's folder. dtype empty: as
    its weights are kept."""
    if Path(path).is_dir():
        return huggingface.load(path, device, dtype)
    loaded = checkpoint.load(path, device)
    if dtype:
        loaded.model.to(huggingface.choose_dtype(dtype, None))
    return loaded


def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if argv[0] != "export" or len(argv) != 3:
        raise UserError("want: python weights.py export CHECKPOINT.pt DIR")
    source, folder = Path(argv[1]), argv[2]
    loaded, results = checkpoint.load(source), source.parent / "results.json"
    scores = read_json(results) if results.exists() else None
    if scores and scores["digest"] != loaded.checkpoint["digest"]:
        scores = None  # of another checkpoint
    export.export(loaded, folder, scores)
    print(f"{folder}: {source}, as AutoModelForImageTextToText opens it")


if __name__ == "__main__":
    config.run(main)
