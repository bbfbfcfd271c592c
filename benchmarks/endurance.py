"""
What shows only after long: waiting for data at SAYCam's size, and a soak; see reliability.py.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from processes import PHASES, SMALL, TOY, command, environment, must

import data
from batches import SampleBatches
from common.images import ImageFormat
from fast.memory import keep_memory
from model import GPT, BabyLLaVA, GPTConfig, make_projector
from tokenizer import Tokenizer, caption_sample
from training.prefetch import in_advance

# As many pairs and features as SAYCam has: (F, P, E), 13 GB; the GPT and batch of configs/phase2.py
PAIRS, P, E, BATCH = 67_000, 49, 2048, 64
SIZES = {"n_layer": 8, "n_head": 8, "n_embd": 256, "vocab_size": 6000, "block_size": 2048}


def make_corpus(home):
    """Data and features as large as SAYCam's, in sparse files: (data.Data, features)."""
    words = "look , that is a red ball over there , can you see it ?"
    tokenizer = Tokenizer.train([words] * 9, 300)
    writer = data.Writer(home / "large", "made")
    writer.start(tokenizer, ImageFormat(8))
    part, frame = writer.split("train"), np.zeros((8, 8, 3), np.uint8)
    for clip in range(PAIRS):
        part.sample(*caption_sample(tokenizer, words), [part.image(frame, clip)])
    writer.finish()
    path = home / "features.bin"
    with open(path, "wb") as file:
        file.truncate(PAIRS * P * E * 2)
    return data.Data(home / "large"), np.memmap(path, "float16", "r", shape=(PAIRS, P, E))


class Tower:
    """Of a tower only what batches ask: how many tokens it makes of an image."""

    tiled, image_attention = False, "causal"

    def __init__(self, gpt):
        self.gpt = gpt

    def image_tokens(self, size):
        return P


def waiting(home, settings):
    """Each batch twice in turn: as it comes, while the thread reads another, and then again."""
    torch.set_num_threads(os.cpu_count())
    dataset, features = make_corpus(home)
    gpt = GPT(GPTConfig(**SIZES))
    model = BabyLLaVA(
        gpt, make_projector("mlp2x_gelu", E, SIZES["n_embd"]), None, dataset.tokenizer.image
    )
    batches = SampleBatches(dataset, "train", BATCH, 0, Tower(gpt), features)
    read = lambda step: batches.read(batches.plan(step))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    keep_memory()

    def take(batch):
        model(*batch.to("cpu", dataset.image_format))[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = 100
    subprocess.run(["sync"], check=False)
    drop = Path("/proc/sys/vm/drop_caches")
    cold = os.access(drop, os.W_OK)
    if cold:
        drop.write_text("3")
    take(read(0))
    coming, times = in_advance(read, range(1, 10**6), 2), {"waits": [], "read": [], "again": []}
    for _ in range(steps):
        clock = time.perf_counter()
        batch = next(coming)
        times["waits"].append(time.perf_counter() - clock)
        take(batch)
        times["read"].append(time.perf_counter() - clock)
        clock = time.perf_counter()
        take(batch)
        times["again"].append(time.perf_counter() - clock)
    coming.close()
    lost = sum(times["waits"]) / sum(times["read"])
    ratio = np.median(np.array(times["read"]) / np.array(times["again"]))
    print(
        f"{PAIRS:,} pairs, features of {features.nbytes / 1e9:.1f} GB, cache "
        f"{'cold' if cold else 'as it was'}: {lost:.2%} of the time is waiting for data; a step "
        f"takes {np.median(times['read']):.2f} s, {ratio:.3f} of one without reading\n"
    )


# ---------------------------------------------------------------------------------------------
# A soak


def soak(home, settings):
    """Tiny steps through all phases, while memory and open files are looked at from outside."""
    must(command("data.py", TOY), home)
    each = settings.steps // len(PHASES)
    flags = " ".join(f"--{name}_steps={each}" for name in PHASES)
    flags += f" --eval_every={each} --save_every={max(each // 20, 1)} --log_every=50"
    log, seen = home / "out/w/log.jsonl", {name: [] for name in PHASES}
    words = command("train.py", SMALL, flags)
    run = subprocess.Popen(
        words, cwd=home, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    place = Path(f"/proc/{run.pid}")
    while run.poll() is None:
        time.sleep(0.5)
        try:
            status = (place / "status").read_text().split("RssAnon:")[1]
            files = len(list((place / "fd").iterdir()))
            last = json.loads(log.read_text().splitlines()[-1])
        except (OSError, IndexError, ValueError):
            continue
        seen[last["phase"]].append((last["step"] / each, int(status.split()[0]) / 1024, files))
    if run.returncode:
        sys.exit(f"the soak ended with {run.returncode}")
    print(
        "| phase | steps | MB at a fifth | MB at the end | grown | files then | files at the end |"
    )
    print("|---" * 7 + "|")
    for name, found in seen.items():
        found = found or [(0, float("nan"), 0)]
        early = [row for row in found if 0.2 <= row[0] < 0.4]
        late = [row for row in found if row[0] >= 0.8]
        early, late = early or found[:1], late or found[-1:]  # a phase that is over in a moment
        one, two = (float(np.median([row[1] for row in rows])) for rows in (early, late))
        files = [int(np.median([row[2] for row in rows])) for rows in (early, late)]  # at rest
        print(
            f"| {name} | {each} | {one:.1f} | {two:.1f} | {two / one - 1:+.1%} | {files[0]} | "
            f"{files[1]} |"
        )
    print()
