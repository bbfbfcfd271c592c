"""
DINO: training a vision tower without labels, by self-distillation (Caron et al. 2021, arXiv
2104.14294).

A student that sees one view of a scene must predict the output of the teacher, a moving average of
the student, for another view. The views here are crops of two frames of one clip, which show the
same things in different positions. A falling loss proves nothing; watch linear_probe().

train.py's loop calls inputs(), forward(), after_step() and result(), as on model.BabyLLaVA.
Letters: n rows, N images, S image side in pixels, E vision width, K prototypes.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common.devices import send
from common.images import normalise
from fast.products import Linear
from model import BabyLLaVA

NUMBERS_A_VIEW = 8  # random numbers for each view, see crop()


class Head(nn.Module):
    """DINO's projection head: MLP, unit length, then K prototypes of unit length."""

    def __init__(self, width, hidden, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(width, hidden),
            nn.GELU(),
            Linear(hidden, hidden),
            nn.GELU(),
            Linear(hidden, bottleneck),
        )
        self.last = Linear(bottleneck, prototypes, bias=False)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        return F.linear(x, F.normalize(self.last.weight, dim=-1))


def crop(frames, size, scale, numbers):
    """Random crops of frames (n, 3, S, S) in 0..1 -> (n, 3, size, size): between scale[0] and
    scale[1] of the area, an aspect ratio of 3/4 to 4/3, half of them mirrored.

    numbers (n, 8) in 0..1: area, aspect ratio, mirrored, position x and y, and three for
    recolour()."""
    n = len(frames)
    area, aspect, mirror = numbers[:, 0], numbers[:, 1], numbers[:, 2]
    side = (scale[0] + (scale[1] - scale[0]) * area).sqrt()
    stretch = ((2 * aspect - 1) * (math.log(4 / 3) / 2)).exp()
    sides = torch.stack([side * stretch, side / stretch], 1).clamp(max=1)  # (n, 2): width, height
    theta = torch.zeros(n, 2, 3, device=frames.device)
    theta[:, 0, 0] = sides[:, 0] * torch.where(mirror < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = sides[:, 1]
    theta[:, :, 2] = (2 * numbers[:, 3:5] - 1) * (1 - sides)
    grid = F.affine_grid(theta, (n, 3, size, size), align_corners=False)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False)


def recolour(pixels, numbers, grey=0.4):
    """Pixels (n, 3, size, size) in 0..1 with a random hue, a fraction `grey` of them in grey, and
    brighter or darker by up to 40 %.

    Colour is made useless on purpose: in a small world colour alone tells most images apart, and
    the tower would never learn shape."""
    n = len(pixels)
    angle = 2 * math.pi * numbers[:, 5]  # turn the hue: rotate RGB about its grey axis (Rodrigues)
    cosine, sine = angle.cos(), angle.sin() / math.sqrt(3)
    a, b, c = (1 + 2 * cosine) / 3, (1 - cosine) / 3 - sine, (1 - cosine) / 3 + sine
    turn = torch.stack([a, b, c, c, a, b, b, c, a], 1).view(n, 3, 3)
    is_grey = (numbers[:, 6] < grey)[:, None, None]
    turn = torch.where(is_grey, torch.full_like(turn, 1 / 3), turn)
    pixels = torch.einsum("nij,njhw->nihw", turn, pixels)
    brightness = (0.6 + 0.8 * numbers[:, 7])[:, None, None, None]
    return (pixels * brightness).clamp(0, 1)


class DINO(nn.Module):
    """Student, teacher and their loss.

    mask: the share of the patches of a global crop that the student does not see (masked siamese
    networks, Assran et al. 2022, arXiv 2204.07141): less to compute, and more to guess.

    The teacher's output is centred, so that no prototype always wins, and sharpened by a low
    temperature, so that they do not all win equally: together this prevents collapse."""

    def __init__(
        self,
        student,
        teacher,
        prototypes,
        local_views=0,
        temperature=0.04,
        momentum=0.99,
        hidden=256,
        bottleneck=64,
        mask=0.0,
    ):
        super().__init__()
        heads = [Head(student.width, hidden, bottleneck, prototypes) for _ in range(2)]
        self.student = nn.ModuleDict({"backbone": student, "head": heads[0]})
        self.teacher = nn.ModuleDict({"backbone": teacher, "head": heads[1]})
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(prototypes))
        # the teacher's outputs in this step, over all micro-batches: their sum and number
        self.register_buffer("step_sum", torch.zeros(prototypes), persistent=False)
        self.register_buffer("step_rows", torch.zeros(()), persistent=False)
        self.local_views, self.temperature, self.momentum = local_views, temperature, momentum
        self.mask = mask

    def inputs(self, batch, image_format, seed, step):
        """(global crops (2 n, 3, ...), local crops (local_views n, 3, ...) or None, which tokens of
        global crops the student sees (2 n, k) or None) of a batches.FramePairs: one global crop of
        each of the two frames, and `local_views` smaller ones.

        Global crops have 3/4 of the side, local crops 1/2; the tower interpolates its position
        embeddings. The random numbers of a row depend on seed, step and its number in the whole
        batch, not on how the batch is cut into processes and micro-batches."""
        device = self.centre.device
        end, views = batch.first + batch.count, 2 + self.local_views
        random = np.random.RandomState([seed, step])
        numbers = random.random_sample((end, views, NUMBERS_A_VIEW))[batch.first :]
        numbers = send(numbers.astype(np.float32), device)
        pair = [
            send(frames, device).permute(0, 3, 1, 2) / 255
            for frames in (batch.frames, batch.others)
        ]
        patch, side = self.student["backbone"].patch, pair[0].shape[-1]
        big, small = (max(1, round(side * share / patch)) * patch for share in (0.75, 0.5))

        def view(i, size, scale):
            cropped = crop(pair[i % 2], size, scale, numbers[:, i])
            return normalise(recolour(cropped, numbers[:, i]), image_format)

        global_crops = torch.cat([view(i, big, (0.4, 1.0)) for i in range(2)])
        local_crops = [view(i, small, (0.15, 0.5)) for i in range(2, views)]
        kept = None
        if self.mask:
            random = np.random.RandomState([seed, step, 1])
            order = random.random_sample((end, 2, (big // patch) ** 2)).argsort(-1)
            kept = send(self.choose_tokens(order[batch.first :]), device)
        return global_crops, torch.cat(local_crops) if local_crops else None, kept

    def choose_tokens(self, order):
        """order (n, 2, P), a random order of the patches of each global crop -> (2 n, k): the
        tokens that the student sees, CLS first, then patches from 1 on."""
        count = max(1, round(order.shape[-1] * (1 - self.mask)))
        patches = np.sort(order[..., :count]) + 1
        tokens = np.concatenate([np.zeros_like(patches[..., :1]), patches], -1)
        return tokens.swapaxes(0, 1).reshape(-1, tokens.shape[-1])

    def encode(self, network, pixels, **which):
        """Head outputs of the CLS vectors, (n, K), fp32."""
        return network["head"](network["backbone"](pixels, only_cls=True, **which)[:, 0]).float()

    def forward(self, global_crops, local_crops=None, kept=None):
        """(teacher outputs, loss): the mean cross-entropy of each student view against each global
        view of the teacher that is not the same view."""
        with torch.no_grad():
            outputs = self.encode(self.teacher, global_crops)
            self.step_sum += outputs.sum(0)
            self.step_rows += len(outputs)
            targets = ((outputs - self.centre) / self.temperature).softmax(-1).chunk(2)
        which = {} if kept is None else {"kept": kept}  # only a ViT has it
        guesses = self.encode(self.student, global_crops, **which).chunk(2)
        if local_crops is not None:
            guesses += self.encode(self.student, local_crops).chunk(self.local_views)
        terms = []
        for i, target in enumerate(targets):
            for j, guess in enumerate(guesses):
                if i != j:
                    terms.append(-(target * (guess / 0.1).log_softmax(-1)).sum(-1).mean())
        return outputs, sum(terms) / len(terms)

    @torch.no_grad()
    def after_step(self, progress, taken):
        """Update centre and teacher, if the step was taken; outputs of a step that was not taken
        may not be finite and are dropped. The momentum rises to 1 along a cosine. progress: 0 to
        1."""
        if taken:
            self.update_teacher(progress)
        self.step_sum.zero_()
        self.step_rows.zero_()

    def update_teacher(self, progress):
        if dist.is_initialized():
            dist.all_reduce(self.step_sum)
            dist.all_reduce(self.step_rows)
        self.centre.lerp_(self.step_sum / self.step_rows, 0.1)
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters()):
            slow.lerp_(fast, 1 - momentum)

    def result(self):
        """The BabyLLaVA that a checkpoint saves: the teacher's tower alone."""
        return BabyLLaVA(None, tower=self.teacher["backbone"])


def linear_probe(features, labels, split):
    """The accuracy of a ridge classifier, fitted on rows [:split] and scored on the rest.

    features (n, E) float, labels (n,) int. A closed form in fp64, so there is nothing to tune."""
    x = features.double()
    x = (x - x[:split].mean(0)) / (x[:split].std(0) + 1e-6)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    y = F.one_hot(labels).double()
    gram = x[:split].T @ x[:split] + 0.01 * split * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x[:split].T @ y[:split])
    return ((x[split:] @ weight).argmax(1) == labels[split:]).double().mean().item()
