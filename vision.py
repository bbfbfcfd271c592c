"""
Towers: the networks that turn a picture into vectors. DINO's ViT (with DINOv2's additions), and
the ResNeXt of BabyLLaVA's published models.

What every tower promises, and all that the rest of the code knows of it:

    tower(pixels, select_layer)   (N, 3, S, S) -> (N, 1 + P, E): one vector for the whole picture
                                  (CLS), then P for its places, row by row from the top left
    tower.width                   E
    tower.patch                   pixels a side of one place
    tower.num_patches(S)         P of a picture of S x S pixels
    tower.arguments               {name: value}, with which type(tower)(**arguments) is one like it
    tower.fault(S, select_layer)  why it cannot take such pictures or give that layer, or ""

A new tower is a class here that keeps this promise and an entry in TOWERS; other people's names for
its weights belong in weights.py. Parameters carry the names of the code that published them, so
that checkpoints load strictly. Knows nothing of files and argv.
Letters: N images, S side, P places, E width, H heads, D = E / H.
"""

import hashlib
import json
import math

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------
# The vision transformer


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
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(N, T, E))


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
    """DINO's vision transformer (Caron et al. 2021, arXiv 2104.14294).

    DINOv2's also scale each layer's output (`scaled`) and have `registers`, tokens that see and
    are seen but are not handed on. `offset` and `antialias`: see position_embeddings.
    Raises ValueError where a division leaves a rest."""

    def __init__(
        self,
        size,
        patch,
        width,
        depth,
        heads,
        scaled=False,
        registers=0,
        offset=0.1,
        antialias=False,
    ):
        super().__init__()
        self.arguments = {
            "size": size,
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
            "scaled": scaled,
            "registers": registers,
            "offset": offset,
            "antialias": antialias,
        }
        if size % patch or width % heads:
            raise ValueError(
                f"a ViT of {size} pixels in patches of {patch}, {width} wide with "
                f"{heads} heads: neither division may leave a rest"
            )
        self.patch, self.width, self.registers = patch, width, registers
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

    def num_patches(self, size):
        return (size // self.patch) ** 2

    def fault(self, size, select_layer):
        depth = len(self.blocks)
        if not -depth <= select_layer <= -1:
            return f"select_layer {select_layer}: a ViT of {depth} blocks takes -1 to -{depth}"
        if size < self.patch:
            return f"pictures of {size} pixels are smaller than a patch of {self.patch}"
        return ""

    def position_embeddings(self, height, width):
        """Position embeddings for a picture of height x width patches, (1, 1 + P, E).

        Another size than the trained one is reached by bicubic interpolation, as the code that
        published the weights does it: DINO adds 0.1 to the target, lest rounding lose a row;
        Hugging Face's does not, nor DINOv2's with registers, which smooths when it shrinks."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        offset, antialias = self.arguments["offset"], self.arguments["antialias"]
        if offset:
            to = {"scale_factor": ((height + offset) / side, (width + offset) / side)}
        else:
            to = {"size": (height, width)}
        grid = F.interpolate(grid, **to, mode="bicubic", antialias=antialias)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x, select_layer=-1):
        """select_layer -1: the last block, after the final norm (DINO's own output). -2, -3, ...:
        the block before, before that, ..., without the norm (LLaVA's meaning)."""
        if self.fault(min(x.shape[2:]), select_layer):
            raise ValueError(self.fault(min(x.shape[2:]), select_layer))
        height, width = x.shape[2] // self.patch, x.shape[3] // self.patch
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        x = x + self.position_embeddings(height, width)  # (N, 1 + P, E)
        if self.registers:  # after CLS, without positions
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        for block in self.blocks[: len(self.blocks) + 1 + select_layer]:
            x = block(x)
        if self.registers:
            x = torch.cat([x[:, :1], x[:, 1 + self.registers :]], dim=1)
        return self.norm(x) if select_layer == -1 else x


# ---------------------------------------------------------------------------------------------
# The residual network


class Bottleneck(nn.Module):
    def __init__(self, inputs, middle, outputs, groups, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNeXt(nn.Module):
    """ResNet and ResNeXt (Xie et al. 2017, arXiv 1611.05431) under torchvision's names. Its CLS is
    the mean of the last map.

    Always in eval mode: BatchNorm keeps the statistics that it was trained with."""

    patch = 32  # pixels a side that become one place: five halvings

    def __init__(self, depths=(3, 4, 6, 3), middle=128, groups=32):
        super().__init__()
        self.arguments = {"depths": list(depths), "middle": middle, "groups": groups}
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for i, depth in enumerate(depths):
            layer = nn.Sequential()
            for k in range(depth):
                stride = 2 if i > 0 and k == 0 else 1
                layer.append(Bottleneck(inputs, middle << i, 256 << i, groups, stride))
                inputs = 256 << i
            self.add_module(f"layer{i + 1}", layer)
        self.width = inputs

    def train(self, mode=True):
        return super().train(False)

    def num_patches(self, size):
        return (size // self.patch) ** 2

    def fault(self, size, select_layer):
        if select_layer != -1 or size % self.patch:
            return (
                f"a ResNeXt gives its last map, select_layer -1 and not {select_layer}, of "
                f"sides that divide by 32, not {size}"
            )
        return ""

    def forward(self, x, select_layer=-1):
        for size in x.shape[2:]:
            if self.fault(size, select_layer):
                raise ValueError(self.fault(size, select_layer))
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, E, S / 32, S / 32)
        x = x.flatten(2).transpose(1, 2)  # (N, P, E)
        return torch.cat([x.mean(1, keepdim=True), x], 1)


# ---------------------------------------------------------------------------------------------
# What is common to all


TOWERS = {"vit": ViT, "resnext": ResNeXt}


def describe(tower):
    """{"kind", "arguments"} with which build() makes a tower like this one."""
    kind = next(name for name, cls in TOWERS.items() if type(tower) is cls)
    return {"kind": kind, "arguments": tower.arguments}


def build(description):
    """The tower of a describe(), its weights still random."""
    return TOWERS[description["kind"]](**description["arguments"])


def weights_digest(weights):
    """A sha256 of a state dict, names and shapes included, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(tower, select_layer=-1, keep_cls=False):
    """What tells the features of one tower from another's: weights, architecture (heads, registers
    and the way of interpolating are in no weight), layer, and whether CLS is among them."""
    how = json.dumps([describe(tower), select_layer, keep_cls], sort_keys=True)
    return hashlib.sha256((how + weights_digest(tower.state_dict())).encode()).hexdigest()
