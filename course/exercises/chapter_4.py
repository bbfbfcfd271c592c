"""Exercises of chapter 4: learning together."""

import math

import torch
from exercise import call, check, exercise, same

import train
from training.muon import polar_factors


@exercise("4.1", "easy")
def targets_of(tokens, loss_mask):
    """The target of each position: the next token if that token's loss mask is 1, else -100.

    tokens: list of T ids; loss_mask: list of T numbers, 0 or 1. Returns a list of T targets. The
    last position has no next token, so its target is -100."""


@check(targets_of)
def check_targets_of(yours):
    for tokens, mask, wanted in (
        ([9, 9, 1, 2, 3], [0, 0, 1, 1, 1], [-100, 1, 2, 3, -100]),
        ([9, 1, 2], [0, 1, 0], [1, -100, -100]),
        ([4], [1], [-100]),
        ([1, 2, 3], [1, 1, 1], [2, 3, -100]),
    ):
        hint = (
            "The mask belongs to the token that is predicted. The last image token predicts a word."
        )
        given = {"tokens": tokens, "loss_mask": mask}
        same(list(call(yours, tokens, mask)), wanted, given, hint)


@exercise("4.2", "easy")
def learning_rate(step, steps, warmup):
    """The learning rate of a step as a share of the highest rate. It rises during the first warm =
    max(1, int(warmup * steps)) steps, then falls along half a cosine:

        (step + 1) / warm                                           if step < warm
        (1 + cos(pi (step - warm) / max(steps - warm, 1))) / 2      otherwise

    step: 0 to steps - 1. Returns a float."""


@check(learning_rate)
def check_learning_rate(yours):
    for steps, warmup in ((100, 0.1), (10, 0.0), (1, 0.5), (7, 1.0)):
        for step in range(steps):
            wanted = train.learning_rate(step, steps, warmup)
            given = {"step": step, "steps": steps, "warmup": warmup}
            same(
                call(yours, step, steps, warmup), wanted, given, "The last warm step has factor 1."
            )


@exercise("4.3", "medium")
def clip(gradients, largest):
    """Clipping: multiply all gradients by min(1, largest / norm), in place. The norm is the root of
    the sum of the squares of all numbers in all gradients.

    gradients: list of tensors. Returns the norm before, a float."""


@check(clip)
def check_clip(yours):
    torch.manual_seed(0)
    for scale in (0.01, 1.0, 100.0):
        gradients = [scale * torch.randn(3, 4), scale * torch.randn(5)]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        wanted = [g * min(1.0, 1.0 / norm) for g in gradients]
        given = f"gradients of norm {norm:.3g}, largest = 1"
        same(yours(gradients, 1.0), norm, given, "One norm for all tensors, before clipping.")
        same(gradients, wanted, given, "In place; a small gradient is left alone.")


@exercise("4.4", "hard")
def adamw(parameter, gradient, state, lr, betas, eps, weight_decay):
    """A step of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), without torch.optim:

        p <- p - lr * weight_decay * p
        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        t <- t + 1
        p <- p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    parameter, gradient: tensors of one shape; state: a dict, {} before the first step, which holds
    m, v and t between steps. Returns the new parameter; the old one is not changed."""


@check(adamw)
def check_adamw(yours):
    torch.manual_seed(0)
    for lr, betas, decay in ((1e-2, (0.9, 0.95), 0.1), (0.1, (0.8, 0.999), 0.0)):
        start = torch.randn(3, 4)
        theirs, own, state = torch.nn.Parameter(start.clone()), start.clone(), {}
        reference = torch.optim.AdamW([theirs], lr=lr, betas=betas, eps=1e-8, weight_decay=decay)
        for step in range(4):
            theirs.grad = torch.randn(3, 4)
            reference.step()
            before = own.clone()
            new = yours(own, theirs.grad.clone(), state, lr, betas, 1e-8, decay)
            given = f"lr = {lr}, betas = {betas}, weight_decay = {decay}, step {step + 1}"
            same(own, before, given, "Return a new tensor.")
            hint = "t counts from 1. The decay is of the old parameter, and is not in m and v."
            same(new, theirs.detach(), given + ", beside torch.optim.AdamW", hint)
            own = new.detach()


@exercise("4.5", "hard")
def orthogonalise(matrix):
    """Muon's step (training/muon.py): a matrix G = U S V^T becomes about U V^T, by matrix products
    only. Start with X = G / |G|, where |G| is the root of the sum of squares. If G has more rows
    than columns, use its transpose, and transpose the result back. Five times:

        X <- a X + b (X X^T) X + c (X X^T)^2 X        a, b, c = 3.4445, -4.7750, 2.0315

    matrix: (R, C) float. Returns (R, C)."""


@check(orthogonalise)
def check_orthogonalise(yours):
    torch.manual_seed(0)
    for R, C in ((4, 4), (3, 7), (8, 5)):
        G = 5 * torch.randn(R, C)
        wide = G if R <= C else G.T
        factor = polar_factors(wide.double()[None])[0]
        hint = (
            "Divide by the Frobenius norm first. For a tall matrix transpose, and back at the end."
        )
        wanted = factor if R <= C else factor.T
        same(call(yours, G), wanted, f"R = {R}, C = {C}, beside training.muon", hint, 1e-4)
