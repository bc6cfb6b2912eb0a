"""Kernels that sample between places: Resize and Upsample in all their modes, GridSample.

Resampling is linear and separable: along each axis every output is a weighted sum of a few inputs. Where
torch has an operator for exactly that, it is taken; else the weights are a matrix for each axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_mdp.training.kernels.registry import Call, floats, integers, kernel, of_sizes

__all__: list[str] = []

_Array = npt.NDArray[np.floating[Any]]

_SMOOTH = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear"}
_COORDINATES = frozenset(
    (
        "align_corners asymmetric half_pixel half_pixel_symmetric pytorch_half_pixel tf_crop_and_resize "
        "tf_half_pixel_for_nn"
    ).split()
)
_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


class _Axis(NamedTuple):
    """One axis from ``size`` to ``length``; a crop is the part from ``start`` to ``end`` of it.

    ONNX Runtime leaves an axis of scale 1 as it is, even in a crop.
    """

    size: int
    length: int
    scale: float
    start: float = 0.0
    end: float = 1.0

    @property
    def changes(self) -> bool:
        return self.length != self.size or self.scale != 1


class _Sampling(NamedTuple):
    """The attributes of a node that say where and how it samples."""

    kind: str
    coordinates: str
    nearest: str
    slope: float
    antialias: bool
    inside: bool


def _sampling(call: Call) -> _Sampling:
    """Older opsets leave most of them out."""
    new = call.opset >= 11
    return _Sampling(
        call.get("mode", "nearest").removeprefix("bi").removeprefix("tri"),
        call.get("coordinate_transformation_mode", "half_pixel" if new else "asymmetric"),
        call.get("nearest_mode", "round_prefer_floor") if new else "floor",
        call.get("cubic_coeff_a", -0.75),
        bool(call.get("antialias", 0)),
        bool(call.get("exclude_outside", 0)),
    )


_Table = Callable[[_Sampling, _Axis], npt.NDArray[Any]]


def _coordinates(how: _Sampling, axis: _Axis) -> _Array:
    """``float32[length]``: which place of the input, in pixels, each output looks at.

    In single precision, as ONNX Runtime computes it: rounding decides which neighbour is the nearest.
    """
    mode, size, length = how.coordinates, np.float32(axis.size), np.float32(axis.length)
    x, scale, half = np.arange(axis.length, dtype=np.float32), np.float32(axis.scale), np.float32(0.5)
    if length == 1 and mode in ("align_corners", "pytorch_half_pixel"):
        return x
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        return x * (size - 1) / (length - 1)
    if mode == "half_pixel_symmetric":
        return size / 2 * (1 - length / (scale * size)) + (x + half) / scale - half
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return (x + half) / scale - half
    if mode == "tf_half_pixel_for_nn":
        return (x + half) / scale
    start, end = np.float32(axis.start), np.float32(axis.end)  # tf_crop_and_resize
    if length == 1:
        return x + half * (start + end) * (size - 1)
    return start * (size - 1) + x * (end - start) * (size - 1) / (length - 1)


def _nearest(how: _Sampling, axis: _Axis) -> npt.NDArray[np.int64]:
    x = _coordinates(how, axis).astype(np.float64)
    rounded = {
        "ceil": np.ceil(x),
        "floor": np.floor(x),
        "round_prefer_ceil": np.floor(x + 0.5),
        "round_prefer_floor": np.ceil(x - 0.5),
    }[how.nearest]
    places: npt.NDArray[np.int64] = np.clip(rounded, 0, axis.size - 1).astype(np.int64)
    return places


def _taps(how: _Sampling, distance: _Array) -> _Array:
    """The weight of an input at a ``distance`` in pixels."""
    d = np.abs(distance)
    if how.kind != "cubic":
        return np.where(d < 1, 1 - d, 0.0)
    a = how.slope
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights: _Array = np.where(d <= 1, near, np.where(d < 2, far, 0))
    return weights


def _repeats(how: _Sampling, axis: _Axis) -> npt.NDArray[np.int64]:
    """How often the nearest sampling repeats each input; 0 if it does something else."""
    places = _nearest(how, axis)
    factor = len(places) // axis.size
    same = factor > 0 and np.array_equal(places, np.arange(len(places)) // factor)
    return np.asarray(factor * same)


def _outside(how: _Sampling, axis: _Axis) -> npt.NDArray[np.bool_]:
    """``bool[length]``: which outputs look at no place of the input."""
    places = _coordinates(how, axis)
    return np.asarray((places < 0) | (places > axis.size - 1))


def _weights(how: _Sampling, axis: _Axis) -> _Array:
    """``float64[length, size]``: the weight of every input in every output; the edge is repeated."""
    x = _coordinates(how, axis).astype(np.float64)
    shrink = min(1.0, axis.scale) if how.antialias else 1.0
    reach = (2 if how.kind == "cubic" else 1) / shrink
    places = np.floor(x - reach).astype(np.int64)[:, None] + np.arange(math.ceil(2 * reach) + 2)
    weights = _taps(how, (places - x[:, None]) * shrink)
    if how.inside:
        weights = np.where((places >= 0) & (places < axis.size), weights, 0)
    total = weights.sum(1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    matrix = np.zeros((axis.length, axis.size))
    rows = np.arange(axis.length)[:, None]
    np.add.at(matrix, (rows, np.clip(places, 0, axis.size - 1)), weights)
    return matrix


@of_sizes
def _numbers(table: _Table, how: tuple[Any, ...], axis: tuple[Any, ...]) -> Any:
    """A table in lists, of plain tuples: what tracing takes for constants."""
    return table(_Sampling(*how), _Axis(*axis)).tolist()


def _tensor(table: _Table, how: _Sampling, axis: _Axis) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(_numbers(table, tuple(how), tuple(axis)))
    return torch.from_numpy(table(how, axis))


def _resampled(call: Call, x: Tensor, axes: list[_Axis]) -> Tensor:
    how = _sampling(call)
    if how.coordinates not in _COORDINATES:
        raise call.unsupported(f"the coordinates {how.coordinates}")
    if how.kind != "nearest" and _as_in_torch(how, x, axes):
        aligned = how.coordinates == "align_corners"
        sizes = [axis.length for axis in axes[2:]]
        return F.interpolate(x, sizes, mode=_SMOOTH[how.kind, x.dim() - 2], align_corners=aligned)
    for number, axis in enumerate(axes):
        if not axis.changes:
            continue
        if how.kind == "nearest":
            factor = _numbers(_repeats, tuple(how), tuple(axis))
            if factor:
                x = x.repeat_interleave(factor, number)
            else:
                x = x.index_select(number, _tensor(_nearest, how, axis).to(x.device))
        else:
            weights = _tensor(_weights, how, axis).to(x)
            x = torch.tensordot(x, weights, dims=([number], [1])).movedim(-1, number)
    if how.coordinates != "tf_crop_and_resize":
        return x
    return _filled(x, how, axes, call.get("extrapolation_value", 0.0))


def _filled(x: Tensor, how: _Sampling, axes: list[_Axis], value: float) -> Tensor:
    """Set what a crop reads outside of its input."""
    for number, axis in ((number, axis) for number, axis in enumerate(axes) if axis.changes):
        shape = [-1 if k == number else 1 for k in range(x.dim())]
        x = x.masked_fill(_tensor(_outside, how, axis).to(x.device).reshape(shape), value)
    return x


def _as_in_torch(how: _Sampling, x: Tensor, axes: list[_Axis]) -> bool:
    """Whether ``F.interpolate`` computes the same; it takes the ratio of the sizes for the scale."""
    flat = how.coordinates == "pytorch_half_pixel" and any(axis.length == 1 for axis in axes[2:])
    return (
        how.kind == "linear"
        and how.coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners")
        and not (how.antialias or how.inside or flat)
        and all(abs(axis.length / axis.size - axis.scale) < 1e-6 for axis in axes)
        and (how.kind, x.dim() - 2) in _SMOOTH
        and not any(axis.changes for axis in axes[:2])
    )


@kernel("Resize", host=(1, 2, 3))
def _resize(call: Call, x: Tensor, *operands: Tensor | None) -> Tensor:
    """``X, scales`` in opset 10, ``X, roi, scales, sizes`` since."""
    given = (None, operands[0], None) if call.opset < 11 else (*operands, None, None, None)[:3]
    roi, scales, sizes = given
    numbers = [axis % x.dim() for axis in call.get("axes") or range(x.dim())]
    before = [x.shape[number] for number in numbers]
    if sizes is not None and sizes.numel():
        lengths, factors = _fitted(call, before, integers(sizes))
    else:
        assert scales is not None
        factors = floats(scales)
        lengths = [math.floor(size * factor) for size, factor in zip(before, factors, strict=True)]
    crop = _sampling(call).coordinates == "tf_crop_and_resize" and roi is not None
    corners = floats(roi) if crop and roi is not None else [0.0] * len(numbers) + [1.0] * len(numbers)
    axes = [_Axis(size, size, 1.0) for size in x.shape]
    for k, number in enumerate(numbers):
        axes[number] = _Axis(before[k], lengths[k], factors[k], corners[k], corners[k + len(numbers)])
    return _resampled(call, x, axes)


def _fitted(call: Call, before: list[int], sizes: list[int]) -> tuple[list[int], list[float]]:
    """The sizes to reach and their scales, under the policy of an aspect ratio."""
    factors = [size / old for size, old in zip(sizes, before, strict=True)]
    policy = call.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return sizes, factors
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [math.floor(old * factor + 0.5) for old in before], [factor] * len(before)


@kernel("Upsample", host=(1,))
def _upsample(call: Call, x: Tensor, scales: Tensor | None = None) -> Tensor:
    factors = floats(scales) if scales is not None else list(call.get("scales"))
    pairs = zip(x.shape, factors, strict=True)
    return _resampled(call, x, [_Axis(size, math.floor(size * factor), factor) for size, factor in pairs])


@kernel("GridSample")
def _grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = call.get("mode", "linear")
    return F.grid_sample(
        x,
        grid.to(x.dtype),
        mode=_GRID_MODES.get(mode, mode),
        padding_mode=call.get("padding_mode", "zeros"),
        align_corners=bool(call.get("align_corners", 0)),
    )
