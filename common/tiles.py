"""
Tiles: a large picture as a small whole and full-resolution pieces (LLaVA-NeXT's "anyres").

The picture is fitted into the best of a few canvases, each a rectangle of tiles. The tower encodes
the whole picture, squashed, and each tile. The features of the tiles are joined to one map, its
empty margins are cut off, and a learnt newline vector is appended to each row:

    +-------+      +---+---+      w w        the whole's P tokens first,
    |       |  ->  | a | b |  ->  a a b b n  then the map's rows, n the newline
    +-------+      +---+---+      a a b b n

All of this is geometry: an arrangement says which feature each image token is. Sizes in pixels are
(width, height). Letters: S side of a tile in pixels; `side` of a tile in patches, P = side * side.
"""

from math import ceil, sqrt

import numpy as np
from PIL import Image

NEWLINE = -1  # in an arrangement: the newline vector instead of a feature


# ---------------------------------------------------------------------------------------------
# Cutting


def choose_canvas(width, height, canvases):
    """The canvas (width, height) that keeps the most of a picture's pixels; among equals the one
    with the least empty area, then the first."""
    best, best_score = None, None
    for canvas in canvases:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        score = (kept, kept - canvas[0] * canvas[1])
        if best is None or score > best_score:
            best, best_score = canvas, score
    return best


def fitted(width, height, canvas):
    """The size of a picture scaled to fit a canvas, its aspect ratio kept."""
    by_width, by_height = canvas[0] / width, canvas[1] / height
    if by_width < by_height:
        return canvas[0], min(ceil(height * by_width), canvas[1])
    return min(ceil(width * by_height), canvas[0]), canvas[1]


def cut(image, canvas, size, resample):
    """The tiles of a PIL image on a canvas, size x size pixels each, row by row."""
    resized = image.resize(fitted(*image.size, canvas), resample)
    page = Image.new("RGB", canvas)  # black around it
    page.paste(resized, [(c - n) // 2 for c, n in zip(canvas, resized.size)])
    corners = [(x, y) for y in range(0, canvas[1], size) for x in range(0, canvas[0], size)]
    return [page.crop((x, y, x + size, y + size)) for x, y in corners]


# ---------------------------------------------------------------------------------------------
# Putting together


def without_margins(grid, width, height):
    """The part of a canvas's map (rows, columns) that a picture of this size covers."""
    rows, columns = grid.shape
    if width / height > columns / rows:
        covered = int(round(height * (columns / width), 7))
        margin = (rows - covered) // 2
        return grid[margin : rows - margin]
    covered = int(round(width * (rows / height), 7))
    margin = (columns - covered) // 2
    return grid[:, margin : columns - margin]


def between(old, new):
    """Linear interpolation of `old` points at `new` points: (index before, index after, weight of
    the one after)."""
    position = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0)
    before = position.astype(np.int64)
    return before, np.minimum(before + 1, old - 1), position - before


def shrink(grid, rows, columns):
    """A map (h, w) of indices at fewer points: index (rows, columns, 4) and weight of each."""
    top, bottom, down = between(grid.shape[0], rows)
    left, right, across = between(grid.shape[1], columns)
    index = [grid[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)]
    weight = [np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)]
    return np.stack(index, -1), np.stack(weight, -1)


def arrange(rows, columns, width, height, side, first=0, max_tiles=0):
    """(index (tokens, k), weight (tokens, k)) of one image: each token is the weighted sum of k
    features, or NEWLINE.

    rows, columns: of tiles, 0 without tiles; width, height: of the picture; first: the number of
    its first frame among those that the tower encodes, P features each. k is 1, or 4 if a map of
    more than `max_tiles` tiles is interpolated down to so many (LLaVA-OneVision's anyres_max_9)."""
    P = side * side
    whole = first * P + np.arange(P)
    if not rows:
        index = np.append(whole, NEWLINE)[:, None]
        return index, np.ones(index.shape, np.float32)
    y, x = np.mgrid[: rows * side, : columns * side]
    tile = first + 1 + y // side * columns + x // side
    grid = without_margins(tile * P + y % side * side + x % side, width, height)
    k, weight, ratio = 1, np.ones((*grid.shape, 1)), 0.0
    if max_tiles:
        ratio = sqrt(grid.size / (max_tiles * P))
    if ratio > 1.1:
        grid, weight = shrink(grid, int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))
        k = 4
    grid = grid.reshape(*weight.shape)
    newline = np.full((len(grid), 1, k), NEWLINE)
    only_first = np.broadcast_to(np.eye(1, k), newline.shape)
    grid, weight = np.hstack([grid, newline]), np.hstack([weight, only_first])
    whole = np.repeat(whole[:, None], k, 1)
    index = np.concatenate([whole, grid.reshape(-1, k)])
    weight = np.concatenate([np.repeat(np.eye(1, k), P, 0), weight.reshape(-1, k)])
    return index, weight.astype(np.float32)


def join(arrangements):
    """The arrangements of several images as one; k is the largest of them."""
    k = max(index.shape[1] for index, _ in arrangements)
    parts = [[np.pad(part, ((0, 0), (0, k - part.shape[1]))) for part in a] for a in arrangements]
    return tuple(np.concatenate(part) for part in zip(*parts))


def count_tokens(images, side, max_tiles=0):
    """The number of tokens of each image; images (K, 4): rows, columns, width, height."""
    kinds, which = np.unique(np.asarray(images, np.int64), axis=0, return_inverse=True)
    counts = [len(arrange(*kind, side, max_tiles=max_tiles)[0]) for kind in kinds.tolist()]
    return np.array(counts, np.int64)[which.reshape(-1)]
