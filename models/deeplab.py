"""DeepLabV3: a dilated ResNet, atrous spatial pyramid pooling, and an output as large as the image.

Chen et al., arXiv 1706.05587, with an output stride of 8: the last two stages dilate instead of striding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.convolutions import chain, conv_bn
from models.resnet import Residual

__all__ = ["DeepLab", "deeplab"]


def _bottleneck(cin: int, width: int, stride: int, dilation: int) -> Residual:
    cout = 4 * width
    branch = chain(
        a=conv_bn(cin, width, 1),
        b=conv_bn(width, width, 3, stride, dilation=dilation),
        c=conv_bn(width, cout, 1, activation=None),
    )
    same = cin == cout and stride == 1
    return Residual(branch, nn.Identity() if same else conv_bn(cin, cout, 1, stride, activation=None))


class PyramidPooling(nn.Module):
    """Convolutions of one map at several dilations, and its mean, laid side by side and mixed."""

    def __init__(self, cin: int, width: int, rates: Sequence[int]) -> None:
        super().__init__()
        dilated = (conv_bn(cin, width, 3, dilation=rate) for rate in rates)
        self.parts = nn.ModuleList([conv_bn(cin, width, 1), *dilated])
        self.mean = chain(pool=nn.AdaptiveAvgPool2d(1), conv=conv_bn(cin, width, 1))
        self.project = conv_bn((len(rates) + 2) * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, cin, H, W]`` to ``float[N, width, H, W]``."""
        mean = functional.interpolate(self.mean(x), x.shape[-2:], mode="bilinear", align_corners=False)
        mixed: Tensor = self.project(torch.cat([*(part(x) for part in self.parts), mean], 1))
        return mixed


class DeepLab(nn.Module):
    """Backbone, pyramid pooling and a classifier of every pixel."""

    def __init__(self, backbone: nn.Module, cin: int, width: int, rates: Sequence[int], classes: int) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, PyramidPooling(cin, width, rates)
        self.smooth, self.classify = conv_bn(width, width, 3), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, H, W]`` to ``float[N, classes, H, W]``."""
        scores = self.classify(self.smooth(self.pooling(self.backbone(x))))
        return functional.interpolate(scores, x.shape[-2:], mode="bilinear", align_corners=False)


def deeplab(
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (3, 4, 6, 3),
    pooled: int = 256,
    rates: Sequence[int] = (12, 24, 36),
    classes: int = 21,
) -> DeepLab:
    """Return DeepLabV3 on ResNet-50; a stage of width ``w`` has a stream of ``4 w`` channels."""
    cin, layers = widths[0], list[nn.Module]()
    for width, depth, stride, dilation in zip(widths, depths, (1, 2, 1, 1), (1, 1, 2, 4), strict=True):
        for block in range(depth):
            layers.append(_bottleneck(cin, width, 1 if block else stride, dilation))
            cin = 4 * width
    stem = chain(conv7=conv_bn(3, widths[0], 7, 2), pool=nn.MaxPool2d(3, 2, 1))
    return DeepLab(chain(stem=stem, stages=nn.Sequential(*layers)), cin, pooled, rates, classes)
