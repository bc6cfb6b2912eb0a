"""ConvNeXt: depthwise 7 × 7 convolution, layer norm over channels, MLP and LayerScale.

Liu et al., arXiv 2201.03545. Stochastic depth is left out, because it is the identity at inference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.vit import Mlp

__all__ = ["ConvNeXt", "convnext"]


class ChannelNorm(nn.Module):
    """Layer norm over the channels of ``float[N, C, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in channels-last order."""
        out: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """``x + scale * mlp(norm(depthwise(x)))``, the MLP in channels-last order."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, 4 * channels)
        self.scale = nn.Parameter(torch.empty(channels).uniform_(0.2, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, C, H, W]`` to the same shape."""
        hidden = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))) * self.scale
        return x + hidden.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Four stages, each with a strided convolution before it, then mean, norm and classifier."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0])]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                layers += [ChannelNorm(widths[stage - 1]), nn.Conv2d(widths[stage - 1], width, 2, 2)]
            layers += [ConvNeXtBlock(width) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, H, W]`` to ``float[N, classes]``."""
        out: Tensor = self.head(self.norm(self.layers(x).mean((2, 3))))
        return out


def convnext(
    widths: tuple[int, ...] = (96, 192, 384, 768),
    depths: tuple[int, ...] = (3, 3, 9, 3),
    classes: int = 1000,
) -> ConvNeXt:
    """Return ConvNeXt, by default the size T."""
    return ConvNeXt(widths, depths, classes)
