"""EfficientNet: inverted residuals with squeeze-and-excitation gates and SiLU.

Tan and Le, arXiv 1905.11946, table 1; the gate is Hu et al., arXiv 1709.01507, squeezed to a quarter
of the block's input channels. Dropout and stochastic depth are left out, because they are the identity
at inference.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.convolutions import SqueezeExcitation, chain, conv_bn, divisible, head

__all__ = ["efficientnet_b0"]

# (expansion, output channels, blocks, stride of the first block, kernel) of the 7 stages.
_B0_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class MBConv(nn.Module):
    """``project(gate(depthwise(expand(x))))``, added to ``x`` where the shape is the same."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int, kernel: int) -> None:
        super().__init__()
        hidden = cin * expansion
        expand = {} if expansion == 1 else {"expand": conv_bn(cin, hidden, 1, activation=nn.SiLU)}
        self.branch = chain(
            **expand,
            depthwise=conv_bn(hidden, hidden, kernel, stride, groups=hidden, activation=nn.SiLU),
            gate=SqueezeExcitation(hidden, max(1, cin // 4)),
            project=conv_bn(hidden, cout, 1, activation=None),
        )
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, cin, H, W]`` to ``float[N, cout, H/stride, W/stride]``."""
        out: Tensor = self.branch(x)
        return x + out if self.residual else out


def efficientnet_b0(width: float = 1.0, classes: int = 1000) -> nn.Sequential:
    """Return EfficientNet-B0 at a width multiplier, ``float[N, 3, H, W]`` to ``float[N, classes]``."""
    cin = divisible(32 * width)
    stem = conv_bn(3, cin, 3, 2, activation=nn.SiLU)
    layers: list[nn.Module] = []
    for expansion, channels, blocks, first_stride, kernel in _B0_STAGES:
        cout = divisible(channels * width)
        for block in range(blocks):
            stride = 1 if block else first_stride
            layers.append(MBConv(cin, cout, stride, expansion, kernel))
            cin = cout
    features = divisible(1280 * width)
    last = conv_bn(cin, features, 1, activation=nn.SiLU)
    return chain(stem=stem, blocks=nn.Sequential(*layers), last=last, head=head(features, classes))
