"""
The operations with gradients by hand, beside their formulae in fp64 and autograd's gradients.
"""

import subprocess
import sys

import pytest
import torch
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
        furthest = (a - b).abs().amax(tuple(range(a.ndim))) if a.numel() else 0
        assert furthest <= tolerance * (1 + (b.abs().max() if b.numel() else 0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_they_are_used_on_a_cpu_in_fp32_alone():
    assert fused.by_hand(torch.zeros(1))
    assert not fused.by_hand(torch.zeros(1, dtype=torch.bfloat16))
    assert not fused.by_hand(torch.zeros(1, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.by_hand(torch.zeros(1))


OPERATIONS = {  # name: (function by hand, shapes of what learns, the call)
    "linear": ("Product", [(3, 5, 6), (11, 6), (11,)], fused.linear),
    "split_rotated": (
        "SplitRotated",
        [(2, 3, 8, 4)],
        lambda x: fused.split_rotated(x, *ANGLES.to(x.dtype), 2),
    ),
    "swiglu": ("SwiGLU", [(3, 5, 22)], fused.swiglu),
    "norm": ("AddNorm", [(3, 5, 8), (8,)], lambda x, w: fused.add_norm(x, None, w, 0.1)),
    "add_norm": (
        "AddNorm",
        [(3, 5, 8), (3, 5, 8), (8,)],
        lambda x, residual, w: fused.add_norm(x, residual, w, 0.1),
    ),
    "head_loss": (
        "HeadLoss",
        [(4, 6), (13, 6)],
        lambda x, w: fused.head_loss(x, w, torch.tensor([0, -100, 12, 3])),
    ),
}
ANGLES = torch.stack([torch.rand(3, 1, 2).cos(), torch.rand(3, 1, 2).sin()])


def results(call, inputs):
    """(outputs, gradients) of a call, for gradients of its outputs that are all alike."""
    out = call(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    total = sum(part.sum() for part in out)  # whose gradient has strides of 0
    return [*out, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation_is_by_hand_in_fp32_and_its_formula_in_fp64(monkeypatch, name):
    function, shapes, call = OPERATIONS[name]
    used, apply = [], fused.apply
    monkeypatch.setattr(fused, "apply", lambda f, *rest: used.append(f.__name__) or apply(f, *rest))
    inputs = [leaf(*shape) for shape in shapes]
    fast = results(call, inputs)
    assert used == [function] or (name == "head_loss" and set(used) == {function, "Product"})
    used.clear()
    for a, b in zip(fast, results(call, [twin(x) for x in inputs]), strict=True):
        assert b.dtype == torch.float64 and (a - b).abs().max() < 1e-5 * (1 + b.abs().max())
    assert not used


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation_takes_any_layout_and_any_one_that_learns(name):
    _, shapes, call = OPERATIONS[name]
    inputs = [leaf(*shape) for shape in shapes]
    expected = results(call, inputs)
    turned = [x.detach().mT.contiguous().mT if x.ndim > 1 else x.detach() for x in inputs]
    for a, b in zip(results(call, [x.requires_grad_() for x in turned]), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for i, gradient in enumerate(expected[-len(inputs) :]):
        one = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        out = call(*one)
        sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
        assert torch.allclose(one[i].grad, gradient, atol=1e-5)
        assert all(x.grad is None for j, x in enumerate(one) if j != i)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_gradients_can_be_had_twice_but_have_none_of_their_own(name):
    _, shapes, call = OPERATIONS[name]
    inputs = [leaf(*shape) for shape in shapes]
    out = call(*inputs)
    total = sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,)))
    once = torch.autograd.grad(total, inputs, retain_graph=True)
    again = torch.autograd.grad(total, inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(gradient.square().sum() for gradient in again).backward()


@pytest.mark.parametrize("shape", [(6,), (1, 6), (3, 5, 6), (0, 6)])
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
            fused.linear(x, weight[None]),
            fused.head_loss(x.flatten(0, 1), x[0, :2], targets),
        ]

    with torch.no_grad():
        without = results()
    for a, b in zip(without, results(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(sys.platform != "linux", reason="keep_memory() does nothing elsewhere")
def test_kept_memory_is_used_again(tmp_path):
    """A step's large tensors cost no new pages, once there were others as large; what is free then
    can be given back."""
    script = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch, fused
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(12_000_000).add_(1)  # 48 MB: beyond what the C library keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def held():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0])  # KiB
first = pages()
fused.keep_memory()
pages()
print(first, pages())
many = [torch.ones(1_000_000) for _ in range(100)]  # 400 MB, with holes between ones in use
few = many[::10]
del many
before = held()
fused.return_memory()
print(before - held())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, later, given_back = map(int, done.stdout.split())
    assert later < first / 10 and given_back > 300_000


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
    y = total / (total.square().mean(-1, keepdim=True) + 0.1).sqrt() * slow[1]  # eps is seen
    fast = fused.add_norm(x, residual if with_residual else None, weight, 0.1)
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


@pytest.mark.parametrize("targets", [[], [-100, -100]])
def test_a_loss_of_no_targets_is_nothing(targets):
    """PyTorch's is not a number, which a micro-batch without targets would spread to its step."""
    targets = torch.tensor(targets, dtype=torch.long)
    for dtype in (torch.float32, torch.float64):  # by hand, and by the formula
        hidden, weight = leaf(len(targets), 4, dtype=dtype), leaf(5, 4, dtype=dtype)
        loss = fused.head_loss(hidden, weight, targets)
        loss.backward()
        assert loss == 0 and not weight.grad.any() and not hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_outside_the_vocabulary_is_refused(target, dtype):
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        fused.head_loss(leaf(2, 4, dtype=dtype), leaf(5, 4, dtype=dtype), torch.tensor([target, 2]))


def test_under_compile_the_formulae_run(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.randn(2, 3, 6, 4)
    cos, sin = torch.randn(3, 1, 2), torch.randn(3, 1, 2)
    monkeypatch.setattr(fused.SplitRotated, "apply", None)
    assert fused.split_rotated(x, cos, sin, 1)[0].shape == (2, 3, 4, 4)
