"""Which memory explains what was measured: the size of the cache, and the price of what is not in it.

Single layers say how much a megabyte of weights costs in variants of different size, and whole models how
much that is together. Of a grid of both numbers, the pair is chosen whose staircases and affine map leave the
smallest errors: the mean one of whole models, plus that of the layers' times, and around it a finer grid is
searched. What explains hardly more than no price at all is none.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from onnx_mdp.tables.cost_terms import Layer
from onnx_mdp.tables.memory import UNPRICED, Memory, total
from onnx_mdp.tables.staircases import Staircases, affine, height

__all__ = ["fit_memory", "sum_ms"]

_CACHES = (0.05, 0.1, 0.17, 0.27, 0.42, 0.65)  # of what the unpruned model touches
_FINER = (1.25, 1.12)
_BETTER, _EXACT = 0.98, 1e-4
_PRICES = (0.02, 0.04, 0.08, 0.14, 0.22, 0.35)  # of all weights, beside the unpruned latency

Vector = npt.NDArray[np.float64]


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
    if not most.weights:
        return UNPRICED
    cache_mb, ms_per_mb = most.maps + most.weights, float(measured_ms[0]) / most.weights
    shares = itertools.product(_CACHES, _PRICES)
    grid = [UNPRICED, *(Memory(c * cache_mb, p * ms_per_mb) for c, p in shares)]

    @functools.cache
    def errors(memory: Memory) -> float:
        drift = staircases.drift(memory, rounds=1)
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
    return best if errors(best) < _BETTER * errors(UNPRICED) - _EXACT else UNPRICED
