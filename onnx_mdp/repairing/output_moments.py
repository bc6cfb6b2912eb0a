"""Repair by moments: the mean, and the spread, of what a layer gives are made those of the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.repairing.layer_samples import store_matrix, weight_matrix
from onnx_mdp.repairing.linear_layers import Layer, LayerRepair, numbers, shift, store
from onnx_mdp.repairing.stepwise import Walk

__all__ = ["match_means", "match_spreads"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

_UNCHANGED = 1e-6  # of the deviation of a layer's outputs
_FACTORS = (0.5, 2.0)  # what moved by more is not what it was


@dataclass(frozen=True, slots=True)
class _Moments:
    """Of each output, over inputs and positions, ``float64[outputs]``.

    ``dense`` are those of the original's outputs that are kept, ``slim`` those that the layer gives now.
    """

    dense_mean: Vector
    slim_mean: Vector
    dense_variance: Vector
    slim_variance: Vector
    covariance: Vector

    @property
    def spread(self) -> float:
        """Variance of the original's outputs, summed over them."""
        return max(float(self.dense_variance.sum()), 1e-30)

    def error(self, factor: float | Vector = 1.0) -> float:
        """Relative squared error of the outputs times a factor, with the means of the original."""
        apart = self.dense_variance - 2 * factor * self.covariance + factor**2 * self.slim_variance
        return max(float(apart.sum()), 0.0) / self.spread


def match_means(model: ir.Model, layer: Layer, dense: Walk, slim: Walk) -> LayerRepair:
    """Shift the outputs of a layer, so that the means of its target are those of the original."""
    found = layer.fixed or _moments(layer, layer.target, dense, slim)
    if isinstance(found, str):
        return LayerRepair("bias", layer.name, kept=found)
    by = found.dense_mean - found.slim_mean
    if np.abs(by).max(initial=0.0) <= _UNCHANGED * np.sqrt(found.spread):
        return LayerRepair("bias", layer.name, kept="the means of its outputs did not move")
    shift(model, layer, by)
    after = found.error()
    return LayerRepair("bias", layer.name, after + float(by @ by) / found.spread, after)


def match_spreads(model: ir.Model, layer: Layer, dense: Walk, slim: Walk) -> LayerRepair:
    """Scale and shift the outputs of a layer, so that their means and variances are those of the original.

    Running statistics move as those over these inputs did, and are not replaced by them: a few inputs do not
    tell what the training set did.
    """
    found = layer.fixed or _moments(layer, layer.own, dense, slim)
    if isinstance(found, str):
        return LayerRepair("bn", layer.name, kept=found)
    by, least = found.dense_mean - found.slim_mean, 1e-12 * found.spread
    factor = np.clip(np.sqrt((found.dense_variance + least) / (found.slim_variance + least)), *_FACTORS)
    moved = max(np.abs(by).max() / np.sqrt(found.spread), np.abs(factor - 1).max())
    if moved <= _UNCHANGED:
        return LayerRepair("bn", layer.name, kept="the moments of its outputs did not move")
    offset = factor * (layer.offset - found.slim_mean) + found.dense_mean
    if layer.normalization is not None:
        _renormalize(layer, factor, offset)
    else:
        weights = weight_matrix(layer)
        store_matrix(layer, weights * factor.reshape(*weights.shape[:2], 1))
        shift(model, layer, offset - layer.offset)
    before = found.error() + float(by @ by) / found.spread
    return LayerRepair("bn", layer.name, before, found.error(factor))


def _renormalize(layer: Layer, factor: Vector, offset: Vector) -> None:
    """Running statistics with which the outputs are ``factor`` times as large, and ``offset`` is added."""
    norm = layer.normalization
    assert norm is not None
    variance = (numbers(norm.variance) + norm.epsilon) / factor**2 - norm.epsilon
    store(norm.variance, np.maximum(variance, 0.0))
    gain = norm.gain
    before = 0.0 if layer.bias is None else numbers(layer.bias).reshape(-1)
    mean = before + (numbers(norm.bias) - offset) / np.where(gain == 0, np.inf, gain)
    store(norm.mean, np.where(gain == 0, numbers(norm.mean), mean))


def _moments(layer: Layer, name: str, dense: Walk, slim: Walk) -> _Moments | str:
    """The moments of a tensor, or why they cannot be compared."""
    sums = np.zeros((5, int(layer.kept.sum())))
    count = 0
    slim.reach([layer.data])  # once, and not again with all of the layer
    for (whole,), (part,) in zip(dense.read([name]), slim.peek([name]), strict=True):
        expected, actual = (np.moveaxis(y, layer.axis, 0).astype(np.float64) for y in (whole, part))
        expected = expected[layer.kept]
        if expected.shape != actual.shape:
            return "its outputs lie at other places"
        y, z = expected.reshape(len(expected), -1), actual.reshape(len(actual), -1)
        sums += [y.sum(1), z.sum(1), (y * y).sum(1), (z * z).sum(1), (y * z).sum(1)]
        count += y.shape[1]
    first, second, squares, slim_squares, products = sums / count
    return _Moments(
        dense_mean=first,
        slim_mean=second,
        dense_variance=np.maximum(squares - first**2, 0.0),
        slim_variance=np.maximum(slim_squares - second**2, 0.0),
        covariance=products - first * second,
    )
