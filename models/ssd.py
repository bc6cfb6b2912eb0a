"""SSD512: VGG-16 with a dilated fc6, seven maps, an L2 normalisation, and one predictor for each map.

Liu et al., arXiv 1512.02325. Class scores and box offsets of all default boxes are concatenated; there is no
suppression. The normalised map has a learnt scale for each channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.boxes import box_rows
from models.convolutions import BareConv, chain

__all__ = ["L2Norm", "Ssd", "ssd512"]

# Convolutions of the five stages of VGG-16.
_DEPTHS = (2, 2, 3, 3, 3)


class L2Norm(nn.Module):
    """Divide every position by its norm over the channels and scale each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Entries of a vector of norm one are of magnitude 1 / √channels: the paper begins with 20 for 512.
        self.scale = nn.Parameter(channels**0.5 * torch.empty(1, channels, 1, 1).uniform_(0.5, 1.5))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, channels, H, W]`` to the same shape."""
        norm = x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10
        return self.scale * (x / norm)


class Ssd(nn.Module):
    """Convolutions without BatchNorm; ``stages`` are the widths of VGG, ``extras`` of the added maps."""

    def __init__(
        self,
        stages: Sequence[int],
        fc: int,
        extras: Sequence[tuple[int, int]],
        anchors: Sequence[int],
        classes: int,
    ) -> None:
        super().__init__()
        self.classes = classes
        wide = (3, *stages)
        self.stages = nn.ModuleList(
            _stage(cin, cout, depth) for cin, cout, depth in zip(wide, stages, _DEPTHS, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.norm = L2Norm(stages[3])
        self.fc = chain(
            pool=nn.MaxPool2d(3, 1, 1),
            fc6=BareConv(stages[4], fc, 3, padding=6, dilation=6),
            act6=nn.ReLU(),
            fc7=BareConv(fc, fc, 1),
            act7=nn.ReLU(),
        )
        self.extras = nn.ModuleList()
        cin = fc
        for number, (inner, cout) in enumerate(extras, 1):
            last = number == len(extras)
            self.extras.append(_extra(cin, inner, cout, (4, 1) if last else (3, 2)))
            cin = cout
        maps = (stages[3], fc, *(cout for _, cout in extras))
        self.scores = nn.ModuleList(
            BareConv(width, count * classes, 3, padding=1) for width, count in zip(maps, anchors, strict=True)
        )
        self.boxes = nn.ModuleList(
            BareConv(width, count * 4, 3, padding=1) for width, count in zip(maps, anchors, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, H, W]`` to ``float[N, boxes, classes + 4]``."""
        for stage in self.stages[:3]:
            x = self.pool(stage(x))
        x = self.stages[3](x)
        maps = [self.norm(x)]
        x = self.fc(self.stages[4](self.pool(x)))
        maps.append(x)
        for extra in self.extras:
            x = extra(x)
            maps.append(x)
        scores = [box_rows(layer(x), self.classes) for layer, x in zip(self.scores, maps, strict=True)]
        boxes = [box_rows(layer(x), 4) for layer, x in zip(self.boxes, maps, strict=True)]
        return torch.cat([torch.cat(scores, 1), torch.cat(boxes, 1)], 2)


def _stage(cin: int, cout: int, depth: int) -> nn.Sequential:
    layers: dict[str, nn.Module] = {}
    for number in range(1, depth + 1):
        layers[f"conv{number}"] = BareConv(cin, cout, 3, padding=1)
        layers[f"act{number}"] = nn.ReLU()
        cin = cout
    return chain(**layers)


def _extra(cin: int, inner: int, cout: int, last: tuple[int, int]) -> nn.Sequential:
    kernel, stride = last
    narrow, wide = BareConv(cin, inner, 1), BareConv(inner, cout, kernel, stride, padding=1)
    return chain(conv1=narrow, act1=nn.ReLU(), conv2=wide, act2=nn.ReLU())


def ssd512(
    stages: Sequence[int] = (64, 128, 256, 512, 512),
    fc: int = 1024,
    extras: Sequence[tuple[int, int]] = ((256, 512), (128, 256), (128, 256), (128, 256), (128, 256)),
    classes: int = 21,
    anchors: Sequence[int] = (4, 6, 6, 6, 6, 4, 4),
) -> Ssd:
    """Return SSD for images of 512 × 512; with fewer extras, of a smaller power of two."""
    return Ssd(stages, fc, extras, anchors, classes)
