"""
The operations with gradients by hand, beside their formulae in fp64 and autograd's gradients.
"""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import fused


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def twin(x):
    return x.detach().double().requires_grad_()


def same(fast, slow, inputs, tolerance=1e-5):
    """Outputs agree, and for random gradients of these so do all the inputs' gradients."""
    fast, slow = ((out if isinstance(out, tuple) else (out,)) for out in (fast, slow))
    given = [torch.randn_like(out) for out in fast]
    torch.autograd.backward(fast, given)
    torch.autograd.backward(slow, [g.double() for g in given])
    pairs = [*zip(fast, slow), *((a.grad, b.grad) for a, b in inputs)]
    for a, b in pairs:
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_they_are_used_on_a_cpu_in_fp32_alone():
    assert fused.by_hand(torch.zeros(1))
    assert not fused.by_hand(torch.zeros(1, dtype=torch.bfloat16))
    assert not fused.by_hand(torch.zeros(1, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.by_hand(torch.zeros(1))


@pytest.mark.parametrize("shape", [(1, 6), (3, 5, 6)])
@pytest.mark.parametrize("learns", ["xwb", "xw", "x", "w"])
def test_linear(shape, learns):
    x, weight, bias = leaf(*shape), leaf(11, 6), leaf(11)
    slow = [twin(t) for t in (x, weight, bias)]
    pairs = []
    for letter, fast, exact in zip("xwb", (x, weight, bias), slow):
        fast.requires_grad_(letter in learns)
        pairs += [(fast, exact)] if letter in learns else []
    bias = bias if "b" in learns else None
    y = torch.einsum("...i,oi->...o", slow[0], slow[1]) + (slow[2] if bias is not None else 0)
    same(fused.linear(x, weight, bias), y, pairs)
    with torch.no_grad():
        assert torch.equal(fused.linear(x, weight, bias), fused.Product.apply(x, weight, bias))


def test_without_gradients_results_are_the_same():
    """Autograd is passed by, not the arithmetic."""
    x, weight = torch.randn(2, 3, 8), torch.ones(8)
    cos, sin = torch.randn(3, 1, 1), torch.randn(3, 1, 1)
    heads, targets = x.view(2, 3, 4, 2), torch.tensor([1, 0, 1, 1, 0, 0])

    def results():
        return [
            fused.swiglu(x),
            *fused.add_norm(x, x, weight, 1e-5),
            *fused.split_rotated(heads, cos, sin, 1),
            fused.head_loss(x.flatten(0, 1), x[0, :2], targets),
        ]

    with torch.no_grad():
        without = results()
    for a, b in zip(without, results(), strict=True):
        assert torch.equal(a, b)


def test_kept_memory_is_used_again(tmp_path):
    """A step's large tensors cost no new pages, once there were others as large."""
    script = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch, fused
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(12_000_000).add_(1)  # 48 MB: beyond what the C library keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = pages()
fused.keep_memory()
pages()
print(first, pages())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT)], capture_output=True, text=True, cwd=tmp_path
    )
    first, later = map(int, done.stdout.split())
    assert later < first / 10


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_split_rotated(heads, kv_heads):
    """Truth: complex numbers, turned by multiplication."""
    x = leaf(2, 7, heads + 2 * kv_heads, 8)
    slow_x = twin(x)
    angles = torch.outer(torch.arange(7.0), torch.rand(4))[:, None]
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)
    q, k, v = slow_x.split([heads, kv_heads, kv_heads], dim=2)
    a, b = torch.cat([q, k], 2).chunk(2, -1)
    turned = torch.complex(a, b) * turn
    q, k = torch.cat([turned.real, turned.imag], -1).split([heads, kv_heads], dim=2)
    fast = fused.split_rotated(x, angles.cos(), angles.sin(), kv_heads)
    assert [tuple(part.shape) for part in fast] == [
        (2, 7, h, 8) for h in (heads, kv_heads, kv_heads)
    ]
    same(fast, (q, k, v), [(x, slow_x)])


def test_swiglu():
    x = leaf(3, 5, 22)
    slow_x = twin(x)
    gate, up = slow_x[..., :11], slow_x[..., 11:]
    same(fused.swiglu(x), gate / (1 + (-gate).exp()) * up, [(x, slow_x)])


@pytest.mark.parametrize("with_residual", [False, True])
def test_add_norm(with_residual):
    x, weight, residual = leaf(3, 5, 16), leaf(16), leaf(3, 5, 16)
    slow = [twin(t) for t in (x, weight, residual)]
    total = slow[0] + slow[2] if with_residual else slow[0]
    y = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * slow[1]
    fast = fused.add_norm(x, residual if with_residual else None, weight, 1e-5)
    pairs = list(zip((x, weight, residual), slow))
    same(fast, (y, total) if with_residual else y, pairs if with_residual else pairs[:2])


def test_a_norm_whose_sum_nobody_uses_has_the_gradient_of_the_norm_alone():
    x, residual, weight = leaf(4, 8), leaf(4, 8), leaf(8)
    fused.add_norm(x, residual, weight, 1e-5)[0].square().sum().backward()
    total = (x + residual).detach().requires_grad_()
    fused.add_norm(total, None, weight, 1e-5).square().sum().backward()
    assert torch.equal(x.grad, total.grad) and torch.equal(residual.grad, total.grad)


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
@pytest.mark.parametrize("learns", ["both", "hidden", "weight", "none"])
def test_head_loss(monkeypatch, chunk, learns):
    """Whatever the chunks are, targets of -100 left out, for whatever of the two learns."""
    monkeypatch.setattr(fused, "CHUNK", chunk)
    hidden, weight = leaf(9, 6), leaf(13, 6)
    hidden.requires_grad_(learns in ("both", "hidden"))
    weight.requires_grad_(learns in ("both", "weight"))
    targets = torch.tensor([0, 12, -100, 3, 3, -100, 7, 1, 2])
    slow = [twin(hidden).requires_grad_(), twin(weight)]
    expected = 0
    for i, target in enumerate(targets.tolist()):
        if target != -100:
            scores = slow[1] @ slow[0][i]
            expected = expected + (scores.exp().sum().log() - scores[target]) / 7
    loss = fused.head_loss(hidden, weight, targets)
    assert abs(loss - expected) < 1e-5 and loss.dtype == torch.float32
    (3 * expected).backward()
    if learns != "none":
        (3 * loss).backward()
    for x, y in zip((hidden, weight), slow):
        assert x.grad is None if not x.requires_grad else (x.grad - y.grad).abs().max() < 1e-5


def test_a_loss_of_no_targets_is_not_a_number_as_torch_has_it():
    hidden, weight, targets = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([-100, -100])
    assert math.isnan(F.cross_entropy(hidden @ weight.T, targets))
    assert math.isnan(fused.head_loss(hidden, weight, targets))


def test_under_compile_the_formulae_run(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.randn(2, 3, 6, 4)
    cos, sin = torch.randn(3, 1, 2), torch.randn(3, 1, 2)
    monkeypatch.setattr(fused.SplitRotated, "apply", None)
    assert fused.split_rotated(x, cos, sin, 1)[0].shape == (2, 3, 4, 4)
