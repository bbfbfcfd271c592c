"""
Measure kernels.py beside what a user would pick instead, on this machine's GPU.

    python benchmarks/kernel_speed.py             # attention, RMSNorm, a training step: tables
    python benchmarks/kernel_speed.py --tiles 64  # time other tiles than the table's, for D 64
    python benchmarks/kernel_speed.py --compile   # no GPU: registers, spills, shared memory

Every figure is the median of `repeats` runs, apart forward and backward, the L2 cache flushed
before each; "+-" is half the distance between the quartiles. "error" is the largest difference
from fp64, output and all gradients, over the largest true value. FlexAttention has its own choice
of tiles, SDPA gets a prefix as an additive mask. Rows that lose are printed too.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0")  # else kernels.py has none to compile without a GPU
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import config
import kernels
import model
from config import UserError, option

# The bytes of shared memory a program may have; sm_80's is what sm_86 and sm_89 have too
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}


@dataclasses.dataclass
class Config(config.Options):
    compile: bool = False  # compile every kernel without a GPU and show what it takes
    gpus: tuple[str, ...] = option((*SHARED,), choices=(*SHARED,))  # of --compile
    widths: tuple[int, ...] = (8, 32, 40, 64, 72, 128)  # head widths, of --compile
    lengths: tuple[int, ...] = (96, 100)  # of --compile: a multiple of 16, and another
    tiles: int = option(0, low=0, high=128)  # time other tiles than the table's, for this width
    quick: bool = False  # tiny shapes: does it run at all?
    repeats: int = option(30, low=2, high=10**6)  # runs a figure
    device: str = "cuda"  # cpu runs Triton's interpreter (TRITON_INTERPRET=1): with --quick only


# ---------------------------------------------------------------------------------------------
# Compiling without a GPU

KERNELS = (
    "attention_forward",
    "attention_backward_q",
    "attention_backward_kv",
    "norm_forward",
    "norm_backward",
)


def record(families, widths, lengths, norms=(256, 1000, 8192)):
    """What the launchers pass to each kernel, for every entry of TILES: (kernel, args, options)."""
    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((self.kernel, args, options))

    before = {name: getattr(kernels, name) for name in (*KERNELS, "family")}
    for name in KERNELS:
        setattr(kernels, name, Recorder(before[name]))
    for family in families:
        kernels.family = lambda x: family
        dtype = torch.float32 if family == "fp32" else torch.bfloat16
        for D, T in itertools.product(widths, lengths):
            q, k, v = torch.zeros(2, T, 8, D, dtype=dtype).split([4, 2, 2], 2)
            o, log = kernels.attention_forward_op(q, k, v, 0)
            kernels.attention_backward_op(q, k, v, o, log, o, 0)
        for width in norms:
            x, weight = torch.zeros(64, width, dtype=dtype), torch.ones(width)
            y, total, rstd = kernels.norm_forward_op(x, x, weight, 1e-5)
            kernels.norm_backward_op(y, total, total, weight, rstd)
    for name, value in before.items():
        setattr(kernels, name, value)
    return launches


def compile_one(launch, capability):
    """A row of compile_all's table, without the GPU: a launch compiled for sm_<capability>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, options = launch
    options = dict(options)
    build = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    signature, constants, facts = {}, {}, {}
    names = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    passed = dict(zip((p.name for p in kernel.params), args)) | options
    for i, parameter in enumerate(kernel.params):
        value = passed[parameter.name]
        if parameter.is_constexpr or isinstance(value, int) and value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:  # as a launch does, tell the compiler which pointers and strides divide by 16
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = names[value.dtype] if tensor else "i32"
            if tensor or value % 16 == 0:
                facts[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, facts),
        target=GPUTarget("cuda", capability, 32),
        options=build,
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], text=True, check=True, capture_output=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    tile = [passed.get(key) for key in ("BLOCK_D", "BLOCK_M", "BLOCK_N", "BLOCK_C", "ROWS")]
    at = ("keys", "D") if "keys" in passed else ("width",)
    return [
        kernel.__name__,
        ", ".join(f"{name} {passed[name]}" for name in at),
        signature[kernel.params[0].name][1:],
        " x ".join(str(n) for n in tile if n),
        build["num_warps"],
        build.get("num_stages", ""),
        registers,
        stack,
        compiled.metadata.shared,
        len(re.findall(r"wgmma\.mma_async", compiled.asm["ptx"])),
    ]


def compile_all(gpus, widths, lengths):
    """One row a kernel and entry of TILES. Returns them; main prints them and judges."""
    jobs = []
    for gpu in gpus:
        capability = int(gpu.removeprefix("sm_"))
        families = (kernels.family_of(capability // 10), "fp32")
        jobs += [(launch, capability) for launch in record(families, widths, lengths)]
    global compile_job  # a forked process finds the jobs where they are: kernels do not pickle

    def compile_job(number):
        return [f"sm_{jobs[number][1]}", *compile_one(*jobs[number])]

    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return pool.map(compile_job, range(len(jobs)), chunksize=1)


def faults(row):
    """What is wrong with a row of compile_all: nothing, if the kernel may ship."""
    arch, kernel, _, dtype, _, _, _, _, stack, shared, wgmma = row
    # in fp32 the kernels are for checking, and may be slow
    wrong = [f"{stack} bytes spilled"] if stack and dtype != "fp32" else []
    if shared > SHARED[arch]:
        wrong.append(f"{shared:,} bytes of shared memory")
    if arch == "sm_90" and dtype == "bf16" and kernel.startswith("attention") and not wgmma:
        wrong.append("no wgmma")
    return ", ".join(wrong)


# ---------------------------------------------------------------------------------------------
# Timing


def table(title, columns, rows):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def timed(call, settings):
    """(median, half the distance between the quartiles) of a call, in ms."""
    for _ in range(3):
        call()
    if settings.device == "cpu":
        stamps = [time.perf_counter()]
        for _ in range(settings.repeats):
            call()
            stamps.append(time.perf_counter())
        took = [1000 * (b - a) for a, b in zip(stamps, stamps[1:])]
    else:
        flush = torch.empty(256 << 20, dtype=torch.int8, device=settings.device)
        took = []
        for _ in range(settings.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(5_000_000)  # cycles: all is queued before the GPU's clock starts
            start.record()
            call()
            end.record()
            took.append((start, end))
        torch.cuda.synchronize()
        took = [start.elapsed_time(end) for start, end in took]
    low, middle, high = statistics.quantiles(took, n=4)
    return middle, (high - low) / 2


def compiled(function, settings, **options):
    """torch.compile; in a quick run without Inductor, whose C++ takes minutes to build."""
    backend = "aot_eager" if settings.quick else "inductor"
    return torch.compile(function, backend=backend, **options)


def error(got, true):
    """The largest of |got - true| / max |true| over pairs of tensors; got may have more rows."""
    got = [a.detach()[: len(t)] for a, t in zip(got, true)]
    return max(float((a - t).abs().max() / t.abs().max()) for a, t in zip(got, true))


def cells(name, make, inputs, grads, true, work, work_back, unit, floor, settings):
    """A row: the name, then forward and backward of the function that make() gives, in ms and as a
    rate (`work` a call, in `unit`s a second and in percent of `floor`), and its error against the
    `true` outputs and gradients. One cell says why, where another's backend has no answer."""
    try:
        function = make()
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        back = functools.partial(torch.autograd.grad, outputs, inputs, grads, retain_graph=True)
        wrong = error([*outputs, *back()], true)
        forward, backward = timed(lambda: function(*inputs), settings), timed(back, settings)
    except Exception as reason:
        line = (str(reason).splitlines() or [""])[0].replace("|", "/")
        if name == "ours" or "CUDA error" in line:  # the first must work, after the second nothing
            raise
        return [name, f"{type(reason).__name__}: {line[:60]}", "", "", "", ""]
    row = [name]
    for (ms, spread), done in ((forward, work), (backward, work_back)):
        rate = done / ms * 1e3
        row += [f"{ms:.3f} +- {spread:.3f}", f"{rate / unit:.0f} ({100 * rate / floor:.0f} %)"]
    return [*row, f"{wrong:.1e}" if wrong < 0.1 else f"WRONG: {wrong:.1e}"]


def truth(function, inputs, grads):
    """Outputs and gradients of a function of fp64 copies, detached."""
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = torch.autograd.grad(outputs, inputs, [g.double() for g in grads])
    return [x.detach() for x in (*outputs, *found)]


def floors(settings):
    """(bytes/s of a copy, bf16 FLOP/s of a square product): what this machine can do at most."""
    n = 1 << (10 if settings.quick else 13)
    a = torch.randn(n, n, device=settings.device, dtype=torch.bfloat16)
    big = torch.empty(n * n * 8, device=settings.device, dtype=torch.bfloat16)
    other = torch.empty_like(big)
    for _ in range(1 if settings.quick else 300):  # half a second: the clocks of a cold GPU are low
        a @ a
    copy, _ = timed(lambda: other.copy_(big), settings)
    product, _ = timed(lambda: a @ a, settings)
    return 2 * big.nbytes / copy * 1e3, 2 * n**3 / product * 1e3


def peers(prefix, T, dtype, settings):
    """{name: attention of (B, T, H, D)} : ours and all that PyTorch offers, each forced apart."""
    mask = None
    if prefix:
        mask = torch.zeros(T, T, device=settings.device, dtype=dtype)
        mask.masked_fill_(~kernels.visible(T, T, prefix, settings.device), float("-inf"))

    def sdpa(backend, q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, is_causal=not prefix
            ).transpose(1, 2)

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        blocks = create_block_mask(
            lambda b, h, i, j: (j <= i) | (j < prefix), None, None, T, T, device=settings.device
        )
        fast = compiled(flex_attention, settings, dynamic=False)
        return lambda q, k, v: fast(
            *(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks
        ).transpose(1, 2)

    named = {"ours": lambda: lambda q, k, v: kernels.attention(q, k, v, prefix, "triton")}
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        named[f"sdpa {name}"] = functools.partial(lambda b: functools.partial(sdpa, b), backend)
    return named | {"flex, compiled": flex}


def attention_table(settings, floor):
    shapes = [
        (64, 512, 8, 64, 0),
        (64, 1024, 8, 64, 0),
        (32, 2048, 8, 64, 0),
        (16, 4096, 8, 64, 0),
        (64, 1024, 8, 32, 0),
        (64, 1024, 4, 128, 0),
        (32, 2048, 4, 128, 0),
        (64, 1024, 8, 64, 256),
        (32, 2048, 8, 64, 576),
    ]
    if settings.quick:
        shapes = [(1, 20, 2, 16, 0), (1, 20, 2, 16, 5)]
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    for B, T, H, D, prefix in shapes:
        torch.compiler.reset()  # each shape compiled for itself
        q, k, v = torch.randn(B, T, 3 * H, D, device=settings.device, dtype=dtype).split(H, 2)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        grads = [torch.randn(B, T, H, D, device=settings.device, dtype=dtype)]
        pairs = int(kernels.visible(T, T, prefix, "cpu").sum())
        work = 4 * B * H * D * pairs  # two products, a multiplication and an addition each
        true = truth(
            functools.partial(kernels.attention_reference, prefix=prefix),
            [x[:1] for x in inputs],
            [grads[0][:1]],
        )
        rows = [
            cells(name, make, inputs, grads, true, work, 2.5 * work, 1e12, floor, settings)
            for name, make in peers(prefix, T, dtype, settings).items()
        ]
        table(
            f"attention, {str(dtype)[6:]}, B {B}, T {T}, H {H}, D {D}, prefix {prefix}; FLOP = 4 "
            "B H D x visible pairs, backward 2.5 times that; % of a large matrix product",
            ["", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "error"],
            rows,
        )


def norm_table(settings, floor):
    def eager(x, r, w):
        total = x + r
        return F.rms_norm(total, w.shape, w, 1e-5), total

    def liger():
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Fused

        return lambda x, r, w: Fused.apply(x, r, w, 1e-5, 0.0, "llama", False)

    named = {
        "ours": lambda: lambda x, r, w: kernels.rms_norm(x, w, 1e-5, r, "triton"),
        "eager": lambda: eager,
        "torch.compile": lambda: compiled(eager, settings, dynamic=False),
        "Liger": liger,
    }
    shapes = [(262144, 256), (65536, 512), (65536, 768), (16384, 4096)]
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    for many, width in [(40, 24)] if settings.quick else shapes:
        torch.compiler.reset()
        inputs = [
            torch.randn(many, width, device=settings.device, dtype=dtype, requires_grad=True)
            for _ in range(2)
        ]
        inputs.append(torch.ones(width, device=settings.device, dtype=dtype, requires_grad=True))
        grads = [torch.randn_like(inputs[0]) for _ in range(2)]
        work = 4 * inputs[0].nbytes  # two tensors in, two out; backward: three in, one out
        true = truth(eager, inputs, grads)
        rows = [
            cells(name, make, inputs, grads, true, work, work, 1e9, floor, settings)
            for name, make in named.items()
        ]
        table(
            f"RMSNorm with residual, {str(dtype)[6:]}, {many} x {width}; bytes = 4 tensors of "
            "that shape each way; % of a copy's bandwidth",
            ["", "forward ms", "GB/s", "backward ms", "GB/s", "error"],
            rows,
        )


def step_table(settings):
    """Training steps of the default model on 64k tokens: forward, loss, backward, AdamW."""
    B, T = (2, 16) if settings.quick else (64, 1024)
    sizes = {"n_layer": 8, "n_head": 8, "n_embd": 256, "vocab_size": 6000}
    if settings.quick:
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 50}
    rows = []
    for compiling in (False, True):
        for attention, norm in (
            ("triton", "triton"),
            ("sdpa", "torch"),
            ("reference", "reference"),
        ):
            torch.manual_seed(0)
            torch.compiler.reset()
            gpt = model.GPTConfig(**sizes, block_size=T, attention=attention, norm=norm)
            net = model.BabyLLaVA(model.GPT(gpt)).to(settings.device)
            adam = torch.optim.AdamW(net.parameters(), 1e-3, fused=settings.device == "cuda")
            tokens = torch.randint(gpt.vocab_size, (B, T), device=settings.device)
            run = compiled(net, settings) if compiling else net

            def step(run=run, adam=adam, tokens=tokens):
                with torch.autocast("cuda", torch.bfloat16, enabled=settings.device == "cuda"):
                    _, loss = run(tokens, tokens)
                loss.backward()
                adam.step()
                adam.zero_grad(set_to_none=True)

            try:
                ms, spread = timed(step, settings)
                figures = [f"{ms:.2f} +- {spread:.2f}", f"{B * T / ms * 1e3:,.0f}"]
            except torch.OutOfMemoryError:
                figures = ["out of memory", ""]
            rows.append([attention, norm, "compiled" if compiling else "eager", *figures])
            size = sum(p.numel() for p in net.parameters())
            del net, adam, run, step
            if settings.device == "cuda":
                torch.cuda.empty_cache()
    table(
        f"a training step, {B} x {T} tokens, {size:,} parameters",
        ["attention", "norm", "", "ms", "tokens/s"],
        rows,
    )


def tiles_table(settings):
    """Time the attention kernels with other tiles; the table's own are marked."""
    D, key = settings.tiles, 64 if settings.tiles <= 64 else 128
    q, k, v = torch.randn(
        32, 1024, 3 * 512 // D, D, device=settings.device, dtype=torch.bfloat16
    ).split(512 // D, 2)
    o, log = kernels.attention_forward_op(q, k, v, 0)
    delta, grads = torch.empty_like(log), [torch.empty_like(o) for _ in range(3)]
    name = kernels.family(q)
    mine = kernels.TILES[name][key]
    launches = [
        (kernels.attention_forward, (o, log)),
        (kernels.attention_backward_q, (o, o, log, delta, grads[0])),
        (kernels.attention_backward_kv, (o, log, delta, *grads[1:])),
    ]
    for which, (kernel, others) in enumerate(launches):
        found = []
        for tile in {
            mine[which],
            *(
                (M, N, warps, stages)
                for M in (32, 64, 128)
                for N in (32, 64, 128)
                for warps in (4, 8)
                for stages in (2, 3)
                if 2048 <= M * N <= 8192 * warps // 4
            ),
        }:
            kernels.TILES[name][key] = (tile,) * 3
            try:
                ms, _ = timed(lambda: kernels.launch(kernel, which, q, k, v, 0, *others), settings)
                found.append((ms, tile, "the table's" if tile == mine[which] else ""))
            except Exception as reason:
                if "out of resource" not in str(reason):  # more shared memory than there is
                    raise
        kernels.TILES[name][key] = mine
        table(
            f"{KERNELS[which]}, {name}, D {D}",
            ["ms", "M, N, warps, stages", ""],
            [[f"{ms:.3f}", *rest] for ms, *rest in sorted(found)],
        )


def main(argv):
    settings = config.load(Config, argv, __doc__)
    if settings.compile:
        rows = compile_all(settings.gpus, settings.widths, settings.lengths)
        table(
            "Compiled without a GPU",
            [
                "for",
                "kernel",
                "of",
                "dtype",
                "tile",
                "warps",
                "stages",
                "registers",
                "spilled",
                "shared",
                "wgmma",
                "",
            ],
            [[*row, faults(row)] for row in rows],
        )
        if any(faults(row) for row in rows):
            raise UserError("a kernel spills, or asks for more shared memory than there is")
        return
    torch._functorch.config.donated_buffer = False  # backward is run again on the same graph
    if why := kernels.lacking(settings.device):
        raise UserError(f"nothing measured: {why}. --compile needs no GPU")
    if settings.device == "cuda":
        import triton

        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0]
        print(
            f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}, torch "
            f"{torch.__version__}, triton {triton.__version__}, {time.strftime('%Y-%m-%d')}"
        )
    if settings.tiles:
        return tiles_table(settings)
    copy, product = floors(settings)
    print(f"a copy: {copy / 1e9:,.0f} GB/s; a bf16 matrix product: {product / 1e12:,.1f} TFLOP/s")
    attention_table(settings, product)
    norm_table(settings, copy)
    step_table(settings)
    copy, product = floors(settings)
    print(
        f"\nat the end, a copy: {copy / 1e9:,.0f} GB/s; a bf16 matrix product: "
        f"{product / 1e12:,.1f} TFLOP/s"
    )


if __name__ == "__main__":
    config.run(main)
