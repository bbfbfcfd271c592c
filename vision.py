"""
The eye: DINO's vision transformer, its self-distillation, and the features that a GPT looks at;
and ResNeXt, the eye that BabyLLaVA's published models have.

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


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width, heads, scaled):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)
        self.ls2 = LayerScale(width) if scaled else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """A DINO vision transformer. forward(x): (N, 3, S, S) -> (N, 1 + P, E), CLS first.

    DINOv2's also scale each layer's output (`scaled`) and have `registers`, tokens that see and
    are seen but are not handed on. `offset` and `antialias`: see positions."""

    def __init__(self, size=64, patch=8, width=128, depth=4, heads=4, scaled=False, registers=0,
                 offset=0.1, antialias=False):
        super().__init__()
        if size % patch or width % heads:
            raise ValueError(f"a ViT of {size} pixels in patches of {patch}, {width} wide with "
                             f"{heads} heads: neither division may leave a rest")
        self.patch, self.width, self.registers = patch, width, registers
        self.arguments = dict(size=size, patch=patch, width=width, depth=depth, heads=heads,
                              scaled=scaled, registers=registers, offset=offset,
                              antialias=antialias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, width))
        self.patch_embed = PatchEmbed(patch, width)
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.blocks = nn.ModuleList(Block(width, heads, scaled) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def shape(self):
        """The arguments that make a tower like this one."""
        return self.arguments

    def positions(self, height, width):
        """Position embeddings for a picture of height x width patches, (1, 1 + P, E).

        Another size than the trained one is reached by bicubic interpolation, as the code that
        published the weights does it: DINO adds 0.1 to the target, lest rounding lose a row;
        Hugging Face's does not, nor DINOv2's with registers, which smooths when it shrinks."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        offset, antialias = self.arguments["offset"], self.arguments["antialias"]
        to = {"scale_factor": ((height + offset) / side, (width + offset) / side)} if offset else \
            {"size": (height, width)}
        grid = F.interpolate(grid, **to, mode="bicubic", antialias=antialias)
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
        if self.registers:  # after CLS, without positions
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks[:len(self.blocks) + 1 + select_layer]:
            x = block(x)
        x = torch.cat([x[:, :1], x[:, 1 + self.registers:]], 1) if self.registers else x
        return self.norm(x) if select_layer == -1 else x


class Bottleneck(nn.Module):
    def __init__(self, inputs, middle, outputs, groups, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None if stride == 1 and inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNeXt(nn.Module):
    """ResNet and ResNeXt (Xie et al. 2017, arXiv 1611.05431), torchvision's names; never trained
    here. forward(x): (N, 3, S, S) -> (N, 1 + P, E): the mean of the last map, then its P positions.

    Always in eval mode: BatchNorm keeps the statistics that it was trained with."""

    patch = 32  # pixels a side that become one position: five halvings

    def __init__(self, depths=(3, 4, 6, 3), middle=128, groups=32):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for i, depth in enumerate(depths):
            layer = nn.Sequential()
            for k in range(depth):
                layer.append(Bottleneck(inputs, middle << i, 256 << i, groups,
                                        2 if i and not k else 1))
                inputs = 256 << i
            self.add_module(f"layer{i + 1}", layer)
        self.width = inputs
        self.arguments = {"depths": list(depths), "middle": middle, "groups": groups}

    def shape(self):
        return self.arguments

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x, select_layer=-1):
        if select_layer != -1 or x.shape[2] % 32 or x.shape[3] % 32:
            raise ValueError(f"a ResNeXt gives its last map, select_layer -1 and not {select_layer}"
                             f", of sides that divide by 32, not {x.shape[3]} x {x.shape[2]}")
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, E, S / 32, S / 32)
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([x.mean(1, keepdim=True), x], 1)


def make_tower(shape):
    """The tower of a checkpoint's shape(): a ViT or a ResNeXt, its weights still random."""
    return (ResNeXt if "depths" in shape else ViT)(**shape)


@torch.no_grad()
def tower_features(tower, x, select_layer=-1, keep_cls=False):
    """What the projector sees: (N, 3, S, S) -> (N, P, E), or P + 1 with CLS kept, first."""
    return tower(x, select_layer)[:, 0 if keep_cls else 1:]


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
    device = next(tower.parameters()).device
    for start in range(0, len(frames), batch):
        x = preprocess(frames[start:start + batch], device)
        yield tower_features(tower, x, select_layer, keep_cls).cpu().to(torch.float16).numpy()


def fingerprint(tower, select_layer=-1, keep_cls=False):
    """sha256 of the tower's weights and of what is taken from it: which features are whose."""
    digest = hashlib.sha256(f"{select_layer} {keep_cls}".encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


# Hugging Face's names (old and new) for the parameters of ViT, Dinov2 -> facebookresearch's.
RENAMES = [(r"^(vit|dinov2(_with_registers)?)\.", ""), (r"^pooler\..*", ""),
           (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
           (r"^embeddings\.position_embeddings", "pos_embed"), (r"^embeddings\.", ""),
           (r"^(encoder\.)?layers?\.", "blocks."), (r"^layernorm\.", "norm."),
           (r"\.layernorm_before", ".norm1"), (r"\.layernorm_after", ".norm2"),
           (r"\.attention\.(output\.dense|o_proj)", ".attn.proj"),
           (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)", r".attn.\2"),
           (r"\.intermediate\.dense", ".mlp.fc1"), (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
           (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma")]


def dino_names(state):
    """A Hugging Face ViT's state dict under DINO's names; q, k, v stacked into one."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    renamed.pop("", None)  # the pooler, which DINO has not
    for key in [key for key in renamed if ".attn.q." in key]:
        parts = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(
                [renamed.pop(part) for part in parts])
    return renamed


def build_tower(state, heads=0):
    """A ViT or ResNeXt in eval mode, filled strictly from a checkpoint's dict; its architecture is
    read off names and shapes.

    Takes a state dict, or a training checkpoint, whose teacher is used; facebookresearch's names
    (DINO, DINOv2), Hugging Face's (ViT, Dinov2), torchvision's (ResNet, ResNeXt). Prefixes
    `module.`, `backbone.`, `encoder.` come off the start of keys; heads, and the mask token that
    only training uses, are left out; all other keys must be used, all parameters be filled.
    heads 0: width / 64, as in all published ViTs. Raises ValueError naming the keys that are
    missing, left over or misshapen."""
    for key in ("teacher", "state_dict", "model"):
        state = state.get(key, state)
    hugging_face = any("embeddings.cls_token" in key for key in state)
    if hugging_face:
        state = dino_names(state)
    state = {re.sub(r"^((module|backbone|encoder)\.)+", "", key): value
             for key, value in state.items()}
    state = {key: value for key, value in state.items()
             if not re.match(r"(head|fc)\.|mask_token$", key)}
    blocks = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in state) if m]
    if "pos_embed" in state and "patch_embed.proj.weight" in state:
        width, patch = state["pos_embed"].shape[2], state["patch_embed.proj.weight"].shape[2]
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        tower = ViT(side * patch, patch, width, 1 + max(blocks, default=0),
                    heads or max(1, width // 64), "blocks.0.ls1.gamma" in state, registers,
                    0.0 if hugging_face or registers else 0.1, registers > 0)
    elif "layer1.0.conv2.weight" in state:
        depths = [len([k for k in state if re.fullmatch(rf"layer{i}\.\d+\.conv2\.weight", k)])
                  for i in range(1, 5)]
        middle, group = state["layer1.0.conv2.weight"].shape[:2]
        tower = ResNeXt(depths, middle, middle // group)
    else:
        raise ValueError("neither a DINO ViT nor a ResNeXt: its keys are "
                         f"{', '.join(list(state)[:5])} ...")
    counters = {k: v for k, v in tower.state_dict().items() if k.endswith("num_batches_tracked")}
    own, state = ({k: v for k, v in each.items() if not k.endswith("num_batches_tracked")}
                  for each in (tower.state_dict(), state))  # which are no weights
    faults = {"missing": [key for key in own if key not in state],
              "left over": [key for key in state if key not in own],
              "of another shape": [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
                                   for k in own if k in state and own[k].shape != state[k].shape]}
    if any(faults.values()):
        raise ValueError("; ".join(f"{len(keys)} keys {fault}: {', '.join(keys[:4])}"
                                   for fault, keys in faults.items() if keys))
    tower.load_state_dict(counters | state)
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
