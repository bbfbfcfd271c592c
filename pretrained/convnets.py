"""
Convolutional towers: the ResNeXt of BabyLLaVA's published models, and ConvLLaVA's ConvNeXt. Their
interface: vision.py.
Letters: N images, S image side in pixels, P patches, E vision width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from config import UserError
from fast.products import Linear


def with_mean(maps):
    """Maps (N, E, h, w) -> (N, 1 + P, E): their mean instead of a CLS token, then the patches."""
    x = maps.flatten(2).transpose(1, 2)  # (N, P, E)
    return torch.cat([x.mean(1, keepdim=True), x], 1)


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
    """ResNet and ResNeXt (Xie et al. 2017, arXiv 1611.05431) under torchvision's names. The mean of
    the last map takes the place of CLS.

    Always in eval mode: BatchNorm keeps the statistics that it was trained with."""

    patch = 32  # side in pixels: five halvings

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

    @classmethod
    def from_options(cls, options, size):
        raise UserError("a ResNeXt is not trained here: give one with --vision_weights")

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

    def forward(self, x, select_layer=-1, only_cls=False):
        for size in x.shape[2:]:
            if self.fault(size, select_layer):
                raise ValueError(self.fault(size, select_layer))
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, E, S / 32, S / 32)
        return with_mean(x)[:, : 1 if only_cls else None]


class NormChannels(nn.LayerNorm):
    """LayerNorm over the channels of maps (N, E, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mixer(nn.Module):
    """Linear, GELU, Linear, four times as wide inside."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ConvNeXtBlock(nn.Module):
    """A 7 x 7 convolution of each channel, then an MLP over the channels at each position."""

    def __init__(self, width, eps):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps)
        self.mlp = Mixer(width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))  # the block starts near the identity

    def forward(self, x):
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # (N, h, w, E)
        y = self.gamma * self.mlp(self.norm(y))
        return x + y.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Halves the map (except the first stage), then applies `depth` blocks."""

    def __init__(self, width_in, width, depth, eps):
        super().__init__()
        self.downsample = nn.Identity()
        if width_in != width:
            halve = nn.Conv2d(width_in, width, 2, 2)
            self.downsample = nn.Sequential(NormChannels(width_in, eps), halve)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width, eps) for _ in range(depth)))

    def forward(self, x):
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al. 2022, arXiv 2201.03545) under timm's names. The mean of the last map
    takes the place of CLS.

    The stem makes patches of stem x stem pixels. Each of `depths` is a stage of so many blocks,
    twice as wide as the stage before and at half its resolution. ConvLLaVA (arXiv 2405.15738) has
    five stages, so that an image of 768 pixels is 144 tokens."""

    def __init__(self, depths=(3, 3, 27, 3), width=192, stem=4, eps=1e-6):
        super().__init__()
        self.arguments = {"depths": list(depths), "width": width, "stem": stem, "eps": eps}
        self.stem = nn.Sequential(nn.Conv2d(3, width, stem, stem), NormChannels(width, eps))
        widths = [width << i for i in range(len(depths))]
        befores = [width, *widths[:-1]]
        self.stages = nn.Sequential(
            *(Stage(*sizes, eps) for sizes in zip(befores, widths, depths, strict=True))
        )
        self.width, self.patch = widths[-1], stem << (len(depths) - 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @classmethod
    def from_options(cls, options, size):
        """A ConvNeXt for images of size x size pixels. Raises UserError."""
        if not options.conv_stages:
            raise UserError("--vision_tower convnext: give --conv_stages, as 1 1 2 1")
        tower = cls(options.conv_stages, options.vision_width, options.patch)
        if tower.fault(size, -1):
            raise UserError(tower.fault(size, -1))
        return tower

    def num_patches(self, size):
        return (size // self.patch) ** 2

    def fault(self, size, select_layer):
        if select_layer != -1 or size % self.patch:
            return (
                f"this ConvNeXt gives its last map, select_layer -1 and not {select_layer}, of "
                f"sides that divide by {self.patch}, not {size}"
            )
        return ""

    def forward(self, x, select_layer=-1, only_cls=False):
        for size in x.shape[2:]:
            if self.fault(size, select_layer):
                raise ValueError(self.fault(size, select_layer))
        return with_mean(self.stages(self.stem(x)))[:, : 1 if only_cls else None]
