"""The Triton kernels: against fp64, against themselves broken on purpose, and compiled unrun."""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE, ROOT
from torch.nn.parallel import DistributedDataParallel as DDP

import kernels
from kernels import attention, attention_reference, rms_norm, rms_norm_reference
from model import GPT, BabyLLaVA, GPTConfig

pytest.importorskip("triton")
EXACT = 1e-5 if DEVICE == "cpu" else 1e-4  # a GPU's exp2 is approximate
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def attention_error(call, T, D, heads, prefix, keys=None, B=2):
    """The largest error of a call's output and gradients against the formula in fp64."""
    torch.manual_seed(T + D)
    (H, H_kv), keys = heads, keys or T
    fused = torch.randn(B, keys, H + 2 * H_kv, D, device=DEVICE)  # as a projection leaves them
    q, k, v = fused.split([H, H_kv, H_kv], 2)
    inputs = [x.detach().requires_grad_() for x in (q[:, keys - T :], k, v)]
    assert not inputs[1].is_contiguous() or keys == B == 1
    y = call(*inputs, prefix)
    dy = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, inputs, dy)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y = attention_reference(*wide, prefix)
    true = [y, *torch.autograd.grad(y, wide, dy.double())]
    return torch.stack([(a - b).abs().max() for a, b in zip(got, true)]).max()  # NaN stays NaN


def norm_error(call, shape, residual):
    torch.manual_seed(shape[-1])
    x, r, w = (
        torch.randn(n, device=DEVICE, requires_grad=True) for n in (shape, shape, shape[-1:])
    )
    y = call(x, w, 1e-5, r if residual else None)
    outputs = y if residual else (y,)
    grads = [torch.randn(shape, device=DEVICE) for _ in outputs]
    got = [*outputs, *torch.autograd.grad(outputs, (x, r, w) if residual else (x, w), grads)]
    x, r, w = (t.detach().double().requires_grad_() for t in (x, r, w))
    total = x + r if residual else x
    outputs = [rms_norm_reference(total, w, 1e-5), total][: len(outputs)]
    true = [
        *outputs,
        *torch.autograd.grad(
            outputs, (x, r, w) if residual else (x, w), [g.double() for g in grads]
        ),
    ]
    return torch.stack([(a - b).abs().max() for a, b in zip(got, true)]).max()  # NaN stays NaN


def triton_attention(q, k, v, prefix, module=kernels):
    return module.attention(q, k, v, prefix, "triton")


def triton_norm(x, w, eps, residual, module=kernels):
    return module.rms_norm(x, w, eps, residual, "triton")


# Every T with every D, and heads, groups and prefixes in turn, so that all pairs with T occur.
GRID = [
    (T, D, [(2, 2), (4, 2), (3, 1)][(a + b) % 3], [0, 5, 70][(a + 2 * b) % 3])
    for (a, T), (b, D) in itertools.product(
        enumerate((1, 17, 64, 130)), enumerate((8, 32, 48, 64, 128))
    )
]


@pytest.mark.parametrize("T, D, heads, prefix", GRID)
def test_attention_and_its_gradients_are_the_formulas(T, D, heads, prefix):
    assert attention_error(triton_attention, T, D, heads, prefix, B=1 if T > 64 else 2) < EXACT


@pytest.mark.parametrize("tile", [(16, 64, 4, 1), (64, 16, 4, 1), (64, 64, 4, 1)])
@pytest.mark.parametrize(
    "T, keys, prefix", [(80, 80, 0), (80, 80, 33), (80, 80, 1000), (20, 90, 0), (20, 90, 80)]
)
def test_any_tile_any_prefix_and_fewer_queries_than_keys(monkeypatch, tile, T, keys, prefix):
    monkeypatch.setitem(kernels.TILES["fp32"], 64, (tile,) * 3)
    assert attention_error(triton_attention, T, 16, (2, 1), prefix, keys, B=1) < EXACT


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7, 1), (3, 5, 24), (130, 100), (9, 257), (2, 5000)])
def test_rms_norm_and_its_gradients_are_the_formulas(monkeypatch, shape, residual):
    monkeypatch.setattr(kernels, "PARTS", 2)  # so that programs take several turns
    assert norm_error(triton_norm, shape, residual) < EXACT * max(1, shape[-1] / 100)


BREAKS = {
    "the mask is off by one": ("(j <= i)", "(j < i + 2)"),
    "the diagonal is not seen": ("(j <= i)", "(j < i)"),
    "the prefix is one short": ("| (j < prefix)", "| (j < prefix - 1)"),
    "a tile too many goes unmasked": ("tl.maximum(i + 1, prefix)", "tl.maximum(i + BLOCK_N, 0)"),
    "the first queries are skipped": ("first - shift), 0)", "first + BLOCK_M - shift), 0)"),
    "old sums are not shrunk": ("l * shrink", "l"),
    "the logarithm is dropped": ("m + tl.log2(l)", "m"),
    "delta is dropped from dQ": ("(dp - delta[:, None])", "dp"),
    "delta is dropped from dK": (
        "(dp - tl.load(DELTA + number, mask=row < queries, other=0.0)[None, :])",
        "dp",
    ),
    "only the first head of a group adds": ("in range(GROUP)", "in range(1)"),
    "dK is not scaled back": ("dk * scale", "dk"),
}
NORM_BREAKS = {
    "eps is dropped": ("/ width + eps)", "/ width + 0.01)"),
    "the mean is over the padding": ("tl.sum(x * x, 1) / width", "tl.sum(x * x, 1) / BLOCK_C"),
    "the mean of g h is dropped": ("- h * (tl.sum(g * h, 1) / width)[:, None]", ""),
    "the residual's gradient is dropped": ("dx += tl.load(DS", "dx += 0 * tl.load(DS"),
    "dweight keeps the last turn only": ("dw += dy * h", "dw = dy * h"),
}


def copy(tmp_path, old="", new=""):
    """kernels.py, with one thing changed, as a module of its own."""
    source = (ROOT / "kernels.py").read_text()
    assert old in source
    path = tmp_path / "a_copy.py"
    path.write_text(source.replace(old, new) if old else source)
    spec = importlib.util.spec_from_file_location("a_copy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("what", BREAKS)
def test_the_check_fails_a_broken_attention(tmp_path, what):
    module = copy(tmp_path, *BREAKS[what])
    assert (
        not attention_error(lambda *a: triton_attention(*a, module=module), 70, 16, (4, 2), 37, B=1)
        < 1e-3
    )


@pytest.mark.parametrize("what", NORM_BREAKS)
def test_the_check_fails_a_broken_norm(tmp_path, monkeypatch, what):
    module = copy(tmp_path, *NORM_BREAKS[what])
    monkeypatch.setattr(module, "PARTS", 2)
    assert not norm_error(lambda *a: triton_norm(*a, module=module), (130, 100), True) < 1e-3


def test_any_stride_of_inputs_and_gradients():
    x, w = torch.randn(5, 24, device=DEVICE), torch.randn(48, device=DEVICE)[::2]
    y = rms_norm(x, w, 1e-5, None, "triton")
    assert (y - rms_norm_reference(x, w, 1e-5)).abs().max() < 1e-5
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, 8, 20, device=DEVICE).permute(0, 3, 1, 2).requires_grad_()
        for _ in range(3)
    )  # (B, T, H, D) whose last axis is not consecutive
    x = torch.randn(24, 10, device=DEVICE).t().requires_grad_()
    w = torch.ones(24, device=DEVICE, requires_grad=True)
    for call, inputs in (
        (lambda b: attention(q, k, v, 3, b), (q, k, v)),
        (lambda b: rms_norm(x, w, 1e-5, None, b), (x, w)),
        (lambda b: rms_norm(x, w, 1e-5, x * 2, b)[1], (x,)),
        (lambda b: rms_norm(x, w, 1e-5, x * 2, b)[0], (x, w)),
    ):
        grads = [torch.autograd.grad(call(b).sum(), inputs) for b in ("triton", "reference")]
        for ours, true in zip(*grads):  # a sum's gradient is one number, expanded with stride 0
            assert (ours - true).abs().max() < 1e-4


def test_gradients_are_the_same_bits_each_time():
    torch.manual_seed(0)
    q = torch.randn(2, 40, 4, 16, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(2, 40, 2, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    runs = [
        torch.autograd.grad(attention(q, k, v, 7, "triton").pow(2).sum(), (q, k, v))
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("copies", [0, 1])
def test_opcheck(tmp_path, copies):
    """PyTorch's own check of a custom operator: schema, fake shapes, autograd, under tracing; with
    a copy of kernels.py in the process, too, as when it opens two exported models."""
    for module in [kernels, *(copy(tmp_path) for _ in range(copies))]:
        x = torch.randn(1, 5, 2, 8, device=DEVICE, requires_grad=True)
        triton_attention(x, x, x, 0, module).sum().backward()
    q, k, v = (
        x.detach().requires_grad_()
        for x in torch.randn(1, 5, 4, 8, device=DEVICE).split([2, 1, 1], 2)
    )
    o, log = kernels.attention_forward_op(q.detach(), k.detach(), v.detach(), 2)
    x, r = (torch.randn(3, 24, device=DEVICE, requires_grad=True) for _ in range(2))
    w = torch.ones(24, device=DEVICE, requires_grad=True)
    y, total, rstd = kernels.norm_forward_op(x.detach(), r.detach(), w.detach(), 1e-5)
    for op, args in (
        (kernels.attention_forward_op, (q, k, v, 2)),
        (kernels.attention_backward_op, (q.detach(), k.detach(), v.detach(), o, log, o, 2)),
        (kernels.norm_forward_op, (x, r, w, 1e-5)),
        (kernels.norm_forward_op, (x, None, w, 1e-5)),
        (kernels.norm_backward_op, (y, total, total, w.detach(), rstd)),
        (kernels.norm_backward_op, (y, None, total, w.detach(), rstd)),
    ):
        torch.library.opcheck(op, args)


def small(attention="triton", norm="triton"):
    torch.manual_seed(0)
    return BabyLLaVA(
        GPT(
            GPTConfig(
                vocab_size=30,
                block_size=20,
                n_layer=2,
                n_head=4,
                n_kv_head=2,
                n_embd=32,
                attention=attention,
                norm=norm,
            )
        )
    ).to(DEVICE)


def gradients(run, net, tokens):
    run(tokens, tokens)[1].backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_a_whole_model_eager_compiled_and_in_ddp(tmp_path):
    tokens = torch.randint(30, (2, 20), device=DEVICE)
    net = small("reference", "reference")
    true = gradients(net, net, tokens)
    net = small()
    assert (gradients(net, net, tokens) - true).abs().max() < 1e-5
    net = small()
    whole = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert (gradients(whole, net, tokens) - true).abs().max() < 1e-5
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = small()
        assert (gradients(DDP(net), net, tokens) - true).abs().max() < 1e-5
    finally:
        dist.destroy_process_group()


def test_under_autocast_the_stream_is_half_precision_and_right():
    q = torch.randn(1, 5, 2, 8, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        assert {attention(q, q, q, 0, b).dtype for b in ("triton", "sdpa")} == {torch.float16}
    tokens = torch.randint(30, (2, 20), device=DEVICE)
    net = small("reference", "reference")
    true = gradients(net, net, tokens)
    for backends in (("triton", "triton"), ("sdpa", "torch")):
        net = small(*backends)
        with torch.autocast(DEVICE, torch.float16):  # the interpreter is wrong in bfloat16
            assert net.gpt(tokens).dtype == torch.float16
            error = (gradients(net, net, tokens) - true).abs().max()
        assert error < 0.02 * true.abs().max()


def test_a_half_precision_branch_on_an_fp32_stream():
    x = torch.randn(3, 24, device=DEVICE, dtype=torch.float16, requires_grad=True)
    r, w = torch.randn(3, 24, device=DEVICE, requires_grad=True), torch.ones(24, device=DEVICE)
    y, total = rms_norm(x, w, 1e-5, r, "triton")
    (y.sum() + total.sum()).backward()
    assert total.dtype == torch.float32 == r.grad.dtype and x.grad.dtype == torch.float16
    assert torch.equal(total, x + r)


def test_cached_generation_is_the_same_words():
    tokens = torch.randint(30, (2, 6), device=DEVICE)
    said = [
        torch.stack([*small(*backends).generate(tokens, max_new_tokens=10)])
        for backends in (("triton", "triton"), ("reference", "reference"))
    ]
    assert torch.equal(*said)


def test_what_cannot_run_is_one_clear_line(monkeypatch):
    wide = torch.ones(1, 2, 1, 256, device=DEVICE)
    with pytest.raises(ValueError, match="vectors up to 128 wide, not 256"):
        attention(wide, wide, wide, backend="triton")
    with pytest.raises(ValueError, match="float16, not float64"):
        rms_norm(wide.double(), wide[0, 0, 0].double(), 1e-5, None, "triton")
    with pytest.raises(ValueError, match="no backend 'flash'"):
        attention(wide, wide, wide, backend="flash")
    with pytest.raises(ValueError, match="H a multiple of H_kv"):
        attention(wide, wide[:, :1], wide[:, :1])
    with pytest.raises(ValueError, match=r"weight \(3,\) must be as its last axis"):
        rms_norm(wide, torch.ones(3, device=DEVICE), 1e-5)
    with pytest.raises(ValueError, match="the residual as all of it"):
        rms_norm(wide, wide[0, 0, 0], 1e-5, wide[:, :1])
    with pytest.raises(ValueError, match="of one dtype"):
        attention(wide, wide, wide.half())
    monkeypatch.setattr(kernels, "INTERPRET", False)
    assert "NVIDIA GPU, and this is to run on cpu" in kernels.lacking("cpu")
    monkeypatch.setattr(kernels, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "not installed" in kernels.lacking("cuda")


def test_without_triton_the_file_still_imports_and_computes():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, kernels;"
        "q = torch.ones(1, 2, 1, 8); print(kernels.attention(q, q, q).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "16.0\n", done.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="there it has a use")
def test_triton_is_not_imported_where_no_kernel_can_run():
    """A caption would wait for it, and hold 75 MB more."""
    code = "import sys, sample, train; print('triton' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert done.stdout == "False\n", done.stderr


def run_benchmark(tmp_path, *flags, **env):
    done = subprocess.run(
        [sys.executable, "benchmarks/kernel_speed.py", *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, **env},
    )
    return (
        done.returncode,
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in done.stdout.splitlines()
            if line.startswith("|")
        ],
        done,
    )


def test_every_entry_of_the_table_compiles_without_a_spill(tmp_path, capsys):
    code, rows, done = run_benchmark(
        tmp_path, "--compile", "--gpus=sm_90", "--widths", "64", "128", "--lengths=100",
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    assert code == 0, done.stdout + done.stderr
    with capsys.disabled():
        print(done.stdout if "-s" in sys.argv else "", end="")
    rows = [row for row in rows if row[0].startswith("sm_")]
    # two families of tiles x (two widths x three attention, three widths x two norms); others take
    # as long again, see docs/kernels.md
    assert len(rows) == 2 * (2 * 3 + 3 * 2)
    for _, name, _, dtype, _, _, _, registers, spilled, shared, wgmma, fault in rows:
        assert fault == "" and spilled == "0" and 0 < int(registers) <= 255
        assert int(shared) <= 232_448
        if dtype == "bf16" and name.startswith("attention"):
            assert int(wgmma) > 0


def test_the_gate_would_notice():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks" / "kernel_speed.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    fine = ["sm_90", "attention_forward", "keys 96, D 64", "bf16", "", 4, 2, 200, 0, 1000, 8]
    assert bench.faults(fine) == ""
    for place, value, fault in (
        (8, 8, "8 bytes spilled"),
        (9, 232_449, "shared memory"),
        (10, 0, "no wgmma"),
    ):
        assert fault in bench.faults([*fine[:place], value, *fine[place + 1 :]])
    fine[0] = "sm_80"
    assert "shared" in bench.faults([*fine[:9], 101_377, 0])


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter")
def test_the_benchmark_says_what_it_lacks(tmp_path):
    """Whole it runs in tests/test_benchmarks.py, by benchmarks/gpu.sh."""
    code, _, done = run_benchmark(tmp_path, TRITON_INTERPRET="0")
    assert code == 1 and done.stderr.startswith("error: nothing measured: it needs an NVIDIA GPU")


@gpu
@pytest.mark.parametrize("prefix", [0, 300])
def test_half_precision_errs_no_more_than_sdpa(prefix):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1000, 12, 64, device="cuda", dtype=torch.bfloat16).split(4, 2)
    true = attention_reference(q.double(), k.double(), v.double(), prefix)
    ours, theirs = ((attention(q, k, v, prefix, b) - true).abs().max() for b in ("triton", "sdpa"))
    assert ours < 1.5 * theirs


@gpu
def test_inside_a_cuda_graph():
    q, k, v = torch.randn(2, 100, 12, 64, device="cuda", dtype=torch.bfloat16).split(4, 2)
    w = torch.ones(64, device="cuda")
    attention(q, k, v), rms_norm(q, w, 1e-5)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = attention(q, k, v), rms_norm(q, w, 1e-5)
    q.normal_()
    graph.replay()
    assert torch.equal(y, attention(q, k, v)) and torch.equal(z, rms_norm(q, w, 1e-5))


@gpu
def test_offsets_past_two_to_the_31():
    q = torch.randn(3, 1 << 14, 512, 128, device="cuda", dtype=torch.bfloat16)  # 3.2e9 numbers
    y = attention(q, q[:, :, :1], q[:, :, :1], backend="triton")
    true = attention_reference(q[2:, :50, 500:].double(), *[q[2:, :50, :1].double()] * 2)
    assert (y[2:, :50, 500:] - true).abs().max() < 0.05
