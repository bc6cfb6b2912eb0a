"""A detector in the style of YOLOv8: C2f blocks that split and concatenate, SPPF, and a decoupled head.

After Ultralytics YOLOv8 (2023), whose boxes are expectations over bins (Li et al., Generalized Focal Loss,
arXiv 2006.04388): a softmax over bins, then a convolution whose weight counts them. Boxes come out in
units of the image, beside a sigmoid for each class; there is no suppression.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.convolutions import BareConv, chain, conv_bn

__all__ = ["Yolo", "yolo"]


def _conv(cin: int, cout: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    return conv_bn(cin, cout, kernel, stride, activation=nn.SiLU)


class Bottleneck(nn.Module):
    """Two convolutions, with an optional shortcut around them."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.branch = chain(a=_conv(width, width, 3), b=_conv(width, width, 3))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, width, H, W]`` to the same shape."""
        y: Tensor = self.branch(x)
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """One half of the channels passes bottlenecks one by one; all that came on the way is concatenated."""

    def __init__(self, cin: int, cout: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        self.enter = _conv(cin, cout)
        self.steps = nn.ModuleList(Bottleneck(cout // 2, shortcut) for _ in range(depth))
        self.leave = _conv((2 + depth) * (cout // 2), cout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, cin, H, W]`` to ``float[N, cout, H, W]``."""
        parts = list(self.enter(x).chunk(2, 1))
        for step in self.steps:
            parts.append(step(parts[-1]))
        out: Tensor = self.leave(torch.cat(parts, 1))
        return out


class Sppf(nn.Module):
    """Three poolings in a row, concatenated with what they began with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = _conv(width, width // 2), _conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, width, H, W]`` to the same shape."""
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        out: Tensor = self.leave(torch.cat(parts, 1))
        return out


class Head(nn.Module):
    """Boxes as distributions over bins, and classes, from one map each; then both decoded together."""

    def __init__(self, widths: Sequence[int], classes: int, bins: int, image: int) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        box, score = max(16, widths[0] // 4, 4 * bins), max(widths[0], min(classes, 100))
        self.boxes = nn.ModuleList(
            chain(a=_conv(w, box, 3), b=_conv(box, box, 3), out=BareConv(box, 4 * bins, 1)) for w in widths
        )
        self.scores = nn.ModuleList(
            chain(a=_conv(w, score, 3), b=_conv(score, score, 3), out=BareConv(score, classes, 1))
            for w in widths
        )
        self.register_buffer("places", torch.arange(float(bins)).reshape(1, bins, 1, 1), persistent=False)
        points, strides = _grid([image // 2 ** (3 + level) for level in range(len(widths))])
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("strides", strides, persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map one ``float[N, widths[i], H, W]`` a level to ``float[N, 4 + classes, boxes]``."""
        levels = zip(maps, self.boxes, self.scores, strict=True)
        joined = [torch.cat([box(x), score(x)], 1) for x, box, score in levels]
        flat = torch.cat([x.view(x.shape[0], x.shape[1], -1) for x in joined], 2)
        box, score = flat.split((4 * self.bins, self.classes), 1)
        shares = box.view(box.shape[0], 4, self.bins, -1).transpose(2, 1).softmax(1)
        expected = functional.conv2d(shares, self.places).view(box.shape[0], 4, -1)
        before, after = expected.chunk(2, 1)
        low, high = self.points - before * self.strides, self.points + after * self.strides
        return torch.cat([(low + high) / 2, high - low, score.sigmoid()], 1)


def _grid(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Centres ``float[2, boxes]`` and sizes ``float[1, boxes]`` of all cells, in units of the image."""
    points, strides = [], []
    for size in sizes:
        line = (torch.arange(size) + 0.5) / size
        y, x = torch.meshgrid(line, line, indexing="ij")
        points.append(torch.stack([x.reshape(-1), y.reshape(-1)]))
        strides.append(torch.full((1, size * size), 1 / size))
    return torch.cat(points, 1), torch.cat(strides, 1)


class Yolo(nn.Module):
    """Backbone of five widths, a neck that goes up and down again, and the head on three levels."""

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], classes: int, bins: int, image: int
    ) -> None:
        super().__init__()
        first, *rest = widths
        self.stem = _conv(3, first, 3, 2)
        self.stages = nn.ModuleList(
            chain(down=_conv(cin, cout, 3, 2), c2f=C2f(cout, cout, depth, shortcut=True))
            for cin, cout, depth in zip(widths[:-1], rest, depths, strict=True)
        )
        _, _, small, middle, large = widths
        self.pool = Sppf(large)
        self.up = nn.Upsample(scale_factor=2)
        join = partial(C2f, depth=depths[0], shortcut=False)
        self.up1 = join(large + middle, middle)
        self.up2 = join(middle + small, small)
        self.down1, self.join1 = _conv(small, small, 3, 2), join(small + middle, middle)
        self.down2, self.join2 = _conv(middle, middle, 3, 2), join(middle + large, large)
        self.head = Head((small, middle, large), classes, bins, image)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``float[N, 3, image, image]`` to ``float[N, 4 + classes, boxes]``."""
        x = self.stages[0](self.stem(x))
        small = self.stages[1](x)
        middle = self.stages[2](small)
        large = self.pool(self.stages[3](middle))
        middle = self.up1(torch.cat([self.up(large), middle], 1))
        small = self.up2(torch.cat([self.up(middle), small], 1))
        middle = self.join1(torch.cat([self.down1(small), middle], 1))
        large = self.join2(torch.cat([self.down2(middle), large], 1))
        out: Tensor = self.head([small, middle, large])
        return out


def yolo(
    widths: Sequence[int] = (16, 32, 64, 128, 256),
    depths: Sequence[int] = (1, 2, 2, 1),
    classes: int = 80,
    *,
    bins: int = 16,
    image: int = 640,
) -> Yolo:
    """Return the "n" size for images of ``image`` × ``image``, a multiple of 32."""
    return Yolo(widths, depths, classes, bins, image)
