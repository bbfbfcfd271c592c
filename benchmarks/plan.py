"""
Is --plan right? Memory and time of each phase of configs/toy.py, planned and then taken.

    python benchmarks/plan.py [FOLDER]      # a folder with data/toy; else it is drawn

Each phase is planned, trained, and planned again, each time in processes of its own; a plan is the
mean of both. The long phases are cut to a minute or so, because the speed of a shared machine
changes within minutes. Three rounds; medians.
"""

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = {"vision": "vision", "language": "language", "phase1": "1", "phase2": "2"}
TRAIN = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/toy.py")]
TRAIN += ["--vision_steps=200", "--phase2_steps=400", "--eval_every=100"]
ROUNDS = 3
CHILD = "import resource, subprocess, sys\nsubprocess.run(sys.argv[1:], check=True)\n"
CHILD += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"


def planned(phase, folder):
    """(MB, seconds) of a phase by --plan."""
    command = [*TRAIN, "--out=out/checked", "--phase", phase, "--plan"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    row = [line for line in done.stdout.splitlines() if line.startswith("| ")][1]
    cells = [cell.strip() for cell in row.split("|")]
    number, unit = cells[9].split()
    minutes, seconds = map(int, re.match(r"(\d+):(\d+)", cells[11]).groups())
    return float(number) * (1000 if unit == "GB" else 1), 60 * minutes + seconds


def taken(phase, folder):
    """(MB, seconds) of training a phase, less the seconds of the same command when it is done:
    those of starting Python and PyTorch."""
    command = [sys.executable, "-c", CHILD, *TRAIN, "--out=out/checked", "--phase", phase]
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
        if len(seconds) == 1:
            scale = 1e6 if sys.platform == "darwin" else 1e6 / 1024
            memory = int(done.stdout.split()[-1]) / scale
    return memory, seconds[0] - seconds[1]


def measure(name, phase, folder):
    """(MB planned, MB taken, seconds planned, seconds taken) of a phase."""
    before = planned(phase, folder)
    memory, seconds = taken(phase, folder)
    path, features = Path(folder) / f"out/checked/{name}.pt", Path(folder) / "data/toy/features"
    path.rename(path.with_suffix(".away"))
    if name == "phase1":  # as they were before
        features.rename(features.with_suffix(".away"))
    after = planned(phase, folder)
    path.with_suffix(".away").rename(path)
    if name == "phase1":
        features.with_suffix(".away").rename(features)
    return (before[0] + after[0]) / 2, memory, (before[1] + after[1]) / 2, seconds


def main(folder):
    if not (Path(folder) / "data/toy/meta.json").exists():
        subprocess.run([sys.executable, str(ROOT / "data.py"), "toy"], cwd=folder, check=True)
    found = {name: [] for name in PHASES}
    for _ in range(ROUNDS):
        for leftover in ("out/checked", "data/toy/features"):
            shutil.rmtree(Path(folder) / leftover, ignore_errors=True)
        for name, phase in PHASES.items():
            found[name].append(measure(name, phase, folder))
            print(name, *(f"{number:.0f}" for number in found[name][-1]), flush=True)
    print("| phase | memory planned | taken | ratio | time planned | taken | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, rounds in found.items():
        memory, own, seconds, real = (statistics.median(column) for column in zip(*rounds))
        cells = [f"{memory:.0f} MB", f"{own:.0f} MB", f"{memory / own:.2f}"]
        cells += [f"{seconds:.0f} s", f"{real:.0f} s", f"{seconds / real:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as name:
            main(name)
