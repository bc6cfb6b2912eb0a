"""Repair by moments: the mean, and the spread, of what a layer gives are made those of the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.linear_layers import Layer, LayerRepair, shift
from onnx_mdp.stepwise import Walk

__all__ = ["match_means"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

_UNCHANGED = 1e-6  # of the spread of a layer's outputs


@dataclass(frozen=True, slots=True)
class _Moments:
    """Of each output, over inputs and positions: means ``float64[outputs]`` and variances.

    ``dense`` are those of the original's outputs that are kept, ``slim`` those that the layer gives now;
    ``error`` is the mean square of their difference, summed over the outputs.
    """

    dense_mean: Vector
    dense_variance: Vector
    slim_mean: Vector
    slim_variance: Vector
    error: float

    @property
    def spread(self) -> float:
        """Variance of the original's outputs, summed over them."""
        return max(float(self.dense_variance.sum()), 1e-30)


def match_means(model: ir.Model, layer: Layer, dense: Walk, slim: Walk) -> LayerRepair:
    """Shift the outputs of a layer, so that the means of its target are those of the original."""
    if layer.fixed is not None:
        return LayerRepair("bias", layer.name, kept=layer.fixed)
    found = _moments(layer, layer.target, dense, slim)
    if found is None:
        return LayerRepair("bias", layer.name, kept="its outputs lie at other places")
    by = found.dense_mean - found.slim_mean
    if np.abs(by).max(initial=0.0) <= _UNCHANGED * np.sqrt(found.spread):
        return LayerRepair("bias", layer.name, kept="the means of its outputs did not move")
    shift(model, layer, by)
    before, after = found.error, found.error - float(by @ by)
    return LayerRepair("bias", layer.name, before / found.spread, after / found.spread)


def _moments(layer: Layer, name: str, dense: Walk, slim: Walk) -> _Moments | None:
    """The moments of a tensor; None where the original's has other extents beside the outputs."""
    sums = np.zeros((4, int(layer.kept.sum())))
    error, count = 0.0, 0
    slim.reach([layer.data])  # once, and not again with all of the layer
    for (before,), (after,) in zip(dense.read([name]), slim.peek([name]), strict=True):
        expected, actual = (np.moveaxis(y, layer.axis, 0).astype(np.float64) for y in (before, after))
        expected = expected[layer.kept]
        if expected.shape != actual.shape:
            return None
        y, z = expected.reshape(len(expected), -1), actual.reshape(len(actual), -1)
        sums += [y.sum(1), (y * y).sum(1), z.sum(1), (z * z).sum(1)]
        error += float(((y - z) ** 2).sum())
        count += y.shape[1]
    first, first_square, second, second_square = sums / count
    variances = [np.maximum(a - b**2, 0.0) for a, b in ((first_square, first), (second_square, second))]
    return _Moments(first, variances[0], second, variances[1], error / count)
