"""The layers of every network here: a convolution with BatchNorm and activation, or a bare one."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["BareConv", "chain", "conv_bn", "divisible", "head"]


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
) -> nn.Sequential:
    """Return a convolution without bias, padded by half its kernel, then BatchNorm, then ``activation``."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    tail = {} if activation is None else {"act": activation()}
    return chain(conv=conv, bn=nn.BatchNorm2d(cout), **tail)


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
