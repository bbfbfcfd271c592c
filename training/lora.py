"""
LoRA (Hu et al. 2021, arXiv 2106.09685): instead of a matrix W, train two thin factors beside it.

    y = x W^T  ->  y = x W^T + alpha / rank * (x A^T) B^T        A (rank, in), B (out, rank)

B starts at 0, so the model is unchanged at first. A saved checkpoint has the product merged into
W and needs no LoRA to be loaded; A and B are stored beside it, for resuming. q, k and v are one
matrix here and share their A, and so do gate and up.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fast.products import Linear


class LoRALinear(Linear):
    """A linear layer with the two factors beside its weight. base: the layer that it replaces."""

    def __init__(self, base, rank, alpha):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features))
        nn.init.normal_(self.lora_A, std=self.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged(self):
        return self.weight + self.scale * self.lora_B @ self.lora_A


def add_lora(gpt, rank, alpha):
    """Replace all linear layers in the blocks of a GPT by LoRALinear."""
    for parent in list(gpt.layers.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha))


def is_factor(name):
    """Whether a parameter of this name is a LoRA factor."""
    return name.rpartition(".")[2].startswith("lora_")


def has_lora(model):
    return any(isinstance(module, LoRALinear) for module in model.modules())


def merged_names(model):
    """The names of the weights that factors are merged into."""
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge(model):
    """(the model's state dict with the factors merged into its weights, {name: factor}). Merged
    weights are new tensors on the CPU, so that a GPU need not hold a second model."""
    state = model.state_dict()
    factors = {name: state.pop(name) for name in list(state) if is_factor(name)}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] = module.merged().cpu()
    return state, factors
