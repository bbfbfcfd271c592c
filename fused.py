"""
A small model's operations in few passes over memory, for a CPU without a compiler: the products, by
the faster of two libraries, and what lies between them, with gradients written by hand.

There what lies between takes as long as the products, because each elementary operation reads its
inputs from memory and writes its result back, and its gradient does so again. By hand, results go
where they are wanted (`out=`, in-place), nothing is kept that can be made again, and the loss holds
the logits of some of its targets at a time. These gradients have no gradients of their own: asking
for second derivatives raises.

Each operation stands beside its formula, which runs wherever by_hand() is false: on a GPU, under
torch.compile (which fuses by itself), under autocast, in other dtypes.
Letters: B batch, T sequence length, H heads, D head width, C model width, V vocabulary, K targets.
"""

import ctypes
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

ONEDNN = torch.backends.mkldnn.is_available()
CHUNK = 1 << 22  # logits at a time: 16 MB, and as much again for their logarithms


def by_hand(x):
    """Whether operations on x are done by hand: on a CPU, in fp32, without compiler or autocast."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    return plain and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


class NoContext:
    """A stand-in for autograd's ctx where nobody will ask for gradients: it saves nothing."""

    needs_input_grad = (False, False, False)

    @staticmethod
    def save_for_backward(*tensors):
        pass

    @staticmethod
    def set_materialize_grads(value):
        pass


def apply(function, *inputs):
    """Run one of the functions below; without autograd's machinery where no gradient is wanted, for
    it takes as long as the products of a single token."""
    if torch.is_grad_enabled():
        return function.apply(*inputs)
    return function.forward(NoContext, *inputs)


def keep_memory():
    """Let the C library keep what tensors free: else the next step's are paid for again, page by
    page. glibc alone; elsewhere nothing happens, and nothing in return_memory()."""
    mallopt = c_library("mallopt")
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
    mallopt(-4, 0)  # M_MMAP_MAX: nothing lies outside of it


def return_memory():
    """Give what was kept and is free back to the system: among batches of many lengths it crumbles,
    and would grow for hours."""
    c_library("malloc_trim")(0)


def c_library(name):
    """A function of the C library, or one that does nothing."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, lambda *_: None)


# ---------------------------------------------------------------------------------------------
# Matrix products


def product(x, weight, bias=None):
    """x (..., N) @ weight (M, N).T by oneDNN, whose products of few rows or wide results are up to
    three times as fast as MKL's, which PyTorch takes."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
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
        dweight = dbias = None
        if wants_weight:  # MKL is faster at this one
            dweight = rows.T @ x.reshape(-1, x.shape[-1])
        if wants_bias:
            dbias = rows.sum(0)
        return dx, dweight, dbias


def linear(x, weight, bias=None):
    """x (..., N) -> (..., M), as F.linear."""
    if by_hand(x) and ONEDNN:
        return apply(Product, x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


# ---------------------------------------------------------------------------------------------
# Rotary positions (Su et al. 2021, arXiv 2104.09864), halves paired as in Llama


def rotary_frequencies(config):
    """The angle by which each pair of a head turns from one position to the next, (D / 2,).

    rope_scaling: (factor,) makes positions denser; (factor, low, high, length) is Llama 3.1's: of
    the context it was trained on first, `length` tokens, what turns less than `low` times is slowed
    by the factor, what turns more than `high` times is left, and between them a blend."""
    exponents = torch.arange(0, config.head_width, 2).float() / config.head_width
    frequencies = config.rope_theta**-exponents
    if len(config.rope_scaling) == 1:
        return frequencies / config.rope_scaling[0]
    if config.rope_scaling:
        factor, low, high, length = config.rope_scaling
        turns = length * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / factor
    return frequencies


def rotate(x, cos, sin):
    """Turn each pair of x (B, T, H, D) by its position's angle; cos, sin (T, 1, D / 2)."""
    wide = x if x.dtype == torch.float64 else x.float()
    a, b = wide.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rotate_into(y, x, cos, sin):
    """The same, written to y; with -sin it is its own gradient."""
    (a, b), (c, d) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    torch.mul(a, cos, out=c).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=d).addcmul_(a, sin)


class SplitRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads, cos, sin, kv_heads):
        ctx.save_for_backward(cos, sin)
        qk = heads.shape[2] - kv_heads
        turned = torch.empty_like(heads)
        rotate_into(turned[:, :, :qk], heads[:, :, :qk], cos, sin)
        turned[:, :, qk:].copy_(heads[:, :, qk:])  # as a view it would keep all of heads
        return turned.split([qk - kv_heads, kv_heads, kv_heads], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        cos, sin = ctx.saved_tensors
        sizes = [dq.shape[2], dk.shape[2], dv.shape[2]]
        dheads = dq.new_empty(*dq.shape[:2], sum(sizes), dq.shape[3])
        to_q, to_k, to_v = dheads.split(sizes, dim=2)
        rotate_into(to_q, dq, cos, -sin)
        rotate_into(to_k, dk, cos, -sin)
        to_v.copy_(dv)
        return dheads, None, None, None


def split_rotated(heads, cos, sin, kv_heads):
    """heads (B, T, H + 2 H_kv, D), what attention's projection made -> q (B, T, H, D) and k
    (B, T, H_kv, D), both rotated, and v (B, T, H_kv, D)."""
    if by_hand(heads):
        return apply(SplitRotated, heads, cos, sin, kv_heads)
    qk, v = heads.split([heads.shape[2] - kv_heads, kv_heads], dim=2)
    return *rotate(qk, cos, sin).split([qk.shape[2] - kv_heads, kv_heads], dim=2), v


# ---------------------------------------------------------------------------------------------
# SwiGLU (Shazeer 2020, arXiv 2002.05202)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d = torch.empty_like(gate_up)
        dgate, dup = d.chunk(2, dim=-1)
        torch.mul(dy, up, out=dgate)  # of silu(gate); next, in its own place, of gate
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        torch.mul(F.silu(gate), dy, out=dup)
        return d


def swiglu(gate_up):
    """silu(gate) * up of the halves of gate_up (..., 2 N) -> (..., N)."""
    if by_hand(gate_up):
        return apply(SwiGLU, gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# ---------------------------------------------------------------------------------------------
# RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        ctx.set_materialize_grads(False)  # whoever ignores the sum adds no zeros to its gradient
        total = x if residual is None else x + residual
        norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
        scale = (norm.square_() / total.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(total, weight, scale)
        y = (total * scale).mul_(weight)
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal=None):
        total, weight, scale = ctx.saved_tensors
        C, dweight = total.shape[-1], None
        if dy is None:  # the sum alone was used
            return dtotal, dtotal if ctx.needs_input_grad[1] else None, None, None
        along = (dy * total).reshape(-1, C)
        if ctx.needs_input_grad[2]:
            dweight = scale.reshape(1, -1).mm(along)[0]
        # dx = scale g - total scale^3 mean(g total), with g = dy weight
        inner = (along @ weight).view_as(scale)  # C times that mean
        dx = torch.mul(dy, weight, out=along.view_as(dy))  # what lay along is done with
        dx.mul_(scale).addcmul_(total, inner.mul_(scale.pow(3)).div_(-C))
        if dtotal is not None:
            dx.add_(dtotal)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None


def add_norm(x, residual, weight, eps):
    """RMSNorm of x (..., C); with a residual the pair (norm(x + residual), x + residual)."""
    if by_hand(x):
        return apply(AddNorm, x, residual, weight, eps)
    total = x if residual is None else x + residual
    y = F.rms_norm(total, weight.shape, weight.to(total.dtype), eps)
    return y if residual is None else (y, total)


# ---------------------------------------------------------------------------------------------
# The loss


class HeadLoss(torch.autograd.Function):
    """The gradients of a loss are as easily had as the loss itself, so they are made with it, a
    chunk of logits at a time, which is then overwritten."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight) if wants_weight else None
        counts = targets != -100
        share = counts / counts.sum().clamp(min=1)  # of each target in the mean
        loss, size = hidden.new_zeros(()), max(1, CHUNK // len(weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            wanted = targets[rows].where(counts[rows], 0)[:, None]
            logits = linear(hidden[rows], weight)
            torch.log_softmax(logits, -1, out=logits)
            loss -= share[rows] @ logits.gather(1, wanted)[:, 0]
            if not (wants_hidden or wants_weight):
                continue
            dlogits = logits.exp_()  # the softmax; less 1 at the target
            dlogits.scatter_add_(1, wanted, dlogits.new_full(wanted.shape, -1.0))
            dlogits.mul_(share[rows, None])
            if wants_hidden:
                dhidden[rows] = linear(dlogits, weight.T)
            if wants_weight:
                dweight.addmm_(dlogits.T, hidden[rows])
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return *(None if d is None else d * dloss for d in ctx.saved_tensors), None


def head_loss(hidden, weight, targets):
    """The mean cross-entropy of hidden (K, C) @ weight (V, C).T with targets (K,), over those that
    are not -100; 0 where all are."""
    if by_hand(hidden):
        return apply(HeadLoss, hidden, weight, targets)
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)
