"""
How much of a machine's arithmetic training and the tower use, beside its matrix products alone.

    python benchmarks/utilization.py
    python benchmarks/utilization.py --work phase2 --widths 512

On a GPU with 65,536 tokens a step, in bf16, compiled; on a CPU 2,048, in fp32, eager (all of it
takes seven minutes on two cores). A step is train.py's own, on a batch that is there already: a GPT
of 12 layers in heads of 64; phase 0 in rows of 1,024 tokens, phases 1 and 2 in samples of 196 image
tokens, stored features 384 wide, and 60 words. Features are those of a ViT-B/14, from frames of 224
x 224 to what is written.

FLOP: multiplications and additions in matrix products that the result needs, forward and backward,
counted by torch.utils.flop_counter in the plain formulas: attention in full, masked or not, and
nothing twice that a kernel computes again. "of products": the FLOP/s beside those of a product of
two large square matrices in the same dtype, measured here (known as MFU). "busy": the share of time
in which a GPU ran anything.
"""

import copy
import dataclasses
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peers import timed
from sides import Ours, Shape
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import config
from common.images import ImageFormat
from config import option
from fast.memory import keep_memory
from model import BabyLLaVA
from training import features
from vision import ViT

WORK = ("language", "phase1", "phase2", "features")
P, WORDS, ROW = 196, 60, 1024


@dataclasses.dataclass
class Config(config.Options):
    work: tuple[str, ...] = option(WORK, choices=WORK)  # what to measure
    widths: tuple[int, ...] = (256, 512, 768)  # of the GPT; multiples of 64
    tokens: int = option(0, low=0, high=1 << 24)  # a step; 0: 65,536 on a GPU, 2,048 on a CPU
    frames: int = option(0, low=0, high=1 << 20)  # for features; 0: 2,048 on a GPU, 64 on a CPU
    steps: int = option(10, low=1, high=10**6)  # of each, after three that do not count
    side: int = option(0, low=0, high=1 << 16)  # of the square matrices; 0: 8,192, on a CPU 2,048
    compile: str = option("", choices=("", "on", "off"))  # torch.compile; empty: on for cuda
    device: str = ""  # cpu or cuda; empty: cuda where there is one


def rate(dtype, device, side):
    """FLOP/s of the product of two square matrices, the best of many."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / (min(timed(lambda: a @ a, device) for _ in range(30)) / 1e3)


def count_flops(run):
    """The FLOPs of run(), which must be in fp64: then all products are PyTorch's, and counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def shape_of(work, width, tokens):
    sizes = {"layers": 12, "width": width, "heads": width // 64}
    if work == "language":
        row = min(ROW, tokens)
        return Shape(0, (), batch=tokens // row, words=row, **sizes)
    return Shape(224, (384, 12, 6), batch=max(1, tokens // (P + WORDS)), words=WORDS, **sizes)


def step_flops(work, shape):
    """Of a whole batch, from one row's."""
    cpu = torch.device("cpu")
    side = Ours(dataclasses.replace(shape, batch=1), work, cpu)
    side.prepare("eager")  # what learns decides which gradients are wanted
    side.model.double()
    inputs = side.model.inputs(side.batch, side.run.dataset.image_format, 0, 0)
    return shape.batch * count_flops(lambda: side.model(*inputs)[1].backward())


def busy_share(spans):
    """The share of the time from the first start to the last end that (start, end)s cover."""
    covered, until = 0.0, min(start for start, _ in spans)
    first = until
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered / (until - first)


def busy(step, steps, device):
    """The share of some steps' time in which a GPU ran anything; "-" on a CPU."""
    if device.type != "cuda":
        return "-"
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        # annotations such as "Optimizer.step" span what runs inside them, pauses too
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return f"{busy_share(spans):.1%}"


def measure(action, settings, device):
    """(the median of its milliseconds, how busy it keeps a GPU)."""
    took = [timed(action, device) for _ in range(settings.steps + 3)]
    return statistics.median(took[3:]), busy(action, settings.steps, device)


def measure_step(work, width, settings, device):
    """(what, tokens, FLOP, ms, busy) of a step."""
    shape = shape_of(work, width, settings.tokens)
    side = Ours(shape, work, device)
    side.prepare("compiled" if settings.compile == "on" else "eager", dtype="")
    tokens = shape.batch * (shape.image_tokens + shape.words)
    return (
        f"{work}, {width} wide",
        tokens,
        step_flops(work, shape),
        *measure(side.step, settings, device),
    )


def measure_features(settings, device):
    """The same of a tower's features, of frames."""
    image_format = ImageFormat(224)
    model = BabyLLaVA(None, tower=ViT(224, 14, 768, 12, 12)).eval()
    plain = copy.deepcopy(model).double()
    pixels = torch.zeros(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        flops = settings.frames * count_flops(lambda: plain.encode_images(pixels))
    model.to(device)
    frames = torch.randint(0, 256, (settings.frames, 224, 224, 3), dtype=torch.uint8).numpy()
    action = lambda: list(features.extract(model, frames, image_format, device))  # noqa: E731
    return "features, ViT-B/14", settings.frames, flops, *measure(action, settings, device)


def main(argv):
    settings = config.load(Config, argv, __doc__)
    if any(width < 64 or width % 64 for width in settings.widths):
        raise config.UserError("--widths: multiples of 64 are wanted, the width of a head")
    device = checkpoint.choose_device(settings.device)
    on_gpu = device.type == "cuda"
    settings.tokens = settings.tokens or (65536 if on_gpu else 2048)
    settings.frames = settings.frames or (2048 if on_gpu else 64)
    settings.compile = settings.compile or ("on" if on_gpu else "off")
    side = settings.side or (8192 if on_gpu else 2048)
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # as train.py does
    else:
        keep_memory()  # so does it this
    dtypes = {"features": torch.float32}
    dtypes |= dict.fromkeys(WORK[:3], torch.bfloat16 if on_gpu else torch.float32)
    rates = {dtype: rate(dtype, device, side) for dtype in set(dtypes.values())}
    name = (
        torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    )
    told = ", ".join(f"{str(dtype)[6:]} {flops / 1e12:.2f}" for dtype, flops in rates.items())
    print(
        f"torch {torch.__version__}, {name}; products of {side} x {side}, TFLOP/s: {told}\n\n"
        "| work | dtype | ms | tokens or frames/s | TFLOP/s | of products | busy | GB |\n"
        + "|---" * 8
        + "|"
    )
    jobs = [
        partial(measure_step, work, width)
        for work in settings.work
        if work != "features"
        for width in settings.widths
    ]
    jobs += [measure_features] * ("features" in settings.work)
    for job in jobs:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        what, units, flops, ms, share = job(settings, device)
        dtype = dtypes[what.split(",")[0]]
        speed = flops / ms * 1e3
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if on_gpu else "-"
        print(
            f"| {what} | {str(dtype)[6:]} | {ms:.1f} | {units / ms * 1e3:,.1f} | "
            f"{speed / 1e12:.3f} | {speed / rates[dtype]:.1%} | {share} | {memory} |",
            flush=True,
        )


if __name__ == "__main__":
    config.run(main)
