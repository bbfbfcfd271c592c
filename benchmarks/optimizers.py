"""
What a step of an optimizer takes: AdamW, our Muon and PyTorch's, side by side.

    python benchmarks/optimizers.py
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/optimizers.py   # as on a CPU without bf16

Of the toy recipe's student (phase vision) and GPT with projector (phase2), and of a GPT twice as
wide. The gradients are random; milliseconds are medians of --rounds in which all take turns.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import config
import train
from dino import DINO
from model import GPT, GPTConfig, make_projector
from training.optimizer import make_optimizers
from vision import ViT

DEVICE = torch.device("cpu")


@dataclass
class Config(config.Options):
    rounds: int = config.option(15, low=1)


def parameters_of(*modules):
    """{name: parameter} of what modules train."""
    pairs = [pair for module in modules for pair in module.named_parameters()]
    named = {f"{i}.{name}": p for i, (name, p) in enumerate(pairs)}
    return {name: p for name, p in named.items() if p.requires_grad}


def shapes():
    """{what: its parameters}."""
    student = DINO(*(ViT(64, 8, 128, 4, 4) for _ in range(2)), 128)
    found = {"DINO's student, 128 wide": parameters_of(student)}
    for width in (128, 256):
        gpt = GPT(GPTConfig(500, width, 4, 4, 128))
        projector = make_projector("mlp2x_gelu", 128, width)
        found[f"GPT and projector, {width} wide"] = parameters_of(gpt, projector)
    return found


def optimizers_of(parameters):
    """{name: its optimizers}. PyTorch's Muon takes the place of ours, beside the same AdamW."""
    of = {
        name: make_optimizers(train.Config(optimizer=name), [(parameters, 1e-9)], DEVICE)
        for name in ("adamw", "muon")
    }
    ours, adamw = of["muon"]
    found = {"AdamW": of["adamw"], "our Muon": of["muon"]}
    if hasattr(torch.optim, "Muon"):  # PyTorch 2.9
        matrices = [p for group in ours.param_groups for p in group["params"]]
        theirs = torch.optim.Muon(matrices, lr=1e-9, adjust_lr_fn="match_rms_adamw")
        found["PyTorch's Muon"] = [theirs, adamw]
    return found


def main(argv):
    settings = config.load(Config, argv, __doc__)
    print("| milliseconds a step | AdamW | our Muon | PyTorch's Muon |\n|---|---|---|---|")
    for what, parameters in shapes().items():
        for parameter in parameters.values():
            parameter.grad = 0.01 * torch.randn_like(parameter)
        of = optimizers_of(parameters)
        taken = {name: [] for name in of}
        for turn in range(settings.rounds + 2):  # two to warm up
            for name, optimizers in of.items():
                began = time.perf_counter()
                for optimizer in optimizers:
                    optimizer.step()
                if turn >= 2:
                    taken[name].append(1e3 * (time.perf_counter() - began))
        row = [f"{statistics.median(times):.1f}" for times in taken.values()]
        print(f"| {what} | {' | '.join(row)}{' | -' * (3 - len(row))} |", flush=True)


if __name__ == "__main__":
    config.run(main)
