"""Exercises of chapter 2: seeing without labels."""

import numpy as np
import torch
from exercise import call, check, exercise, same

from vision import PatchEmbed


@exercise("2.1", "easy")
def patches(image, side):
    """A picture as a sequence of patches (Dosovitskiy et al. 2021, arXiv 2010.11929).

    image: (3, S, S) float, S a multiple of side. Returns (P, 3 * side * side): the patches of side
    x side pixels, row by row from the top left. Each patch lists its red values row by row, then
    its green values, then its blue values."""


@check(patches)
def check_patches(yours):
    torch.manual_seed(0)
    for S, side in ((8, 4), (6, 2), (4, 4), (9, 3)):
        image = torch.randn(3, S, S)
        rows = range(0, S, side)
        wanted = torch.stack(
            [image[:, y : y + side, x : x + side].flatten() for y in rows for x in rows]
        )
        hint = "Patch 1 is to the right of patch 0. unfold or reshape: mind the order of the axes."
        same(call(yours, image, side), wanted, f"S = {S}, side = {side}", hint)


@exercise("2.2", "easy")
def embed_patches(flat, weight, bias):
    """The first layer of a ViT. It is written as a convolution whose stride is the side of its
    kernel, so it is a matrix product of patches (vision.PatchEmbed).

    flat: (P, 3 * side * side), as 2.1 gives them; weight: (E, 3, side, side) and bias (E,) of the
    convolution. Returns (P, E)."""


@check(embed_patches)
def check_embed_patches(yours):
    torch.manual_seed(0)
    for S, side, E in ((8, 4, 5), (6, 2, 3)):
        module, image = PatchEmbed(side, E, True), torch.randn(3, S, S)
        flat = image.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4)
        flat = flat.reshape(-1, 3 * side * side)
        found = call(yours, flat, module.proj.weight.detach(), module.proj.bias.detach())
        hint = "Flatten the weight as the patches are flattened; do not forget the bias."
        given = f"S = {S}, side = {side}, E = {E}, beside vision.PatchEmbed"
        same(found, module(image[None])[0].detach(), given, hint)


@exercise("2.3", "medium")
def dino_loss(student, teacher, centre, student_temperature, teacher_temperature):
    """DINO's loss for one pair of views (Caron et al. 2021, arXiv 2104.14294): the cross-entropy
    between the teacher's distribution, centred and sharpened, and the student's.

        p = softmax((teacher - centre) / teacher_temperature)
        loss = - sum over prototypes of p ln softmax(student / student_temperature)

    student, teacher: (n, K); centre: (K,). Returns the mean over rows, a scalar tensor. Gradients
    flow into the student alone."""


@check(dino_loss)
def check_dino_loss(yours):
    torch.manual_seed(0)
    student, teacher, centre = torch.randn(6, 5), torch.randn(6, 5), torch.randn(5)
    for own, other in ((0.1, 0.04), (1.0, 1.0), (0.01, 0.001)):
        wanted = 0.0
        for s, t in zip(student.double(), teacher.double()):
            p = ((t - centre.double()) / other).softmax(-1)
            wanted -= (p * (s / own).log_softmax(-1)).sum() / len(student)
        hint = "The centre is the teacher's alone. log_softmax is safe where log(softmax) is not."
        given = f"temperatures {own} and {other}"
        same(call(yours, student, teacher, centre, own, other), wanted, given, hint)
    s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    yours(s, t, centre, 0.1, 0.04).backward()
    flows = t.grad is not None and bool(t.grad.any())
    same(flows, False, "a teacher that requires gradients", "Detach the teacher's distribution.")


@exercise("2.4", "easy")
def follow(teacher, student, momentum):
    """The teacher is a moving average of the student: t <- momentum * t + (1 - momentum) * s, in
    place, without gradients.

    teacher, student: lists of tensors of equal shapes. Returns nothing."""


@check(follow)
def check_follow(yours):
    torch.manual_seed(0)
    for momentum in (0.0, 0.9, 1.0):
        teacher = [torch.nn.Parameter(torch.randn(3, 2)), torch.randn(4)]
        student = [torch.nn.Parameter(torch.randn(3, 2)), torch.randn(4)]
        wanted = [
            momentum * t.detach() + (1 - momentum) * s.detach() for t, s in zip(teacher, student)
        ]
        before = [s.detach().clone() for s in student]
        yours(teacher, student, momentum)
        given = f"momentum = {momentum}"
        same([t.detach() for t in teacher], wanted, given, "The teacher keeps most of itself.")
        same([s.detach() for s in student], before, given, "The student stays as it is.")


@exercise("2.5", "medium")
def entropies(logits):
    """Two numbers that show a collapse, which the loss does not show.

    logits: (n, K), the teacher's outputs for n pictures, centred and divided by the temperature.
    Returns (entropy of the mean distribution, mean entropy of the distributions), floats in nats.
    If one prototype wins for all pictures, both are 0. If all prototypes are equally likely for
    each picture, both are ln K. In a healthy run the first is near ln K and the second near 0."""


@check(entropies)
def check_entropies(yours):
    torch.manual_seed(0)
    for name, logits in (
        ("one prototype for all", torch.tensor([[50.0, 0, 0, 0]] * 6)),
        ("all alike", torch.zeros(6, 4)),
        ("each its own", 50.0 * torch.eye(4)),
        ("random", torch.randn(7, 5)),
        ("very sure", 1e4 * torch.randn(7, 5)),
    ):
        p = logits.double().softmax(-1).numpy()

        def entropy(q):
            return float(-sum(x * np.log(x) for x in q if x > 0))

        wanted = (entropy(p.mean(0)), float(np.mean([entropy(q) for q in p])))
        hint = (
            "First the mean over pictures, then its entropy; and the other way round. 0 ln 0 = 0."
        )
        same(tuple(map(float, call(yours, logits))), wanted, name, hint)


@exercise("2.6", "hard")
def linear_probe(features, labels, split, decay):
    """How much of a label can be read from features by a linear map: ridge regression on one-hot
    labels, in closed form (dino.linear_probe).

        W = (X^T X + decay * split * I)^-1 X^T Y

    X: the features, minus the mean and divided by the standard deviation (with n - 1) of the first
    `split` rows, plus a last column of ones; Y: one-hot labels.
    features: (n, E) double; labels: (n,) int. Fitted on the first `split` rows.
    Returns the accuracy on the other rows, a float."""


@check(linear_probe)
def check_linear_probe(yours):
    random = np.random.RandomState(0)
    for n, E, split, noise in ((60, 4, 40, 0.1), (200, 6, 150, 2.0), (90, 3, 30, 1.0)):
        labels = random.randint(0, 3, n)
        features = 5.0 + np.eye(3, E)[labels] + noise * random.randn(n, E)
        features *= 10.0 ** np.linspace(-3, 3, E)  # of very different sizes
        x = (features - features[:split].mean(0)) / features[:split].std(0, ddof=1)
        x = np.concatenate([x, np.ones((n, 1))], 1)
        left = np.concatenate([x[:split], np.sqrt(0.01 * split) * np.eye(E + 1)])
        right = np.concatenate([np.eye(3)[labels[:split]], np.zeros((E + 1, 3))])
        weight = np.linalg.lstsq(left, right, rcond=None)[0]
        wanted = float(((x[split:] @ weight).argmax(1) == labels[split:]).mean())
        found = call(yours, torch.tensor(features), torch.tensor(labels), split, 0.01)
        hint = "Mean, deviation and fit are of the first rows alone; the score is of the others."
        same(found, wanted, f"n = {n}, E = {E}, split = {split}", hint)
