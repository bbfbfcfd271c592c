"""
Towers: the networks that turn a picture into vectors. The vision transformers of DINO, DINOv2, CLIP
and SigLIP here, those that convolve in convnets.py.

What every tower promises, and all that the rest of the code knows of it:

    tower(pixels, select_layer)   (N, 3, S, S) -> (N, 1 + P, E): one vector for the whole picture
                                  (CLS), then P for its places, row by row from the top left;
                                  only_cls=True: the one alone, (N, 1, E), as DINO wants it
    tower.width                   E
    tower.patch                   pixels a side of one place
    tower.num_patches(S)         P of a picture of S x S pixels
    tower.arguments               {name: value}, with which type(tower)(**arguments) is one like it
    tower.fault(S, select_layer)  why it cannot take such pictures or give that layer, or ""

A new tower is a class here that keeps this promise and an entry in TOWERS; other people's names for
its weights belong in towers.py. Parameters carry the names of the code that published them, so
that checkpoints load strictly. Knows nothing of files and argv.
Letters: N images, S side, P places, E width, H heads, D = E / H.
"""

import functools
import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from convnets import ConvNeXt, ResNeXt
from fused import Linear

# ---------------------------------------------------------------------------------------------
# The vision transformer


class PatchEmbed(nn.Module):
    def __init__(self, patch, width, bias):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, 3, S, S) -> (N, P, E)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x, outputs=None):
        """x (N, T, E) -> (N, T, E), or what the first `outputs` alone gather."""
        N, T, E = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.heads, E // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, T, D)
        y = F.scaled_dot_product_attention(q[:, :, :outputs], k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class MLP(nn.Module):
    def __init__(self, width, hidden, activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width, heads, hidden, activation, eps, scaled):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, hidden, activation)
        self.ls2 = LayerScale(width) if scaled else nn.Identity()

    def forward(self, x, outputs=None):
        x = x[:, :outputs] + self.ls1(self.attn(self.norm1(x), outputs))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINO's vision transformer (Caron et al. 2021, arXiv 2104.14294), and its relatives.

    DINOv2's also scale each layer's output (`scaled`) and have `registers`, tokens that see and
    are seen but are not handed on. `offset` and `antialias`: see position_embeddings. CLIP's have a
    norm before the first block and none for the places after the last; SigLIP's have no CLS either:
    in its place stands the mean of the places. hidden 0: 4 * width.
    Raises ValueError where the heads do not divide the width."""

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
        hidden=0,
        activation="gelu",
        eps=1e-6,
        patch_bias=True,
        cls=True,
        first_norm=False,
        final_norm=True,
    ):
        arguments = {name: value for name, value in locals().items() if name != "self"}
        super().__init__()
        self.arguments = {k: v for k, v in arguments.items() if k != "__class__"}
        if width % heads or size < patch:
            raise ValueError(
                f"a ViT of {size} pixels in patches of {patch}, {width} wide with {heads} heads: "
                "heads must divide the width, and a patch fit in"
            )
        self.patch, self.width, self.registers = patch, width, registers
        if cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, cls + (size // patch) ** 2, width))
        self.patch_embed = PatchEmbed(patch, width, patch_bias)
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.norm_pre = nn.LayerNorm(width, eps) if first_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden or 4 * width, activation, eps, scaled) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps) if final_norm else nn.Identity()
        for name, parameter in self.named_parameters():
            if name in ("cls_token", "pos_embed"):
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
        cls = self.arguments["cls"]
        side = math.isqrt(self.pos_embed.shape[1] - cls)
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, cls:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        offset, antialias = self.arguments["offset"], self.arguments["antialias"]
        if offset:
            to = {"scale_factor": ((height + offset) / side, (width + offset) / side)}
        else:
            to = {"size": (height, width)}
        grid = F.interpolate(grid, **to, mode="bicubic", antialias=antialias)
        return torch.cat([self.pos_embed[:, :cls], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x, select_layer=-1, only_cls=False):
        """select_layer -1: the last block, after the final norm (DINO's own output). -2, -3, ...:
        the block before, before that, ..., without the norm (LLaVA's meaning). only_cls: CLS alone,
        (N, 1, E), which spares the last block the places."""
        if self.fault(min(x.shape[2:]), select_layer):
            raise ValueError(self.fault(min(x.shape[2:]), select_layer))
        height, width = x.shape[2] // self.patch, x.shape[3] // self.patch
        x = self.patch_embed(x)  # (N, P, E)
        if self.arguments["cls"]:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.position_embeddings(height, width)  # (N, 1 + P, E)
        if self.registers:  # after CLS, without positions
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        x = self.norm_pre(x)
        blocks = self.blocks[: len(self.blocks) + 1 + select_layer]
        for block in blocks:
            is_last = block is blocks[-1]
            x = block(x, 1 if only_cls and is_last and self.arguments["cls"] else None)
        if self.registers:
            x = torch.cat([x[:, :1], x[:, 1 + self.registers :]], dim=1)
        x = self.norm(x) if select_layer == -1 else x
        if not self.arguments["cls"]:
            x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        return x[:, :1] if only_cls else x


# ---------------------------------------------------------------------------------------------
# What is common to all


TOWERS = {"vit": ViT, "resnext": ResNeXt, "convnext": ConvNeXt}


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
