"""U-Net with group norms: down by pooling, up by transposed convolutions, every level concatenated.

Ronneberger et al., arXiv 1505.04597; Wu and He, Group Normalization, arXiv 1803.08494.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.convolutions import chain

__all__ = ["UNet", "unet"]


def _double(cin: int, cout: int, groups: int) -> nn.Sequential:
    layers: dict[str, nn.Module] = {}
    for number in (1, 2):
        layers[f"conv{number}"] = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
        layers[f"norm{number}"] = nn.GroupNorm(groups, cout)
        layers[f"act{number}"] = nn.ReLU()
        cin = cout
    return chain(**layers)


class UNet(nn.Module):
    """One width a level; what goes down at a level meets what comes up there."""

    def __init__(self, widths: Sequence[int], groups: int, classes: int) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.first = _double(3, widths[0], groups)
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(_double(cin, cout, groups) for cin, cout in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(cout, cin, 2, 2) for cin, cout in pairs[::-1])
        self.join = nn.ModuleList(_double(2 * cin, cin, groups) for cin, _ in pairs[::-1])
        self.out = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, H, W]``, sizes multiples of 2 ** levels, to ``float[N, classes, H, W]``."""
        x = self.first(x)
        skipped = []
        for down in self.down:
            skipped.append(x)
            x = down(self.pool(x))
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skipped.pop(), up(x)], 1))
        out: Tensor = self.out(x)
        return out


def unet(widths: Sequence[int] = (64, 128, 256, 512, 1024), groups: int = 8, classes: int = 21) -> UNet:
    """Return U-Net with ``groups`` groups in every norm."""
    return UNet(widths, groups, classes)
