"""
LoRA (Hu et al. 2021, arXiv 2106.09685): instead of a matrix W, learn two thin ones beside it.

    y = x W^T  ->  y = x W^T + alpha / rank * (x A^T) B^T        A (rank, in), B (out, rank)

B begins at 0, so that nothing changes at first. On saving, the product is merged into W, so that
whoever loads the file knows nothing of all this; what a run needs to go on, A and B, is kept apart.
q, k and v, which are one matrix here, share their A, and so do gate and up.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fused import Linear


class LoRALinear(Linear):
    """A Linear with two factors beside its weight."""

    def widen(self, rank, alpha):
        self.lora_A = nn.Parameter(torch.randn(rank, self.in_features) / self.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged(self):
        return self.weight + self.scale * self.lora_B @ self.lora_A


def add(gpt, rank, alpha):
    """Give all linear layers of a GPT's blocks factors of this rank."""
    for module in gpt.layers.modules():
        if type(module) is Linear:
            module.__class__ = LoRALinear
            module.widen(rank, alpha)


def is_factor(name):
    return name.rpartition(".")[2].startswith("lora_")


def is_in(model):
    return any(isinstance(module, LoRALinear) for module in model.modules())


def merged_into(model):
    """The names of the weights that factors are merged into."""
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge(model):
    """(the model's state dict with the factors merged into its weights, {name: factor}); what is
    merged is new, and on the CPU, so that a GPU need not hold a second model."""
    state = model.state_dict()
    factors = {name: state.pop(name) for name in list(state) if is_factor(name)}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] = module.merged().cpu()
    return state, factors
