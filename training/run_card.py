"""
run.json: the facts about each start of a run, a list: command, code, machine, versions, data.
"""

import os
import platform
import shlex
import subprocess
import time
from pathlib import Path

import torch

from common.files import read_json, write_json


def find_commit():
    """The commit of this code, with "and changes" if files differ from it; "" without git."""
    root = Path(__file__).parent.parent
    try:
        run = lambda *words: subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
        if Path(run("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return ""  # the repository of another project, in which this code is a folder
        changed = run("status", "--porcelain", "--untracked-files=no")
        return run("rev-parse", "--short=12", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def find_machine(device):
    """The processor and the number of cores that may be used, or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    return f"{name}, {count} cores, {threads} thread{'s' * (threads > 1)}"


def describe(settings, dataset, processes):
    """{name: text} of a start of train.py."""
    card = {
        "command": shlex.join(["python", "train.py", *settings.arguments]),
        "config": settings.file,
        "seed": str(settings.seed),
        "data": f"{dataset.directory}, corpus {dataset.meta['corpus'][:12]}",
        "commit": find_commit(),
        "machine": find_machine(processes.device),
        "processes": str(processes.world) if processes.world > 1 else "",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "started": time.strftime("%Y-%m-%d %H:%M"),
    }
    return {name: text for name, text in card.items() if text}


def read(folder):
    """The facts about the last start of a run, {name: text}; {} if there are none."""
    path = Path(folder) / "run.json"
    starts = read_json(path) if path.exists() else []
    return (
        starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
    )


def add(settings, dataset, processes):
    """Add this start to run.json."""
    path = Path(settings.out) / "run.json"
    before = read_json(path) if path.exists() else []
    write_json(path, [*before, describe(settings, dataset, processes)])
