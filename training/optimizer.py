"""
Which parameters are trained, at which rate, and by which optimizer.

AdamW is for all parameters, or with --optimizer muon for those that are no matrices (muon.py).

Another optimizer is a change of make_optimizers(): train.py's loop steps every optimizer in the
list that it returns, none of which may be empty, and a checkpoint stores their states in its order.
An option of its own belongs to Config in train.py and to EVERY_PHASE in training/phases.py.
"""

import math

import torch

from config import UserError
from kernels import CAN_REGISTER
from training import lora
from training.muon import Muon


def parse_part(entry, lr):
    """(part, rate) of "tower" or "tower=2e-4". Raises UserError."""
    part, has_rate, rate = entry.partition("=")
    try:
        rate = float(rate) if has_rate else lr
    except ValueError:
        rate = math.nan
    if not part or not (math.isfinite(rate) and rate >= 0):
        raise UserError(f"learn {entry!r}: want a part, or part=rate")
    return part, rate


def find_parameters(model, part):
    """{name: parameter} of the parameters of a part of a model that can be trained.

    A part is the name of a module ("gpt", "tower.blocks.3") or a prefix of names. The image newline
    belongs to the projector. Of a GPT with LoRA only the factors are trained."""
    found = {n: p for n, p in model.named_parameters() if (n + ".").startswith(part + ".")}
    if part == "projector" and getattr(model, "tiled", False):
        found["image_newline"] = model.image_newline
    if lora.has_lora(model):
        found = {n: p for n, p in found.items() if lora.is_factor(n) or not n.startswith("gpt.")}
    return found


def set_trainable(model, parts, lr):
    """Make the named parts trainable and freeze all else. Returns [({name: parameter}, rate)].

    parts: entries as parse_part() takes them. What is frozen is in eval mode: no dropout there.
    Raises UserError for a part that does not exist, overlaps another, or has nothing to train."""
    model.requires_grad_(False).eval()
    modules, groups = dict(model.named_modules()), []
    for entry in parts:
        part, rate = parse_part(entry, lr)
        found = find_parameters(model, part)
        if part not in modules and not found:
            known = ", ".join(name for name in modules if name and name.count(".") < 2)
            raise UserError(f"learn {entry!r}: no such part; one of {known}")
        if not found and lora.has_lora(model):
            raise UserError(f"learn {entry!r}: with lora_rank nothing of it is trained")
        if any(parameter.requires_grad for parameter in found.values()):
            raise UserError(f"learn {entry!r}: it is part of another that is trained already")
        for parameter in found.values():
            parameter.requires_grad_(True)
        if part in modules:
            modules[part].train()
        groups.append((found, rate))
    return groups


# Tables: each row belongs to a token or a prototype
TABLES = ("embed_tokens.weight", "lm_head.weight", "head.last.weight")


def is_for_muon(settings, name, parameter):
    """Whether Muon trains a parameter: a matrix, but no table. Stacked matrices (q, k and v) are
    one."""
    return settings.optimizer == "muon" and parameter.ndim == 2 and not name.endswith(TABLES)


def moments_of(settings, groups):
    """How many numbers the optimizers of groups [({name: parameter}, rate)] keep."""
    pairs = [pair for parameters, _ in groups for pair in parameters.items()]
    return sum(p.numel() * (1 if is_for_muon(settings, n, p) else 2) for n, p in pairs)


def make_optimizers(settings, groups, device):
    """The optimizers of groups [({name: parameter}, rate)]: AdamW, with weight decay for matrices
    and without for vectors, and with --optimizer muon before it Muon. [] if there is nothing to
    train (an identity projector).

    Each param group has its highest learning rate as "highest_lr"."""
    of_muon, of_adamw = [], []
    for parameters, rate in groups:
        takes = {n: is_for_muon(settings, n, p) for n, p in parameters.items()}
        matrices = [p for n, p in parameters.items() if takes[n]]
        others = [p for n, p in parameters.items() if not takes[n]]
        for params, some, lr, decay in (
            (of_muon, matrices, rate * settings.muon_rate, settings.weight_decay),
            (of_adamw, [p for p in others if p.ndim >= 2], rate, settings.weight_decay),
            (of_adamw, [p for p in others if p.ndim < 2], rate, 0.0),
        ):
            if some:
                params.append({"params": some, "weight_decay": decay, "highest_lr": lr, "lr": lr})
    optimizers = []
    if of_muon:
        optimizers.append(Muon(of_muon))
    if of_adamw:
        betas = (0.9, settings.beta2)
        # fused: one operation for all parameters; on a CPU from PyTorch 2.4 on
        is_fused = device.type == "cuda" or (device.type == "cpu" and CAN_REGISTER)
        optimizers.append(torch.optim.AdamW(of_adamw, betas=betas, fused=is_fused))
    return optimizers
