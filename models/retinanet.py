"""RetinaNet: a feature pyramid of five levels on ResNet-50, and two heads that all levels share.

Lin et al., arXiv 1708.02002 and 1612.03144. Class scores and box offsets of all anchors are concatenated;
there is no suppression.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.boxes import box_rows
from models.convolutions import BareConv, chain
from models.resnet import resnet50

__all__ = ["FeaturePyramid", "RetinaNet", "retinanet"]


class FeaturePyramid(nn.Module):
    """Three maps, from coarse to fine, each joined with the coarser one; two coarser ones are added."""

    def __init__(self, maps: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(BareConv(cin, width, 1) for cin in maps)
        self.smooth = nn.ModuleList(BareConv(width, width, 3, padding=1) for _ in maps)
        self.coarse = BareConv(maps[-1], width, 3, 2, 1)
        self.coarser = BareConv(width, width, 3, 2, 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map ``float[N, maps[i], H, W]``, fine to coarse, to ``float[N, width, H, W]`` and two more."""
        levels: list[Tensor] = []
        above: Tensor | None = None
        for x, lateral, smooth in list(zip(maps, self.lateral, self.smooth, strict=True))[::-1]:
            joined = lateral(x)
            if above is not None:
                joined = joined + functional.interpolate(above, scale_factor=2.0)
            above = joined
            levels.insert(0, smooth(joined))
        levels.append(self.coarse(maps[-1]))
        levels.append(self.coarser(levels[-1].relu()))
        return levels


def _head(width: int, depth: int, outputs: int) -> nn.Sequential:
    layers: dict[str, nn.Module] = {}
    for number in range(1, depth + 1):
        layers[f"conv{number}"] = BareConv(width, width, 3, padding=1)
        layers[f"act{number}"] = nn.ReLU()
    return chain(**layers, out=BareConv(width, outputs, 3, padding=1))


class RetinaNet(nn.Module):
    """ResNet-50 without its classifier, the pyramid and the heads."""

    def __init__(self, widths: Sequence[int], width: int, depth: int, classes: int, anchors: int) -> None:
        super().__init__()
        backbone = list(resnet50(widths).children())
        self.start = chain(stem=backbone[0], stage1=backbone[1])
        self.stages = nn.ModuleList(backbone[2:5])
        self.pyramid = FeaturePyramid([4 * w for w in widths[1:]], width)
        self.classes = classes
        self.scores = _head(width, depth, anchors * classes)
        self.boxes = _head(width, depth, anchors * 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, H, W]``, sizes multiples of 32, to ``float[N, boxes, classes + 4]``."""
        x = self.start(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        levels = self.pyramid(maps)
        scores = torch.cat([box_rows(self.scores(x), self.classes) for x in levels], 1)
        boxes = torch.cat([box_rows(self.boxes(x), 4) for x in levels], 1)
        return torch.cat([scores, boxes], 2)


def retinanet(
    widths: Sequence[int] = (64, 128, 256, 512),
    width: int = 256,
    *,
    depth: int = 4,
    classes: int = 80,
    anchors: int = 9,
) -> RetinaNet:
    """Return RetinaNet; ``width`` and ``depth`` are those of the pyramid's levels and of the heads."""
    return RetinaNet(widths, width, depth, classes, anchors)
