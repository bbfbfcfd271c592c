"""
The two operations a transformer spends itself on, RMSNorm and attention, each in three forms: the
formula, PyTorch's own fused operation, and Triton kernels with their gradients by hand.

    rms_norm     y_i = x_i / sqrt(mean(x^2) + eps) * weight_i       over the last axis
    attention    y_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j     over the keys j that i may see

Query i sees key j where j <= i (causal: no word sees a later one) or j < prefix (an image, say,
that every position may see whole). During cached generation there are fewer queries than keys;
queries are then the last ones, and i counts from the first key. Layout is (B, T, H, D), as views
of the fused projection come, so nothing is copied. k and v may have fewer heads than q (grouped
queries): head h of q reads head h * H_kv // H of k and v.

Why kernels? A GPU multiplies hundreds of numbers in the time it takes to fetch one from memory. A
kernel fetches a tile of numbers once, does all there is to do with it, and writes the result once.
Triton runs one function as a grid of programs: each asks for its number (tl.program_id), loads
tiles, computes on whole tiles in fp32 and stores them. A tensor arrives as the pointer to its
first number; a pointer plus a tile of offsets is a tile of pointers, which tl.load and tl.store
take, with a mask at the edges. Programs run in any order and share nothing. What is marked
tl.constexpr is known when the kernel is compiled; tl.static_range is a loop written out then.

RMSNorm, forward: a program takes a few rows, adds the residual, and keeps one number a row,
r = 1 / sqrt(mean(x^2) + eps). Backward, with h = x r and g = dy weight, both made again:

    dx = r (g - h mean(g h)) + dsum       dsum: what the residual stream itself hands back
    dweight = sum over rows of dy h       each program sums some rows, then those sums are summed

Attention, forward: FlashAttention-2 (Dao 2023, arXiv 2307.08691). The (T, T) scores s never reach
memory. A program holds a tile of queries and walks over tiles of keys with a softmax that is right
so far: the largest score m, and the sums of 2^(s - m) and 2^(s - m) v. A larger maximum m' shrinks
the old sums by 2^(m - m'). Scores are in base 2 (a GPU's own), and all that is kept for later is
L = m + log2(sum of 2^(s - m)). Backward, with P = 2^(s - L), the softmax itself:

    dV = P' dO    dP = dO V'    dS = P (dP - delta)    dQ = dS K / sqrt(D)    dK = dS' Q / sqrt(D)
    delta_i = sum_j P_ij dP_ij = O_i . dO_i, which needs no walk

One kernel walks over keys for dQ (and leaves delta), one over queries for dK and dV. No two
programs add to one number, so their gradients are the same bits each time. Each walk has two
stretches: tiles that are visible whole ("#"), where no mask is computed, and masked ones ("/"):

    keys      0 . . . . . .              0 . . . . . .  with a prefix
    queries   / . . . . . .              # # / . . . .
              # / . . . . .              # # / . . . .
              # # / . . . .              # # / . . . .
              # # # / . . .              # # # / . . .

`backend` is "triton"; PyTorch's own, "sdpa" (attention) or "torch" (the norm); "reference", the
formulae in fp32; or None or "auto": triton in bf16 and fp16 on a GPU that has it, else PyTorch's.
Letters: B batch, T sequence length, H heads, D head width, C model width.
"""
from __future__ import annotations  # where there is no Triton, `tl` below is never looked up

import math
import os
from contextlib import suppress

import torch
import torch.nn.functional as F

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own slow one: how the tests run
# The kernels are operators of PyTorch, so that torch.compile and autograd know them
CAN_REGISTER = hasattr(torch.library, "custom_op")  # from PyTorch 2.4 on
triton = None
# Its import takes 0.3 s and 75 MB, so it is left out where no kernel will run. Who wants to compile
# them without a GPU sets TRITON_INTERPRET=0.
if CAN_REGISTER and ("TRITON_INTERPRET" in os.environ or torch.cuda.is_available()):
    with suppress(ImportError):  # there is none for macOS and Windows
        import triton
        import triton.language as tl
jit = triton.jit if triton else lambda kernel: kernel

# A process may open two exported models, each with a copy of this file. Operators of the same name
# would replace those of the first copy, so each copy has a namespace of its own.
SPACE = "nanobabyllava"
while hasattr(getattr(torch.ops, SPACE), "norm_forward"):
    SPACE += "_"


def register(name):
    """torch.library.custom_op; in an older PyTorch a stand-in, with which this file is imported
    and its kernels are never called."""
    if CAN_REGISTER:
        return torch.library.custom_op(f"{SPACE}::{name}", mutates_args=())
    return NotRegistered


class NotRegistered:
    def __init__(self, function):
        pass

    def register_fake(self, function):
        return function

    def register_autograd(self, function, setup_context):
        pass


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMITS = {"sdpa": 128, "torch": 8192}  # the widest that Triton takes in the place of each


def lacking(device):
    """Why Triton kernels cannot run on a device, "cuda:1" say, or "" where they can."""
    if INTERPRET and triton:
        return ""
    if torch.device(device).type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return f"it needs an NVIDIA GPU, and this is to run on {torch.device(device).type}"
    if triton is None:
        return "the package triton is not installed"
    if not CAN_REGISTER:
        return f"it needs PyTorch 2.4, and this is {torch.__version__}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(device)} is older"
    return ""


# torch.compiler.assume_constant_result, without the 1.3 s that its import takes
lacking._dynamo_marked_constant = True


def choose(backend, fast, x):
    """The backend to run on x (..., width): backend, or for None and "auto" Triton where x is bf16
    or fp16 and it can run, else `fast`.

    Raises ValueError for an unknown name, or for triton where it cannot run."""
    if backend in ("reference", fast):
        return backend
    if backend in (None, "auto") and x.device.type == "cpu":  # a hundred times for each word
        return fast
    if backend not in (None, "auto", "triton"):
        raise ValueError(f"no backend {backend!r}: choose auto, triton, {fast} or reference")
    why = lacking(str(x.device))
    if not why and x.dtype not in DTYPES:
        why = f"it takes float32, bfloat16 and float16, not {str(x.dtype)[6:]}"
    if not why and x.shape[-1] > LIMITS[fast]:
        why = f"it takes vectors up to {LIMITS[fast]} wide, not {x.shape[-1]}"
    if why and backend == "triton":
        raise ValueError(f"backend triton: {why}; choose auto, {fast} or reference")
    if backend == "triton":
        return "triton"
    # in fp32 the kernels are for checking: three tf32 products for one
    return fast if why or INTERPRET or x.dtype == torch.float32 else "triton"


def autocast_dtype(x):
    """The dtype in which autocast computes on x's device, or None outside autocast."""
    kind = x.device.type
    if CAN_REGISTER:
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if kind == "cpu":  # before PyTorch 2.4 these are functions of their own
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def run(kernel, grid, x, *arguments, **options):
    """Launch a grid of programs on x's device, unless it is empty."""
    if 0 not in grid:
        with torch.cuda.device_of(x):
            kernel[grid](*arguments, **options)


# ---------------------------------------------------------------------------------------------
# RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)


def rms_norm_reference(x, weight, eps):
    """x (..., C), weight (C,) -> (..., C) in x's dtype, computed in fp32 (fp64 stays fp64)."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def rms_norm(x, weight, eps, residual=None, backend=None):
    """RMSNorm of x (..., C), or of x + residual, in one call.

    Returns the norm; with a residual (..., C), the pair (norm(x + residual), x + residual): a
    transformer block needs both, and a fused kernel reads and writes them once.
    Raises ValueError when the shapes do not fit or the backend cannot run."""
    if weight.shape != x.shape[-1:] or residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm of x {(*x.shape,)}: weight {(*weight.shape,)} must be as its "
                         "last axis, and the residual as all of it")
    if (backend := choose(backend, "torch", x)) == "triton":
        if residual is not None:  # one dtype for all: the wider
            x, residual = (t.to(torch.promote_types(x.dtype, residual.dtype))
                           for t in (x, residual))
        y, total, _ = norm_forward_op(x, residual, weight, eps)
        return y if residual is None else (y, total)
    total = x if residual is None else x + residual
    if backend == "torch" and CAN_REGISTER:  # F.rms_norm came with PyTorch 2.4 too
        y = F.rms_norm(total, weight.shape, weight.to(total.dtype), eps)
    else:
        y = rms_norm_reference(total, weight, eps)
    return y if residual is None else (y, total)


@jit
def norm_forward(X, R, W, Y, S, RSTD, rows, width, eps, RESIDUAL: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row[:, None].to(tl.int64) * width + col[None, :]  # 64 bits: big tensors pass 2^31
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(R + at, mask=inside, other=0.0).to(tl.float32)
        total = x.to(S.dtype.element_ty)
        tl.store(S + at, total, mask=inside)
        x = total.to(tl.float32)  # what is normed is what is stored, rounding included
    w = tl.load(W + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(Y + at, (x * rstd[:, None] * w).to(Y.dtype.element_ty), mask=inside)
    tl.store(RSTD + row, rstd, mask=row < rows)


@jit
def norm_backward(DY, DS, X, W, RSTD, DX, DW, rows, width, RESIDUAL: tl.constexpr,
                  ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    col = tl.arange(0, BLOCK_C)
    w = tl.load(W + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        at = row[:, None].to(tl.int64) * width + col[None, :]
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)[:, None]
        dy = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(X + at, mask=inside, other=0.0).to(tl.float32) * rstd
        dw += dy * h
        g = dy * w
        dx = rstd * (g - h * (tl.sum(g * h, 1) / width)[:, None])
        if RESIDUAL:
            dx += tl.load(DS + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(DW + tl.program_id(0) * width + col, tl.sum(dw, 0), mask=col < width)


def norm_tile(width):
    """About 4,096 numbers at a time, 32 a thread (a warp is 32 threads); 16 where rows are wider
    than 2,048. Enough loads are under way to keep memory busy, while dy, h, dx and dw in fp32
    still fit a thread's 255 registers."""
    BLOCK_C = triton.next_power_of_2(width)
    return {"ROWS": max(1, 4096 // BLOCK_C), "BLOCK_C": BLOCK_C,
            "num_warps": min(16, max(4, BLOCK_C // 512))}


@register("norm_forward")
def norm_forward_op(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor,
                    eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, total, rstd = norm_forward_shapes(x, residual, weight, eps)
    tile, rows, width = norm_tile(x.shape[-1]), rstd.numel(), x.shape[-1]
    run(norm_forward, (triton.cdiv(rows, tile["ROWS"]),), x, x.contiguous(),
        x if residual is None else residual.contiguous(), weight.contiguous(), y, total, rstd,
        rows, width, eps, RESIDUAL=residual is not None, **tile)
    return y, total, rstd


@norm_forward_op.register_fake  # what comes out, without running: torch.compile plans with it
def norm_forward_shapes(x, residual, weight, eps):
    return (x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape),
            x.new_empty(x.shape[:-1], dtype=torch.float32))


# Rows of dweight's partial sums: 4 programs for each of an H100's 132 multiprocessors. Fixed, so
# that the order of the sum, and with it every bit, is the same each time.
PARTS = 528


@register("norm_backward")
def norm_backward_op(dy: torch.Tensor, dtotal: torch.Tensor | None, x: torch.Tensor,
                     weight: torch.Tensor, rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tile, rows, width = norm_tile(x.shape[-1]), rstd.numel(), x.shape[-1]
    parts = min(PARTS, triton.cdiv(rows, tile["ROWS"]))
    dx, dw = x.new_empty(x.shape), rstd.new_empty(parts, width)
    run(norm_backward, (parts,), x, dy.contiguous(),  # gradients may be expanded, with stride 0
        dy if dtotal is None else dtotal.contiguous(), x.contiguous(), weight.contiguous(), rstd,
        dx, dw, rows, width, RESIDUAL=dtotal is not None, **tile)
    return dx, dw.sum(0).to(weight.dtype)


@norm_backward_op.register_fake
def norm_backward_shapes(dy, dtotal, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def norm_save(ctx, inputs, output):
    x, residual, weight, _ = inputs
    ctx.residual = residual is not None
    ctx.set_materialize_grads(False)  # the last norm's sum is used by nobody: no zeros for it
    ctx.save_for_backward(output[1] if ctx.residual else x, weight, output[2])


def norm_gradients(ctx, dy, dtotal, _):
    x, weight, rstd = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dw = norm_backward_op(dy, dtotal if ctx.residual else None, x, weight, rstd)
    return dx, dx if ctx.residual else None, dw, None


norm_forward_op.register_autograd(norm_gradients, setup_context=norm_save)


# ---------------------------------------------------------------------------------------------
# Attention (Vaswani et al. 2017, arXiv 1706.03762)


def visible(queries, keys, prefix, device):
    """Which key each query sees: (queries, keys) bool, the queries being the last of the keys."""
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    return (j <= i) | (j < prefix)


def attention_weights(q, k, prefix=0):
    """The softmax itself, (B, H, queries, keys), fp32: what each position looks at."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) / q.shape[-1] ** 0.5
    seen = visible(q.shape[1], k.shape[1], prefix, q.device)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def attention_reference(q, k, v, prefix=0):
    weights = attention_weights(q, k, prefix)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhij,bjhd->bihd", weights, v.to(weights.dtype)).to(q.dtype)


def attention(q, k, v, prefix=0, backend=None):
    """q (B, T, H, D); k, v (B, T_keys, H_kv, D), T_keys >= T, H a multiple of H_kv -> (B, T, H, D).

    prefix: how many leading keys every query sees (0: plain causal).
    Raises ValueError when the shapes do not fit or the backend cannot run."""
    B, T, H, D = q.shape
    T_keys, H_kv = k.shape[1:3]
    if (k.shape != v.shape or k.shape != (B, T_keys, H_kv, D) or T_keys < T or H % H_kv
            or not q.dtype == k.dtype == v.dtype):
        raise ValueError(f"attention of q {(*q.shape,)}, k {(*k.shape,)}, v {(*v.shape,)}: want "
                         "(B, T, H, D) of one dtype, at most as many queries as keys, H a "
                         "multiple of H_kv")
    backend = choose(backend, "sdpa", q)
    if backend == "triton":
        dtype = autocast_dtype(q)
        if dtype:  # PyTorch casts for its own operators only
            q, k, v = (x.to(dtype) for x in (q, k, v))
        return attention_forward_op(q, k, v, prefix)[0]
    if backend == "reference":
        return attention_reference(q, k, v, prefix)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, H, D) -> (B, H, T, D)
    grouped = {"enable_gqa": True} if H != H_kv else {}  # an argument from PyTorch 2.5 on
    # Branches, and not is_causal=(a condition): torch.compile would make that a symbol, of which
    # SDPA takes none, and leave the whole model uncompiled.
    if T == T_keys and prefix <= 1 and T > 1:  # SDPA's own flag needs no mask in memory
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
    else:
        mask = None if T == 1 else visible(T, T_keys, prefix, q.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **grouped)
    return y.transpose(1, 2)


@jit
def sees(i, j, prefix):
    return (j <= i) | (j < prefix)


@jit
def stretches(i, keys, prefix, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(whole, last): of queries i to i + BLOCK_M - 1, all see the keys before `whole`, rounded down
    to a multiple of BLOCK_N, and none sees `last` or later. At i = 64, tiles of 64 x 32 and
    prefix 70: (64, 128)."""
    return (tl.maximum(i + 1, prefix) // BLOCK_N * BLOCK_N,
            tl.minimum(tl.maximum(i + BLOCK_M, prefix), keys))


@jit
def attention_forward(Q, K, V, O, L, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, queries, keys,
                      prefix, scale, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                      BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      PRECISION: tl.constexpr):
    # q_b, q_t, q_h ...: strides, how many numbers lie between one row, token, head and the next.
    # Programs start in order of their number: the last tile of queries, which walks longest, first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # see norm_forward
    row, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)[None, :]
    n, j = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]  # as rows, as columns
    mine = (row < queries)[:, None] & (d < D)
    q = tl.load(Q + b * q_b + h * q_h + row.to(tl.int64)[:, None] * q_t + d, mask=mine, other=0.0)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    m, l = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    shift = keys - queries  # row r of q stands at position r + shift
    whole, last = stretches(first + shift, keys, prefix, BLOCK_M, BLOCK_N)
    begin, end = 0, whole
    for MASKED in tl.static_range(2):
        for start in range(begin, end, BLOCK_N):
            inside = (start + n < keys) & (d < D) if MASKED else d < D
            k = tl.load(K + n * k_t + d, mask=inside, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
            if MASKED:
                s = tl.where(sees((row + shift)[:, None], start + j, prefix), s, float("-inf"))
            higher = tl.maximum(m, tl.max(s, 1) * scale)  # all see key 0: never -inf
            p = tl.exp2(s * scale - higher[:, None])
            shrink = tl.exp2(m - higher)
            m, l = higher, l * shrink + tl.sum(p, 1)
            v = tl.load(V + n * v_t + d, mask=inside, other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            K += BLOCK_N * k_t
            V += BLOCK_N * v_t
        begin, end = whole, last
    at = ((b * queries + row) * H + h) * D
    tl.store(O + at[:, None] + d, (acc / l[:, None]).to(O.dtype.element_ty), mask=mine)
    tl.store(L + (b * H + h) * queries + row, m + tl.log2(l), mask=row < queries)


@jit
def attention_backward_q(Q, K, V, O, DO, L, DELTA, DQ, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t,
                         v_h, queries, keys, prefix, scale, H: tl.constexpr, GROUP: tl.constexpr,
                         D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)[None, :]
    n, j = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]  # as rows, as columns
    mine = (row < queries)[:, None] & (d < D)
    at = ((b * queries + row) * H + h)[:, None] * D + d  # this tile's place in O, DO and DQ
    number = (b * H + h) * queries + row  # and in L and DELTA
    q = tl.load(Q + b * q_b + h * q_h + row.to(tl.int64)[:, None] * q_t + d, mask=mine, other=0.0)
    do = tl.load(DO + at, mask=mine, other=0.0)
    delta = tl.sum(tl.load(O + at, mask=mine, other=0.0).to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + number, delta, mask=row < queries)
    log = tl.load(L + number, mask=row < queries, other=0.0)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    shift = keys - queries
    whole, last = stretches(first + shift, keys, prefix, BLOCK_M, BLOCK_N)
    begin, end = 0, whole
    for MASKED in tl.static_range(2):
        for start in range(begin, end, BLOCK_N):
            inside = (start + n < keys) & (d < D) if MASKED else d < D
            k = tl.load(K + n * k_t + d, mask=inside, other=0.0)
            v = tl.load(V + n * v_t + d, mask=inside, other=0.0)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - log[:, None])
            if MASKED:
                p = tl.where(sees((row + shift)[:, None], start + j, prefix), p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            K += BLOCK_N * k_t
            V += BLOCK_N * v_t
        begin, end = whole, last
    # ln 2 = 0.693...: `scale` makes scores of base 2, so their derivative has that factor
    tl.store(DQ + at, (dq * scale * 0.6931471805599453).to(DQ.dtype.element_ty), mask=mine)


@jit
def attention_backward_kv(Q, K, V, DO, L, DELTA, DK, DV, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t,
                          v_h, queries, keys, prefix, scale, H: tl.constexpr, GROUP: tl.constexpr,
                          D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    first = tl.program_id(0) * BLOCK_N
    g, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # g: head of k and v
    m, j = tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    mine, wide = (j < keys)[:, None] & (d < D), j.to(tl.int64)[:, None]
    k = tl.load(K + b * k_b + g * k_h + wide * k_t + d, mask=mine, other=0.0)
    v = tl.load(V + b * v_b + g * v_h + wide * v_t + d, mask=mine, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # query rows before `low` see none of these keys, rows from `whole` on see all of them
    shift = keys - queries
    low = tl.maximum(tl.where(first < prefix, 0, first - shift), 0) // BLOCK_M * BLOCK_M
    whole = tl.where(first + BLOCK_N <= prefix, 0, first + BLOCK_N - 1 - shift)
    whole = (tl.maximum(whole, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    for of_group in range(GROUP):  # all heads of q that read this one
        h = g * GROUP + of_group
        Q_h = Q + b * q_b + h * q_h + low.to(tl.int64) * q_t
        DO_h = DO + ((b * queries + low) * H + h) * D
        begin, end = low, tl.minimum(whole, queries)
        for WHOLE in tl.static_range(2):
            for start in range(begin, end, BLOCK_M):
                row = start + m  # rows past the last are zeros, and add zero
                number = (b * H + h) * queries + row
                inside = (row < queries)[:, None] & (d < D)
                q = tl.load(Q_h + m[:, None] * q_t + d, mask=inside, other=0.0)
                log = tl.load(L + number, mask=row < queries, other=0.0)
                # (BLOCK_N, BLOCK_M) here: so no tile need be transposed in registers
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                p = tl.exp2(s * scale - log[None, :])
                if not WHOLE:
                    p = tl.where(sees((row + shift)[None, :], j[:, None], prefix), p, 0.0)
                do = tl.load(DO_h + m[:, None] * (H * D) + d, mask=inside, other=0.0)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                ds = p * (dp - tl.load(DELTA + number, mask=row < queries, other=0.0)[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
                Q_h += BLOCK_M * q_t
                DO_h += BLOCK_M * H * D
            begin, end = whole, queries
    at = ((b * keys + j) * (H // GROUP) + g)[:, None] * D + d
    tl.store(DK + at, (dk * scale * 0.6931471805599453).to(DK.dtype.element_ty), mask=mine)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=mine)


# Tiles (BLOCK_M, BLOCK_N, warps, stages: loads under way at a time) of forward, dQ, and dK with dV,
# for D up to 64 and up to 128. A table, not a search: every run has the same kernels, and the tests
# compile all of them ahead. A program reads its own tile once and the other side's again and again,
# so its own is the larger, up to what the 255 registers of a thread hold without spilling to
# memory. Eight warps share a tile's loads; four, in "hopper"'s forward of D up to 64, let two
# programs fit, one's softmax behind the other's products. "hopper" has 227 KB of shared memory a
# program, "ampere" keeps below the 99 KB of consumer GPUs, and so does "blackwell", where ampere's
# last entry would spill. "fp32" makes a product of three in tf32 (tf32x3), which takes registers:
# it is for checking, not for speed.
TILES = {
    "hopper": {64: ((128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
               128: ((128, 64, 8, 3), (128, 64, 8, 2), (32, 64, 8, 2))},
    "ampere": {64: ((128, 64, 8, 2), (128, 32, 8, 3), (32, 64, 8, 2)),
               128: ((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2))},
    "blackwell": {64: ((128, 64, 8, 2), (128, 32, 8, 3), (32, 64, 8, 2)),
                  128: ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2))},
    "fp32": {64: ((32, 16, 8, 1),) * 3, 128: ((16, 16, 8, 1),) * 3}}


def family(x):
    """Which of TILES: decided by a multiprocessor's shared memory and the size of a number."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return "fp32"
    return family_of(torch.cuda.get_device_capability(x.device)[0])


def family_of(major):
    """Which of TILES, in bf16 and fp16, is for GPUs of a compute capability `major`.x."""
    return {8: "ampere", 9: "hopper"}.get(major, "blackwell")


def launch(kernel, which, q, k, v, prefix, *others):
    """Run attention kernel `which` of TILES' three, a program for each tile, head and row of B."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, T, H, D), (_, T_keys, H_kv, _) = q.shape, k.shape
    BLOCK_D = max(16, triton.next_power_of_2(D))  # the least a tensor core takes is 16
    M, N, warps, stages = TILES[family(q)][64 if D <= 64 else 128][which]
    if D % 16 and which < 2:  # rows that start anywhere take more registers to address
        M = max(16, M // 2)
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    run(kernel, (triton.cdiv(T_keys, N), H_kv, B) if which == 2 else (triton.cdiv(T, M), H, B), q,
        q, k, v, *others, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], T, T_keys,
        min(prefix, T_keys), D ** -0.5 / math.log(2), H=H, GROUP=H // H_kv, D=D, BLOCK_D=BLOCK_D,
        BLOCK_M=M, BLOCK_N=N, PRECISION="tf32x3" if exact else "tf32", num_warps=warps,
        num_stages=stages)


@register("attention_forward")
def attention_forward_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: int
                         ) -> tuple[torch.Tensor, torch.Tensor]:
    o, log = attention_forward_shapes(q, k, v, prefix)
    launch(attention_forward, 0, q, k, v, prefix, o, log)
    return o, log


@attention_forward_op.register_fake
def attention_forward_shapes(q, k, v, prefix):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@register("attention_backward")
def attention_backward_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
                          log: torch.Tensor, do: torch.Tensor, prefix: int
                          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = attention_backward_shapes(q, k, v, o, log, do, prefix)
    do, delta = do.contiguous(), torch.empty_like(log)
    launch(attention_backward_q, 1, q, k, v, prefix, o, do, log, delta, dq)
    launch(attention_backward_kv, 2, q, k, v, prefix, do, log, delta, dk, dv)
    return dq, dk, dv


@attention_backward_op.register_fake
def attention_backward_shapes(q, k, v, o, log, do, prefix):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def attention_save(ctx, inputs, output):
    *inputs, ctx.prefix = inputs
    ctx.set_materialize_grads(False)  # none for the logarithms
    ctx.save_for_backward(*inputs, *output)


attention_forward_op.register_autograd(
    lambda ctx, do, _: (*attention_backward_op(*ctx.saved_tensors, do, ctx.prefix), None),
    setup_context=attention_save)
