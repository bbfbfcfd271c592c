"""
The eye: DINO's vision transformer, its self-distillation, and the features that a GPT looks at.

A ViT cuts a picture of S x S pixels into P = (S / patch)^2 patches and turns each into a vector of
width E. Parameters carry the names of facebookresearch/dino, so that its checkpoints load strictly.
Phase 0 trains it without labels: a student that sees small crops must agree with a slowly moving
average of itself, the teacher, that sees large ones (Caron et al. 2021, arXiv 2104.14294).
Knows nothing of files and argv. Letters: N images, S side, P patches, E width, H heads, D E / H.
"""
import hashlib
import math
import re

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in every DINO release

# ---------------------------------------------------------------------------------------------
# The network


class PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, 3, S, S) -> (N, P, E)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        N, T, E = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.heads, E // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, T, D)
        if x.device.type == "cpu":  # there, SDPA's bf16 backward takes five times fp32's time
            q, k, v = q.float(), k.float(), v.float()
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, E))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A DINO vision transformer. forward(x): (N, 3, S, S) -> (N, 1 + P, E), CLS first."""

    def __init__(self, size=64, patch=8, width=128, depth=4, heads=4):
        super().__init__()
        if size % patch or width % heads:
            raise ValueError(f"a ViT of {size} pixels in patches of {patch}, {width} wide with "
                             f"{heads} heads: neither division may leave a rest")
        self.size, self.patch, self.width, self.heads = size, patch, width, heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, width))
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def shape(self):
        """The arguments that make a tower like this one."""
        return {"size": self.size, "patch": self.patch, "width": self.width,
                "depth": len(self.blocks), "heads": self.heads}

    def positions(self, height, width):
        """Position embeddings for a picture of height x width patches, (1, 1 + P, E).

        Another size than the trained one is reached by bicubic interpolation. The +0.1 on the
        target is DINO's: it keeps a rounded-down scale factor from losing a row."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((height + 0.1) / side, (width + 0.1) / side),
                             mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x, select_layer=-1):
        """select_layer -1: the last block, after the final norm (DINO's own output). -2, -3, ...:
        the block before, before that, ..., without the norm (LLaVA's meaning)."""
        if not -len(self.blocks) <= select_layer <= -1:
            raise ValueError(f"select_layer {select_layer}: a tower of {len(self.blocks)} blocks "
                             f"takes -1 to -{len(self.blocks)}")
        height, width = x.shape[2] // self.patch, x.shape[3] // self.patch
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        x = x + self.positions(height, width)
        for block in self.blocks[:len(self.blocks) + 1 + select_layer]:
            x = block(x)
        return self.norm(x) if select_layer == -1 else x

    @torch.no_grad()
    def features(self, x, select_layer=-1, keep_cls=False):
        """What the projector sees: (N, 3, S, S) -> (N, P, E), or P + 1 with CLS kept, first."""
        return self(x, select_layer)[:, 0 if keep_cls else 1:]


# ---------------------------------------------------------------------------------------------
# Self-distillation


class Head(nn.Module):
    """DINO's projection head: MLP, unit length, then K prototypes of unit length."""

    def __init__(self, width, hidden, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, bottleneck))
        self.last = nn.Linear(bottleneck, prototypes, bias=False)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        return F.linear(x, F.normalize(self.last.weight, dim=-1))


def views(frames, size, scale, generator, rank=0, world=1, grey=0.4):
    """Random views of frames (n, 3, S, S) in 0..1 -> (n, 3, size, size), normalised.

    A view is a crop of `scale` (low, high) of the area, maybe mirrored, its hue turned by any
    angle, brighter or darker, maybe grey. Colour is made useless on purpose: with colour left in,
    colour alone tells the pictures of a small world apart and the tower never learns shape.
    The random numbers are drawn for all `world` ranks and this one's used, so that two ranks with
    half the frames each see what one process would."""
    n = len(frames)

    def draw(*shape):
        numbers = torch.rand(n * world, *shape, generator=generator)
        return numbers[rank * n:(rank + 1) * n].to(frames.device)

    side = (scale[0] + (scale[1] - scale[0]) * draw()).sqrt()
    aspect = (2 * draw() - 1).mul(math.log(4 / 3) / 2).exp()
    sides = torch.stack([side * aspect, side / aspect], 1).clamp(max=1)  # (n, 2): width, height
    theta = torch.zeros(n, 2, 3, device=frames.device)
    theta[:, 0, 0] = sides[:, 0] * torch.where(draw() < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = sides[:, 1]
    theta[:, :, 2] = (2 * draw(2) - 1) * (1 - sides)
    grid = F.affine_grid(theta, (n, 3, size, size), align_corners=False)
    x = F.grid_sample(frames, grid, padding_mode="border", align_corners=False)

    angle = 2 * math.pi * draw()  # turn the hue: rotate RGB about its grey axis (Rodrigues)
    cosine, sine = angle.cos(), angle.sin() / math.sqrt(3)
    a, b, c = (1 + 2 * cosine) / 3, (1 - cosine) / 3 - sine, (1 - cosine) / 3 + sine
    turn = torch.stack([a, b, c, c, a, b, b, c, a], 1).view(n, 3, 3)
    turn = torch.where((draw() < grey)[:, None, None], torch.full_like(turn, 1 / 3), turn)
    x = torch.einsum("nij,njhw->nihw", turn, x)
    return normalise((x * (0.6 + 0.8 * draw())[:, None, None, None]).clamp(0, 1))


def normalise(x):
    """(N, 3, S, S) in 0..1 -> ImageNet's zero mean and unit variance."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


class DINO(nn.Module):
    """Student, teacher and their loss. Call after_step after each optimizer step.

    The teacher's output is centred (so that no prototype wins always) and sharpened by a low
    temperature (so that not all win equally): the two pulls keep it from collapsing. A loss that
    falls proves nothing; watch linear_probe."""

    def __init__(self, student, teacher, prototypes=256, hidden=256, bottleneck=64, local_views=0,
                 temperature=0.04, momentum=0.99):
        super().__init__()
        head = lambda: Head(student.width, hidden, bottleneck, prototypes)
        self.student = nn.ModuleDict({"backbone": student, "head": head()})
        self.teacher = nn.ModuleDict({"backbone": teacher, "head": head()})
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(prototypes))
        self.register_buffer("mean", torch.zeros(prototypes))  # of this step's teacher outputs
        self.local_views, self.temperature, self.momentum = local_views, temperature, momentum

    def views(self, frames, others, generator, rank=0, world=1):
        """Two wide views, one of each moment, and `local_views` near ones, at 3/4 and 1/2 of the
        side: frames, others (n, S, S, 3) uint8 -> ((2 n, 3, ...), (local_views n, 3, ...) or None).
        The tower's positions are interpolated to fit."""
        pair = [f.permute(0, 3, 1, 2) / 255 for f in (frames, others)]
        patch = self.student["backbone"].patch
        wide, near = (round(pair[0].shape[-1] * share / patch) * patch for share in (0.75, 0.5))
        wide = torch.cat([views(f, wide, (0.4, 1.0), generator, rank, world) for f in pair])
        near = [views(pair[i % 2], near, (0.15, 0.5), generator, rank, world)
                for i in range(self.local_views)]
        return wide, torch.cat(near) if near else None

    def forward(self, wide, near=None):
        """(teacher outputs, loss): each student view's cross-entropy against the teacher's other
        wide views, their mean."""
        encode = lambda network, x: network["head"](network["backbone"](x)[:, 0]).float()  # (n, K)
        with torch.no_grad():
            outputs = encode(self.teacher, wide)
            self.mean.copy_(outputs.mean(0))
            targets = ((outputs - self.centre) / self.temperature).softmax(-1).chunk(2)
        guesses = encode(self.student, wide).chunk(2)
        if near is not None:
            guesses += encode(self.student, near).chunk(self.local_views)
        terms = [-(target * (guess / 0.1).log_softmax(-1)).sum(-1).mean()
                 for i, target in enumerate(targets) for j, guess in enumerate(guesses) if i != j]
        return outputs, sum(terms) / len(terms)

    @torch.no_grad()
    def after_step(self, progress):
        """Move centre and teacher, whose momentum climbs to 1 along a cosine. progress: 0 to 1."""
        if dist.is_initialized():
            dist.all_reduce(self.mean)
            self.mean /= dist.get_world_size()
        self.centre.lerp_(self.mean, 0.1)
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters()):
            slow.lerp_(fast, 1 - momentum)


# ---------------------------------------------------------------------------------------------
# From frames to features, and from checkpoints to towers


def preprocess(frames, device="cpu"):
    """Frames (N, S, S, 3) uint8 -> the tower's input (N, 3, S, S): the one way in, in training,
    feature extraction and sampling alike."""
    return normalise(torch.as_tensor(np.array(frames), device=device).permute(0, 3, 1, 2) / 255)


def extract(tower, frames, select_layer=-1, keep_cls=False, batch=256):
    """Yield features of frames (N, S, S, 3) uint8, in order, as float16 arrays (n, P, E)."""
    device = tower.pos_embed.device
    for start in range(0, len(frames), batch):
        x = preprocess(frames[start:start + batch], device)
        yield tower.features(x, select_layer, keep_cls).cpu().to(torch.float16).numpy()


def fingerprint(tower, select_layer=-1, keep_cls=False):
    """sha256 of the tower's weights and of what is taken from it: which features are whose."""
    digest = hashlib.sha256(f"{select_layer} {keep_cls}".encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def build_tower(state, heads=0):
    """A ViT, in eval mode, filled strictly from a checkpoint's dict; its shape is read off it.

    Takes a backbone's state dict, or a DINO training checkpoint, whose teacher is used. Prefixes
    `module.`, `backbone.`, `encoder.` come off the start of keys, and DINO's own `head.*` is left
    out; otherwise each key must be used and each parameter filled. heads 0: width / 64, as in all
    published ViTs. Raises ValueError naming the keys that are missing, left over or misshapen."""
    state = state.get("teacher", state)
    state = {re.sub(r"^((module|backbone|encoder)\.)+", "", key): value
             for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    try:
        width, patch = state["pos_embed"].shape[2], state["patch_embed.proj.weight"].shape[2]
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
    except KeyError as error:
        raise ValueError(f"not a DINO ViT: no key {error} among {', '.join(list(state)[:5])} "
                         "...") from None
    depth = 1 + max([int(key.split(".")[1]) for key in state if key.startswith("blocks.")] or [0])
    tower = ViT(side * patch, patch, width, depth, heads or max(1, width // 64))
    own = tower.state_dict()
    faults = {"missing": [key for key in own if key not in state],
              "left over": [key for key in state if key not in own],
              "of another shape": [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
                                   for k in own if k in state and own[k].shape != state[k].shape]}
    if any(faults.values()):
        raise ValueError("; ".join(f"{len(keys)} keys {fault}: {', '.join(keys[:4])}"
                                   for fault, keys in faults.items() if keys))
    tower.load_state_dict(state)
    return tower.eval()


def linear_probe(features, labels, split):
    """Accuracy of a ridge classifier fitted on rows [:split] and scored on the rest.

    features (N, E) float, labels (N,) int. The closed form in fp64: no optimizer to tune."""
    x = features.double()
    x = (x - x[:split].mean(0)) / (x[:split].std(0) + 1e-6)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    y = F.one_hot(labels).double()
    gram = x[:split].T @ x[:split] + 0.01 * split * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x[:split].T @ y[:split])
    return ((x[split:] @ weight).argmax(1) == labels[split:]).double().mean().item()
