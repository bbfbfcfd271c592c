"""Exercises of chapter 6: kernels. Those in Triton are in chapter_6_triton.py."""

import torch
from exercise import Wrong, call, check, exercise, same

from kernels import attention_reference


@exercise("6.1", "easy")
def online_softmax(x, block):
    """The maximum and the sum of a softmax in one pass (Milakov & Gimelshein 2018, arXiv
    1805.02867): walk over x in blocks and keep m, the largest so far, and l, the sum of exp(x - m)
    so far. When m grows, l is multiplied by exp(old m - new m).

    x: (N,) float, may be as large as 1e4; block: how many numbers are read at a time; the last
    block may be shorter. Returns (m, l), scalar tensors, from which softmax is exp(x - m) / l."""


@check(online_softmax)
def check_online_softmax(yours):
    torch.manual_seed(0)
    for N, block, scale in ((8, 4, 1.0), (7, 3, 1.0), (5, 8, 1.0), (64, 16, 1e4), (1, 1, 1.0)):
        x = scale * (torch.randn(N) - 3)
        m, l = call(yours, x, block)
        given = f"N = {N}, block = {block}, a deviation of {scale:g}"
        hint = "Start m at -inf. The old sum must shrink before the new terms are added."
        same(torch.as_tensor(m), x.max(), given, hint)
        same((x.double() - m).exp() / l, x.double().softmax(0), given, hint)


@exercise("6.4", "hard")
def tiled_attention(q, k, v, block):
    """Attention without a matrix of scores (Dao et al. 2022, arXiv 2205.14135): for each query walk
    over the keys in blocks, with the m and l of exercise 6.1, and a sum of values that is
    multiplied by the same factor as l. Scores are q . k / sqrt(D). Causal: query i sees keys 0 to
    i, and a block of later keys is not read.

    q, k, v: (T, D) float; block: keys at a time. Returns (T, D)."""


@check(tiled_attention)
def check_tiled_attention(yours):
    torch.manual_seed(0)
    for T, D, block in ((5, 4, 2), (8, 8, 4), (3, 4, 8), (9, 4, 3)):
        q, k, v = 3 * torch.randn(3, T, D)
        wanted = attention_reference(*(x[None, :, None].double() for x in (q, k, v)))[0, :, 0]
        given = f"T = {T}, D = {D}, block = {block}, beside kernels.attention_reference"
        hint = "When m grows, the sum of values shrinks as l does. Divide by l once, at the end."
        same(call(yours, q, k, v, block), wanted, given, hint)
    # keys that no query may read: a nan there must not reach the result
    k, v = k.clone(), v.clone()
    k[6:], v[6:] = float("nan"), float("nan")
    found = yours(q, k, v, 3)
    if bool(found[:6].isnan().any()):
        raise Wrong("with nan in keys after query 5: they reach earlier queries", "0 * nan is nan.")
