"""Exercises of chapter 3: a picture in the stream of words."""

import torch
import torch.nn.functional as F
from exercise import call, check, exercise, same

from model import make_projector


@exercise("3.1", "easy")
def mix(tokens, image_token, table, image_embeds):
    """The embeddings of a sequence of words and pictures: each placeholder becomes the next image
    token (model.BabyLLaVA.embed).

    tokens: (T,) int; image_token: the id of the placeholder; table: (V, C), row i is the embedding
    of token i; image_embeds: (M, C), the image tokens for the M placeholders, in order.
    Returns (T, C)."""


@check(mix)
def check_mix(yours):
    torch.manual_seed(0)
    table = torch.randn(10, 3)
    for tokens in ([9, 9, 1, 2], [1, 9, 2, 9, 9], [1, 2], [9]):
        embeds = torch.randn(tokens.count(9), 3)
        rows, others = [], iter(embeds)
        for token in tokens:
            rows.append(next(others) if token == 9 else table[token])
        found = call(yours, torch.tensor(tokens), 9, table, embeds)
        hint = "A tensor. Placeholders may stand anywhere, and there may be none."
        same(found, torch.stack(rows), {"tokens": tokens, "image_token": 9}, hint)


@exercise("3.2", "easy")
def project(features, first, second):
    """LLaVA-1.5's projector, mlp2x_gelu: linear, GELU, linear (Liu et al. 2023, arXiv 2310.03744).

    features: (P, E); first: (weight (C, E), bias (C,)); second: (weight (C, C), bias (C,)).
    Returns (P, C). GELU is the exact one, with the error function."""


@check(project)
def check_project(yours):
    torch.manual_seed(0)
    for P, E, C in ((4, 3, 5), (1, 6, 2)):
        module = make_projector("mlp2x_gelu", E, C)
        pairs = [(m.weight.detach(), m.bias.detach()) for m in module if hasattr(m, "weight")]
        features = 3 * torch.randn(P, E)
        given = f"P = {P}, E = {E}, C = {C}, beside model.make_projector"
        hint = "Is each weight used as nn.Linear uses it? Where is GELU? Not its tanh form."
        same(call(yours, features, *pairs), module(features).detach(), given, hint)


@exercise("3.3", "medium")
def pool(projected, window):
    """Fewer tokens a picture: the mean of each window x window patches (--image_pool).

    projected: (P, C), the P = side * side patches row by row, side a multiple of window.
    Returns (P / window^2, C), row by row."""


@check(pool)
def check_pool(yours):
    torch.manual_seed(0)
    for side, window in ((4, 2), (6, 3), (3, 1), (8, 4)):
        x = torch.randn(side * side, 3)
        wanted = F.avg_pool2d(x.T.reshape(1, 3, side, side), window)[0].flatten(1).T
        hint = "A mean. Of neighbours in the picture, not in the sequence. Row by row."
        same(call(yours, x, window), wanted, {"side": side, "window": window}, hint)


@exercise("3.4", "medium")
def insert_placeholders(tokens, image_token, counts):
    """Placeholders: a text has one for each picture, and the model needs one for each image token
    (tokenizer.expand).

    tokens: list of ids, one image_token for each picture; counts: how many image tokens each
    picture has, in order. Returns the longer list of ids. Raises ValueError if the number of
    placeholders is not the number of counts."""


@check(insert_placeholders)
def check_insert_placeholders(yours):
    for tokens, counts, wanted in (
        ([9, 1, 2], [3], [9, 9, 9, 1, 2]),
        ([1, 9, 2, 9], [1, 2], [1, 9, 2, 9, 9]),
        ([1, 2], [], [1, 2]),
        ([9, 9], [2, 1], [9, 9, 9]),
    ):
        given = {"tokens": tokens, "image_token": 9, "counts": counts}
        hint = "Each placeholder has its own count. Do not expand the ones you have inserted."
        same(list(call(yours, tokens, 9, counts)), wanted, given, hint)
    for tokens, counts in (([9, 1], []), ([1], [2]), ([9, 9], [4])):
        try:
            found = yours(tokens, 9, counts)
        except ValueError:
            continue
        given = {"tokens": tokens, "counts": counts}
        same(found, "a ValueError", given, "A wrong number must raise an error.")
