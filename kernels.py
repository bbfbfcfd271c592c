"""
The two operations a transformer spends itself on: RMSNorm and attention.

Each has a slow reference that states the mathematics, and a fast backend behind the same call:

    RMSNorm     y = x / sqrt(mean(x^2) + eps) * weight           over the last axis
    attention   y_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j   over the keys j that i may see

Query i sees key j where j <= i (causal: no word sees a later one) or j < prefix (an image, say,
that every position may see whole). During cached generation there are fewer queries than keys;
queries are then the last ones, and i counts from the first key. Layout is (B, T, H, D), as views
of the fused projection come, so nothing is copied. k and v may have fewer heads than q (grouped
queries): head h of q reads head h * H_kv // H of k and v.

`backend` is "sdpa" (attention) or "torch" (the norm): PyTorch's own fused operations; "reference":
the formulae above, in fp32; None: the automatic choice. "triton" is asked for by name only.
Letters: B batch, T sequence length, H heads, D head width, C model width.
"""
import torch
import torch.nn.functional as F

ATTENTION = ("auto", "triton", "sdpa", "reference")
NORM = ("auto", "triton", "torch", "reference")


def choose(backend, allowed, fast):
    """The backend to run: `fast` for None or "auto".

    Raises ValueError for a name that is none of `allowed`, or one that cannot run here."""
    if backend in (None, "auto"):
        return fast
    if backend not in allowed:
        raise ValueError(f"no backend {backend!r}: choose one of {', '.join(allowed)}")
    if backend == "triton":
        raise ValueError("backend 'triton': this version has no Triton kernels yet; "
                         f"choose auto, {fast} or reference")
    return backend


# ---------------------------------------------------------------------------------------------
# RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)


def rms_norm_reference(x, weight, eps):
    """x (..., C), weight (C,) -> (..., C) in x's dtype, computed in fp32 (fp64 stays fp64)."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def rms_norm(x, weight, eps, residual=None, backend=None):
    """RMSNorm of x (..., C), or of x + residual, in one call.

    Returns the norm; with a residual (..., C), the pair (norm(x + residual), x + residual): a
    transformer block needs both, and a fused kernel reads and writes them once."""
    backend = choose(backend, NORM, "torch")
    total = x if residual is None else x + residual
    if backend == "reference":
        y = rms_norm_reference(total, weight, eps)
    else:
        y = F.rms_norm(total, weight.shape, weight.to(total.dtype), eps)
    return y if residual is None else (y, total)


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
    Raises ValueError when the heads do not divide or the backend cannot run."""
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads over {k.shape[2]} key heads do not divide")
    if choose(backend, ATTENTION, "sdpa") == "reference":
        return attention_reference(q, k, v, prefix)
    T, T_keys = q.shape[1], k.shape[1]
    causal = T == T_keys and prefix <= 1  # SDPA's own flag, which needs no mask in memory
    mask = None if causal or T == 1 else visible(T, T_keys, prefix, q.device)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
        is_causal=causal and T > 1, enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2)  # (B, H, T, D) -> (B, T, H, D)
