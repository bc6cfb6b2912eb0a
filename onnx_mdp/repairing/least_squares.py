"""Repair by least squares: new weights with which a layer gives, on what it gets now, what the original gave.

    min_W  Σ ‖a(W x + b) − a(y₀)‖² + λ ‖W − W₀‖²      x from the repaired layers before, y₀ from the original

as in channel pruning (He, Zhang & Sun, ICCV 2017), but the penalty pulls towards the weights ``W₀`` that the
layer has, and ``λ`` is chosen on inputs that are held out. Where the output is added to a stream, ``y₀`` is
the stream of the original, so that the layer makes up for the error of the stream as well. ``a`` is the Relu
or Clip that follows, or nothing: where the original is held at a bound, it is no error to be beyond it. A few
steps of majorisation fit ``y₀``, there replaced by what the layer gives, or by the bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.concurrency import matrix_threads
from onnx_mdp.repairing.layer_samples import inputs_at, outputs_at, store_matrix, weight_matrix
from onnx_mdp.repairing.linear_layers import Layer, LayerRepair, shift
from onnx_mdp.repairing.stepwise import Walk

__all__ = ["refit"]

Array = npt.NDArray[Any]
Wide = npt.NDArray[np.float64]

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the mean square of the inputs
_STEPS = 4
_HELD_OUT = 5  # of so many inputs one
_ROWS = 8192  # samples at least
_ROWS_OF_EACH = 64  # of an input: more inputs are more samples
_ROWS_FOR_EACH = 16  # samples for each unknown of an output
_MOST_NUMBERS = 2**27  # of all samples: half a gigabyte
_MOST_UNKNOWNS = 8192  # of an output: a matrix of half a gigabyte
_UNCHANGED = 1e-10  # of the variance
_DEAD = 1e-6  # of the largest gain
_LARGE = 1024  # unknowns from which on a product is worth several threads


@dataclass(frozen=True, slots=True)
class _Part:
    """Samples of one input: ``x``, ``float32[groups, samples, unknowns]``, with a one for a shift.

    ``now`` and ``wanted`` are what the layer gives and the original gave, ``[groups, samples, outputs]``.
    """

    x: Array
    now: Array
    wanted: Array

    def goal(self, change: Wide | None, bounds: tuple[float, float]) -> Array:
        """What to add to ``now``: where the original is held at a bound, no more than brings it there."""
        given = self.given(change)
        low, high = bounds
        goal = np.where(self.wanted <= low, np.minimum(given, low), self.wanted)
        return np.asarray(np.where(self.wanted >= high, np.maximum(given, high), goal) - self.now)

    def given(self, change: Wide | None) -> Array:
        """What the layer gives after a change of its weights, ``[groups, unknowns, outputs]``."""
        return self.now if change is None else self.now + self.x @ change.astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Problem:
    """The fit of one layer to ``parts``; the last unknown is a shift if it ``shifts``."""

    parts: Sequence[_Part]
    bounds: tuple[float, float]
    shifts: bool

    def error(self, change: Wide | None = None) -> float:
        """Σ (a(y) − a(y₀))² over all samples."""
        limits = self.bounds
        pairs = ((np.clip(p.given(change), *limits), np.clip(p.wanted, *limits)) for p in self.parts)
        return float(sum(np.square(y - wanted, dtype=np.float64).sum() for y, wanted in pairs))

    def spread(self) -> float:
        """Σ (a(y₀) − mean)² over all samples."""
        wanted = np.concatenate([np.clip(part.wanted, *self.bounds) for part in self.parts], 1)
        return max(float(np.square(wanted - wanted.mean(1, keepdims=True), dtype=np.float64).sum()), 1e-30)

    def gram(self) -> Wide:
        """``Σ xᵀx``, ``float64[groups, unknowns, unknowns]``."""
        return _total(part.x.transpose(0, 2, 1) @ part.x for part in self.parts)

    def cross(self, change: Wide | None) -> Wide:
        """``Σ xᵀ goal``, ``float64[groups, unknowns, outputs]``."""
        return _total(p.x.transpose(0, 2, 1) @ p.goal(change, self.bounds) for p in self.parts)

    def solve(self, gram: Wide, cross: Wide, penalty: float) -> Wide:
        """The best change of the weights, ``float64[groups, unknowns, outputs]``."""
        system = gram.copy()
        diagonal = np.einsum("gii->gi", system)
        added = penalty * np.maximum(diagonal.mean(1, keepdims=True), 1e-30) * np.ones_like(diagonal)
        if self.shifts:
            added[:, -1] = 0.0
        diagonal += added
        return np.asarray(np.linalg.solve(system, cross))


def _total(arrays: Iterator[Array]) -> Wide:
    total = next(arrays).astype(np.float64)
    for array in arrays:
        total += array
    return total


def refit(model: ir.Model, layer: Layer, dense: Walk, slim: Walk) -> LayerRepair:
    """Fit the weights and the bias of a layer to the original's outputs, unless that does not help."""
    reason = _why_not(layer, dense)
    if reason is not None:
        return LayerRepair("lstsq", layer.name, kept=reason)
    with matrix_threads(None if weight_matrix(layer).shape[2] >= _LARGE else 1):
        return _refit(model, layer, dense, slim)


def _refit(model: ir.Model, layer: Layer, dense: Walk, slim: Walk) -> LayerRepair:
    found = _gather(layer, dense, slim)
    if isinstance(found, str):
        return LayerRepair("lstsq", layer.name, kept=found)
    shifts = layer.fixed is None
    held = _Problem(found[_HELD_OUT - 1 :: _HELD_OUT] or found[-1:], layer.bounds, shifts)
    known = {id(part) for part in held.parts}
    fitted = _Problem([part for part in found if id(part) not in known], layer.bounds, shifts)
    before, spread = held.error(), held.spread()
    if before <= _UNCHANGED * spread:
        return LayerRepair("lstsq", layer.name, kept="its outputs did not move")
    gram, cross = fitted.gram(), fitted.cross(None)
    changes = {penalty: fitted.solve(gram, cross, penalty) for penalty in _PENALTIES}
    errors = {penalty: held.error(change) for penalty, change in changes.items()}
    penalty = min(errors, key=lambda p: errors[p])
    change, after = changes[penalty], errors[penalty]
    for _ in range(_STEPS if layer.bounds != (-math.inf, math.inf) else 0):
        further = fitted.solve(gram, fitted.cross(change), penalty)
        error = held.error(further)
        if error >= after:
            break
        change, after = further, error
    if not after < before:
        return LayerRepair("lstsq", layer.name, kept="no other weights are better on inputs held out")
    _store(model, layer, change, shifts)
    return LayerRepair("lstsq", layer.name, before / spread, after / spread)


def _store(model: ir.Model, layer: Layer, change: Wide, shifts: bool) -> None:
    weights = weight_matrix(layer)
    groups, outputs, unknowns = weights.shape
    by = change.transpose(0, 2, 1)
    store_matrix(layer, weights + by[:, :, :unknowns] / _gain(layer).reshape(groups, outputs, 1))
    if shifts:
        shift(model, layer, by[:, :, -1].reshape(-1))


def _why_not(layer: Layer, dense: Walk) -> str | None:
    if layer.node.op_type == "BatchNormalization":
        return "it normalises something else than one layer"
    unknowns = weight_matrix(layer).shape[2]
    if unknowns > _MOST_UNKNOWNS:
        return f"each of its outputs has {unknowns} weights"
    return "there is no second input to hold out" if dense.count < 2 else None


def _gain(layer: Layer) -> Wide:
    """What the outputs are multiplied with after the layer; infinite where that is next to nothing."""
    if layer.normalization is None:
        return np.ones(int(layer.kept.sum()))
    gain = layer.normalization.gain
    return np.where(np.abs(gain) > _DEAD * np.abs(gain).max(), gain, np.inf)


def _gather(layer: Layer, dense: Walk, slim: Walk) -> list[_Part] | str:
    """Samples of each input, or why there are none."""
    weights = weight_matrix(layer)
    groups, outputs, unknowns = weights.shape
    gain = _gain(layer)
    alive = np.isfinite(gain)
    product = weights * np.where(alive, gain, 0.0).reshape(groups, outputs, 1)
    matrix = product.transpose(0, 2, 1).astype(np.float32)
    rows = max(_ROWS, _ROWS_OF_EACH * dense.count, _ROWS_FOR_EACH * unknowns)
    rows = min(rows, _MOST_NUMBERS // (groups * unknowns))
    parts = []
    for x, other, wanted in _drawn(layer, rows // dense.count + 1, dense, slim):
        if wanted.shape != (x.shape[1], groups * outputs):
            return "its outputs lie at other places"
        shape = x.shape[1], groups, outputs
        now = (x @ matrix).transpose(1, 0, 2) + (layer.offset + other).reshape(shape)
        goal = np.where(alive.reshape(groups, outputs), wanted.reshape(shape), now)
        ones = np.ones((groups, x.shape[1], int(layer.fixed is None)))
        both = (np.asarray(y.transpose(1, 0, 2), np.float32) for y in (now, goal))
        parts.append(_Part(np.concatenate([x, ones], 2).astype(np.float32), *both))
    return parts


def _drawn(layer: Layer, rows: int, dense: Walk, slim: Walk) -> Iterator[tuple[Array, Array, Array]]:
    """Of each feed: inputs, what is added to the outputs, and what the original gave, at some places."""
    rng = np.random.default_rng(0)
    names = [layer.data] if layer.other is None else [layer.data, layer.other]
    for (whole,), (data, *others) in zip(dense.read([layer.target]), slim.read(names), strict=True):
        extents = np.moveaxis(whole, layer.axis, -1).shape[:-1]
        total = math.prod(extents)
        places = np.sort(rng.choice(total, min(rows, total), replace=False))
        wanted = outputs_at(layer, whole, places)[:, layer.kept]
        other = outputs_at(layer, others[0], places) if others else np.zeros_like(wanted)
        yield inputs_at(layer, data, extents, places), other, wanted
