"""Tiles: the geometry, against counted sets and a slow reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import tiles
from common.images import ImageFormat, to_picture

PUBLISHED = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]


@pytest.mark.parametrize(
    "canvas, tokens", [((672, 672), 2928), ((1008, 336), 2328), ((336, 1008), 2376)]
)
def test_the_published_numbers_of_tokens(canvas, tokens):
    """Of pictures that fill their canvas, at 336 pixels in patches of 14."""
    columns, rows = canvas[0] // 336, canvas[1] // 336
    assert tiles.count_tokens([[rows, columns, *canvas]], 24).tolist() == [tokens]


@pytest.mark.parametrize(
    "size, canvas",
    [
        ((336, 336), (336, 672)),  # all keep everything: the first of those that waste least
        ((1000, 1000), (672, 672)),
        ((1600, 400), (1008, 336)),
        ((300, 2000), (336, 1008)),
        ((672, 400), (672, 672)),
        ((672, 336), (672, 336)),
    ],
)
def test_the_canvas_that_keeps_most_and_wastes_least(size, canvas):
    assert tiles.choose_canvas(*size, PUBLISHED) == canvas


def test_tiles_are_the_picture_in_the_middle_of_black():
    wide = Image.new("RGB", (40, 10), "red")
    pieces = [np.array(tile) for tile in tiles.cut(wide, (40, 20), 20, Image.Resampling.BILINEAR)]
    assert len(pieces) == 2
    for piece in pieces:
        assert (piece[5:15] == (255, 0, 0)).all() and not piece[:5].any() and not piece[15:].any()


def slow(features, newline, rows, columns, width, height, side, max_tiles):
    """LLaVA's own way: one map put together, cut, shrunk, closed with newlines."""
    C = features.shape[-1]
    whole, cut = features[0], features[1:]
    if not rows:
        return torch.cat([whole, newline[None]])
    grid = cut.view(rows, columns, side, side, C).permute(4, 0, 2, 1, 3)
    grid = grid.reshape(C, rows * side, columns * side)
    h, w = grid.shape[1:]
    if width / height > w / h:
        new = int(round(height * (w / width), 7))
        grid = grid[:, (h - new) // 2 : h - (h - new) // 2]
    else:
        new = int(round(width * (h / height), 7))
        grid = grid[:, :, (w - new) // 2 : w - (w - new) // 2]
    h, w = grid.shape[1:]
    ratio = (h * w / (max_tiles * side * side)) ** 0.5 if max_tiles else 0
    if ratio > 1.1:
        grid = F.interpolate(grid[None], [int(h // ratio), int(w // ratio)], mode="bilinear")[0]
    ends = newline[:, None, None].expand(C, grid.shape[1], 1)
    return torch.cat([whole, torch.cat([grid, ends], 2).flatten(1).T])


@pytest.mark.parametrize("max_tiles", [0, 1, 9])
def test_an_arrangement_is_the_map_put_together(max_tiles):
    rng, side = np.random.RandomState(0), 3
    for _ in range(60):
        rows, columns = rng.randint(0, 5, 2)
        rows, columns = (rows, columns) if rows * columns else (0, 0)
        width, height = rng.randint(10, 400, 2).tolist()
        features, newline = torch.randn(1 + rows * columns, side * side, 4), torch.randn(4)
        expected = slow(features, newline, rows, columns, width, height, side, max_tiles)
        arranged = tiles.arrange(rows, columns, width, height, side, max_tiles=max_tiles)
        index, weight = map(torch.tensor, arranged)
        table = torch.cat([features.flatten(0, 1), newline[None]])
        found = (table[index] * weight[..., None]).sum(1)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5
        assert tiles.count_tokens([[rows, columns, width, height]], side, max_tiles) == len(found)


def test_several_arrangements_as_one():
    one = tiles.arrange(2, 2, 10, 10, 2, max_tiles=1)  # of four outputs each
    two = tiles.arrange(0, 0, 10, 10, 2, first=5)  # of one
    index, weight = tiles.join([one, two])
    assert index.shape == weight.shape == (len(one[0]) + len(two[0]), 4)
    assert (weight[len(one[0]) :, 1:] == 0).all() and index[len(one[0]), 0] == 5 * 4


def test_a_picture_in_tiles_has_the_whole_first():
    wide = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 90, 3), np.uint8))
    form = ImageFormat(32, canvases=((64, 32), (32, 64), (64, 64)))
    picture = to_picture(wide, form)
    assert picture.grid == (1, 2, 90, 40) and picture.frames.shape == (3, 32, 32, 3)
    assert (picture.frames[0] == to_picture(wide, ImageFormat(32)).frames[0]).all()
    assert ImageFormat.parse({**form.__dict__, "canvases": [[64, 32], [32, 64], [64, 64]]}) == form
