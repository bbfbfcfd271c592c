"""
A model that was trained, at work: what it sees in pictures, and what it says of them.
Letters: N images, S side, P image tokens an image, E vision width, C model width.
"""

from dataclasses import replace

import numpy as np
import torch

from config import UserError
from images import read_picture, to_pixels
from tiles import arrange


@torch.no_grad()
def encode_frames(loaded, frames, batch=64):
    """Features (N, P, E) of frames (N, S, S, 3) uint8. (In training they are stored in fp16.)"""
    features = []
    for start in range(0, len(frames), batch):
        pixels = to_pixels(frames[start : start + batch], loaded.image_format, loaded.device)
        features.append(loaded.model.encode_images(pixels.to(loaded.dtype)))
    return torch.cat(features)


@torch.no_grad()
def see(loaded, pictures):
    """What stands for each of some images.Pictures in the text: a list of (tokens, C)."""
    model, embeds = loaded.model, []
    if model.projector is None:
        raise UserError("this checkpoint cannot see: give one of phase 1 or later, or no --image")
    features = encode_frames(loaded, np.concatenate([picture.frames for picture in pictures]))
    first = 0
    for picture in pictures:
        own = features[first : first + len(picture.frames)]
        first += len(picture.frames)
        arrangement = None
        if model.tiled:
            side = int(own.shape[1] ** 0.5)
            arranged = arrange(*picture.grid, side, max_tiles=loaded.image_format.max_tiles)
            arrangement = [torch.tensor(part, device=loaded.device) for part in arranged]
        embeds.append(model.project(own, arrangement))
    return embeds


def read(loaded, paths):
    """The Pictures of some files. OneVision shows several without their tiles."""
    image_format = loaded.image_format
    if len(paths) > 1 and image_format.max_tiles:
        image_format = replace(image_format, fit="pad", canvases=())
    return [read_picture(path, image_format) for path in paths]


def caption(loaded, embeds, max_new_tokens=50, batch=100):
    """Greedy captions of pictures, given as see() gives them, one string each."""
    captions = [None] * len(embeds)
    for count in sorted({len(embed) for embed in embeds}):  # of alike length together
        alike = [i for i, embed in enumerate(embeds) if len(embed) == count]
        for start in range(0, len(alike), batch):
            rows = alike[start : start + batch]
            shown = torch.cat([embeds[i] for i in rows]).to(loaded.device)
            tokens = torch.full((len(rows), count), loaded.tokenizer.image, device=loaded.device)
            stop = (loaded.tokenizer.eos,)
            said = list(loaded.model.generate(tokens, shown, max_new_tokens, stop=stop))
            for i, row in zip(rows, torch.stack(said, 1).tolist()):  # (n, new tokens)
                captions[i] = loaded.tokenizer.decode(row).strip()
    return captions
