"""Pyramid vision transformer v2: keys and values at a reduced resolution, MLPs with a depthwise convolution.

Wang et al., arXiv 2106.13797. SegFormer's encoder (arXiv 2105.15203) has the same layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Pyramid", "pvt"]


class ReducedAttention(nn.Module):
    """Attention whose keys and values come from a strided convolution of the tokens."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.reduce = nn.Conv2d(channels, channels, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(channels) if reduction > 1 else None

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map ``float[N, H·W, C]`` to the same shape."""
        batch, tokens, channels = x.shape
        size = channels // self.heads
        query = self.query(x).reshape(batch, tokens, self.heads, size).permute(0, 2, 1, 3)
        source = x
        if self.reduce is not None and self.norm is not None:
            image = x.permute(0, 2, 1).reshape(batch, channels, height, width)
            source = self.norm(self.reduce(image).flatten(2).permute(0, 2, 1))
        parts = self.kv(source).reshape(batch, -1, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        key, value = parts[0], parts[1]
        scores = (query @ key.transpose(-2, -1)) * size**-0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, channels)
        out: Tensor = self.proj(mixed)
        return out


class ConvolutionalMlp(nn.Module):
    """Linear, depthwise 3 × 3 convolution over the image, GELU, linear."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map ``float[N, H·W, C]`` to the same shape."""
        x = self.fc1(x)
        batch, _, hidden = x.shape
        x = self.depthwise(x.transpose(1, 2).reshape(batch, hidden, height, width))
        out: Tensor = self.fc2(F.gelu(x.flatten(2).transpose(1, 2)))
        return out


class PyramidLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, channels: int, heads: int, reduction: int, expansion: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = ReducedAttention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = ConvolutionalMlp(channels, expansion * channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map ``float[N, H·W, C]`` to the same shape."""
        x = x + self.attention(self.norm1(x), height, width)
        out: Tensor = x + self.mlp(self.norm2(x), height, width)
        return out


class PyramidStage(nn.Module):
    """Overlapping patches, layers, and a norm; images in and out."""

    def __init__(
        self,
        cin: int,
        channels: int,
        patch: tuple[int, int],
        depth: int,
        heads: int,
        reduction: int,
        expansion: int,
    ) -> None:
        super().__init__()
        size, stride = patch
        self.patches = nn.Conv2d(cin, channels, size, stride, size // 2)
        self.norm0 = nn.LayerNorm(channels)
        layers = [PyramidLayer(channels, heads, reduction, expansion) for _ in range(depth)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, cin, H, W]`` to ``float[N, channels, H/stride, W/stride]``."""
        x = self.patches(x)
        batch, channels, height, width = x.shape
        x = self.norm0(x.flatten(2).transpose(1, 2))
        for layer in self.layers:
            x = layer(x, height, width)
        return self.norm(x).transpose(1, 2).reshape(batch, channels, height, width)


class Pyramid(nn.Module):
    """Stages, then the mean over positions and a classifier."""

    def __init__(
        self, widths: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...], classes: int
    ) -> None:
        super().__init__()
        stages = []
        for stage, width in enumerate(widths):
            patch = (3, 2) if stage else (7, 4)
            reduction = 2 ** (len(widths) - 1 - stage)
            before = widths[stage - 1] if stage else 3
            expansion = 8 if stage < 2 else 4
            stages.append(
                PyramidStage(before, width, patch, depths[stage], heads[stage], reduction, expansion)
            )
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, H, W]`` to ``float[N, classes]``."""
        out: Tensor = self.head(torch.mean(self.stages(x), (2, 3)))
        return out


def pvt(
    widths: tuple[int, ...] = (32, 64, 160, 256),
    depths: tuple[int, ...] = (2, 2, 2, 2),
    heads: tuple[int, ...] = (1, 2, 5, 8),
    classes: int = 1000,
) -> Pyramid:
    """Return PVT v2, by default the size B0."""
    return Pyramid(widths, depths, heads, classes)
