"""
Seconds from nothing to a target: how fast is the toy world learnt on this machine?

    python benchmarks/speedrun.py --seeds 1 2 3
    python benchmarks/speedrun.py --flags phase2_steps=2500

Draws the world, trains all phases and tests, in an empty folder, once a seed; drawing and testing
count too. Prints each score beside its target, then a row for a table of records: a record is a
recipe of which each of three seeds reaches every target. Run it on an idle machine with two cores,
beside the recipe before: a ratio says more than seconds do.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from common.files import read_json  # noqa: E402
from config import UserError  # noqa: E402

# (name, path in results.json's "tasks", the least score)
TARGETS = (
    ("binding", "baby_winoground.binding.group", 0.90),
    ("position", "baby_winoground.position.group", 0.90),
    ("Labeled-S, seen", "labeled_s.seen.accuracy", 0.97),
    ("Labeled-S, held-out", "labeled_s.held_out.accuracy", 0.85),
    ("VTWT, held-out", "vtwt.held_out.accuracy", 0.95),
    ("captions, seen", "caption.seen.names_thing", 0.97),
    ("captions, held-out", "caption.held_out.names_thing", 0.85),
)


@dataclass
class Config(config.Options):
    recipe: str = str(ROOT / "configs/toy.py")  # a config file
    seeds: tuple[int, ...] = (1,)
    flags: tuple[str, ...] = ()  # for train.py, without their dashes: optimizer=muon


def scores_of(results):
    """{name: score} of each target."""
    found = {}
    for name, path, _ in TARGETS:
        value = results["tasks"]
        for key in path.split("."):
            value = value[key]
        found[name] = value["score"]
    return found


def run(settings, seed):
    """(seconds, {name: score}) of a recipe with a seed, from an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), str(Path(settings.recipe).resolve())]
        command += ["--out=out/run", f"--seed={seed}", *(f"--{flag}" for flag in settings.flags)]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise UserError(f"train.py ended with {done.returncode}: {done.stderr[-300:].strip()}")
        return seconds, scores_of(read_json(Path(folder) / "out/run/results.json"))


def commit():
    """What git calls this version, or "-" outside a clone."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(asked, text=True, capture_output=True).stdout.strip() or "-"


def main(argv):
    settings = config.load(Config, argv, __doc__)
    rows = {seed: run(settings, seed) for seed in settings.seeds}
    heads = " | ".join(f"seed {seed}" for seed in rows)
    print(f"| target | at least | {heads} |")
    print("|---" * (2 + len(rows)) + "|")
    for name, _, least in TARGETS:
        own = [scores[name] for _, scores in rows.values()]
        cells = " | ".join(f"{s:.3f}{'' if s >= least else ' (missed)'}" for s in own)
        print(f"| {name} | {least:.2f} | {cells} |")
    taken = [f"{seconds:.0f} s" for seconds, _ in rows.values()]
    print(f"| time | | {' | '.join(taken)} |\n")
    missed = {name for _, s in rows.values() for name, _, least in TARGETS if s[name] < least}
    state = f"missed: {', '.join(sorted(missed))}" if missed else "reached"
    middle = statistics.median(seconds for seconds, _ in rows.values())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {time.strftime('%Y-%m-%d')}"
    flags = " ".join(settings.flags) or "as it is"
    recipe = f"{Path(settings.recipe).name}, {flags}"
    print(f"| {middle:.0f} s | {recipe} | {state} | {commit()} | {machine} |")


if __name__ == "__main__":
    config.run(main)
