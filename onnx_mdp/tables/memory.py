"""What is read from memory: the megabytes of a layer, and of a whole model that runs again and again.

Between two runs weights stay in the cache of the last level, unless a run touches more than that holds. So
what they cost depends on the whole model: of ``T`` megabytes that a run reads and makes, weights and feature
maps, a cache of ``C`` megabytes leaves the share

    1 - exp(-(T / C)³)

of the weights to be read from memory again, at so many milliseconds for a megabyte. Both numbers belong to
the machine of the moment: a guest has a part of a cache that others use as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from onnx_mdp.errors import MeasurementError
from onnx_mdp.tables.cost_terms import HEADS, SUMMED_HEADS

__all__ = ["UNPRICED", "UNREADABLE", "Megabytes", "Memory", "megabytes", "total"]

UNREADABLE = "the store holds measurements of this model that this version cannot read: choose another store"
_BYTES = 4  # of an element; half as much in float16 moves the thresholds, and the fits with them
_STEEPNESS = 3


class Megabytes(NamedTuple):
    """Of the feature maps that are read and made, and of the weights."""

    maps: float
    weights: float


@dataclass(frozen=True, slots=True)
class Memory:
    """The cache that is left to a model, and milliseconds for a megabyte of weights that is not in it."""

    cache_mb: float = 1.0
    ms_per_mb: float = 0.0

    def share(self, touched: Megabytes) -> float:
        """Of the weights, what each run of a model reads from memory again; 0 where that costs nothing."""
        if not self.ms_per_mb:
            return 0.0
        return -math.expm1(-(((touched.maps + touched.weights) / self.cache_mb) ** _STEEPNESS))


UNPRICED = Memory()  # weights cost the same in every model


def megabytes(key: str, a: float, b: float, step: int) -> Megabytes:
    """Of one layer at the widths ``a`` read and ``b`` made, which are stored in steps.

    Where heads are an axis of their own, ``a`` is the width of each and ``b`` their number.
    """
    layer = _layer(key)
    reads, makes = _padded(a, step), _padded(b, step)
    if layer.heads:
        maps = ((layer.read, layer.axes[0]), (layer.made, layer.axes[1]))
        return Megabytes(sum(mb * (1.0, b, reads * b)[min(axes, 2)] for mb, axes in maps), 0.0)
    return Megabytes(layer.read * reads + layer.made * makes, layer.weight * reads * makes)


def total(layers: Iterable[tuple[str, float, float]], step: int) -> Megabytes:
    """Of all layers of a model: keys, widths read and widths made."""
    parts = [megabytes(key, a, b, step) for key, a, b in layers]
    return Megabytes(math.fsum(p.maps for p in parts), math.fsum(p.weights for p in parts))


def _padded(channels: float, step: int) -> float:
    return channels if channels < step else -(-channels // step) * step


class _Layer(NamedTuple):
    """Megabytes of a channel read, of one made, and of the weights between two.

    An operation on each channel alone makes as many as it reads, and its key has the width made only.
    ``axes`` are how many axes of the tensors read and made are widths.
    """

    read: float
    made: float
    weight: float
    heads: bool
    axes: tuple[int, int]


@lru_cache(maxsize=4096)
def _layer(key: str) -> _Layer:
    try:
        described = json.loads(key)
        shapes = [described.get(name, []) for name in ("in", "out")]
        read, made = (1e-6 * _BYTES * math.prod(abs(size) for size in shape) for shape in shapes)
        weight = 1e-6 * _BYTES * math.prod(described["weight"]) if "weight" in described else 0.0
        kind, axes = described.get("kind", ""), tuple(shape.count(-1) for shape in shapes)
        if not math.isfinite(read + made + weight):
            raise ValueError("sizes without end")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MeasurementError(UNREADABLE) from error
    if kind in ("depthwise", "moves"):
        read, made, weight = 0.0, read + made, 0.0
    return _Layer(read, made, weight, kind in (HEADS, SUMMED_HEADS), (axes[0], axes[1]))
