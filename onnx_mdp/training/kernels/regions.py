"""Kernels of regions: what RoiAlign and MaxRoiPool pool from a map, and which boxes NonMaxSuppression keeps.

Gradients reach the map, not the regions.
"""

from __future__ import annotations

import itertools
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


@kernel("NonMaxSuppression", host=(2, 3, 4))
def _non_max_suppression(
    call: Call,
    boxes: Tensor,
    scores: Tensor,
    most: Tensor | None = None,
    overlap: Tensor | None = None,
    least: Tensor | None = None,
) -> Tensor:
    """``int64[kept, 3]``: image, class and box, the best first, without those that overlap a better one."""
    count = int(most) if most is not None else 0
    limit = float(overlap) if overlap is not None else 0.0
    corners, values = _corners(call, boxes.detach().cpu()), scores.detach().cpu()
    kept: list[tuple[int, int, int]] = []
    for image, label in itertools.product(range(values.shape[0]), range(values.shape[1])):
        order = torch.sort(values[image, label], descending=True, stable=True).indices
        if least is not None:
            order = order[values[image, label, order] > float(least)]
        chosen: list[int] = []
        while len(chosen) < count and order.numel():
            chosen.append(int(order[0]))
            order = order[1:][_overlaps(corners[image], chosen[-1], order[1:]) <= limit]
        kept += [(image, label, box) for box in chosen]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _corners(call: Call, boxes: Tensor) -> Tensor:
    """``[..., 4]``: the lower and the upper corner of each box."""
    if call.get("center_point_box", 0):
        center, half = boxes[..., :2], boxes[..., 2:] / 2
        return torch.cat([center - half, center + half], -1)
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _overlaps(corners: Tensor, box: int, others: Tensor) -> Tensor:
    """Intersection over union of one box with others."""
    low = torch.maximum(corners[box, :2], corners[others, :2])
    high = torch.minimum(corners[box, 2:], corners[others, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = (corners[..., 2:] - corners[..., :2]).prod(-1)
    union = areas[box] + areas[others] - common
    return torch.where(union > 0, common / union, 0)
