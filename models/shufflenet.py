"""ShuffleNetV2: half of the channels pass by, the other half is convolved, and both are shuffled.

Ma et al., arXiv 1807.11164, table 5 (1x). The shuffle is a reshape, a transposition and a reshape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.convolutions import chain, conv_bn, head

__all__ = ["shufflenet_v2"]


class ShuffleUnit(nn.Module):
    """``shuffle(cat(passing, branch(x)))``: half of ``x`` passes, or all of it where the image shrinks."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, cout // 2
        if stride > 1:
            self.passing = chain(
                depthwise=conv_bn(cin, cin, 3, stride, groups=cin, activation=None),
                point=conv_bn(cin, half, 1),
            )
        self.side = chain(
            expand=conv_bn(cin if stride > 1 else half, half, 1),
            depthwise=conv_bn(half, half, 3, stride, groups=half, activation=None),
            project=conv_bn(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, cin, H, W]`` to ``float[N, cout, H/stride, W/stride]``."""
        if self.stride > 1:
            joined = torch.cat([self.passing(x), self.side(x)], 1)
        else:
            kept, seen = x.chunk(2, 1)
            joined = torch.cat([kept, self.side(seen)], 1)
        return _shuffled(joined, 2)


def _shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    parts = x.view(batch, groups, channels // groups, height, width).transpose(1, 2)
    return parts.reshape(batch, channels, height, width)


def shufflenet_v2(
    widths: Sequence[int] = (24, 116, 232, 464, 1024), units: Sequence[int] = (4, 8, 4), classes: int = 1000
) -> nn.Sequential:
    """Return ShuffleNetV2, ``float[N, 3, H, W]`` to ``float[N, classes]``.

    ``widths`` names the stem, the stages and the last convolution, ``units`` the length of the stages.
    """
    cin, *stages, features = widths
    stem = chain(conv3=conv_bn(3, cin, 3, 2), pool=nn.MaxPool2d(3, 2, 1))
    body: dict[str, nn.Module] = {}
    for index, (count, cout) in enumerate(zip(units, stages, strict=True)):
        layers = [ShuffleUnit(cout if unit else cin, cout, 1 if unit else 2) for unit in range(count)]
        body[f"stage{index + 2}"] = nn.Sequential(*layers)
        cin = cout
    return chain(stem=stem, **body, last=conv_bn(cin, features, 1), head=head(features, classes))
