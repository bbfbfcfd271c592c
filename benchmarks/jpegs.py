"""
Preparing JPEGs beside the loop that one would write with Pillow, for each core.

    python benchmarks/jpegs.py
    python benchmarks/jpegs.py --count 20000 --rounds 3 --sides 640x480

The loop opens a picture, makes it RGB, resizes it and appends it to a file, on one core. Ours is
`data.py pairs`'s own reading (images.read_all), appended to a file too; on one core, and on all.
`reduced` is `--resample reduced`: a JPEG at least twice as large as is wanted is decoded at a half,
a quarter or an eighth of its size. How much that changes is printed: the mean difference of the
first picture's pixels, 0 to 255, beside that of bilinear from bicubic. Linux alone.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

import config
from common.images import ImageFormat, read_all, read_image
from config import option

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@dataclasses.dataclass
class Config(config.Options):
    count: int = option(2000, low=8, high=10**6)  # pictures
    rounds: int = option(3, low=1, high=1000)  # of each way, in turn
    sides: tuple[str, ...] = ("224x224", "640x480")  # of the JPEGs, in pixels
    size: int = option(96, low=8, high=4096)  # of the frames made of them


def draw(folder, width, height, count):
    """Paths of JPEGs of soft blobs with grain, as a camera's are."""
    rng, paths = np.random.RandomState(0), []
    for i in range(min(count, 50)):
        soft = Image.fromarray(rng.randint(0, 256, (9, 12, 3), np.uint8)).resize((width, height))
        grain = rng.normal(0, 4, (height, width, 1))
        pixels = (np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
        paths.append(str(folder / f"{i}.jpg"))
    return [paths[i % len(paths)] for i in range(count)]


def plain_loop(paths, size, out):
    for path in paths:
        image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        out.write(np.asarray(image).tobytes())


def ours(paths, image_format, out):
    for picture in read_all(paths, image_format):
        out.write(picture.frames.tobytes())


def seconds(work, cores):
    """What work takes on these cores; forked processes inherit them."""
    os.sched_setaffinity(0, cores)
    start = time.perf_counter()
    work()
    took = time.perf_counter() - start
    os.sched_setaffinity(0, CORES)
    return took


def measure(folder, settings, width, height):
    """Print the rows of one size of JPEGs."""
    paths = draw(folder, width, height, settings.count)
    forms = {kind: ImageFormat(settings.size, resample=kind) for kind in ("bilinear", "reduced")}
    with open(folder / "frames.bin", "wb") as out:
        ways = {
            ("a plain loop of Pillow", 1): lambda: plain_loop(paths, settings.size, out),
            **{
                (f"ours, {kind}", cores): lambda form=form: ours(paths, form, out)
                for kind, form in forms.items()
                for cores in dict.fromkeys((1, len(CORES)))
            },
        }
        took = {way: [] for way in ways}
        for _ in range(settings.rounds):
            for (name, cores), work in ways.items():
                out.seek(0)
                took[name, cores].append(seconds(work, CORES[:cores]))
    (loop, _), *_ = ways
    for (name, cores), times in took.items():
        ratios = [a / b / cores for a, b in zip(took[loop, 1], times)]
        rate = settings.count / statistics.median(times)
        per_core = statistics.median(ratios)
        print(
            f"| {width} x {height} | {name} | {cores} | {rate:,.0f} | {per_core:.2f} |", flush=True
        )
    made = {kind: read_image(paths[0], form).astype(int) for kind, form in forms.items()}
    cubic = read_image(paths[0], ImageFormat(settings.size, resample="bicubic")).astype(int)
    reduced, other = (np.abs(made["bilinear"] - x).mean() for x in (made["reduced"], cubic))
    print(f"\nreduced differs by {reduced:.2f} from bilinear, bicubic by {other:.2f}\n")


def main(argv):
    settings = config.load(Config, argv, __doc__)
    if not CORES:
        raise config.UserError("this system does not let a process keep to one core; Linux does")
    print(f"frames of {settings.size} x {settings.size}, {settings.count:,} JPEGs, cores {CORES}\n")
    for sides in settings.sides:
        width, _, height = sides.partition("x")
        if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
            raise config.UserError(f"--sides {sides}: want WIDTHxHEIGHT")
        print("| JPEGs | way | cores | pictures/s | a core, over the loop |\n|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), settings, int(width), int(height))


if __name__ == "__main__":
    config.run(main)
