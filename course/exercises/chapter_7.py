"""Exercises of chapter 7: the family."""

import numpy as np
import torch
from exercise import call, check, exercise, same

from common.tiles import choose_canvas, without_margins
from fast.products import Linear
from training.lora import LoRALinear


@exercise("7.1", "medium")
def best_canvas(width, height, canvases):
    """LLaVA-NeXT fits a picture into the best of a few canvases (common/tiles.choose_canvas). The
    picture is scaled by min(canvas width / width, canvas height / height); kept is the number of
    its pixels then, int(width * scale) * int(height * scale), but at most width * height.

    canvases: list of (width, height). Returns the canvas that keeps the most. Of canvases that
    keep equally many take the smallest (canvas width * canvas height), then the first."""


@check(best_canvas)
def check_best_canvas(yours):
    random = np.random.RandomState(0)
    canvases = [(672, 672), (336, 672), (672, 336), (1008, 336), (336, 1008)]
    sizes = [(640, 480), (100, 100), (336, 336), (2000, 300), (300, 2000), (336, 672)]
    sizes += [tuple(map(int, random.randint(20, 2000, 2))) for _ in range(40)]
    for size in sizes:
        given = {"width": size[0], "height": size[1]}
        hint = "Enlarging gives no new pixels: that is what 'at most' is for."
        same(tuple(call(yours, *size, canvases)), choose_canvas(*size, canvases), given, hint)


@exercise("7.2", "medium")
def unpad(rows, columns, width, height):
    """Which part of a canvas's map of patches a picture covers (common/tiles.without_margins). It
    lies in the middle, scaled until it touches two sides.

    rows, columns: of the map; width, height: of the picture. If width / height > columns / rows the
    margins are above and below: covered = int(round(height * (columns / width), 7)) rows, the
    margin (rows - covered) // 2 on each side. Otherwise they are left and right, in the same way.
    Returns (top, bottom, left, right): rows top to bottom - 1 and columns left to right - 1."""


@check(unpad)
def check_unpad(yours):
    random = np.random.RandomState(0)
    sizes = [(48, 48, 640, 480), (24, 48, 100, 100), (48, 24, 30, 200), (8, 8, 64, 64)]
    sizes += [(*random.choice([8, 16, 24], 2), *random.randint(90, 500, 2)) for _ in range(40)]
    for rows, columns, width, height in (map(int, size) for size in sizes):
        grid = np.arange(rows * columns).reshape(rows, columns)
        left = without_margins(grid, width, height)
        top, side = divmod(int(left[0, 0]), columns)
        wanted = (top, top + left.shape[0], side, side + left.shape[1])
        given = {"rows": rows, "columns": columns, "width": width, "height": height}
        found = tuple(map(int, call(yours, rows, columns, width, height)))
        same(
            found, wanted, given, "The margin is the same on both sides, so covered may grow by 1."
        )


@exercise("7.3", "easy")
def merge_lora(weight, A, B, alpha):
    """Merge LoRA (Hu et al. 2021, arXiv 2106.09685). In training two thin matrices stand beside W:
    y = x W^T + (alpha / rank) (x A^T) B^T. After training they become part of W.

    weight: (out, in); A: (rank, in); B: (out, rank). Returns the merged weight, (out, in)."""


@check(merge_lora)
def check_merge_lora(yours):
    torch.manual_seed(0)
    for out, width, rank, alpha in ((5, 4, 2, 16.0), (3, 6, 1, 1.0)):
        layer = LoRALinear(Linear(width, out, bias=False), rank, alpha)
        torch.nn.init.normal_(layer.lora_B)
        x = torch.randn(7, width)
        found = call(
            yours, layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach(), alpha
        )
        given = f"out = {out}, in = {width}, rank = {rank}, alpha = {alpha}; its outputs"
        same(x @ found.T, layer(x).detach(), given, "B @ A, scaled by alpha / rank.", 1e-4)


@exercise("7.4", "medium")
def conversation(turns, image_token, end):
    """Tokens and loss mask of a conversation in a simple template: questions and answers in turn,
    each answer followed by `end`; only answers and their ends are learnt.

    turns: list of (question, answer), each a list of ids; a question may hold image_token.
    Returns (tokens, loss_mask), two lists of equal length. Raises ValueError if an answer holds an
    image_token, or is empty."""


@check(conversation)
def check_conversation(yours):
    for turns, tokens, mask in (
        ([([9, 1], [2, 3])], [9, 1, 2, 3, 0], [0, 0, 1, 1, 1]),
        ([([1], [2]), ([3, 4], [5])], [1, 2, 0, 3, 4, 5, 0], [0, 1, 1, 0, 0, 1, 1]),
        ([([], [2])], [2, 0], [1, 1]),
        ([], [], []),
    ):
        found = tuple(map(list, call(yours, turns, 9, 0)))
        hint = "The end is learnt, or the model never stops; questions are not."
        same(found, (tokens, mask), {"turns": turns, "image_token": 9, "end": 0}, hint)
    for turns in ([([1], [])], [([1], [2, 9])]):
        try:
            found = yours(turns, 9, 0)
        except ValueError:
            continue
        same(found, "a ValueError", {"turns": turns}, "Refuse what cannot be learnt.")
