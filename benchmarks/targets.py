"""
What computing logits for targets alone buys: training steps of phases 1 and 2 in which the head
runs on all positions, beside the same steps in which it runs on those that have a target.

    python benchmarks/targets.py

Both do the same arithmetic elsewhere and take turns, step by step, in one process. Shapes: S is
36 image tokens and 32 words, batch 8, a GPT of 4 layers; B is 196 and 32, batch 4, 8 layers; both
256 wide with 4 heads and 6,000 tokens, 10 of the 32 words being a caption and the rest padding.
"""

import dataclasses
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peers import spread, take_turns, timed

import config
from config import option
from model import GPT, BabyLLaVA, GPTConfig, make_projector


@dataclasses.dataclass
class Config(config.Options):
    steps: int = option(30, low=3, high=10**6)  # of each kind, after three that do not count
    words: int = option(10, low=1, high=32)  # of the 32 that have a target
    shapes: tuple[str, ...] = option(("S", "B"), choices=("S", "B"))  # of the model


SHAPES = {"S": (36, 8, 4, 192), "B": (196, 4, 8, 384)}  # image tokens, batch, layers, tower width


def make(shape, phase, words):
    """(model, optimizer, tokens, all targets, positions, their targets, features)."""
    P, batch, layers, width = SHAPES[shape]
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(6000, P + 32, layers, 4, 256))
    model = BabyLLaVA(gpt, make_projector("mlp2x_gelu", width, 256), image_token=5999)
    if phase == "phase 1":
        gpt.requires_grad_(False)
    tokens = torch.randint(0, 5000, (batch, P + 32))
    tokens[:, :P] = 5999
    targets = torch.full_like(tokens, -100)
    targets[:, P - 1 : P - 1 + words] = tokens[:, P : P + words]
    positions = torch.nonzero(targets.flatten() != -100)[:, 0]
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, 1e-4)
    features = torch.randn(batch, P, width)
    return model, optimizer, tokens, targets, positions, targets.flatten()[positions], features


def main(argv):
    settings = config.load(Config, argv, __doc__)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, fp32, eager\n")
    print(
        "| shape | phase | all positions, ms | targets alone, ms | times as fast |\n"
        "|---|---|---|---|---|"
    )
    for shape in settings.shapes:
        for phase in ("phase 1", "phase 2"):
            model, optimizer, tokens, everywhere, positions, few, features = make(
                shape, phase, settings.words
            )
            ways = {
                "all": (tokens, everywhere, None, features),
                "few": (tokens, few, positions, features),
            }

            def step(inputs, model=model, optimizer=optimizer):
                model(*inputs)[1].backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            cpu = torch.device("cpu")
            actions = {way: partial(timed, partial(step, ways[way]), cpu) for way in ways}
            took = take_turns(actions, settings.steps)
            slow, fast = (statistics.median(took[way]) for way in ("all", "few"))
            ratio = spread([a / b for a, b in zip(took["all"], took["few"])], 2)
            print(f"| {shape} | {phase} | {slow:.1f} | {fast:.1f} | {ratio} |", flush=True)


if __name__ == "__main__":
    config.run(main)
