"""
Vision towers: networks that turn an image into features. Here the vision transformers of DINO,
DINOv2, CLIP and SigLIP; ResNeXt and ConvNeXt are in pretrained/convnets.py.

The interface of every tower (of a ViT, export.py and pretrained/ use more: blocks, size ...):

    tower(pixels, select_layer)   (N, 3, S, S) -> (N, 1 + P, E): a vector for the whole image (CLS),
                                  then one for each patch, row by row from the top left;
                                  only_cls=True: the first alone, (N, 1, E), for DINO
    tower.width                   E
    tower.patch                   side of a patch in pixels
    tower.num_patches(S)          P of an image of S x S pixels
    tower.arguments               {name: JSON value}; type(tower)(**arguments) has this architecture
    tower.fault(S, select_layer)  why it cannot take such images or give that layer, or ""
    from_options(options, S)      (class method) the tower that train.py's options describe

A new tower is a class with this interface and an entry in TOWERS (after "vit", so that describing a
ViT imports no other): `--vision_tower NAME` then trains it. To open its published weights too, see
docs/contributing.md. Parameters keep the names of the code that published them, so that checkpoints
load strictly.
Letters: N images, S image side in pixels, P patches, E vision width, H heads, D = E / H.
"""

import functools
import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from config import UserError
from fast.products import Linear

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

    def forward(self, x, queries=None):
        """x (N, T, E) -> (N, T, E); with `queries` the first tokens alone, (N, queries, E)."""
        N, T, E = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.heads, E // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, T, D)
        y = F.scaled_dot_product_attention(q[:, :, :queries], k, v)
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

    def forward(self, x, queries=None):
        """x (N, T, E) -> (N, T, E), or (N, queries, E)."""
        x = x[:, :queries] + self.ls1(self.attn(self.norm1(x), queries))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINO's vision transformer (Caron et al. 2021, arXiv 2104.14294), and its relatives.

    size, patch: side of the images and of a patch in pixels; hidden 0: 4 * width.
    scaled, registers: DINOv2's layer scales, and tokens that take part in attention but are not
    returned. offset, antialias: see position_embeddings(). first_norm: CLIP's norm before the first
    block. final_norm: a norm after the last block; CLIP has none for its patches. cls: SigLIP has
    no CLS token; the mean of the patches takes its place.
    Raises ValueError if the heads do not divide the width."""

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
            "hidden": hidden,
            "activation": activation,
            "eps": eps,
            "patch_bias": patch_bias,
            "cls": cls,
            "first_norm": first_norm,
            "final_norm": final_norm,
        }
        if width % heads or size < patch:
            raise ValueError(
                f"a ViT of {size} pixels in patches of {patch}, {width} wide with {heads} heads: "
                "heads must divide the width, and a patch fit in"
            )
        self.patch, self.width, self.registers, self.has_cls = patch, width, registers, cls
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

    @classmethod
    def from_options(cls, options, size):
        """A ViT for images of size x size pixels. Raises UserError."""
        if options.conv_stages:
            raise UserError("conv_stages are a convnext's: give --vision_tower convnext")
        if size % options.patch or options.vision_width % options.vision_heads:
            raise UserError(
                f"frames of {size} pixels in patches of {options.patch}, "
                f"vision_width {options.vision_width} over vision_heads {options.vision_heads}: "
                "neither division may leave a remainder"
            )
        sizes = (options.vision_width, options.vision_depth, options.vision_heads)
        return cls(size, options.patch, *sizes)

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
        """Position embeddings for height x width patches, (1, 1 + P, E).

        For another size than the trained one they are interpolated (bicubic) as in the code that
        published the weights:

            DINO, DINOv2               offset 0.1 on the target size, so that rounding loses no row
            DINOv2 with registers      no offset, antialias
            Hugging Face's folders     no offset, no antialias"""
        side = math.isqrt(self.pos_embed.shape[1] - self.has_cls)
        if (height, width) == (side, side):
            return self.pos_embed
        of_cls, of_patches = self.pos_embed.tensor_split([int(self.has_cls)], dim=1)
        grid = of_patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        offset, antialias = self.arguments["offset"], self.arguments["antialias"]
        if offset:
            to = {"scale_factor": ((height + offset) / side, (width + offset) / side)}
        else:
            to = {"size": (height, width)}
        grid = F.interpolate(grid, **to, mode="bicubic", antialias=antialias)
        return torch.cat([of_cls, grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x, select_layer=-1, only_cls=False, kept=None):
        """select_layer -1: the last block, after the final norm (DINO's own output); -2, -3, ...:
        earlier blocks, without the norm (LLaVA's meaning). only_cls: the CLS token alone, (N, 1,
        E); the last block then skips the patches, which saves a sixth of a DINO step
        (docs/speed.md). kept (N, k): the numbers of the tokens that are computed, of which 0 is the
        CLS token; None: all."""
        if self.fault(min(x.shape[2:]), select_layer):
            raise ValueError(self.fault(min(x.shape[2:]), select_layer))
        height, width = x.shape[2] // self.patch, x.shape[3] // self.patch
        x = self.patch_embed(x)  # (N, P, E)
        if self.has_cls:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.position_embeddings(height, width)  # (N, 1 + P, E)
        if kept is not None:
            x = torch.take_along_dim(x, kept[..., None], dim=1)
        if self.registers:  # after CLS, without positions
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        x = self.norm_pre(x)
        used = len(self.blocks) + 1 + select_layer  # all blocks for -1, one less for -2
        *blocks, last_block = self.blocks[:used]
        for block in blocks:
            x = block(x)
        x = last_block(x, queries=1 if only_cls and self.has_cls else None)
        if self.registers:
            x = torch.cat([x[:, :1], x[:, 1 + self.registers :]], dim=1)
        x = self.norm(x) if select_layer == -1 else x
        if not self.has_cls:
            x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        return x[:, :1] if only_cls else x


# ---------------------------------------------------------------------------------------------
# All kinds of towers


def resnext():
    from pretrained.convnets import ResNeXt  # imported only if such a tower is used

    return ResNeXt


def convnext():
    from pretrained.convnets import ConvNeXt

    return ConvNeXt


# {kind: a function that imports its class}
TOWERS = {"vit": lambda: ViT, "resnext": resnext, "convnext": convnext}


def describe_tower(tower):
    """{"kind", "arguments"}, of which build_tower() makes a tower of the same architecture."""
    kind = next(kind for kind, find_class in TOWERS.items() if type(tower) is find_class())
    return {"kind": kind, "arguments": tower.arguments}


def build_tower(description):
    """The tower that describe_tower() described, with random weights."""
    return TOWERS[description["kind"]]()(**description["arguments"])


def weights_digest(weights):
    """A sha256 of a state dict, names and shapes included, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
