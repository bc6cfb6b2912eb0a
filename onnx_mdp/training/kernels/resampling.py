"""Kernels that sample between places: Resize and Upsample in all their modes, GridSample, RoiAlign.

Resampling is linear and separable: along each axis every output is a weighted sum of a few inputs. Where
torch has an operator for exactly that, it is taken; else the weights are a matrix for each axis.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_mdp.training.kernels.registry import Call, floats, integers, kernel

__all__: list[str] = []

_Array = npt.NDArray[np.float64]

_SMOOTH = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear"}
_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def _coordinates(call: Call, size: int, length: int, scale: float) -> _Array:
    """``float64[length]``: which place of the input, in pixels, each output looks at."""
    mode = call.get("coordinate_transformation_mode", "half_pixel" if call.opset >= 11 else "asymmetric")
    x = np.arange(length, dtype=np.float64)
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        return x * (size - 1) / (length - 1) if length > 1 else x * 0
    if mode == "half_pixel_symmetric":
        exact = scale * size
        return (x + 0.5) / scale - 0.5 + size / 2 * (1 - length / exact)
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and length > 1):
        return (x + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return x * 0
    if mode == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    raise call.unsupported(f"the coordinates {mode}")


def _nearest(call: Call, size: int, length: int, scale: float) -> npt.NDArray[np.int64]:
    x = _coordinates(call, size, length, scale)
    mode = call.get("nearest_mode", "round_prefer_floor") if call.opset >= 11 else "floor"
    rounded = {
        "ceil": np.ceil(x),
        "floor": np.floor(x),
        "round_prefer_ceil": np.floor(x + 0.5),
        "round_prefer_floor": np.ceil(x - 0.5),
    }[mode]
    places: npt.NDArray[np.int64] = np.clip(rounded, 0, size - 1).astype(np.int64)
    return places


def _taps(call: Call, distance: _Array) -> _Array:
    """The weight of an input at a ``distance`` in pixels."""
    d = np.abs(distance)
    if call.get("mode") != "cubic":
        return np.where(d < 1, 1 - d, 0.0)
    a = call.get("cubic_coeff_a", -0.75)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights: _Array = np.where(d <= 1, near, np.where(d < 2, far, 0))
    return weights


def _matrix(call: Call, size: int, length: int, scale: float) -> _Array:
    """``float64[length, size]``: the weight of every input in every output; the edge is repeated."""
    x = _coordinates(call, size, length, scale)
    shrink = min(1.0, scale) if call.get("antialias", 0) else 1.0
    reach = (2 if call.get("mode") == "cubic" else 1) / shrink
    low = np.floor(x - reach).astype(np.int64)
    places = low[:, None] + np.arange(math.ceil(2 * reach) + 2)
    weights = _taps(call, (places - x[:, None]) * shrink)
    inside = (places >= 0) & (places < size)
    if call.get("exclude_outside", 0) or call.get("antialias", 0):
        weights = np.where(inside, weights, 0)
    weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((length, size))
    np.add.at(matrix, (np.arange(length)[:, None], np.clip(places, 0, size - 1)), weights)
    return matrix


def _resampled(call: Call, x: Tensor, sizes: list[int], scales: list[float]) -> Tensor:
    mode = call.get("mode", "nearest").removeprefix("bi").removeprefix("tri")
    changed = [axis for axis, size in enumerate(sizes) if size != x.shape[axis] or scales[axis] != 1]
    if mode == "nearest":
        for axis in changed:
            x = _picked(x, axis, _nearest(call, x.shape[axis], sizes[axis], scales[axis]))
        return x
    if _as_in_torch(call, x, mode, sizes, scales):
        aligned = call.get("coordinate_transformation_mode") == "align_corners"
        return F.interpolate(x, sizes[2:], mode=_SMOOTH[mode, x.dim() - 2], align_corners=aligned)
    for axis in changed:
        weights = torch.from_numpy(_matrix(call, x.shape[axis], sizes[axis], scales[axis])).to(x)
        x = torch.tensordot(x, weights, dims=([axis], [1])).movedim(-1, axis)
    return x


def _picked(x: Tensor, axis: int, places: npt.NDArray[np.int64]) -> Tensor:
    factor = len(places) // x.shape[axis]
    if factor and np.array_equal(places, np.arange(len(places)) // factor):
        return x.repeat_interleave(factor, axis)
    return x.index_select(axis, torch.from_numpy(places).to(x.device))


def _as_in_torch(call: Call, x: Tensor, mode: str, sizes: list[int], scales: list[float]) -> bool:
    """Whether ``F.interpolate`` computes the same; it takes the ratio of the sizes for the scale."""
    coordinates = call.get("coordinate_transformation_mode", "half_pixel" if call.opset >= 11 else "")
    known = ("half_pixel", "pytorch_half_pixel", "align_corners")
    ratios = [abs(size / x.shape[axis] - scales[axis]) < 1e-6 for axis, size in enumerate(sizes)]
    flat = coordinates == "pytorch_half_pixel" and 1 in sizes[2:]
    plain = not call.get("antialias", 0) and not call.get("exclude_outside", 0) and not flat
    return (
        mode == "linear"
        and coordinates in known
        and plain
        and all(ratios)
        and (mode, x.dim() - 2) in _SMOOTH
        and list(x.shape[:2]) == sizes[:2]
    )


@kernel("Resize", host=(1, 2, 3))
def _resize(call: Call, x: Tensor, *operands: Tensor | None) -> Tensor:
    """``X, scales`` in opset 10, ``X, roi, scales, sizes`` since."""
    given = (None, operands[0], None) if call.opset < 11 else (*operands, None, None, None)[:3]
    scales, sizes = given[1], given[2]
    axes = list(call.get("axes") or range(x.dim()))
    if sizes is not None and sizes.numel():
        lengths, factors = _fitted(call, [x.shape[axis] for axis in axes], integers(sizes))
    else:
        assert scales is not None
        factors = floats(scales)
        lengths = [math.floor(x.shape[axis] * factor) for axis, factor in zip(axes, factors, strict=True)]
    all_sizes, all_factors = list(x.shape), [1.0] * x.dim()
    for axis, length, factor in zip(axes, lengths, factors, strict=True):
        all_sizes[axis], all_factors[axis] = length, factor
    return _resampled(call, x, all_sizes, all_factors)


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
    sizes = [math.floor(size * factor) for size, factor in zip(x.shape, factors, strict=True)]
    return _resampled(call, x, sizes, factors)


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
