"""
What each operation of fast/ buys, measured alone: the same step with that one operation replaced by
its plain form.

    python benchmarks/fast_paths.py
    python benchmarks/fast_paths.py --work language --rounds 15

Eager, fp32, two threads. One process; the variants take turns, a step each a round, so that
whatever else the machine does slows all alike. Work: a step of phase language (shape L of
peers.py), of phase 2 (shapes S and B), a DINO step, 64 tokens generated after a picture (shape S),
and a vocabulary of byte pairs. A gain of 1.05 says that the step takes 1.05 times as long without
this operation.
"""

import dataclasses
import re
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peers import spread, take_turns, timed
from sides import SHAPES, Ours, make_run

import batches
import config
import dino
import tokenizer
import train
from common.images import ImageFormat
from config import option
from fast import products
from fast.bpe import train_bpe
from fast.memory import keep_memory
from sources import toy
from vision import ViT

WORK = ("language", "phase2", "dino", "generation", "bpe")


@dataclasses.dataclass
class Config(config.Options):
    work: tuple[str, ...] = option(WORK, choices=WORK)  # what to measure
    rounds: int = option(9, low=3, high=10**6)  # each variant takes a step in each
    keep_memory: bool = True  # let the C library keep freed memory: compare two runs


def plain_batch(self, device, image_format, to=batches.Batch.to):
    return *to(self, device, image_format)[:-1], 0


def plain_encode(self, network, pixels):
    return network["head"](network["backbone"](pixels)[:, 0]).float()


def never(x):
    return False


def always(x):
    return x.dtype == torch.float32


VARIANTS = {  # name: the attributes that are replaced
    "last block from the first target on": [(batches.Batch, "to", plain_batch)],
    "last block of DINO for CLS alone": [(dino.DINO, "encode", plain_encode)],
}
if products.ONEDNN:
    VARIANTS["products by oneDNN"] = [(products, "uses_onednn", never)]
else:
    VARIANTS["products by oneDNN (off on this CPU)"] = [(products, "uses_onednn", always)]


def print_bpe():
    """Train a vocabulary of the toy world's speech with the heap and with the plain loop."""
    counts = Counter()
    for line in toy.speech(toy.Config(), "train", toy.THINGS):
        counts.update(re.findall(tokenizer.PATTERN, " " + line))
    merges = 512 - 256 - len(tokenizer.SPECIALS)
    start = time.perf_counter()
    fast = train_bpe(counts, merges, tokenizer.merge)
    middle = time.perf_counter()
    assert fast == tokenizer.train_bpe_plain(counts, merges)
    plain = time.perf_counter() - middle
    seconds = f"{middle - start:.3f} s, plain {plain:.3f} s"
    print(f"| heap of byte pairs | bpe | {len(counts)} words, {merges} merges | {seconds} |")


def without(replaced, action):
    """action() with some attributes replaced."""

    def run():
        before = [(owner, name, owner.__dict__[name]) for owner, name, _ in replaced]
        for owner, name, value in replaced:
            setattr(owner, name, value)
        try:
            return action()
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)

    return run


def dino_step():
    """A step of DINO on configs/toy.py's tower and batch."""
    model = dino.DINO(*(ViT(64, 8, 128, 4, 4) for _ in range(2)), 128)
    frames = np.random.RandomState(0).randint(0, 256, (2, 32, 64, 64, 3), np.uint8)
    batch = batches.FramePairs(*frames, 0, 32)
    run = make_run(model, "vision", ("student",), torch.device("cpu"), ImageFormat(64))
    return lambda: float(train.take_step(run, 10**5, [batch])[0])


def actions(work, shape):
    """One step, or one answer."""
    if work == "dino":
        return dino_step()
    side = Ours(SHAPES[shape], "generation" if work == "generation" else work, torch.device("cpu"))
    if work == "generation":
        side.model.eval()
        embeds = side.model.embed_images(side.look(1)).detach()
        return lambda: list(side.model.generate(side.prompt[:1], embeds, 64))
    side.prepare("eager")
    return side.step


def main(argv):
    settings = config.load(Config, argv, __doc__)
    torch.set_num_threads(2)
    if settings.keep_memory:
        keep_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, eager")
    print("| operation | work | shape | gain |\n|---|---|---|---|")
    shapes = {"language": ("L",), "phase2": ("S", "B"), "generation": ("S",), "dino": ("toy",)}
    device = torch.device("cpu")
    if "bpe" in settings.work:
        print_bpe()
    for work in settings.work:
        for shape in shapes.get(work, ()):
            step = actions(work, shape)
            variants = {"": [], **VARIANTS, "all of them": sum(VARIANTS.values(), [])}
            took = take_turns(
                {
                    name: partial(timed, without(replaced, step), device)
                    for name, replaced in variants.items()
                },
                settings.rounds,
            )
            base = took.pop("")
            print(f"| (a step) | {work} | {shape} | {statistics.median(base):.1f} ms |")
            for name, values in took.items():
                gain = spread([value / own for value, own in zip(values, base)], 3)
                print(f"| {name} | {work} | {shape} | {gain} |", flush=True)


if __name__ == "__main__":
    config.run(main)
