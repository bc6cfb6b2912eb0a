"""DETR: convolutional features, a transformer encoder and decoder (post-norm), and learned queries.

Carion et al., arXiv 2005.12872. Both attentions are torch's own ``nn.MultiheadAttention``; its exports split
the weights at run time and fold heads with the batch. Classes and boxes are concatenated into one output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.convolutions import conv_bn

__all__ = ["Detr", "detr"]


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[..., width]`` to the same shape."""
        out: Tensor = self.linear2(self.linear1(x).relu())
        return out


class DetrEncoderLayer(nn.Module):
    """Post-norm self-attention, with positions added to query and key, and feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.feed = FeedForward(width, hidden)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Map ``float[tokens, N, width]`` to the same shape."""
        placed = x + positions
        x = self.norm1(x + self.attention(placed, placed, x, need_weights=False)[0])
        out: Tensor = self.norm2(x + self.feed(x))
        return out


class DetrDecoderLayer(nn.Module):
    """Post-norm self-attention among queries, attention to the image, and feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross = nn.MultiheadAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed = FeedForward(width, hidden)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        """Map ``float[queries, N, width]`` to the same shape."""
        placed = x + queries
        x = self.norm1(x + self.attention(placed, placed, x, need_weights=False)[0])
        mixed = self.cross(x + queries, memory + positions, memory, need_weights=False)[0]
        x = self.norm2(x + mixed)
        out: Tensor = self.norm3(x + self.feed(x))
        return out


class Detr(nn.Module):
    """Three strided convolutions, encoder, decoder, and heads for classes and boxes."""

    def __init__(
        self,
        channels: int,
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        queries: int,
        classes: int,
        side: int,
    ) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            conv_bn(3, channels, 3, 2), conv_bn(channels, channels, 3, 2), conv_bn(channels, channels, 3, 2)
        )
        self.project = nn.Conv2d(channels, width, 1)
        self.positions = nn.Parameter(0.5 * torch.randn(side * side, 1, width))
        self.queries = nn.Parameter(torch.randn(queries, 1, width))
        self.encoder = nn.ModuleList(DetrEncoderLayer(width, heads, hidden) for _ in range(layers))
        self.decoder = nn.ModuleList(DetrDecoderLayer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, classes)
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, H, W]`` to ``float[N, queries, classes + 4]``."""
        memory = self.project(self.backbone(x)).flatten(2).permute(2, 0, 1)
        for layer in self.encoder:
            memory = layer(memory, self.positions)
        queries = self.queries.expand(-1, x.shape[0], -1)
        out = torch.zeros_like(queries)
        for layer in self.decoder:
            out = layer(out, queries, memory, self.positions)
        out = self.norm(out).transpose(0, 1)
        return torch.cat([self.classes(out), self.boxes(out)], -1)


def detr(
    channels: int = 256,
    width: int = 256,
    heads: int = 8,
    hidden: int = 1024,
    *,
    layers: int = 6,
    queries: int = 100,
    classes: int = 92,
    image: int = 256,
) -> Detr:
    """Return DETR on images of ``image`` × ``image``."""
    return Detr(channels, width, heads, hidden, layers, queries, classes, image // 8)
