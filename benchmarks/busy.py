"""
A busy laptop: training steps beside other busy processes, by how long waiting threads spin.

    pip install transformers
    python benchmarks/busy.py              # idle, and beside four busy processes

Steps of the toy GPT's shape on 16 rows of 80 tokens, ours and transformers' Llama, on all cores.
Each figure is of fresh processes; rounds are interleaved. common/threads.py sets GOMP_SPINCOUNT.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "10,000 (ours)": {"GOMP_SPINCOUNT": "10000"},
    "1,000": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
ROUNDS = 2
STEP = """
import sys, time
sys.path.insert(0, {root!r})
import torch
torch.manual_seed(0)
tokens = torch.randint(0, 500, (16, 80))
if {ours}:
    from model import GPT, BabyLLaVA, GPTConfig
    model = BabyLLaVA(GPT(GPTConfig(500, 128, 4, 4, 128)))
    loss_of = lambda: model(tokens, tokens.roll(-1, 1))[1]
else:
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, hidden_size=128, intermediate_size=352,
        num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=128,
        tie_word_embeddings=True))
    loss_of = lambda: model(input_ids=tokens, labels=tokens).loss
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
times = []
while sum(times) < {seconds} or len(times) < 8:
    began = time.perf_counter()
    loss_of().backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - began)
print(16 * 80 * len(times[3:]) / sum(times[3:]))
"""


def tokens_per_second(ours, settings, busy):
    """Of training steps in a fresh process, beside `busy` others that never sleep."""
    loop = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(loop) for _ in range(busy)]
    code = STEP.format(root=str(ROOT), ours=ours, seconds=4)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for other in others:
            other.kill()
    return float(done.stdout)


def main():
    print("| threads spin for | ours, idle | ours, busy | Llama, idle | Llama, busy |")
    print("|---|---|---|---|---|")
    found = {}
    for _ in range(ROUNDS):
        for name, settings in SETTINGS.items():
            for ours in (True, False):
                for busy in (0, 4):
                    speed = tokens_per_second(ours, settings, busy)
                    found.setdefault((name, ours, busy), []).append(speed)
    for name in SETTINGS:
        cells = [
            f"{np.median(found[name, ours, busy]):,.0f}"
            for ours in (True, False)
            for busy in (0, 4)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
