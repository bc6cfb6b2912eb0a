"""StreamPETR: 3D boxes from six cameras, by queries that carry over from frame to frame.

Wang et al., *Exploring Object-Centric Temporal Modeling for Efficient Multi-View 3D Object Detection*,
arXiv 2303.11926. All cameras pass through one ResNet with an FPN, folded into the batch. Every pixel is told
where in space its ray runs (a *3D position embedding*, from the camera matrices alone); a transformer decoder
reads all pixels of all cameras. The best queries of a frame enter a queue, a graph input and output, and
return in the next frame, moved by the vehicle's own motion. Denoising and deformable attention are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.detr import FeedForward
from models.resnet import resnet50

__all__ = ["StreamPetr", "streampetr"]

_LOW = (-61.2, -61.2, -10.0)  # metres around the vehicle
_HIGH = (61.2, 61.2, 10.0)
_FARTHEST = 61.2
_BOX = 10  # centre, size, sine and cosine of the heading, velocity


class Pyramid(nn.Module):
    """The ResNet's last two stages, joined at the finer one: a feature pyramid of which one level is read."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        body = resnet50(widths, 1)
        self.stem, self.stage1, self.stage2, self.stage3, self.stage4, _ = body
        self.fine = nn.Conv2d(4 * widths[2], width, 1)
        self.coarse = nn.Conv2d(4 * widths[3], width, 1)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, H, W]`` to ``float[N, width, H/16, W/16]``."""
        fine = self.stage3(self.stage2(self.stage1(self.stem(x))))
        coarse = self.coarse(self.stage4(fine))
        out: Tensor = self.smooth(self.fine(fine) + functional.interpolate(coarse, scale_factor=2.0))
        return out


class PositionEmbedding(nn.Module):
    """Points along the ray of each pixel, by the camera matrix, then two linear layers (section 3.1)."""

    def __init__(self, width: int, depths: int, size: tuple[int, int]) -> None:
        super().__init__()
        rows, columns = size
        # Depths grow linearly, so that near ones are told apart better.
        steps = torch.arange(depths)
        depth = 1 + (_FARTHEST - 1) * steps * (steps + 1) / (depths * (depths + 1))
        v, u = torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns)
        grid = torch.stack(torch.meshgrid(v, u, depth, indexing="ij"), -1)
        v, u, d = grid.unbind(-1)
        self.register_buffer("rays", torch.stack([u * d, v * d, d, torch.ones_like(d)], -1).reshape(-1, 4))
        self.register_buffer("low", torch.tensor(_LOW))
        self.register_buffer("span", torch.tensor(_HIGH) - torch.tensor(_LOW))
        self.depths = depths
        self.encode = nn.Sequential(nn.Linear(3 * depths, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.gate = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Sigmoid())

    def forward(self, camera: Tensor, tokens: Tensor) -> Tensor:
        """Map matrices ``float[N, cameras, 4, 4]`` and ``float[N, T, width]`` to ``float[N, T, width]``."""
        points = (self.rays @ camera.transpose(-1, -2))[..., :3]
        shares = inverse_sigmoid((points - self.low) / self.span)
        embedded = self.encode(shares.reshape(camera.shape[0], -1, 3 * self.depths))
        out: Tensor = embedded * self.gate(tokens)
        return out


class MotionNorm(nn.Module):
    """A layer norm whose scale and shift follow from how the vehicle and the object moved (section 3.3)."""

    def __init__(self, conditions: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.reduce = nn.Sequential(nn.Linear(conditions, width), nn.ReLU())
        self.scale = nn.Linear(width, width)
        self.shift = nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map ``float[N, M, width]`` and ``float[N, M, conditions]`` to ``float[N, M, width]``."""
        known = self.reduce(condition)
        out: Tensor = self.scale(known) * self.norm(x) + self.shift(known)
        return out


class TemporalDecoderLayer(nn.Module):
    """Post-norm attention among queries and to the queue, attention to the images, and feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.feed = FeedForward(width, hidden)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, places: Tensor, past: Tensor, past_places: Tensor, tokens: Tensor, keys: Tensor
    ) -> Tensor:
        """Map ``float[N, queries, width]`` to the same shape; ``keys`` are tokens with their positions."""
        placed = x + places
        seen = torch.cat([placed, past + past_places], 1)
        x = self.norm1(x + self.attention(placed, seen, torch.cat([x, past], 1), need_weights=False)[0])
        x = self.norm2(x + self.cross(x + places, keys, tokens, need_weights=False)[0])
        out: Tensor = self.norm3(x + self.feed(x))
        return out


class StreamPetr(nn.Module):
    """Images, camera matrices, motion since the last frame and the queue to boxes and the next queue."""

    def __init__(
        self,
        widths: Sequence[int],
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        queries: int,
        memory: int,
        propagated: int,
        best: int,
        classes: int,
        depths: int,
        image: tuple[int, int],
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(widths, width)
        self.positions = PositionEmbedding(width, depths, (image[0] // 16, image[1] // 16))
        self.points = nn.Parameter(0.1 + 0.8 * torch.rand(queries, 3))
        self.places = nn.Sequential(nn.Linear(3 * width // 2, width), nn.ReLU(), nn.Linear(width, width))
        self.motion = MotionNorm(2 + 12, width)
        self.layers = nn.ModuleList(TemporalDecoderLayer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Sequential(
            nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, classes)
        )
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, _BOX))
        self.width, self.propagated, self.best, self.kept = width, propagated, best, memory - best

    def forward(
        self, image: Tensor, camera: Tensor, motion: Tensor, memory: Tensor, points: Tensor, speed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Map ``image[N, cameras, 3, H, W]``, ``camera[N, cameras, 4, 4]``, ``motion[N, 3, 4]`` and a queue.

        The queue is ``memory[N, M, width]``, ``points[N, M, 3]`` in metres and ``speed[N, M, 2]``. Returned
        are ``classes[N, Q, classes]``, ``boxes[N, Q, 10]``, whose centres are shares of the space looked at,
        and the queue of the next frame.
        """
        low, span = self.positions.low, self.positions.span
        features = self.pyramid(image.flatten(0, 1)).unflatten(0, (-1, image.shape[1]))
        tokens = features.permute(0, 1, 3, 4, 2).flatten(1, 3)
        keys = tokens + self.positions(camera, tokens)

        points = points @ motion[..., :3].transpose(-1, -2) + motion[:, None, :, 3]
        moved = motion.flatten(1)[:, None].expand(-1, points.shape[1], -1)
        past = self.motion(memory, torch.cat([speed, moved], -1))
        learned = self.points.expand(image.shape[0], -1, -1)
        carried = (points - low) / span
        past_places = self.places(self._waves(carried[:, self.propagated :]))
        shares = torch.cat([learned, carried[:, : self.propagated]], 1)
        places = self.places(self._waves(shares))
        fresh = torch.zeros_like(learned[..., :1]).expand(-1, -1, self.width)
        x = torch.cat([fresh, past[:, : self.propagated]], 1)
        for layer in self.layers:
            x = layer(x, places, past[:, self.propagated :], past_places, tokens, keys)
        x = self.norm(x)

        classes = self.classes(x)
        box = self.boxes(x)
        centre = (box[..., :3] + inverse_sigmoid(shares)).sigmoid()
        boxes = torch.cat([centre, box[..., 3:]], -1)
        top = classes.sigmoid().max(-1).values.topk(self.best, 1).indices
        entering = (memory, x), (points, centre * span + low), (speed, box[..., 8:])
        queue = [torch.cat([_rows(new, top), old[:, : self.kept]], 1) for old, new in entering]
        return classes, boxes, queue[0], queue[1], queue[2]

    def _waves(self, shares: Tensor) -> Tensor:
        """Sines and cosines of positions, ``float[N, K, 3]`` to ``float[N, K, 3 width / 2]``."""
        steps = torch.arange(self.width // 4, dtype=torch.float32, device=shares.device)
        angles = 2 * math.pi * shares[..., None] / 10000 ** (4 * steps / self.width)
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(2)


def inverse_sigmoid(shares: Tensor) -> Tensor:
    """The logit of shares that are clamped into (0, 1)."""
    shares = shares.clamp(1e-5, 1 - 1e-5)
    return (shares / (1 - shares)).log()


def _rows(x: Tensor, top: Tensor) -> Tensor:
    """The queries ``top[N, best]`` of ``x[N, queries, C]``."""
    return x.gather(1, top[..., None].expand(-1, -1, x.shape[-1]))


def streampetr(
    widths: Sequence[int] = (64, 128, 256, 512),
    width: int = 256,
    heads: int = 8,
    hidden: int = 1024,
    *,
    layers: int = 6,
    queries: int = 644,
    memory: int = 512,
    propagated: int = 256,
    best: int = 128,
    classes: int = 10,
    depths: int = 64,
    image: tuple[int, int] = (256, 704),
) -> StreamPetr:
    """Return StreamPETR on ResNet-50; ``queries`` are learned, ``propagated`` ones are of the queue."""
    return StreamPetr(
        widths, width, heads, hidden, layers, queries, memory, propagated, best, classes, depths, image
    )
