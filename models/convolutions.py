"""What several networks here are made of: convolution, BatchNorm and activation, gates, and heads."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

__all__ = ["BareConv", "SqueezeExcitation", "chain", "conv_bn", "divisible", "head"]


class BareConv(nn.Conv2d):
    """A convolution that no normalisation follows: `models.catalog.build` brings its outputs to order one."""


def chain(**layers: nn.Module) -> nn.Sequential:
    """Return the layers in a row; their names become those of the nodes in the ONNX file."""
    return nn.Sequential(OrderedDict(layers))


def conv_bn(
    cin: int,
    cout: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = nn.ReLU,
    dilation: int = 1,
) -> nn.Sequential:
    """Return a convolution without bias, padded by half its extent, then BatchNorm, then ``activation``."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(cin, cout, kernel, stride, padding, dilation, groups, bias=False)
    tail = {} if activation is None else {"act": activation()}
    return chain(conv=conv, bn=nn.BatchNorm2d(cout), **tail)


class SqueezeExcitation(nn.Module):
    """``x * sigmoid(expand(activation(squeeze(mean(x)))))``, one gate a channel (arXiv 1709.01507)."""

    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.gate = chain(
            pool=nn.AdaptiveAvgPool2d(1),
            squeeze=nn.Conv2d(channels, squeezed, 1),
            act=activation(),
            expand=nn.Conv2d(squeezed, channels, 1),
            sigmoid=nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, channels, H, W]`` to the same shape."""
        gate: Tensor = self.gate(x)
        return x * gate


def head(features: int, classes: int) -> nn.Sequential:
    """Return pooling and a linear classifier, ``float[N, features, H, W]`` to ``float[N, classes]``."""
    return chain(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(features, classes))


def divisible(channels: float, by: int = 8) -> int:
    """Round to a multiple of ``by``, at least ``by`` and never more than 10 % down (MobileNetV2, appendix).

    >>> divisible(24 * 0.5), divisible(18), divisible(3)
    (16, 24, 8)
    """
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded
