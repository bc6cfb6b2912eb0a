"""MobileNets: depthwise separable convolutions, plain (V1) and in inverted residuals (V2).

V1: Howard et al., arXiv 1704.04861, table 1. V2: Sandler et al., arXiv 1801.04381, table 2.
Dropout before the classifier is left out, because it is the identity at inference.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.convolutions import chain, conv_bn, divisible, head

__all__ = ["mobilenet_v1", "mobilenet_v2"]

# (output channels, stride) of the 13 separable layers.
_V1_LAYERS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
# (expansion, output channels, blocks, stride of the first block) of the 7 stages.
_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """``project(depthwise(expand(x)))``, added to ``x`` where the shape is the same."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = cin * expansion
        expand = {} if expansion == 1 else {"expand": conv_bn(cin, hidden, 1, activation=nn.ReLU6)}
        self.branch = chain(
            **expand,
            depthwise=conv_bn(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6),
            project=conv_bn(hidden, cout, 1, activation=None),
        )
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, cin, H, W]`` to ``float[N, cout, H/stride, W/stride]``."""
        out: Tensor = self.branch(x)
        return x + out if self.residual else out


def mobilenet_v1(width: float = 1.0, classes: int = 1000) -> nn.Sequential:
    """Return MobileNetV1 at a width multiplier, ``float[N, 3, H, W]`` to ``float[N, classes]``."""
    cin = divisible(32 * width)
    stem = conv_bn(3, cin, 3, 2)
    layers: list[nn.Module] = []
    for channels, stride in _V1_LAYERS:
        cout = divisible(channels * width)
        layers.append(
            chain(depthwise=conv_bn(cin, cin, 3, stride, groups=cin), pointwise=conv_bn(cin, cout, 1))
        )
        cin = cout
    return chain(stem=stem, layers=nn.Sequential(*layers), head=head(cin, classes))


def mobilenet_v2(width: float = 1.0, features: int = 1280, classes: int = 1000) -> nn.Sequential:
    """Return MobileNetV2; its last convolution has ``features * max(1, width)`` channels."""
    cin = divisible(32 * width)
    stem = conv_bn(3, cin, 3, 2, activation=nn.ReLU6)
    layers: list[nn.Module] = []
    for expansion, channels, blocks, first_stride in _V2_STAGES:
        cout = divisible(channels * width)
        for block in range(blocks):
            layers.append(InvertedResidual(cin, cout, 1 if block else first_stride, expansion))
            cin = cout
    features = divisible(features * max(1.0, width))
    last = conv_bn(cin, features, 1, activation=nn.ReLU6)
    return chain(stem=stem, blocks=nn.Sequential(*layers), last=last, head=head(features, classes))
