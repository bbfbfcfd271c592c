"""
Our speed beside what a user would pick instead: transformers' GPT2LMHeadModel and LlamaForCausalLM
(phase 0) and LlavaForConditionalGeneration (phases 1 and 2, generation).

    pip install transformers
    python benchmarks/peers.py                                  # all of it
    python benchmarks/peers.py --work phase2 --shapes B --modes eager
    python benchmarks/peers.py --work memory start

All are given the same shapes, precision and threads, each in a process of its own as its users have
it, and take turns, step by step, so that whatever else the machine does slows all alike. A step is
forward, loss, backward, clipping and AdamW: ours is train.py's own take_step(), theirs what their
own trainer does. Ratios are those of one round, so above 1 ours is faster, and are given as median
and quartiles; "best" compares the faster of eager and compiled on either side.

Our phases 1 and 2 read features from a file, because the tower is frozen; theirs run it in each
step. So that this alone does not decide, its time is taken off theirs, measured beside it. Shapes,
32 words each, all of them targets, GPT 256 wide, 6,000 tokens:

    S    image 96 / 16 (36 tokens), ViT 192 wide of 4 layers, GPT of 4 layers, 4 heads, batch 8
    B    image 224 / 16 (196 tokens), ViT 384 wide of 12 layers, GPT of 8 layers, 4 heads, batch 4
    L    phase 0: no image, GPT of 8 layers, 4 heads, 256 words, all of them targets, batch 8
    G    for a GPU: as B, but a GPT of 12 layers 768 wide, 64 words, batch 64

In fp32 on a CPU; steps on a GPU are in bf16 autocast on both sides.
"""

import dataclasses
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from sides import SHAPES, make_side

import checkpoint
import config
from config import option

ROOT = Path(__file__).resolve().parent.parent
WORK = ("language", "phase1", "phase2", "generation", "memory", "start")
MODES = ("eager", "compiled")


@dataclasses.dataclass
class Config(config.Options):
    work: tuple[str, ...] = option(WORK, choices=WORK)  # what to measure
    shapes: tuple[str, ...] = option(
        ("S", "B"), choices=("S", "B", "G")
    )  # of all but phase 0, which is L
    modes: tuple[str, ...] = option(MODES, choices=MODES)  # of steps; all else is eager
    rounds: int = option(
        15, low=3, high=10**6
    )  # all take a step in each, after 3 that do not count
    device: str = ""  # cpu or cuda; empty: cuda where there is one
    one: str = option("", choices=("", "ours", "LLaVA"))  # its memory alone, for --work memory


# ---------------------------------------------------------------------------------------------
# Taking turns


def timed(action, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def take_turns(actions, rounds):
    """{name: [ms in each round]} of actions that return the ms they took; all act once a round,
    after three rounds that do not count."""
    took = {name: [] for name in actions}
    for number in range(rounds + 3):
        for name, action in actions.items():
            ms = action()
            if number >= 3:
                took[name].append(ms)
    return took


def serve(pipe, kind, shape, work, mode, device):
    """A side in its own process: it does what it is told, and tells how long that took."""
    side = make_side(kind, shape, work, mode, device)
    if work == "generation":
        side.model.eval()
    with suppress(EOFError):  # until nobody holds the other end
        while True:
            name, arguments = pipe.recv()
            pipe.send(timed(partial(getattr(side, name), *arguments), device))


def start_sides(kinds, shape, work, modes, device):
    """{(kind, mode): do}, do("step") being the ms that it took: each in a process that ends with
    this one."""
    context, sides = multiprocessing.get_context("spawn"), {}
    for mode in modes:
        for kind in kinds:
            mine, its = context.Pipe()
            arguments = its, kind, shape, work, mode, device
            context.Process(target=serve, args=arguments, daemon=True).start()
            its.close()
            sides[kind, mode] = partial(tell, mine)
    return sides


def tell(pipe, name, *arguments):
    pipe.send((name, arguments))
    return pipe.recv()  # EOFError: it ended, and has said why


def spread(values, digits):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def print_times(work, name, took):
    for (who, mode), values in took.items():
        print(f"| {work} | {name} | {who} | {mode} | {spread(values, 1)} |", flush=True)


def best_ratio(ours, theirs):
    """Of {mode: values} of both sides the ratios theirs / ours, each side in its faster mode."""
    a, b = (min(side.values(), key=statistics.median) for side in (ours, theirs))
    return [y / x for x, y in zip(a, b)]


def compare(settings, work, name, took):
    """Print the times of {(who, mode): ms}, return lines with the ratios to each peer."""
    print_times(work, name, took)
    sides = {}
    for (who, mode), values in took.items():
        sides.setdefault(who, {})[mode] = values
    ours, lines = sides.pop("ours"), []
    for who, modes in sides.items():
        each = [
            spread(best_ratio({mode: ours[mode]}, {mode: modes[mode]}), 2) if mode in modes else "-"
            for mode in settings.modes
        ]
        lines.append([work, name, who, *each, spread(best_ratio(ours, modes), 2)])
    return lines


def take_off(took, who, looks):
    """Take the tower's time off, round by round."""
    took[who] = [whole - look for whole, look in zip(took[who], looks)]


def training(settings, work, name, device):
    """Steps of a phase, ours beside theirs."""
    shape, kinds = SHAPES[name], ("LLaVA",) if work != "language" else ("GPT-2", "Llama")
    actions = {}
    sides = start_sides(("ours", *kinds), shape, work, settings.modes, device)
    for (kind, mode), do in sides.items():
        actions[kind, mode] = partial(do, "step")
        if kind == "LLaVA":
            actions["its tower", mode] = partial(do, "look", shape.batch)
    took = take_turns(actions, settings.rounds)
    for mode in settings.modes:
        if ("its tower", mode) in took:
            looks = {("its tower", mode): took.pop(("its tower", mode))}
            print_times(work, name, looks)
            take_off(took, ("LLaVA", mode), *looks.values())
    return compare(settings, work, name, took)


def generation(settings, name, device):
    """Greedy answers of sides.ANSWER tokens to a picture and a word, the tower's time taken off."""
    sides = start_sides(("ours", "LLaVA"), SHAPES[name], "generation", ("eager",), device)
    ours, theirs = sides["ours", "eager"], sides["LLaVA", "eager"]
    lines = []
    for rows in (1, 8):
        actions = {
            ("ours", "eager"): partial(ours, "say", rows),
            ("LLaVA", "eager"): partial(theirs, "say", rows),
            ("our tower", "eager"): partial(ours, "look", rows),
            ("its tower", "eager"): partial(theirs, "look", rows),
        }
        took = take_turns(actions, settings.rounds)
        print_times(f"generation, {rows} at once", name, took)
        for who, tower in (("ours", "our tower"), ("LLaVA", "its tower")):
            take_off(took, (who, "eager"), took.pop((tower, "eager")))
        lines += compare(settings, f"generation, {rows} at once, without towers", name, took)
    return lines


# ---------------------------------------------------------------------------------------------
# In processes of their own


def again(*flags):
    """(seconds, what it printed) of this file or another in a fresh process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, flags))}: {done.stderr[-3000:]}")
    return time.perf_counter() - start, done.stdout


def memory(settings, name, device):
    """The largest memory of a process that takes five steps of phase 2, libraries and all; on a
    GPU that of its tensors."""
    peaks = {}
    for who in ("ours", "LLaVA"):
        flags = f"--one={who}", f"--shapes={name}", f"--device={device}"
        peaks[who] = float(again(__file__, *flags)[1])
        print(f"| memory, phase 2 | {name} | {who} | eager | {peaks[who]:.0f} MB |", flush=True)
    ratio = f"{peaks['LLaVA'] / peaks['ours']:.2f}"
    return [["memory, phase 2", name, "LLaVA", *["-"] * len(settings.modes), ratio]]


def measure_one(settings, device):
    side = make_side(settings.one, SHAPES[settings.shapes[0]], "phase2", "eager", device)
    for _ in range(5):
        side.step()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e6)
    else:
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)  # it is in KiB


# What a user of transformers types for a caption of a picture.
THEIR_CAPTION = """
import sys
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1]).to(sys.argv[3])
picture = Image.open(sys.argv[2]).convert("RGB")
inputs = processor(images=picture, text="<image>", return_tensors="pt").to(sys.argv[3])
said = model.generate(**inputs, max_new_tokens=50, do_sample=False)
print(processor.decode(said[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def start(settings, name, device):
    """From the command line to the first caption of the model that comes with the repository, and
    of the same model exported for transformers."""
    picture, flags = ROOT / "assets" / "scene.png", f"--device={device}"
    with tempfile.TemporaryDirectory() as folder:
        again(ROOT / "export.py", ROOT / "assets/toy.pt", f"{folder}/llava")
        said, took = {}, {("ours", "eager"): [], ("LLaVA", "eager"): []}
        for _ in range(settings.rounds):
            for who, command in (
                ("ours", (ROOT / "sample.py", f"--image={picture}", flags)),
                ("LLaVA", ("-c", THEIR_CAPTION, f"{folder}/llava", picture, device)),
            ):
                seconds, said[who] = again(*command)
                took[who, "eager"].append(1000 * seconds)
    print(f"ours: {said['ours'].strip()}; theirs: {said['LLaVA'].strip()}", file=sys.stderr)
    return compare(settings, "cold start to a caption", "toy", took)


def main(argv):
    settings = config.load(Config, argv, __doc__)
    device = checkpoint.choose_device(settings.device)
    if settings.one:
        return measure_one(settings, device)
    import transformers

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {device}, "
        f"{'bf16' if device.type == 'cuda' else 'fp32'}, {torch.get_num_threads()} threads\n\n"
        "| work | shape | who | mode | ms |\n|---|---|---|---|---|"
    )
    measure = {"generation": generation, "memory": memory, "start": start}
    lines = []
    for work in settings.work:
        names = {"language": ("L",), "start": ("toy",)}.get(work, settings.shapes)
        for name in names:
            if work in measure:
                lines += measure[work](settings, name, device)
            else:
                lines += training(settings, work, name, device)
    heads = ["work", "shape", "beside", *settings.modes, "best"]
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    config.run(main)
