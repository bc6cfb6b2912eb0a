"""Kernels that move elements and compute nothing: shapes, axes, slices, padding, blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_mdp.training.kernels.elementwise import DTYPES
from onnx_mdp.training.kernels.registry import Call, axes_of, integers, kernel, of_sizes

__all__: list[str] = []

_PAD_MODES = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


@kernel("Shape")
def _shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[call.get("start", 0) : call.get("end")], dtype=torch.int64)


@kernel("Size")
def _size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@kernel("Reshape", host=(1,))
def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    sizes = integers(shape)
    if not call.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@kernel("Flatten")
def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@kernel("Transpose")
def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.get("perm") or list(range(x.dim()))[::-1])


@kernel("Squeeze", host=(1,))
def _squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = axes_of(call, axes)
    return x.squeeze() if given is None else x.squeeze(tuple(given))


@kernel("Unsqueeze", host=(1,))
def _unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = axes_of(call, axes) or []
    rank = x.dim() + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


@kernel("Concat")
def _concat(call: Call, *operands: Tensor) -> Tensor:
    return torch.cat(operands, call.get("axis", 1))


@kernel("Split", host=(1,))
def _split(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = call.get("axis", 0)
    given = integers(sizes) if sizes is not None else call.get("split")
    if given is None:
        parts = call.get("num_outputs", call.outputs)
        each = -(-x.shape[axis] // parts)
        given = [each] * (parts - 1) + [x.shape[axis] - each * (parts - 1)]
    return torch.split(x, list(given), axis)


@kernel("Slice", host=(1, 2, 3, 4))
def _slice(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = integers(starts) if starts is not None else call.get("starts")
    last = integers(ends) if ends is not None else call.get("ends")
    along = axes_of(call, axes)
    strides = integers(steps) if steps is not None else [1] * len(first)
    for start, end, axis, step in zip(
        first, last, along if along is not None else range(len(first)), strides, strict=True
    ):
        x = _sliced(x, axis % x.dim(), start, end, step)
    return x


def _sliced(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    size = x.shape[axis]
    if step == 1:
        low = min(max(start + size if start < 0 else start, 0), size)
        high = min(max(end + size if end < 0 else end, low), size)
        return x if (low, high) == (0, size) else x.narrow(axis, low, high - low)
    if step > 1:
        return x[(slice(None),) * axis + (slice(start, end, step),)]
    places = list(range(size))[slice(start, None if end < -size else end, step)]
    return x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))


@kernel("Expand", host=(1,))
def _expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(np.broadcast_shapes(x.shape, integers(shape)))


@kernel("Tile", host=(1,))
def _tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(integers(repeats))


@kernel("Pad", host=(1, 2, 3))
def _pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    amounts = integers(pads) if pads is not None else list(call.get("pads"))
    along = integers(axes) if axes is not None else list(range(x.dim()))
    pairs = [(0, 0)] * x.dim()
    for axis, low, high in zip(along, amounts[: len(along)], amounts[len(along) :], strict=True):
        pairs[axis % x.dim()] = low, high
    mode = call.get("mode", "constant")
    if mode == "constant":
        fill = value.item() if value is not None and value.numel() else call.get("value", 0.0)
        return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=fill)
    if mode not in _PAD_MODES:
        raise call.unsupported(f"the mode {mode}")
    for axis, (low, high) in enumerate(pairs):
        if low or high:
            places = _padded(x.shape[axis], low, high, mode)
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x


@of_sizes
def _padded(size: int, low: int, high: int, mode: Any) -> list[int]:
    """Which place of an axis stands at each place of the padded one."""
    kept = np.arange(size)[max(0, -low) : size - max(0, -high)]
    return list(map(int, np.pad(kept, (max(0, low), max(0, high)), mode=mode)))


@kernel("CenterCropPad", host=(1,))
def _center_crop_pad(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    given = call.get("axes")
    for axis, size in zip(given if given is not None else range(x.dim()), integers(shape), strict=True):
        surplus = x.shape[axis] - size
        if surplus > 0:
            x = x.narrow(axis, surplus // 2, size)
        elif surplus < 0:
            low = -surplus // 2
            behind = [0, 0] * (x.dim() - 1 - axis % x.dim())
            x = F.pad(x, [*behind, low, -surplus - low])
    return x


@kernel("ConstantOfShape", host=(0,))
def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    value = call.get("value")
    if value is None:
        return torch.zeros(integers(shape))
    return torch.full(integers(shape), value.item(), dtype=value.dtype)


@kernel("Range", host=(0, 1, 2))
def _range(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@kernel("EyeLike")
def _eye_like(call: Call, x: Tensor) -> Tensor:
    dtype = DTYPES.get(call.get("dtype"), x.dtype)
    ones = torch.ones(x.shape, dtype=dtype, device=x.device)
    diagonal = call.get("k", 0)
    return torch.tril(torch.triu(ones, diagonal), diagonal)


@kernel("Trilu", host=(1,))
def _trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    cut = torch.triu if call.get("upper", 1) else torch.tril
    return cut(x, 0 if k is None else int(k))


@kernel("DepthToSpace")
def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    block = call.get("blocksize")
    batch, channels, height, width = x.shape
    if call.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    y = x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(batch, channels // block**2, height * block, width * block)


@kernel("SpaceToDepth")
def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    block = call.get("blocksize")
    batch, channels, height, width = x.shape
    y = x.reshape(batch, channels, height // block, block, width // block, block)
    y = y.permute(0, 1, 3, 5, 2, 4) if call.get("mode", "DCR") == "CRD" else y.permute(0, 3, 5, 1, 2, 4)
    return y.reshape(batch, channels * block**2, height // block, width // block)


@kernel("Col2Im", host=(1, 2))
def _col2im(call: Call, x: Tensor, image: Tensor, block: Tensor) -> Tensor:
    sizes, extents = integers(image), integers(block)
    rank = len(sizes)
    pads = list(call.get("pads") or [0] * (2 * rank))
    if rank != 2:
        raise call.unsupported(f"{rank} spatial axes")
    padded = [size + pads[axis] + pads[axis + 2] for axis, size in enumerate(sizes)]
    dilations, strides = call.get("dilations") or [1, 1], call.get("strides") or [1, 1]
    y = F.fold(x, tuple(padded), tuple(extents), tuple(dilations), 0, tuple(strides))
    return y[:, :, pads[0] : pads[0] + sizes[0], pads[1] : pads[1] + sizes[1]]


@kernel("SplitToSequence", host=(1,))
def _split_to_sequence(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[list[Tensor]]:
    axis = call.get("axis", 0)
    if sizes is None:
        parts = list(torch.split(x, 1, axis))
        return ([part.squeeze(axis) for part in parts] if not call.get("keepdims", 1) else parts,)
    given = integers(sizes)
    return (list(torch.split(x, given[0] if sizes.dim() == 0 else given, axis)),)


@kernel("SequenceConstruct")
def _sequence_construct(call: Call, *operands: Tensor) -> tuple[list[Tensor]]:
    return (list(operands),)


@kernel("SequenceAt", host=(1,))
def _sequence_at(call: Call, sequence: list[Tensor], place: Tensor) -> Tensor:
    return sequence[int(place)]


@kernel("ConcatFromSequence")
def _concat_from_sequence(call: Call, sequence: list[Tensor]) -> Tensor:
    join = torch.stack if call.get("new_axis", 0) else torch.cat
    return join(sequence, call.get("axis"))
