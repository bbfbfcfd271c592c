"""
What a frozen tower makes of each frame, computed once and mapped into memory ever after.

A file in data/<name>/features/ is found by a key: a digest of the tower's weights and architecture,
the layer, CLS, the normalisation, and the frames themselves. So several towers live side by side,
and none is ever mistaken for another, nor are frames that were drawn anew.
Letters: F frames, P outputs of the tower an image, E vision width.
"""

import hashlib
import json
import os

import numpy as np
import torch
from tqdm import tqdm

import vision
from data import open_bin
from files import claimed, named, open_or_create
from images import to_pixels

BLOCK = 256  # frames, by which the work is shared and a kill can cost


def fingerprint(tower, select_layer=-1, keep_cls=False):
    """What tells the features of one tower from another's: weights, architecture (heads, registers
    and the way of interpolating are in no weight), layer, whether CLS is among them."""
    how = json.dumps([vision.describe(tower), select_layer, keep_cls], sort_keys=True)
    return hashlib.sha256((how + vision.weights_digest(tower.state_dict())).encode()).hexdigest()


def find(dataset, split, model):
    """Where the features are, or will be, that `model` (a BabyLLaVA) makes of a split's frames."""
    key = fingerprint(model.tower, model.select_layer, model.keep_cls)
    return dataset.features_path(split, key)


def shape(dataset, split, model):
    """(F, P, E) of the features of a split."""
    P = model.tower.num_patches(dataset.image_format.size) + model.keep_cls
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
    """The features (F, P, E) float16 of a split, computed where they are not there yet."""
    path, whole = find(dataset, split, model), shape(dataset, split, model)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        frames = dataset.open(split, "frames")
        row_bytes = 2 * whole[1] * whole[2]
        compute(model, frames, dataset.image_format, device, path, row_bytes)
    return open_bin(path, "float16", whole, "delete it")


def compute(model, frames, image_format, device, path, row_bytes):
    """Write the features of frames to a file, a block of frames at a time.

    All who want the same file share the work: the processes of a run, several runs, one that goes
    on where another was killed. Of each block a byte of .done says that it is written, and that
    byte's lock, which ends with its holder, that somebody is at it. So nobody waits for longer than
    a block takes, and nobody in a collective, which would time out."""
    partial, done = path.with_suffix(".partial"), path.with_suffix(".done")
    starts, is_first = range(0, len(frames), BLOCK), int(os.environ.get("RANK", 0)) == 0
    bar = tqdm(total=len(starts), desc="features", unit="block", disable=not is_first)
    with named(partial), open_or_create(done) as flags, bar:
        flags.truncate(len(starts) + 1)  # the last byte's lock is for the end
        with open_or_create(partial) as rows:
            rows.truncate(len(frames) * row_bytes)
            for wait in (False, True):  # first what nobody is at; then what is still not done
                for number, start in enumerate(starts):
                    if path.exists() or read_flags(flags)[number]:
                        continue
                    with claimed(flags, number, wait) as is_mine:
                        if is_mine and not read_flags(flags)[number]:
                            some = frames[start : start + BLOCK]
                            blocks = extract(model, some, image_format, device)
                            write_block(rows, start * row_bytes, blocks)
                            flags.seek(number)
                            flags.write(b"\1")
                    bar.update(sum(read_flags(flags)) - bar.n)
        with claimed(flags, len(starts), wait=True):
            if path.exists():
                partial.unlink(missing_ok=True)
            else:
                os.replace(partial, path)
    done.unlink(missing_ok=True)


def read_flags(flags):
    """The bytes of .done, a 1 where a block is written."""
    flags.seek(0)
    return flags.read()


def write_block(rows, first_byte, blocks):
    """Write arrays one after the other into an open file, and onto the disk."""
    rows.seek(first_byte)
    for block in blocks:
        content = memoryview(block.tobytes())
        while content:  # a disk may take less at a time than it is given
            content = content[rows.write(content) :]
    os.fsync(rows.fileno())
