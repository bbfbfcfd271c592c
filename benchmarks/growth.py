"""
How cost grows: with the length of rows, the batch, the pictures of a sample, and the data set.

    python benchmarks/growth.py
    python benchmarks/growth.py --axes pictures "data set" --draw growth.png

A step is train.py's own on a CPU, eager, fp32, a GPT 256 wide of 4 layers (shape S of sides.py).
Each of four axes doubles or grows tenfold while all else stays; the last column is the cost of one
unit, which is flat where cost grows in step with what is done, and the picture shows that column.
Attention alone makes longer rows dearer by the token. The data set's axis is different: there the
step itself should be flat, however many samples there are, and so the last column is its reading.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peers import timed
from PIL import Image, ImageDraw
from sides import SHAPES, Shape, make_side

import config
import data
from batches import SampleBatches
from common.images import ImageFormat
from config import option
from tokenizer import Tokenizer, caption_sample

CPU = torch.device("cpu")
AXES = ("length", "batch", "pictures", "data set")
COUNTS = {
    "length": (64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8, 16, 32),
    "pictures": (1, 2, 4, 8, 16),
    "data set": (1000, 10_000, 100_000, 1_000_000),
}
UNITS = {
    "length": ("phase 0, 4 rows of so many tokens", "us a token"),
    "batch": ("phase 2, so many samples of shape S", "ms a sample"),
    "pictures": ("phase 2, 4 samples of so many pictures", "ms a picture"),
    "data set": ("so many samples to read 32 from", "ms to read a batch"),
}
P, E = 36, 192  # of a picture's features, as in shape S


@dataclasses.dataclass
class Config(config.Options):
    axes: tuple[str, ...] = option(AXES, choices=AXES)  # along which to measure
    rounds: int = option(9, low=1, high=10**6)  # steps of each count, after two that do not count
    most: int = option(1_000_000, low=1, high=10**9)  # no count above this
    draw: str = ""  # a .png to draw the last column into


def step_ms(axis, count, rounds):
    """The median of a step's milliseconds."""
    shape, work = SHAPES["S"], "phase2"
    if axis == "length":
        shape, work = Shape(0, (), 4, 4, count), "language"
    elif axis == "batch":
        shape = dataclasses.replace(shape, batch=count)
    else:
        shape = dataclasses.replace(shape, batch=4, pictures=count)
    ours = make_side("ours", shape, work, "eager", CPU)
    took = [timed(ours.step, CPU) for _ in range(rounds + 2)]
    return statistics.median(took[2:])


class Eyes:
    """Of a model only what batches ask it: how many tokens an image makes, and what fits."""

    tiled, image_attention = False, "causal"

    class gpt:
        class config:
            block_size = P + 64

    def image_tokens(self, size):
        return P


def make_corpus(folder, count):
    """(its folder, features) of so many samples of one picture; the features are a sparse file."""
    words = "look , that is a red ball over there !"
    tokenizer = Tokenizer.train([words] * 9, 300)
    writer = data.Writer(folder / "made", "made")
    writer.start(tokenizer, ImageFormat(8))
    part, frame = writer.split("train"), np.zeros((8, 8, 3), np.uint8)
    sample = caption_sample(tokenizer, words)
    for clip in range(count):
        part.sample(*sample, [part.image(frame, clip)])
    writer.finish()
    with open(folder / "features.bin", "wb") as file:
        file.truncate(count * P * E * 2)
    features = np.memmap(folder / "features.bin", "float16", "r", shape=(count, P, E))
    return folder / "made", features


def reading(count, rounds):
    """(seconds to open a data set of so many samples, median ms to read a batch of 32 of them)."""
    with tempfile.TemporaryDirectory() as folder:
        made, features = make_corpus(Path(folder), count)
        start = time.perf_counter()
        batches = SampleBatches(data.Data(made), "train", 32, 1, Eyes(), features)
        opened = time.perf_counter() - start
        steps = range(batches.WINDOW * rounds)  # whole windows: the first step of each plans them
        took = []
        for step in steps:
            start = time.perf_counter()
            batches.read(batches.plan(step))
            took.append(1000 * (time.perf_counter() - start))
        windows = np.array(took).reshape(rounds, -1).mean(1)
    return opened, statistics.median(windows.tolist())


def measure(axis, counts, rounds):
    """Print the rows of an axis; return its last column."""
    costs = []
    for count in counts:
        if axis == "data set":
            opened, cost = reading(count, rounds)
            whole = f"{opened:.2f} s to open"
        else:
            ms = step_ms(axis, count, rounds)
            whole = f"{ms:.1f} ms a step"
            cost = 1000 * ms / (4 * count) if axis == "length" else ms / count
            cost = cost / 4 if axis == "pictures" else cost
        costs.append(cost)
        print(f"| {axis} | {count:,} | {whole} | {cost:.3g} {UNITS[axis][1]} |", flush=True)
    return costs


def draw(path, found):
    """A panel for each axis: the cost of one unit, from 0 up, over the counts."""
    wide, high, left, low = 300, 240, 45, 40
    side = 30  # within the axes, for half of the first and of the last number
    picture = Image.new("RGB", (wide * len(found), high), "white")
    pen = ImageDraw.Draw(picture)
    for number, (axis, (counts, costs)) in enumerate(found.items()):
        x0, x1 = number * wide + left, (number + 1) * wide - 15
        top, bottom = 45, high - low
        pen.text((x0, 8), f"{UNITS[axis][0]}:\n{UNITS[axis][1]}", fill="black")
        pen.line([(x0, top), (x0, bottom), (x1, bottom)], fill="grey")
        step = (x1 - x0 - 2 * side) / max(len(counts) - 1, 1)
        places = [
            (x0 + side + i * step, bottom - (bottom - top) * cost / (1.2 * max(costs)))
            for i, cost in enumerate(costs)
        ]
        pen.line(places, fill="navy", width=2)
        for (x, y), count, cost in zip(places, counts, costs):
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill="navy")
            pen.text((x, bottom + 6), f"{count:,}", fill="black", anchor="ma")
            pen.text((x, y - 6), f"{cost:.3g}", fill="navy", anchor="ms")
    picture.save(path)


def main(argv):
    settings = config.load(Config, argv, __doc__)
    if settings.draw and not settings.draw.endswith(".png"):
        raise config.UserError(f"--draw={settings.draw}: want a .png")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, fp32, eager\n")
    print("| axis | count | in all | a unit |\n|---|---|---|---|")
    found = {}
    for axis in settings.axes:
        counts = [count for count in COUNTS[axis] if count <= settings.most]
        if counts:
            found[axis] = counts, measure(axis, counts, settings.rounds)
    if settings.draw and found:
        draw(settings.draw, found)


if __name__ == "__main__":
    config.run(main)
