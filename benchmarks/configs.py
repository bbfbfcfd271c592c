"""
Write docs/configs.md: what each config takes, by `python train.py CONFIG --plan`.

    python benchmarks/configs.py FOLDER

FOLDER may have data/ and out/, from which small models are measured; what is not there is computed
with its published size. Full-size configs are planned for an H100 at 35 % of its peak.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPU = ["--gpu", "h100", "--mfu", "0.35"]
HEADER = """# What each config takes

Written by `python benchmarks/configs.py`, from the output of the command above each table, {date}.
Rows and lengths are of the data, or where it is not here of the published sizes in
`training/published.py`; some lengths there are estimates. FLOP are counted operation by operation
over a forward and a backward pass, and features that are stored are computed once. Memory is of one
process: weights, gradients, the optimizer's moments and activations, and for measured runs all of
the process. On disk: the checkpoint, and features if they are stored. Measured times are of
{machine}.
"""


def plan(config, folder, flags):
    """(command, output) of a plan."""
    command = ["python", "train.py", f"configs/{config}", "--plan", *flags]
    words = [sys.executable, ROOT / "train.py", ROOT / "configs" / config, "--plan", *flags]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{config}: {done.stderr}")
    return " ".join(command), done.stdout.strip()


def machine_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"2 cores of an {line.split(': ')[1]}"
    return "this machine"


def main(folder):
    paths = sorted((ROOT / "configs").glob("**/*.py"))
    names = [str(path.relative_to(ROOT / "configs")) for path in paths]
    names = [name for name in names if name not in ("words.py", "own.py")]  # of no corpus alone
    toys = [name for name in names if name.startswith("toy")]
    pages = [HEADER.format(date=time.strftime("%Y-%m-%d"), machine=machine_name())]
    for name in [*toys, *(name for name in names if name not in toys)]:
        command, shown = plan(name, folder, [] if name in toys else GPU)
        lines = shown.splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("|"))
        end = next(i for i, line in enumerate(lines) if i > first and not line.startswith("|"))
        notes = [line for line in [*lines[:first], *lines[end:]] if line]
        notes = "\n".join(f"- {note}" for note in notes)
        table = "\n".join(lines[first:end])
        pages.append(f"## {name}\n\n```sh\n{command}\n```\n\n{table}\n\n{notes}\n")
        print(name, flush=True)
    (ROOT / "docs" / "configs.md").write_text("\n".join(pages), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
