"""
What a frozen tower makes of each frame, computed once and mapped into memory ever after.

A file in data/<name>/features/ is found by a key: a digest of the tower's weights and architecture,
the layer, CLS, the normalisation, and the frames themselves. So several towers live side by side,
and none is ever mistaken for another, nor are frames that were drawn anew.
Letters: F frames, P image tokens an image, E vision width.
"""

import hashlib
import json
import os

import numpy as np
import torch
from tqdm import tqdm

import vision
from data import open_bin
from files import locked
from images import to_pixels


def fingerprint(tower, select_layer=-1, keep_cls=False, image_pool=1):
    """What tells the features of one tower from another's: weights, architecture (heads, registers
    and the way of interpolating are in no weight), layer, pooling, whether CLS is among them."""
    pooled = [image_pool] if image_pool > 1 else []
    how = json.dumps([vision.describe(tower), select_layer, keep_cls, *pooled], sort_keys=True)
    return hashlib.sha256((how + vision.weights_digest(tower.state_dict())).encode()).hexdigest()


def find(dataset, split, model):
    """Where the features are, or will be, that `model` (a BabyLLaVA) makes of a split's frames."""
    key = fingerprint(model.tower, model.select_layer, model.keep_cls, model.image_pool)
    return dataset.features_path(split, key)


def shape(dataset, split, model):
    """(F, P, E) of the features of a split."""
    P = model.image_tokens(dataset.image_format.size)
    return dataset.count(split, "frames"), P, model.tower.width


def open_stored(dataset, split, model):
    """The features (F, P, E) float16 as an np.memmap, or None where they were never computed."""
    path = find(dataset, split, model)
    if not path.exists():
        return None
    return open_bin(path, "float16", shape(dataset, split, model), "delete it")


@torch.no_grad()
def extract(model, frames, image_format, device, batch=64):
    """Yield the features of frames (F, S, S, 3) uint8, in order, as float16 arrays (n, P, E)."""
    for start in range(0, len(frames), batch):
        pixels = to_pixels(frames[start : start + batch], image_format, device)
        yield model.encode_images(pixels).cpu().numpy().astype(np.float16)


def store(dataset, split, model, device):
    """The features (F, P, E) float16 of a split, computed where they are not there yet, going on
    where a killed run stopped. If another process is computing the same ones, wait for it."""
    path, whole = find(dataset, split, model), shape(dataset, split, model)
    frames = dataset.open(split, "frames")
    row_bytes = 2 * whole[1] * whole[2]
    path.parent.mkdir(exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            compute(model, frames, dataset.image_format, device, path, row_bytes)
    return open_bin(path, "float16", whole, "delete it")


def compute(model, frames, image_format, device, path, row_bytes):
    """Write the features of frames to a file, after those that are in its .partial."""
    partial = path.with_suffix(".partial")
    done = partial.stat().st_size // row_bytes if partial.exists() else 0
    with open(partial, "r+b" if done else "wb") as file:
        file.truncate(done * row_bytes)  # a row that was cut short is computed again
        file.seek(0, os.SEEK_END)
        with tqdm(total=len(frames), initial=done, desc="features", unit="frame") as bar:
            for block in extract(model, frames[done:], image_format, device):
                file.write(block.tobytes())
                bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
