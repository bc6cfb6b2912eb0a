"""Kernels of pooling layers, with padding of any form, ceil mode and dilation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_mdp.training.kernels.convolutions import pad_space, padding
from onnx_mdp.training.kernels.registry import Call, kernel

__all__: list[str] = []

_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_MEAN_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_CONV = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True, slots=True)
class _Window:
    """``pads`` is what the file pads with, ``ceil`` what its ceil mode adds behind that."""

    extents: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[tuple[int, int]]
    ceil: list[int]

    @property
    def all_pads(self) -> list[tuple[int, int]]:
        return [(low, high + more) for (low, high), more in zip(self.pads, self.ceil, strict=True)]


def _window(call: Call, x: Tensor) -> _Window:
    extents = list(call.get("kernel_shape"))
    strides = list(call.get("strides") or [1] * len(extents))
    dilations = list(call.get("dilations") or [1] * len(extents))
    if not 1 <= len(extents) <= 3:
        raise call.unsupported(f"{len(extents)} spatial axes")
    pads = padding(call, x.shape[2:], extents, strides, dilations)
    ceil = [0] * len(extents)
    if call.get("ceil_mode", 0):
        geometry = zip(x.shape[2:], extents, strides, dilations, pads, strict=True)
        ceil = [_missing(*axis) for axis in geometry]
    return _Window(extents, strides, dilations, pads, ceil)


def _missing(size: int, extent: int, stride: int, dilation: int, pads: tuple[int, int]) -> int:
    """What the last window of an axis lacks; a window that would begin behind the input is left out."""
    low, high = pads
    reach = (extent - 1) * dilation + 1
    windows = -(-(size + low + high - reach) // stride) + 1
    if (windows - 1) * stride >= size + low:
        windows -= 1
    return max(0, (windows - 1) * stride + reach - (size + low + high))


@kernel("MaxPool")
def _max_pool(call: Call, x: Tensor) -> object:
    window = _window(call, x)
    pads = window.all_pads
    pool = _MAX_POOL[len(pads) - 1]
    least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    padded = pad_space(x, pads, least)
    if call.outputs == 1:
        return pool(padded, window.extents, window.strides, 0, window.dilations)
    if call.get("storage_order", 0):
        raise call.unsupported("places in column order")
    y, places = pool(padded, window.extents, window.strides, 0, window.dilations, return_indices=True)
    return y, _places(places, x.shape, padded.shape, pads)


def _places(
    places: Tensor, shape: Sequence[int], padded: Sequence[int], pads: Sequence[tuple[int, int]]
) -> Tensor:
    """Places in the whole tensor ``shape`` for places in the spatial axes of the padded one."""
    found = torch.zeros_like(places)
    step = 1
    for axis in range(len(shape) - 1, 1, -1):
        found += (places % padded[axis] - pads[axis - 2][0]) * step
        places = torch.div(places, padded[axis], rounding_mode="floor")
        step *= shape[axis]
    lines = torch.arange(shape[0] * shape[1], device=found.device) * step
    return found + lines.reshape(shape[0], shape[1], *[1] * (len(shape) - 2))


def _window_mean(x: Tensor, window: _Window) -> Tensor:
    """Means over the windows of ``x``, which is padded already."""
    rank = len(window.extents)
    if all(dilation == 1 for dilation in window.dilations):
        y: Tensor = _MEAN_POOL[rank - 1](x, window.extents, window.strides)
        return y
    ones = torch.full((1, 1, *window.extents), 1 / math.prod(window.extents), dtype=x.dtype, device=x.device)
    lines = x.reshape(-1, 1, *x.shape[2:])
    y = _CONV[rank - 1](lines, ones, None, window.strides, 0, window.dilations)
    return y.reshape(*x.shape[:2], *y.shape[2:])


@kernel("AveragePool")
def _average_pool(call: Call, x: Tensor) -> Tensor:
    window = _window(call, x)
    y = _window_mean(pad_space(x, window.all_pads), window)
    counted = torch.ones_like(x[:1, :1])
    if call.get("count_include_pad", 0):
        counted = pad_space(counted, window.pads, 1.0)
        pads = [(0, more) for more in window.ceil]
    else:
        pads = window.all_pads
    return y / _window_mean(pad_space(counted, pads), window) if any(map(any, pads)) else y


@kernel("LpPool")
def _lp_pool(call: Call, x: Tensor) -> Tensor:
    window, power = _window(call, x), float(call.get("p", 2))
    sums = _window_mean(pad_space(x.abs().pow(power), window.all_pads), window) * math.prod(window.extents)
    return sums.pow(1 / power)


def _space(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


@kernel("GlobalAveragePool")
def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return x.mean(_space(x), keepdim=True)


@kernel("GlobalMaxPool")
def _global_max_pool(call: Call, x: Tensor) -> Tensor:
    return x.amax(_space(x), keepdim=True)


@kernel("GlobalLpPool")
def _global_lp_pool(call: Call, x: Tensor) -> Tensor:
    y: Tensor = torch.linalg.vector_norm(x, call.get("p", 2), _space(x), keepdim=True)
    return y
