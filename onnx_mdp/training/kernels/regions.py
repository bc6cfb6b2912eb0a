"""Kernels that pool regions of a map: RoiAlign and MaxRoiPool. Gradients reach the map, not the regions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onnx_mdp.training.kernels.registry import Call, floats, integers, kernel

__all__: list[str] = []


@kernel("RoiAlign", host=(1, 2))
def _roi_align(call: Call, x: Tensor, rois: Tensor, batch: Tensor) -> Tensor:
    """Means (or maxima) of bilinear samples in a grid of bins."""
    half = (
        call.get("coordinate_transformation_mode", "half_pixel" if call.opset >= 16 else "") == "half_pixel"
    )
    height, width = call.get("output_height", 1), call.get("output_width", 1)
    scale = call.get("spatial_scale", 1.0)
    pooled = [x.new_zeros(0, x.shape[1], height, width)]
    for number, corners in zip(integers(batch), rois.tolist(), strict=True):
        left, top, right, bottom = (float(corner) * scale - 0.5 * half for corner in corners)
        size = [bottom - top, right - left] if half else [max(bottom - top, 1.0), max(right - left, 1.0)]
        ys = _samples(call, top, size[0], height, x)
        xs = _samples(call, left, size[1], width, x)
        pooled.append(_pooled(call, x[number], ys, xs).unsqueeze(0))
    return torch.cat(pooled)


def _samples(call: Call, start: float, size: float, bins: int, like: Tensor) -> Tensor:
    """``[bins, samples]``: where each bin of an axis is sampled, in pixels."""
    count = call.get("sampling_ratio", 0) or max(1, math.ceil(size / bins))
    inner = (torch.arange(count, device=like.device) + 0.5) / count
    outer = torch.arange(bins, device=like.device).reshape(-1, 1)
    return (start + (outer + inner) * (size / bins)).to(like.dtype)


def _pooled(call: Call, image: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """``[channels, bins, bins]`` of an image ``[channels, height, width]``."""
    rows, columns = (
        _weights(places.reshape(-1), extent) for places, extent in zip((ys, xs), image.shape[1:], strict=True)
    )
    corners = [image[:, a][:, :, b] * u.reshape(-1, 1) * v for a, u in rows for b, v in columns]
    maximum = call.get("mode", "avg") == "max"
    # The maximum is taken over the four weighted corners of a sample, as ONNX Runtime does.
    samples = torch.stack(corners).amax(0) if maximum else torch.stack(corners).sum(0)
    grid = samples.reshape(image.shape[0], *ys.shape, *xs.shape)
    return grid.amax((2, 4)) if maximum else grid.mean((2, 4))


def _weights(places: Tensor, extent: int) -> list[tuple[Tensor, Tensor]]:
    """The pixels on both sides of each place and their weights; 0 farther than one pixel outside."""
    inside = (places >= -1) & (places <= extent)
    place = places.clamp(0, extent - 1)
    low = place.floor()
    high = (low + 1).clamp(max=extent - 1)
    part = place - low
    return [
        (low.to(torch.int64), torch.where(inside, 1 - part, 0)),
        (high.to(torch.int64), torch.where(inside, part, 0)),
    ]


@kernel("MaxRoiPool", host=(1,))
def _max_roi_pool(call: Call, x: Tensor, rois: Tensor) -> Tensor:
    """Maxima over bins of whole pixels; 0 where a bin is empty."""
    height, width = call.get("pooled_shape")
    scale = call.get("spatial_scale", 1.0)
    pooled = [x.new_zeros(0, x.shape[1], height, width)]
    for row in rois:
        number, *corners = floats(row)
        left, top, right, bottom = (math.floor(corner * scale + 0.5) for corner in corners)
        image = x[int(number)]
        lines = _bins(top, bottom, height, image.shape[1])
        columns = _bins(left, right, width, image.shape[2])
        cells = [
            image[:, a:b, c:d].amax((1, 2)) if a < b and c < d else image.new_zeros(image.shape[0])
            for a, b in lines
            for c, d in columns
        ]
        pooled.append(torch.stack(cells, 1).reshape(1, -1, height, width))
    return torch.cat(pooled)


def _bins(first: int, last: int, count: int, extent: int) -> list[tuple[int, int]]:
    size = max(last - first + 1, 1) / count
    return [
        (
            min(max(math.floor(k * size) + first, 0), extent),
            min(max(math.ceil((k + 1) * size) + first, 0), extent),
        )
        for k in range(count)
    ]
