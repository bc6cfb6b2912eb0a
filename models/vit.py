"""Vision transformers with a class token: DeiT (fused query/key/value) and ViT (separate, with LayerScale).

ViT: Dosovitskiy et al., arXiv 2010.11929. DeiT: Touvron et al., arXiv 2012.12877. LayerScale: Touvron et
al., arXiv 2103.17239.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FusedAttention", "Mlp", "SeparateAttention", "VisionTransformer", "deit", "vit"]


class FusedAttention(nn.Module):
    """Self-attention with one projection for query, key and value, as in timm, and the fused kernel."""

    def __init__(self, embedding: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(embedding, 3 * embedding)
        self.proj = nn.Linear(embedding, embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, tokens, embedding]`` to the same shape."""
        batch, tokens, embedding = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, embedding // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, embedding))
        return out


class SeparateAttention(nn.Module):
    """Self-attention with a projection each for query, key and value, and the softmax written out."""

    def __init__(self, embedding: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(embedding, embedding)
        self.key = nn.Linear(embedding, embedding)
        self.value = nn.Linear(embedding, embedding)
        self.proj = nn.Linear(embedding, embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, tokens, embedding]`` to the same shape."""
        batch, tokens, embedding = x.shape
        width = embedding // self.heads
        query, key, value = (
            layer(x).view(batch, tokens, self.heads, width).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = torch.matmul(query, key.transpose(-1, -2)) * width**-0.5
        mixed = torch.matmul(scores.softmax(-1), value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, embedding))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embedding, hidden)
        self.fc2 = nn.Linear(hidden, embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[..., embedding]`` to the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the stream, optionally scaled channel by channel."""

    def __init__(self, embedding: int, hidden: int, attention: nn.Module, scaled: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embedding, eps=1e-6)
        self.attention = attention
        self.norm2 = nn.LayerNorm(embedding, eps=1e-6)
        self.mlp = Mlp(embedding, hidden)
        self.scale1 = nn.Parameter(torch.empty(embedding).uniform_(0.3, 1.0)) if scaled else None
        self.scale2 = nn.Parameter(torch.empty(embedding).uniform_(0.3, 1.0)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, tokens, embedding]`` to the same shape."""
        mixed = self.attention(self.norm1(x))
        x = x + (mixed if self.scale1 is None else mixed * self.scale1)
        hidden = self.mlp(self.norm2(x))
        return x + (hidden if self.scale2 is None else hidden * self.scale2)


class VisionTransformer(nn.Module):
    """Patches, a class token, position embeddings, encoder layers and a linear classifier."""

    def __init__(
        self,
        *,
        image: int,
        patch: int,
        embedding: int,
        layers: int,
        heads: int,
        hidden: int,
        classes: int,
        fused: bool,
        scaled: bool,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        extra = 2 if distilled else 1
        tokens = (image // patch) ** 2 + extra
        kind = FusedAttention if fused else SeparateAttention
        self.patches = nn.Conv2d(3, embedding, patch, patch)
        self.tokens = nn.Parameter(torch.randn(1, extra, embedding))
        self.positions = nn.Parameter(0.5 * torch.randn(1, tokens, embedding))
        self.layers = nn.Sequential(
            *(EncoderLayer(embedding, hidden, kind(embedding, heads), scaled) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(embedding, eps=1e-6)
        self.head = nn.Linear(embedding, classes)
        self.head_distilled = nn.Linear(embedding, classes) if distilled else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, image, image]`` to ``float[N, classes]``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = self.norm(self.layers(x))
        out: Tensor = self.head(x[:, 0])
        return out if self.head_distilled is None else (out + self.head_distilled(x[:, 1])) / 2


def deit(embedding: int, heads: int, *, distilled: bool = False, **sizes: int) -> VisionTransformer:
    """Return DeiT, with one projection for query, key and value; ``sizes`` as for `_transformer`."""
    return _transformer(embedding, heads, fused=True, scaled=False, distilled=distilled, **sizes)


def vit(embedding: int, heads: int, **sizes: int) -> VisionTransformer:
    """Return ViT with separate projections and LayerScale; ``sizes`` as for `_transformer`."""
    return _transformer(embedding, heads, fused=False, scaled=True, distilled=False, **sizes)


def _transformer(
    embedding: int,
    heads: int,
    *,
    fused: bool,
    scaled: bool,
    distilled: bool,
    layers: int = 12,
    image: int = 224,
    patch: int = 16,
    classes: int = 1000,
) -> VisionTransformer:
    """Return a transformer with an MLP four times as wide as the embedding."""
    return VisionTransformer(
        image=image,
        patch=patch,
        embedding=embedding,
        layers=layers,
        heads=heads,
        hidden=4 * embedding,
        classes=classes,
        fused=fused,
        scaled=scaled,
        distilled=distilled,
    )
