"""
Muon, an optimizer for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

A gradient is large along a few directions and small along the others. Muon replaces the momentum
M = U S V^T (singular values S) by U V^T: the same directions, all with the same size. The step is
then scaled to the size of AdamW's, so that its rates and decay stay as they are (Liu et al. 2025,
arXiv 2502.16982).

Letters: n matrices of one shape, R rows, C columns.
"""

import torch

MOMENTUM = 0.95
# of an odd polynomial a s + b s^3 + c s^5 that takes singular values s of 0 to 1 towards 1 (Jordan)
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
MOST_NUMBERS = 1 << 24  # of matrices that are computed together


def polar_factors(matrices):
    """U V^T of each matrix U S V^T, nearly: (n, R, C), R <= C -> the same, with singular values of
    0.6 to 1.25 instead of 1.

    By Newton-Schulz iterations, which are products alone: X X^T has the singular values of X
    squared, so b X X^T + c (X X^T)^2 times X is b s^3 + c s^5."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x


def group_by_shape(matrices):
    """[[number of a matrix]]: matrices of one shape, or of its transpose, are computed together,
    because a hundred small products take longer than a few large ones."""
    groups = {}
    for i, matrix in enumerate(matrices):
        shape = tuple(sorted(matrix.shape))
        groups.setdefault(shape, [[]])
        most = max(1, MOST_NUMBERS // matrix.numel())
        if len(groups[shape][-1]) == most:
            groups[shape].append([])
        groups[shape][-1].append(i)
    return [group for same in groups.values() for group in same]


class Muon(torch.optim.Optimizer):
    """params as in torch.optim: matrices alone, whole or sharded (DTensor)."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0})

    def momentum(self, parameter):
        """The momentum of a parameter with this step's gradient, a step ahead (Nesterov)."""
        gradient, state = parameter.grad, self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for numbers in group_by_shape(parameters):
                self.update([parameters[i] for i in numbers], group["lr"], group["weight_decay"])

    def update(self, parameters, lr, weight_decay):
        """A step of parameters of one shape."""
        wide = []
        for parameter in parameters:
            matrix = whole(self.momentum(parameter))
            wide.append(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
        stacked = torch.stack(wide)
        if stacked.is_cuda:
            stacked = stacked.bfloat16()  # as Jordan's; few CPUs multiply it, see docs/speed.md
        factors = polar_factors(stacked)
        size = 0.2 * max(parameters[0].shape) ** 0.5
        for parameter, factor in zip(parameters, factors):
            factor = factor if parameter.shape[0] <= parameter.shape[1] else factor.T
            parameter.mul_(1 - lr * weight_decay)
            parameter.add_(part_of(factor, parameter), alpha=-lr * size)


# ---------------------------------------------------------------------------------------------
# Sharded matrices (sharding.py)


def whole(tensor):
    """All of a tensor that may be sharded; every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(tensor, like):
    """A whole tensor, sharded as `like` is; nothing is sent."""
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
