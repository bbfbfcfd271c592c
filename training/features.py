"""
The features of a frozen tower, computed once for each frame and memory-mapped afterwards.

A file in data/<name>/features/ is named by a digest of the tower's weights and architecture, the
layer, CLS, the image format and the frames. So the features of several towers lie side by side, and
none is ever mistaken for another's.
Letters: F frames, P features an image, E vision width.
"""

import hashlib
import json
import os

import numpy as np
import torch
from tqdm import tqdm

import vision
from common.files import Rows, claimed, named, open_or_create
from common.images import to_pixels
from config import UserError
from data import open_bin

BLOCK = 256  # frames per work unit; a kill loses at most this much
LARGEST = 65504  # of the numbers in float16


def fingerprint(tower, select_layer=-1, keep_cls=False):
    """A digest of all that decides a tower's features: weights, architecture (heads, registers and
    interpolation are in no weight), layer, CLS."""
    how = json.dumps([vision.describe_tower(tower), select_layer, keep_cls], sort_keys=True)
    return hashlib.sha256((how + vision.weights_digest(tower.state_dict())).encode()).hexdigest()


def find_path(dataset, split, model):
    """Where the features of a split's frames by `model` (a BabyLLaVA) are stored."""
    key = fingerprint(model.tower, model.select_layer, model.keep_cls)
    return dataset.features_path(split, key)


def find_shape(dataset, split, model):
    """(F, P, E) of the features of a split."""
    P = model.num_features(dataset.image_format.size)
    return dataset.count(split, "frames"), P, model.tower.width


def open_stored(dataset, split, model):
    """The stored features (F, P, E) float16 as an np.memmap, or None."""
    path = find_path(dataset, split, model)
    if not path.exists():
        return None
    return open_bin(path, "float16", find_shape(dataset, split, model), "delete it")


def store(dataset, split, model, device):
    """The features (F, P, E) float16 of a split as an np.memmap, computed if needed."""
    path, shape = find_path(dataset, split, model), find_shape(dataset, split, model)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        frames = dataset.open(split, "frames")
        row_bytes = 2 * shape[1] * shape[2]
        compute(model, frames, dataset.image_format, device, path, row_bytes)
    return open_bin(path, "float16", shape, "delete it")


@torch.no_grad()
def extract(model, frames, image_format, device, batch=64):
    """Yield the features of frames (F, S, S, 3) uint8, in order, as float16 arrays (n, P, E).
    Raises UserError for features that float16 does not hold."""
    for start in range(0, len(frames), batch):
        pixels = to_pixels(frames[start : start + batch], image_format, device)
        features = model.encode_images(pixels).float()
        largest = float(features.abs().max())
        if not largest <= LARGEST:
            kind, layer = vision.describe_tower(model.tower)["kind"], model.select_layer
            what = f"reach {largest:.3g}" if largest > LARGEST else "are not finite numbers"
            raise UserError(
                f"the features of this {kind} at select_layer {layer} {what}, and are stored in "
                f"float16, up to {LARGEST:,}: give --features live, or another --select_layer"
            )
        yield features.cpu().numpy().astype(np.float16)


def compute(model, frames, image_format, device, path, row_bytes):
    """Write the features of frames to a file, a block of frames at a time.

    All processes that want this file share the work: those of one run, of several runs, and of a
    run that continues after a kill. The file .done has a byte for each block: 1 if the block is
    written, and locked while a process computes it. Such a lock ends with its process, so nobody
    waits longer than a block takes, and nobody waits in a collective, which would time out."""
    partial, done = path.with_suffix(".partial"), path.with_suffix(".done")
    rows_of = Rows(frames)  # not through the map, whose pages would all count as this process's
    starts, is_first = range(0, len(frames), BLOCK), int(os.environ.get("RANK", 0)) == 0
    bar = tqdm(total=len(starts), desc="features", unit="block", disable=not is_first)
    with named(partial), open_or_create(done) as flags, bar:
        flags.truncate(len(starts) + 1)  # the lock of the last byte is for renaming
        with open_or_create(partial) as rows:
            rows.truncate(len(frames) * row_bytes)
            for wait in (False, True):  # first the blocks of nobody, then those not done yet
                for number, start in enumerate(starts):
                    if path.exists() or read_flags(flags)[number]:
                        continue
                    with claimed(flags, number, wait) as is_mine:
                        if is_mine and not read_flags(flags)[number]:
                            numbers = np.arange(start, min(start + BLOCK, len(frames)))
                            features = extract(model, rows_of[numbers], image_format, device)
                            write_block(rows, start * row_bytes, features)
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
    """The bytes of .done, 1 for each block that is written."""
    flags.seek(0)
    return flags.read()


def write_block(rows, first_byte, arrays):
    """Write arrays one after the other into an open file, and to the disk."""
    rows.seek(first_byte)
    for array in arrays:
        content = memoryview(array.tobytes())
        while content:  # a write may take less than it is given
            content = content[rows.write(content) :]
    os.fsync(rows.fileno())
