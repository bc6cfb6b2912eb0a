"""Repair by least squares: new weights with which a layer gives, on what it gets now, what the original gave.

    min_W  Σ ‖W x + b − y₀‖² + λ ‖W − W₀‖²        x from the repaired layers before, y₀ from the original

as in channel pruning (He, Zhang & Sun, ICCV 2017); but the penalty pulls towards the weights that the layer
has, and ``λ`` is chosen on inputs that are held out. Where the output is added to a stream, ``y₀`` is the
original's stream, so that the layer makes up for the error of the stream as well. Samples are positions drawn
from every input; of them ``xᵀx`` and ``xᵀ(y₀ − W₀ x)`` are kept, in float64, and those that are held out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.layer_samples import inputs_at, outputs_at, store_matrix, weight_matrix
from onnx_mdp.linear_layers import Layer, LayerRepair, shift
from onnx_mdp.stepwise import Walk

__all__ = ["refit"]

Array = npt.NDArray[Any]
Wide = npt.NDArray[np.float64]

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean square of the inputs
_HELD_OUT = 5  # of so many inputs one
_ROWS = 8192
_ROWS_FOR_EACH = 16  # samples for each unknown of an output
_MOST_UNKNOWNS = 8192  # of an output: a matrix of half a gigabyte
_UNCHANGED = 1e-10  # of the variance
_DEAD = 1e-6  # of the largest gain


@dataclass(slots=True)
class _Samples:
    """Sums over samples of ``x``, with a one for the bias where there may be one, and the residual ``r``.

    ``gram`` is ``Σ xᵀx``, ``float64[groups, unknowns, unknowns]``, ``cross`` is ``Σ xᵀr``.
    """

    gram: Wide
    cross: Wide
    held: list[tuple[Array, Array]] = field(default_factory=list)
    spread: float = 0.0

    def add(self, x: Array, r: Array) -> None:
        """Add samples to the sums."""
        turned = x.transpose(0, 2, 1)
        self.gram += turned @ x
        self.cross += turned @ r

    def error(self, change: Wide | None = None) -> float:
        """Σ r² over what is held out, after a change of the weights ``[groups, unknowns, outputs]``."""
        rest = (r if change is None else r - x @ change.astype(np.float32) for x, r in self.held)
        return float(sum(np.square(r, dtype=np.float64).sum() for r in rest))

    def solve(self, penalty: float, shifts: bool) -> Wide:
        """The change of the weights that is best for a penalty, ``float64[groups, unknowns, outputs]``."""
        diagonal = np.einsum("gii->gi", self.gram).copy()
        free = diagonal[:, :-1] if shifts else diagonal
        added = np.zeros_like(diagonal)
        added[:, : free.shape[1]] = penalty * np.maximum(free.mean(1, keepdims=True), 1e-30)
        return np.linalg.solve(self.gram + added[:, :, None] * np.eye(diagonal.shape[1]), self.cross)


def refit(model: ir.Model, layer: Layer, dense: Walk, slim: Walk) -> LayerRepair:
    """Fit the weights and the bias of a layer to the original's outputs, unless that does not help."""
    if layer.node.op_type == "BatchNormalization":
        return LayerRepair("lstsq", layer.name, kept="it normalises something else than one layer")
    weights, shifts = weight_matrix(layer), layer.fixed is None
    groups, outputs, unknowns = weights.shape
    found = _why_not(unknowns, dense) or _gather(layer, weights, dense, slim)
    if isinstance(found, str):
        return LayerRepair("lstsq", layer.name, kept=found)
    before = found.error()
    if before <= _UNCHANGED * found.spread:
        return LayerRepair("lstsq", layer.name, kept="its outputs did not move")
    errors = {penalty: found.error(found.solve(penalty, shifts)) for penalty in _PENALTIES}
    best = min(errors, key=lambda penalty: errors[penalty])
    if not errors[best] < before:
        return LayerRepair("lstsq", layer.name, kept="no other weights are better on inputs held out")
    for x, r in found.held:
        found.add(x, r)
    change = found.solve(best, shifts).transpose(0, 2, 1)
    store_matrix(layer, weights + change[:, :, :unknowns] / _gain(layer).reshape(groups, outputs, 1))
    if shifts:
        shift(model, layer, change[:, :, -1].reshape(-1))
    return LayerRepair("lstsq", layer.name, before / found.spread, errors[best] / found.spread)


def _why_not(unknowns: int, dense: Walk) -> str | None:
    if unknowns > _MOST_UNKNOWNS:
        return f"each of its outputs has {unknowns} weights"
    return "there is no second input to hold out" if dense.count < 2 else None


def _gain(layer: Layer) -> Wide:
    """What the outputs are multiplied with after the layer; infinite where that is next to nothing."""
    if layer.normalization is None:
        return np.ones(int(layer.kept.sum()))
    gain = layer.normalization.gain
    return np.where(np.abs(gain) > _DEAD * np.abs(gain).max(), gain, np.inf)


def _gather(layer: Layer, weights: Wide, dense: Walk, slim: Walk) -> _Samples | str:
    """The samples of a layer, or why there are none."""
    groups, outputs, unknowns = weights.shape
    rows = max(_ROWS, _ROWS_FOR_EACH * unknowns) // dense.count + 1
    gain = _gain(layer)
    alive = np.isfinite(gain)
    product = (weights * np.where(alive, gain, 0.0).reshape(groups, outputs, 1)).transpose(0, 2, 1)
    size = unknowns + (layer.fixed is None)
    found = _Samples(np.zeros((groups, size, size)), np.zeros((groups, size, outputs)))
    for place, (x, target) in enumerate(_drawn(layer, rows, dense, slim)):
        if x is None or target is None:
            return "its outputs lie at other places"
        now = np.concatenate(list(x @ product), 1) + layer.offset
        residual = np.where(alive, target - now, 0.0).reshape(len(target), groups, outputs)
        ones = np.ones((groups, len(target), size - unknowns))
        full = np.concatenate([x, ones], 2).astype(np.float32)
        pair = full, residual.transpose(1, 0, 2).astype(np.float32)
        if _is_held_out(place, dense.count):
            found.held.append(pair)
            found.spread += float(((target - target.mean(0)) ** 2).sum())
        else:
            found.add(*pair)
    found.spread = max(found.spread, 1e-30)
    return found


def _is_held_out(place: int, count: int) -> bool:
    return place % min(_HELD_OUT, count) == min(_HELD_OUT, count) - 1


def _drawn(layer: Layer, rows: int, dense: Walk, slim: Walk) -> Iterator[tuple[Array | None, Array | None]]:
    """Inputs ``[groups, samples, unknowns]`` and wished outputs ``[samples, outputs]`` of each feed."""
    rng = np.random.default_rng(0)
    names = [layer.data] if layer.other is None else [layer.data, layer.other]
    for (whole,), (data, *other) in zip(dense.read([layer.target]), slim.read(names), strict=True):
        extents = np.moveaxis(whole, layer.axis, -1).shape[:-1]
        total = math.prod(extents)
        places = np.sort(rng.choice(total, min(rows, total), replace=False))
        target = outputs_at(layer, whole, places)[:, layer.kept].astype(np.float64)
        for array in other:
            target = target - outputs_at(layer, array, places)
        yield inputs_at(layer, data, extents, places), target
