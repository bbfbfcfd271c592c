"""
Matrix products on a CPU that is not Intel's: by oneDNN instead of MKL.

PyTorch multiplies fp32 matrices on a CPU with Intel's MKL, which is slow on other makers' CPUs; the
oneDNN that PyTorch also contains is not. The plain form is F.linear, which runs everywhere else: on
Intel's CPUs (where oneDNN is the slower one), on a GPU, under torch.compile or autocast, in other
dtypes. What it buys: docs/speed.md.
"""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def is_intel():
    """Whether this machine has an Intel CPU."""
    info = Path("/proc/cpuinfo")
    maker = info.read_text(errors="replace") if info.exists() else platform.processor()
    return "GenuineIntel" in maker


NEW = hasattr(torch.library, "custom_op")  # PyTorch 2.4 or later, where this was measured
ONEDNN = NEW and torch.backends.mkldnn.is_available() and not is_intel()


def uses_onednn(x):
    """Whether the products of x are computed by oneDNN: the one switch of this file."""
    plain = ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
    return plain and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


def product(x, weight, bias=None):
    """x (..., N) @ weight (M, N).T + bias, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """product() with its gradients. It has no second derivatives: asking for them raises."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = product(dy, weight.T) if wants_x else None
        dweight = rows.T @ x.reshape(-1, x.shape[-1]) if wants_weight else None
        dbias = rows.sum(0) if wants_bias else None
        return dx, dweight, dbias


def linear(x, weight, bias=None):
    """x (..., N) -> (..., M), as F.linear."""
    if not uses_onednn(x):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return Product.apply(x, weight, bias)
    return product(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)
