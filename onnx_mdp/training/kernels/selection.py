"""Kernels that choose elements by place or by value: gather, scatter, sort, accumulate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onnx_mdp.training.kernels.registry import Call, integers, kernel

__all__: list[str] = []

_REDUCTIONS = {"add": "sum", "max": "amax", "min": "amin", "mul": "prod"}


def _from_zero(places: Tensor, size: int) -> Tensor:
    """Places as int64, those from the end counted from the beginning."""
    places = places.to(torch.int64)
    return torch.where(places < 0, places + size, places)


@kernel("Gather")
def _gather(call: Call, x: Tensor, places: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.dim()
    found = _from_zero(places, x.shape[axis])
    shape = (*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, found.reshape(-1)).reshape(shape)


@kernel("GatherElements")
def _gather_elements(call: Call, x: Tensor, places: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    return torch.gather(x, axis, _from_zero(places, x.shape[axis]))


def _lines(shape: tuple[int, ...], places: Tensor) -> Tensor:
    """``int64[n]``: which line of a tensor, flattened over its first axes, each row of ``places`` names."""
    sizes = shape[: places.shape[-1]]
    flat = torch.zeros(places.shape[:-1], dtype=torch.int64, device=places.device)
    for axis, size in enumerate(sizes):
        flat = flat * size + _from_zero(places[..., axis], size)
    return flat.reshape(-1)


@kernel("GatherND")
def _gather_nd(call: Call, x: Tensor, places: Tensor) -> Tensor:
    batches = call.get("batch_dims", 0)
    depth = places.shape[-1]
    shape = (*places.shape[:-1], *x.shape[batches + depth :])
    if batches:
        outer = math.prod(x.shape[:batches])
        x = x.reshape(outer, *x.shape[batches:])
        rows = places.reshape(outer, -1, depth)
        number = torch.arange(outer, device=places.device).reshape(-1, 1, 1).expand(-1, rows.shape[1], 1)
        places = torch.cat([number, rows.to(torch.int64)], -1)
        depth += 1
    lines = x.reshape(math.prod(x.shape[:depth]), -1)
    return lines.index_select(0, _lines(tuple(x.shape), places)).reshape(shape)


@kernel("ScatterND")
def _scatter_nd(call: Call, x: Tensor, places: Tensor, updates: Tensor) -> Tensor:
    depth, reduction = places.shape[-1], call.get("reduction", "none")
    lines = x.reshape(math.prod(x.shape[:depth]), -1)
    where = _lines(tuple(x.shape), places)
    values = updates.to(x.dtype).reshape(where.numel(), -1)
    if reduction == "none":
        return lines.index_copy(0, where, values).reshape(x.shape)
    spread = where.unsqueeze(1).expand_as(values)
    return lines.scatter_reduce(0, spread, values, _REDUCTIONS[reduction]).reshape(x.shape)


@kernel("ScatterElements", "Scatter")
def _scatter_elements(call: Call, x: Tensor, places: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = call.get("axis", 0), call.get("reduction", "none")
    where, updates = _from_zero(places, x.shape[axis]), updates.to(x.dtype)
    if reduction == "none":
        return x.scatter(axis, where, updates)
    return x.scatter_reduce(axis, where, updates, _REDUCTIONS[reduction])


@kernel("TensorScatter")
def _tensor_scatter(call: Call, cache: Tensor, update: Tensor, first: Tensor | None = None) -> Tensor:
    axis = call.get("axis", -2) % cache.dim()
    length, size = update.shape[axis], cache.shape[axis]
    begin = torch.zeros(cache.shape[0], dtype=torch.int64, device=cache.device) if first is None else first
    places = begin.to(torch.int64).reshape(-1, 1) + torch.arange(length, device=cache.device)
    if call.get("mode", "linear") == "circular":
        places = places % size
    shape = [1] * cache.dim()
    shape[0], shape[axis] = places.shape
    return cache.scatter(axis, places.reshape(shape).expand(update.shape), update.to(cache.dtype))


@kernel("Compress")
def _compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    axis = call.get("axis")
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


@kernel("OneHot", host=(1,))
def _one_hot(call: Call, places: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    size = integers(depth)[0]
    found = places.to(torch.int64)
    rank = places.dim() + 1
    axis = call.get("axis", -1) % rank
    shape = [1] * rank
    shape[axis] = size
    numbers = torch.arange(size, device=places.device).reshape(shape)
    hot = torch.where(found < 0, found + size, found).unsqueeze(axis) == numbers
    return torch.where(hot, values[1], values[0])


@kernel("NonZero")
def _non_zero(call: Call, x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


@kernel("ReverseSequence")
def _reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    time, batch = call.get("time_axis", 0), call.get("batch_axis", 1)
    steps = torch.arange(x.shape[time], device=x.device).unsqueeze(1)
    size = lengths.to(torch.int64).unsqueeze(0)
    places = torch.where(steps < size, size - 1 - steps, steps)
    shape = [1] * x.dim()
    shape[time], shape[batch] = places.shape
    places = places if time < batch else places.t()
    return torch.gather(x, time, places.reshape(shape).expand(x.shape))


@kernel("ArgMax", "ArgMin")
def _arg(call: Call, x: Tensor) -> Tensor:
    axis, keep = call.get("axis", 0), bool(call.get("keepdims", 1))
    search = torch.argmax if call.operator == "ArgMax" else torch.argmin
    if call.get("select_last_index", 0):
        found: Tensor = x.shape[axis] - 1 - search(x.flip(axis), axis, keep)
        return found
    found = search(x, axis, keep)
    return found


@kernel("TopK", host=(1,))
def _top_k(call: Call, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of equal values the one that stands first, as ONNX has it; ``torch.topk`` promises nothing."""
    count, axis = integers(k)[0] if k is not None else call.get("k"), call.get("axis", -1)
    values, places = torch.sort(x, stable=True, dim=axis, descending=bool(call.get("largest", 1)))
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@kernel("CumSum", "CumProd", host=(1,))
def _cumulative(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    along = int(axis)
    total, neutral = (torch.cumsum, 0) if call.operator == "CumSum" else (torch.cumprod, 1)
    x = x.flip(along) if call.get("reverse", 0) else x
    if call.get("exclusive", 0):
        first = torch.full_like(x.narrow(along, 0, 1), neutral)
        x = torch.cat([first, x.narrow(along, 0, x.shape[along] - 1)], along)
    y = total(x, along).to(x.dtype)
    return y.flip(along) if call.get("reverse", 0) else y
