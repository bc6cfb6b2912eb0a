"""DenseNet: every layer reads the concatenated outputs of all layers before it.

Huang et al., arXiv 1608.06993, table 1. Layers are BatchNorm, ReLU, convolution, in this order, so that a
concatenation has a scale and a shift of its own in each layer that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.convolutions import chain, conv_bn, head

__all__ = ["densenet121"]

_BOTTLENECK = 4  # channels between the convolutions of a layer, in growth rates


class DenseLayer(nn.Module):
    """``cat(x, conv3(relu(bn(conv1(relu(bn(x)))))))``."""

    def __init__(self, cin: int, growth: int) -> None:
        super().__init__()
        inner = _BOTTLENECK * growth
        self.layer = chain(squeeze=_bn_conv(cin, inner, 1), grow=_bn_conv(inner, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, cin, H, W]`` to ``float[N, cin + growth, H, W]``."""
        return torch.cat([x, self.layer(x)], 1)


def _bn_conv(cin: int, cout: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False)
    return chain(bn=nn.BatchNorm2d(cin), act=nn.ReLU(), conv=conv)


def densenet121(
    growth: int = 32, blocks: Sequence[int] = (6, 12, 24, 16), classes: int = 1000
) -> nn.Sequential:
    """Return DenseNet-121, ``float[N, 3, H, W]`` to ``float[N, classes]``; ``blocks`` counts layers."""
    width = 2 * growth
    stem = chain(conv7=conv_bn(3, width, 7, 2), pool=nn.MaxPool2d(3, 2, 1))
    body: dict[str, nn.Module] = {}
    for index, layers in enumerate(blocks):
        if index:
            halved = _bn_conv(width, width // 2, 1)
            body[f"transition{index}"] = chain(halve=halved, pool=nn.AvgPool2d(2))
            width //= 2
        body[f"block{index + 1}"] = nn.Sequential(
            *(DenseLayer(width + layer * growth, growth) for layer in range(layers))
        )
        width += layers * growth
    last = chain(bn=nn.BatchNorm2d(width), act=nn.ReLU())
    return chain(stem=stem, **body, last=last, head=head(width, classes))
