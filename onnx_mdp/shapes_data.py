"""Ten classes of drawn shapes: labelled images that we own, made on the spot from a seed.

A shape is a signed distance ``d(u, v)``, negative inside, in coordinates where its radius is 1. Position,
radius, rotation, stretch, colours, gratings, strokes before and behind, and noise are drawn at random, so a
small network gets most images right and not all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "shapes"]

Floats = NDArray[np.floating[Any]]
_SIZE = 64
_MEAN, _STD = 0.5, 0.25
_STROKES_BEHIND, _STROKES_BEFORE = 3, 1


def _norm(u: Floats, v: Floats) -> Floats:
    # Six times as fast as np.hypot, whose care about overflow is not needed here.
    norm: Floats = np.sqrt(u * u + v * v)
    return norm


def _disc(u: Floats, v: Floats) -> Floats:
    return _norm(u, v) - 1


def _star(points: int, inner: float, u: Floats, v: Floats) -> Floats:
    """Return the distance to a star whose corners alternate between radius 1 and ``inner``.

    All its edges are one edge after folding the angle into [0, pi / points].
    """
    wedge = 2 * np.pi / points
    angle = np.abs((np.arctan2(v, u) + wedge / 2) % wedge - wedge / 2)
    radius = _norm(u, v)
    edge = np.array([inner * np.cos(wedge / 2) - 1, inner * np.sin(wedge / 2)])
    normal = (np.array([edge[1], -edge[0]]) / np.linalg.norm(edge)).astype(np.float32)
    distance: Floats = (radius * np.cos(angle) - 1) * normal[0] + radius * np.sin(angle) * normal[1]
    return distance


def _polygon(corners: int, u: Floats, v: Floats) -> Floats:
    return _star(corners, float(np.cos(np.pi / corners)), u, v)


def _cross(u: Floats, v: Floats) -> Floats:
    x, y = np.abs(u), np.abs(v)
    distance: Floats = np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.3)
    return distance


def _crescent(u: Floats, v: Floats) -> Floats:
    distance: Floats = np.maximum(_disc(u, v), 0.85 - _norm(u - 0.5, v))
    return distance


def _half_disc(u: Floats, v: Floats) -> Floats:
    distance: Floats = np.maximum(_disc(u + 0.4, v), -u - 0.4)
    return distance


# The label is the position in this dict.
_DISTANCES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "disc": _disc,
    "ring": lambda u, v: np.abs(_norm(u, v) - 0.78) - 0.22,
    "square": lambda u, v: _polygon(4, u, v),
    "frame": lambda u, v: np.abs(_polygon(4, u, v) + 0.18) - 0.18,
    "triangle": lambda u, v: _polygon(3, u, v),
    "pentagon": lambda u, v: _polygon(5, u, v),
    "star": lambda u, v: _star(5, 0.45, u, v),
    "cross": _cross,
    "crescent": _crescent,
    "half disc": _half_disc,
}
CLASSES: tuple[str, ...] = tuple(_DISTANCES)


def shapes(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return ``count`` images, float32[count, 3, 64, 64], and their labels, int64[count].

    Images are 8-bit colours standardised by mean 0.5 and deviation 0.25, so they lie in [-2, 2]; a label is
    an index into `CLASSES`. Classes are balanced: each ten images in a row hold each class once. The same
    seed, an integer of at least 0, gives the same bytes, and a smaller count the first of the same images.
    """
    images = np.empty((count, 3, _SIZE, _SIZE), np.float32)
    labels = np.empty(count, np.int64)
    for block, start in enumerate(range(0, count, len(CLASSES))):
        rows = slice(start, min(start + len(CLASSES), count))
        levels, order = _draw_block(np.random.default_rng((seed, block)))
        images[rows] = (levels * np.float32(1 / 255 / _STD) - np.float32(_MEAN / _STD))[: count - start]
        labels[rows] = order[: count - start]
    return images, labels


def _draw_block(rng: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """Return one image of each class, float32[10, 3, 64, 64] of whole levels 0..255, and int64[10] labels."""
    labels = rng.permutation(len(CLASSES))
    shape_colour, ground_colour = _two_colours(rng)
    canvas = _texture(rng, ground_colour)
    _draw_strokes(rng, canvas, _STROKES_BEHIND)
    _blend(canvas, _texture(rng, shape_colour), _shape_masks(rng, labels))
    _draw_strokes(rng, canvas, _STROKES_BEFORE)
    deviation = _uniform(rng, 0.01, 0.07, (len(CLASSES), 1, 1, 1))
    canvas += deviation * rng.standard_normal(canvas.shape, np.float32)
    # Whole levels, as in a picture file, hide the last bits of sine and root, which differ between machines.
    return np.rint(canvas.clip(0, 1) * np.float32(255)), labels


def _uniform(rng: np.random.Generator, low: float, high: float, shape: tuple[int, ...]) -> Floats:
    return np.float32(low) + np.float32(high - low) * rng.random(shape, np.float32)


def _grid() -> tuple[Floats, Floats]:
    """Return x[1, 1, 64] and y[1, 64, 1]; the image spans [-1, 1]."""
    axis = ((np.arange(_SIZE) + 0.5) * 2 / _SIZE - 1).astype(np.float32)
    return axis[None, None, :], axis[None, :, None]


def _two_colours(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return float32[10, 3, 1, 1] of shape and of ground, at least 0.25 apart in the mean of the channels."""
    ground = _uniform(rng, 0.1, 0.9, (len(CLASSES), 3, 1, 1))
    offset = _uniform(rng, -0.45, 0.45, (len(CLASSES), 3, 1, 1))
    contrast = np.abs(offset).mean(axis=1, keepdims=True)
    offset *= np.maximum(1, np.float32(0.25) / contrast)
    # Leaving the range would be clipped to no contrast at all, so such a channel goes the other way.
    outside = np.abs(ground + offset - 0.5) > 0.5
    return ground + np.where(outside, -offset, offset), ground


def _texture(rng: np.random.Generator, colour: Floats) -> Floats:
    """Return float32[10, 3, 64, 64]: a colour with a grating and a brightness ramp over it."""
    x, y = _grid()
    per_image = (len(CLASSES), 1, 1)
    angle, phase = _uniform(rng, 0, 2 * np.pi, per_image), _uniform(rng, 0, 2 * np.pi, per_image)
    frequency, depth = _uniform(rng, 4, 30, per_image), _uniform(rng, 0, 0.06, per_image)
    along = np.cos(angle) * x + np.sin(angle) * y
    light = depth * np.sin(frequency * along + phase) + _uniform(rng, -0.12, 0.12, per_image) * along
    return colour + light[:, None]


def _shape_masks(rng: np.random.Generator, labels: NDArray[np.int64]) -> Floats:
    """Return float32[10, 64, 64], the share of each pixel that the shape covers."""
    x, y = _grid()
    per_image = (len(CLASSES), 1, 1)
    radius, angle = _uniform(rng, 0.36, 0.75, per_image), _uniform(rng, 0, 2 * np.pi, per_image)
    stretch = np.exp(_uniform(rng, -0.22, 0.22, per_image))
    dx = x - _uniform(rng, -1, 1, per_image) * np.maximum(0.9 - radius, 0.2)
    dy = y - _uniform(rng, -1, 1, per_image) * np.maximum(0.9 - radius, 0.2)
    # Stretching after one rotation and before another also shears the shape.
    lean = _uniform(rng, 0, 2 * np.pi, per_image)
    u, v = _rotate(dx, dy, angle)
    u, v = _rotate(u * stretch / radius, v / (stretch * radius), lean)
    distance = np.stack([_DISTANCES[CLASSES[c]](u[i], v[i]) for i, c in enumerate(labels)])
    return _coverage(distance * radius)


def _rotate(u: Floats, v: Floats, angle: Floats) -> tuple[Floats, Floats]:
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * u + sine * v, cosine * v - sine * u


def _coverage(distance: Floats) -> Floats:
    """Turn a distance in units of half an image into the covered share of the pixel."""
    share: Floats = np.clip(np.float32(0.5) - distance * np.float32(_SIZE / 2), 0, 1)
    return share


def _draw_strokes(rng: np.random.Generator, canvas: Floats, strokes: int) -> None:
    """Draw straight strokes of random place, length, width and colour over every image, in place."""
    x, y = _grid()
    per_image = (len(CLASSES), 1, 1)
    for _ in range(strokes):
        angle = _uniform(rng, 0, np.pi, per_image)
        dx, dy = x - _uniform(rng, -1, 1, per_image), y - _uniform(rng, -1, 1, per_image)
        along, across = _rotate(dx, dy, angle)
        excess = np.maximum(np.abs(along) - _uniform(rng, 0.05, 0.5, per_image), 0)
        distance = _norm(excess, across) - _uniform(rng, 0.015, 0.06, per_image)
        _blend(canvas, _uniform(rng, 0, 1, (len(CLASSES), 3, 1, 1)), _coverage(distance))


def _blend(canvas: Floats, paint: Floats, mask: Floats) -> None:
    """Lay ``paint`` over float32[10, 3, 64, 64] in place, where float32[10, 64, 64] ``mask`` is 1."""
    canvas += mask[:, None] * (paint - canvas)
