"""Residual networks: the ImageNet and CIFAR forms of He et al., and the small one of the demo.

Deep Residual Learning for Image Recognition, arXiv 1512.03385. Here as in torchvision a bottleneck
strides on its 3x3 convolution, where the paper strides on the first 1x1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from models.convolutions import chain, conv_bn, head

__all__ = ["Residual", "cifar_resnet", "resnet18", "resnet50", "resnet101", "resnet152", "shapes_resnet"]

Shortcut = Literal["projection", "pad"]
_IMAGENET_WIDTHS = (64, 128, 256, 512)


class PaddedShortcut(nn.Module):
    """Option A of the paper: keep every ``stride``-th pixel and add zero channels on both sides."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.stride, before = stride, (cout - cin) // 2
        self.padding = (0, 0, 0, 0, before, cout - cin - before)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x[N, cin, H, W]`` as ``[N, cout, H/stride, W/stride]``."""
        return functional.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class Residual(nn.Module):
    """``relu(branch(x) + shortcut(x))``."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, cin, H, W]`` to ``float[N, cout, H/stride, W/stride]``."""
        return functional.relu(self.branch(x) + self.shortcut(x))


def _shortcut(cin: int, cout: int, stride: int, kind: Shortcut) -> nn.Module:
    if cin == cout and stride == 1:
        return nn.Identity()
    if kind == "pad":
        return PaddedShortcut(cin, cout, stride)
    return conv_bn(cin, cout, 1, stride, activation=None)


def _basic(cin: int, width: int, stride: int) -> tuple[nn.Module, int]:
    branch = chain(a=conv_bn(cin, width, 3, stride), b=conv_bn(width, width, 3, activation=None))
    return branch, width


def _bottleneck(cin: int, width: int, stride: int) -> tuple[nn.Module, int]:
    branch = chain(
        a=conv_bn(cin, width, 1),
        b=conv_bn(width, width, 3, stride),
        c=conv_bn(width, 4 * width, 1, activation=None),
    )
    return branch, 4 * width


def _resnet(
    stem: nn.Module,
    stem_width: int,
    form: Literal["basic", "bottleneck"],
    stages: Sequence[tuple[int, int]],
    classes: int,
    shortcut: Shortcut = "projection",
) -> nn.Sequential:
    """Assemble a network from ``stages`` of (blocks, width); every stage but the first halves the image."""
    branch_of, cin = (_basic if form == "basic" else _bottleneck), stem_width
    body: dict[str, nn.Module] = {}
    for index, (blocks, width) in enumerate(stages):
        layers: list[nn.Module] = []
        for block in range(blocks):
            stride = 2 if index and not block else 1
            branch, cout = branch_of(cin, width, stride)
            layers.append(Residual(branch, _shortcut(cin, cout, stride, shortcut)))
            cin = cout
        body[f"stage{index + 1}"] = nn.Sequential(*layers)
    return chain(stem=stem, **body, head=head(cin, classes))


def _imagenet_stem(width: int) -> nn.Module:
    return chain(conv7=conv_bn(3, width, 7, 2), pool=nn.MaxPool2d(3, 2, 1))


def resnet18(widths: Sequence[int] = _IMAGENET_WIDTHS, classes: int = 1000) -> nn.Sequential:
    """Return ResNet-18, ``float[N, 3, H, W]`` to ``float[N, classes]``; ``widths`` names the four stages."""
    stages = tuple(zip((2, 2, 2, 2), widths, strict=True))
    return _resnet(_imagenet_stem(widths[0]), widths[0], "basic", stages, classes)


def resnet50(widths: Sequence[int] = _IMAGENET_WIDTHS, classes: int = 1000) -> nn.Sequential:
    """Return ResNet-50; a stage of width ``w`` has bottlenecks of ``w`` and a stream of ``4 w`` channels."""
    stages = tuple(zip((3, 4, 6, 3), widths, strict=True))
    return _resnet(_imagenet_stem(widths[0]), widths[0], "bottleneck", stages, classes)


def resnet101(widths: Sequence[int] = _IMAGENET_WIDTHS, classes: int = 1000) -> nn.Sequential:
    """Return ResNet-101, which is ResNet-50 with 23 blocks in its third stage."""
    stages = tuple(zip((3, 4, 23, 3), widths, strict=True))
    return _resnet(_imagenet_stem(widths[0]), widths[0], "bottleneck", stages, classes)


def resnet152(widths: Sequence[int] = _IMAGENET_WIDTHS, classes: int = 1000) -> nn.Sequential:
    """Return ResNet-152, which is ResNet-50 with 8 and 36 blocks in its middle stages."""
    stages = tuple(zip((3, 8, 36, 3), widths, strict=True))
    return _resnet(_imagenet_stem(widths[0]), widths[0], "bottleneck", stages, classes)


def cifar_resnet(depth: int, shortcut: Shortcut = "pad", width: int = 16, classes: int = 10) -> nn.Sequential:
    """Return the CIFAR network of ``depth`` = 6 n + 2 layers: three stages of n blocks (section 4.2)."""
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"A CIFAR ResNet has 6 n + 2 layers, not {depth}: take 8, 14, 20, 32, 44 or 56.")
    stages = ((blocks, width), (blocks, 2 * width), (blocks, 4 * width))
    return _resnet(conv_bn(3, width, 3), width, "basic", stages, classes, shortcut)


def shapes_resnet(widths: Sequence[int] = (48, 64, 80), classes: int = 10) -> nn.Sequential:
    """Return the demo's network for 64x64 images: a pooled stem and three stages of two basic blocks."""
    stem = chain(conv3=conv_bn(3, widths[0], 3, 2), pool=nn.MaxPool2d(3, 2, 1))
    return _resnet(stem, widths[0], "basic", tuple((2, width) for width in widths), classes)
