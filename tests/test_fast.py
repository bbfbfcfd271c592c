"""What fast/ computes, against the plain form and fp64."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from fast import products
from fast.products import Linear, linear


@pytest.fixture(params=[False, True], ids=["MKL", "oneDNN"])
def library(request, monkeypatch):
    """Both forms on every machine: which one runs by itself depends on the maker of the CPU."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "ONEDNN", request.param)
    return request.param


def close(a, b, tolerance=1e-5):
    return (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max()


@pytest.mark.parametrize("shape", [(1, 8, 6), (7, 33, 65), (200, 64, 300)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_and_their_gradients(library, shape, with_bias):
    rows, width, outputs = shape
    torch.manual_seed(0)
    x = torch.randn(2, rows, width, requires_grad=True)
    weight = torch.randn(outputs, width, requires_grad=True)
    bias = torch.randn(outputs, requires_grad=True) if with_bias else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    y, dy = linear(x, weight, bias), torch.randn(2, rows, outputs)
    found = torch.autograd.grad(y, inputs, dy)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    true = F.linear(*wide)
    wanted = torch.autograd.grad(true, wide, dy.double())
    assert close(y, true) and all(map(close, found, wanted))
    with torch.no_grad():
        assert close(linear(x, weight, bias), true)


@pytest.mark.parametrize("learns", ["x", "weight", "bias"])
def test_only_the_gradients_that_are_wanted_are_made(library, learns):
    torch.manual_seed(0)
    tensors = {"x": torch.randn(5, 4), "weight": torch.randn(3, 4), "bias": torch.randn(3)}
    tensors[learns].requires_grad_()
    linear(**tensors).sum().backward()
    assert tensors.pop(learns).grad is not None
    assert all(other.grad is None for other in tensors.values())


def test_any_layout(library):
    x = torch.randn(4, 6, 5).transpose(0, 1)
    layer = Linear(5, 7)
    assert close(layer(x), F.linear(x.double(), layer.weight.double(), layer.bias.double()))


@pytest.mark.parametrize("how", ["float64", "autocast", "compile"])
def test_elsewhere_the_plain_form_runs(monkeypatch, how):
    monkeypatch.setattr(products, "ONEDNN", True)
    monkeypatch.setattr(products, "product", None)  # calling it would raise
    x, layer = torch.randn(3, 4), Linear(4, 2)
    if how == "float64":
        layer.double()(x.double())
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        layer(x)


KEEPS = """
import resource, sys
import torch
from fast.memory import keep_memory, return_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(12_000_000).add_(1)  # 48 MB: beyond what the C library keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0])  # KiB

first = pages()
keep_memory()
pages()
print(first, pages())
many = [torch.ones(1_000_000) for _ in range(100)]  # 400 MB, with holes between ones in use
few = many[::10]
del many
before = held()
return_memory()
print(before - held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="keep_memory() does nothing elsewhere")
def test_kept_memory_is_used_again():
    """Large tensors cost no new pages once there were others as large; free memory can be
    returned."""
    done = subprocess.run([sys.executable, "-c", KEEPS], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, later, returned = map(int, done.stdout.split())
    assert later < first / 10 and returned > 300_000
