"""RegNetY: residual bottlenecks of one width with grouped convolutions and squeeze-and-excitation gates.

Radosavovic et al., arXiv 2003.13678, RegNetY-400MF; a gate is squeezed to a quarter of its block's input.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from models.convolutions import SqueezeExcitation, chain, conv_bn, head

__all__ = ["regnet_y"]


class GatedBottleneck(nn.Module):
    """``relu(branch(x) + shortcut(x))``, with a grouped convolution and a gate in the branch."""

    def __init__(self, cin: int, cout: int, stride: int, group_width: int) -> None:
        super().__init__()
        same = cin == cout and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(cin, cout, 1, stride, activation=None)
        self.branch = chain(
            a=conv_bn(cin, cout, 1),
            b=conv_bn(cout, cout, 3, stride, groups=cout // group_width),
            gate=SqueezeExcitation(cout, max(1, cin // 4), nn.ReLU),
            c=conv_bn(cout, cout, 1, activation=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, cin, H, W]`` to ``float[N, cout, H/stride, W/stride]``."""
        return functional.relu(self.branch(x) + self.shortcut(x))


def regnet_y(
    widths: Sequence[int] = (48, 104, 208, 440),
    depths: Sequence[int] = (1, 3, 6, 6),
    group_width: int = 8,
    stem: int = 32,
    classes: int = 1000,
) -> nn.Sequential:
    """Return RegNetY, ``float[N, 3, H, W]`` to ``float[N, classes]``; every stage halves the image."""
    cin, body = stem, dict[str, nn.Module]()
    for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        layers = []
        for block in range(depth):
            layers.append(GatedBottleneck(cin, width, 1 if block else 2, group_width))
            cin = width
        body[f"stage{index + 1}"] = nn.Sequential(*layers)
    return chain(stem=conv_bn(3, stem, 3, 2), **body, head=head(cin, classes))
