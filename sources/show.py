"""
A prepared sample as a person sees it.

    python data.py show data/toy 17                              # its text, with the loss mask
    python data.py show data/toy 17 18 --split val --out a.png   # two samples, and their pictures
    python data.py show data/toy 17 --clips --out pair.png       # frame 17 and its partner for DINO
    python data.py show data/toy 17 --checkpoint out/toy/phase2.pt

Tokens stand apart between bars. Those in the loss are green, or in [brackets] where there is no
colour; each <image> is followed by its number of image tokens. That number depends on the model:
on --checkpoint, else on a tower with patches of --patch pixels.
"""

import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

import checkpoint
import config
from batches import ClipBatches, Plan
from common.files import writing
from common.tiles import count_tokens
from config import UserError, option
from data import Data
from model import BabyLLaVA, IdentityProjector
from vision import ViT


@dataclass
class Config(config.Options):
    split: str = "train"  # train, val, chat_train or chat_val
    clips: bool = False  # the numbers are frames: show each with another frame of its clip
    out: str = ""  # a PNG for the pictures
    checkpoint: str = ""  # count image tokens of this model
    patch: int = option(8, low=1, high=1024)  # without one: side of a patch in pixels


def split_arguments(argv):
    """(folder, numbers, flags) of the command line. Raises UserError."""
    count = 0
    while count < len(argv) and not argv[count].startswith("--"):
        count += 1
    folder, *numbers = argv[:count] or [""]
    if not folder or not numbers or not all(number.isdigit() for number in numbers):
        raise UserError("want: python data.py show FOLDER NUMBER ..., as data/toy 17")
    return folder, [int(number) for number in numbers], argv[count:]


def count_image_tokens(settings, dataset, images):
    """The number of image tokens of each image, rows (k, 5) of the bin."""
    size = dataset.image_format.size
    if settings.checkpoint:
        model = checkpoint.load(settings.checkpoint).model
        if model.projector is None:
            raise UserError(f"{settings.checkpoint} has no projector: give phase 1 or later")
    else:
        with torch.device("meta"):
            tower = ViT(max(size, settings.patch), settings.patch, 8, 1, 1)
        model = BabyLLaVA(None, IdentityProjector("identity", 8, 8), tower)
    P = model.image_tokens(size)
    if dataset.image_format.canvases:
        side = int(P**0.5)
        return count_tokens(images[:, 1:], side, dataset.image_format.max_tiles).tolist()
    return [P] * len(images)


def has_colour():
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def draw_text(dataset, tokens, in_loss, image_tokens):
    """The tokens of a sample as a line of text, see the top of this file."""
    tokenizer, counts, parts = dataset.tokenizer, iter(image_tokens), []
    names = {i: name for name, i in tokenizer.specials.items()}
    for token, flag in zip(tokens.tolist(), in_loss.tolist()):
        piece = names.get(token) or tokenizer.decode([token])
        if token == tokenizer.image:
            piece = f"<image> x {next(counts)}"
        if flag:
            piece = f"\033[32m{piece}\033[0m" if has_colour() else f"[{piece}]"
        parts.append(piece)
    return "|".join(parts)


def show_sample(settings, dataset, number):
    """Print a sample and return its frames (n, S, S, 3), [] without pictures."""
    split, rows = settings.split, dataset.count(settings.split, "samples")
    if number >= rows:
        raise UserError(f"{dataset.directory}: {split} has {rows:,} samples, from 0; no {number}")
    first, length, first_image, n_images = dataset.open(split, "samples")[number].tolist()
    tokens = dataset.open(split, "tokens")[first : first + length]
    in_loss = dataset.open(split, "loss_mask")[first : first + length]
    frames, image_tokens = [], []
    if n_images:
        ids = dataset.open(split, "image_ids")[first_image : first_image + n_images]
        images = dataset.open(split, "images")[ids].astype(np.int64)
        image_tokens = count_image_tokens(settings, dataset, images)
        for start, tile_rows, tile_columns, _, _ in images.tolist():
            end = start + 1 + tile_rows * tile_columns
            frames += list(dataset.open(split, "frames")[start:end])
    placeholders = sum(image_tokens)
    print(
        f"{split} {number}: {length} tokens, {int(in_loss.sum())} in the loss; {n_images} images, "
        f"{placeholders} image tokens; {length - n_images + placeholders} positions"
    )
    print("  " + draw_text(dataset, tokens, in_loss, image_tokens))
    return frames


def show_pair(settings, dataset, number):
    """Print which frames DINO sees together and return the two."""
    batches = ClipBatches(dataset, settings.split, 1, seed=1)
    if number >= batches.rows:
        raise UserError(f"{dataset.directory}: {batches.rows:,} frames, from 0; no {number}")
    clip = batches.clips[number]
    members = np.flatnonzero(batches.clips == clip).tolist()
    pair = batches.read(Plan(np.array([number])))
    print(f"{settings.split} frame {number}: clip {clip}, which has the frames {members}")
    return [pair.frames[0], pair.others[0]]


def draw_rows(rows):
    """A PIL image of rows of frames, at least 128 pixels a frame."""
    side = max(128, len(rows[0][0]))
    page = Image.new("RGB", ((side + 4) * max(map(len, rows)), (side + 4) * len(rows)), "white")
    for y, frames in enumerate(rows):
        for x, frame in enumerate(frames):
            page.paste(
                Image.fromarray(frame).resize((side, side)), (x * (side + 4), y * (side + 4))
            )
    return page


def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        config.load(Config, ["--help"], __doc__)
    folder, numbers, flags = split_arguments(argv)
    settings = config.load(Config, flags, __doc__)
    dataset = Data(folder)
    if settings.split not in dataset.meta["splits"]:
        raise UserError(f"--split {settings.split}: one of {', '.join(dataset.meta['splits'])}")
    show = show_pair if settings.clips else show_sample
    rows = [show(settings, dataset, number) for number in numbers]
    rows = [row for row in rows if row]
    if settings.out and not rows:
        raise UserError(f"--out {settings.out}: these samples have no pictures")
    if settings.out:
        try:
            with writing(settings.out) as file:
                draw_rows(rows).save(file, "PNG")
        except ValueError as error:
            raise UserError(f"--out {settings.out}: {error}") from None
        print(f"written: {settings.out}")
