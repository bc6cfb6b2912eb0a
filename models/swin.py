"""Swin transformer: attention in windows that shift from layer to layer, with relative position biases.

Liu et al., arXiv 2103.14030. Image sides must be multiples of 32 windows' patches, as for 224 and 7.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.vit import Mlp

__all__ = ["Swin", "swin"]


def _windows(x: Tensor, window: int) -> Tensor:
    """``float[N, H, W, C]`` to ``float[N·windows, window², C]``."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def _joined(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of `_windows`."""
    x = x.reshape(-1, height // window, width // window, window, window, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


class WindowAttention(nn.Module):
    """Attention within windows, with a learned bias for each head and relative position."""

    def __init__(self, channels: int, heads: int, window: int, resolution: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.table = nn.Parameter(0.5 * torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        offsets = places[:, :, None] - places[:, None, :] + window - 1
        self.register_buffer("index", offsets[0] * (2 * window - 1) + offsets[1])
        self.register_buffer("mask", self._mask(resolution) if shift else None)

    def _mask(self, resolution: int) -> Tensor:
        """−100 between patches of one window that are no neighbours in the image."""
        region = torch.zeros(1, resolution, resolution, 1)
        cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for row, rows in enumerate(cuts):
            for column, columns in enumerate(cuts):
                region[:, rows, columns] = 3 * row + column
        flat = _windows(region, self.window).squeeze(-1)
        return torch.where(flat[:, None] == flat[:, :, None], 0.0, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, H, W, C]`` to the same shape."""
        _, height, width, channels = x.shape
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = _windows(x, self.window)
        tokens = x.shape[1]
        parts = self.qkv(x).reshape(-1, tokens, 3, self.heads, channels // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (query * (channels // self.heads) ** -0.5) @ key.transpose(-2, -1)
        bias = self.table[self.index.reshape(-1)].reshape(tokens, tokens, self.heads).permute(2, 0, 1)
        scores = scores + bias.unsqueeze(0)
        if self.shift:
            windows = self.mask.shape[0]
            scores = scores.reshape(-1, windows, self.heads, tokens, tokens) + self.mask[None, :, None]
            scores = scores.reshape(-1, self.heads, tokens, tokens)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(-1, tokens, channels)
        out = _joined(self.proj(mixed), self.window, height, width)
        return torch.roll(out, (self.shift, self.shift), (1, 2)) if self.shift else out


class SwinLayer(nn.Module):
    """Pre-norm window attention and MLP on a residual stream in channels-last order."""

    def __init__(self, channels: int, attention: WindowAttention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = attention
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, H, W, C]`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchMerging(nn.Module):
    """Two by two neighbours are concatenated, normalised and projected to twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, H, W, C]`` to ``float[N, H/2, W/2, 2C]``."""
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        out: Tensor = self.reduction(self.norm(torch.cat(corners, -1)))
        return out


class Swin(nn.Module):
    """Patches, stages of window attention with merging between them, then norm, mean and classifier."""

    def __init__(
        self,
        channels: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int,
        image: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, 4)
        self.norm0 = nn.LayerNorm(channels)
        layers: list[nn.Module] = []
        resolution = image // 4
        for stage, depth in enumerate(depths):
            if stage:
                layers.append(PatchMerging(channels))
                channels, resolution = 2 * channels, resolution // 2
            size = min(window, resolution)
            for index in range(depth):
                shift = size // 2 if index % 2 and size < resolution else 0
                attention = WindowAttention(channels, heads[stage], size, resolution, shift)
                layers.append(SwinLayer(channels, attention))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, image, image]`` to ``float[N, classes]``."""
        x = self.norm0(self.patches(x).permute(0, 2, 3, 1))
        out: Tensor = self.head(self.norm(self.layers(x)).mean((1, 2)))
        return out


def swin(
    channels: int = 96,
    depths: tuple[int, ...] = (2, 2, 6, 2),
    heads: tuple[int, ...] = (3, 6, 12, 24),
    *,
    window: int = 7,
    image: int = 224,
    classes: int = 1000,
) -> Swin:
    """Return Swin, by default the size T."""
    return Swin(channels, depths, heads, window, image, classes)
