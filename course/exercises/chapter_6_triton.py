"""Exercises of chapter 6: kernels in Triton, run by its interpreter on a CPU."""

import torch
import triton
import triton.language as tl
from exercise import check, exercise, same

from kernels import rms_norm_reference


def roomy(x, block):
    """(a view of a copy of x, what lies behind it): room for kernels that read or write too far,
    which would otherwise end the process."""
    memory = torch.full((2 * len(x) * block + x.numel(),), 7.0)
    memory[: x.numel()] = x.flatten()
    return memory[: x.numel()].view(x.shape), memory[x.numel() :]


@exercise("6.2", "medium")
@triton.jit
def softmax_kernel(X, Y, columns, BLOCK: tl.constexpr):
    """Softmax of each row in Triton; program i reads row i of X and writes row i of Y.

    X, Y: pointers to (rows, columns) float32, rows one after the other; BLOCK: a power of two, at
    least columns. Reads past the end of a row must be masked, and count as -inf; writes must be
    masked too."""


@check(softmax_kernel)
def check_softmax_kernel(yours):
    torch.manual_seed(0)
    for rows, columns, block, shift in ((3, 8, 8, 0), (2, 5, 8, -9), (4, 17, 32, 200)):
        x, _ = roomy(torch.randn(rows, columns) + shift, block)
        y, behind = roomy(torch.zeros(rows, columns), block)
        yours[(rows,)](x, y, columns, BLOCK=block)
        given = f"{rows} rows of {columns} numbers near {shift}, BLOCK = {block}"
        hint = "Where does row i begin? What is a masked read? Is the largest number taken off?"
        same(y, x.double().softmax(-1), given, hint)
        same(behind, torch.full_like(behind, 7.0), given + ", past the last row", "Mask the store.")


@exercise("6.3", "medium")
@triton.jit
def rms_norm_kernel(X, W, Y, columns, eps, BLOCK: tl.constexpr):
    """RMSNorm of each row in Triton (kernels.norm_forward): y = x / sqrt(mean of x^2 + eps) * w.

    X, Y: pointers to (rows, columns) float32; W: to (columns,); program i computes row i; BLOCK: a
    power of two, at least columns."""


@check(rms_norm_kernel)
def check_rms_norm_kernel(yours):
    torch.manual_seed(0)
    for rows, columns, block in ((3, 8, 8), (2, 5, 16), (4, 24, 32)):
        x, _ = roomy(torch.randn(rows, columns), block)
        w, _ = roomy(torch.randn(1, columns), block)
        y, behind = roomy(torch.zeros(rows, columns), block)
        yours[(rows,)](x, w, y, columns, 0.1, BLOCK=block)
        given = f"{rows} rows of {columns}, BLOCK = {block}, eps = 0.1"
        hint = "The mean is over columns, not over BLOCK; masked reads count as 0."
        same(y, rms_norm_reference(x.double(), w[0].double(), 0.1), given, hint)
        same(behind, torch.full_like(behind, 7.0), given + ", past the last row", "Mask the store.")
