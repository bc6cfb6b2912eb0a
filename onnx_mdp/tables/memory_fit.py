"""Which memory explains what was measured: the size of the cache, and the price of what is not in it.

Single layers say how much a megabyte of weights costs in variants of different size, and whole models how
much that is together. Of a grid of both numbers, the pair is chosen whose staircases and affine map leave the
smallest errors: the mean one of whole models, plus that of the layers' times. No price at all is one of them,
and around the best pair a finer grid is searched.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from onnx_mdp.tables.memory import Memory, total
from onnx_mdp.tables.staircases import Staircases, affine, height

__all__ = ["Layer", "fit_memory", "sum_ms"]

_CACHES_MB = (7.0, 10.0, 14.0, 20.0, 28.0, 40.0, 56.0, 80.0, 112.0)
_FINER = (1.19, 1.09)
_PRICES = (0.02, 0.03, 0.04, 0.055, 0.075, 0.1, 0.13)  # ms for a megabyte: 50 to 8 GB/s

Vector = npt.NDArray[np.float64]
Layer = tuple[str, float, float]  # the key of a term, and the widths that it reads and makes


def sum_ms(
    coefficients: Mapping[str, tuple[float, ...]], memory: Memory, layers: Sequence[Layer], step: int
) -> float:
    """What all layers of a model take, before calibration; layers that no profile shows take nothing."""
    touched = total(layers, step)
    again = memory.share(touched) * memory.ms_per_mb * touched.weights
    return again + sum(height(coefficients, key, a, b, step) or 0.0 for key, a, b in layers)


def fit_memory(
    staircases: Staircases, wholes: Sequence[Sequence[Layer]], measured_ms: Vector, step: int
) -> Memory:
    """The memory that explains the layers of ``staircases`` and whole models best.

    ``wholes`` are the layers of models that took ``measured_ms``, the unpruned one first.
    """
    most = total(wholes[0], step)
    caches = [mb for mb in _CACHES_MB if mb < most.maps + most.weights]
    grid = [Memory(), *(Memory(mb, price) for mb, price in itertools.product(caches, _PRICES))]
    drift = staircases.drift()

    @functools.cache
    def errors(memory: Memory) -> float:
        coefficients = staircases.fit(memory, drift)
        predicted = np.asarray([sum_ms(coefficients, memory, layers, step) for layers in wholes])
        scale, offset = affine(predicted, measured_ms)
        apart = np.abs((scale * predicted + offset) / measured_ms - 1.0)
        return float(apart.mean()) + staircases.error(coefficients, memory, drift)

    best = min(grid, key=errors)
    for factor in _FINER:
        finer = itertools.product((1 / factor, 1.0, factor), repeat=2)
        near = [Memory(best.cache_mb * c, best.ms_per_mb * p) for c, p in finer]
        best = min(near if best.ms_per_mb else [best], key=errors)
    return best
