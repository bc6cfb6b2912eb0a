"""Elimination order and buckets: how the tables of a factor graph are summed and maximised, bucket by bucket.

Arrays have one leading axis beside those of their variables: the rows of a pass, one for each vector of
multipliers. Buckets too large for the cache are summed and reduced one option at a time and never stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_BUCKET",
    "Bucket",
    "Floats",
    "TooWideError",
    "View",
    "at_states",
    "blocks",
    "build_buckets",
    "centre",
    "elimination",
    "gather",
    "kept_shape",
    "largest",
    "scatter",
]

Floats = NDArray[np.float64]

MAX_BUCKET = 4_000_000  # entries that one pass may visit in one bucket: about 30 ms
_WHOLE = 1 << 15  # entries that are summed at once, about what a cache holds
_WIDE = 1 << 12  # entries from which an option of a larger bucket is summed alone, into one buffer


class TooWideError(Exception):
    """A bucket would have more than `MAX_BUCKET` entries: the graph's treewidth is too large."""

    def __init__(self, entries: float) -> None:
        """Keep the size that was refused."""
        super().__init__(f"a bucket of {entries:.1e} entries")
        self.entries = entries


@dataclass(frozen=True, slots=True)
class View:
    """How an array over some variables lies in a bucket: transpose, then one new axis for each other.

    ``others`` are those axes, counted with that of the rows.
    """

    order: tuple[int, ...]
    expand: tuple[slice | None, ...]
    others: tuple[int, ...]

    def of(self, array: Floats) -> Floats:
        return array.transpose(self.order)[self.expand]

    def back(self, array: Floats) -> Floats:
        """From the bucket's axis order, the other axes gone, to the array's own."""
        return array.transpose(np.argsort(self.order))


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is summed when a variable is eliminated; axis 0 of ``scope`` is the variable, the rest stays.

    ``children`` are indices of earlier buckets whose message arrives here, each with its place.
    """

    scope: tuple[int, ...]
    shape: tuple[int, ...]
    tables: tuple[tuple[int, View], ...]
    children: tuple[tuple[int, View], ...]

    @property
    def entries(self) -> int:
        """Tuples of the scope."""
        return math.prod(self.shape)


def kept_shape(shape: Sequence[int], view: View) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape, 1) if axis not in view.others)


def gather(into: Floats, block: Floats, first: int, view: View) -> None:
    """Take the maximum of a block over the axes that a child does not have."""
    largest = block.max(axis=view.others) if view.others else block
    if 1 in view.others:
        np.maximum(into, largest, out=into)
    else:
        into[:, first : first + block.shape[1]] = largest


def at_states(parts: Sequence[Floats], states: tuple[NDArray[np.intp], ...]) -> Floats:
    """The sum of the parts at some states of the axes behind axis 1, float64[rows, options, states]."""
    total = np.zeros(())
    for part in sorted(_merged(parts), key=np.size):
        shared = (size == 1 for size in part.shape[2:])
        places = (np.zeros_like(s) if one else s for s, one in zip(states, shared, strict=True))
        at: tuple[Any, ...] = (slice(None), slice(None), *places)
        total = total + part[at]
    return total


def scatter(into: Floats, block: Floats, states: tuple[NDArray[np.intp], ...], view: View) -> None:
    """As `gather` of a block whose last axis are the ``states``."""
    kept = [axis for axis in range(2, 2 + len(states)) if axis not in view.others]
    if 1 in view.others:
        block = block.max(axis=1)
    if not kept:
        np.maximum(into, block.max(axis=-1), out=into)
        return
    shape = into.shape[-len(kept) :]
    flat = np.ravel_multi_index([states[axis - 2] for axis in kept], shape)
    order = np.argsort(flat, kind="stable")
    starts = np.flatnonzero(np.diff(flat[order], prepend=-1))
    at: tuple[Any, ...] = (..., *np.unravel_index(flat[order[starts]], shape))
    into[at] = np.maximum.reduceat(block[..., order], starts, axis=-1)


def _total(parts: Sequence[Floats], shape: tuple[int, ...]) -> Floats:
    ordered = sorted(parts, key=np.size)
    total = ordered[0] if ordered else np.zeros(())
    for part in ordered[1:]:
        total = total + part
    return total if total.shape == shape else np.broadcast_to(total, shape)


def largest(parts: Sequence[Floats], rows: int, shape: tuple[int, ...]) -> Floats:
    """The maximum over axis 1 of the sum of the parts, float64[rows, shape[1:]]."""
    if rows * math.prod(shape) <= _WHOLE:
        top: Floats = _total(parts, (rows, *shape)).max(axis=1)
        return top
    parts = _merged(parts)
    still = [part for part in parts if part.shape[1] == 1]
    found = np.full((rows, *shape[1:]), -np.inf)
    for _, block in blocks([part for part in parts if part.shape[1] > 1], rows, shape):
        np.maximum(found, block[:, 0] if block.shape[1] == 1 else block.max(axis=1), out=found)
    for part in still:
        found += part[:, 0]
    return found


def blocks(parts: Sequence[Floats], rows: int, shape: tuple[int, ...]) -> Iterator[tuple[int, Floats]]:
    """The sum of the parts, some options of axis 1 at a time, each block with its first option.

    A block, float64[rows, k, shape[1:]], must not be kept: the next one may take its memory.
    """
    width = rows * math.prod(shape[1:])
    if width * shape[0] <= _WHOLE:
        yield 0, _total(parts, (rows, *shape))
        return
    parts = _merged(parts)
    if width < _WIDE:
        step = _WHOLE // width
        for first in range(0, shape[0], step):
            some = [part[:, first : first + step] if part.shape[1] > 1 else part for part in parts]
            yield first, _total(some, (rows, min(step, shape[0] - first), *shape[1:]))
    else:
        still = _total([part for part in parts if part.shape[1] == 1], (rows, 1, *shape[1:]))[:, 0]
        moving = sorted((part for part in parts if part.shape[1] > 1), key=np.size)
        buffer = np.empty((rows, *shape[1:]))
        lone = [still] if any(part.shape[1] == 1 for part in parts) else []
        for option in range(shape[0]):
            yield option, _summed([*(part[:, option] for part in moving), *lone], buffer)[:, None]


def _merged(parts: Sequence[Floats]) -> list[Floats]:
    """One part a shape: many small ones cost less to sum than to spread over the bucket each."""
    merged: dict[tuple[int, ...], Floats] = {}
    for part in parts:
        merged[part.shape] = merged[part.shape] + part if part.shape in merged else part
    return list(merged.values())


def _summed(slices: Sequence[Floats], buffer: Floats) -> Floats:
    if len(slices) == 1:
        return np.broadcast_to(slices[0], buffer.shape)
    np.add(slices[0], slices[1], out=buffer)
    for one in slices[2:]:
        buffer += one
    return buffer


def elimination(
    scopes: Iterable[tuple[int, ...]], sizes: Sequence[int], last: int = -1
) -> tuple[list[int], list[tuple[int, ...]]]:
    """A greedy order, smallest bucket first, and what is left beside each variable when it goes.

    The variable ``last``, if there is one, goes after all others.
    """
    beside: list[set[int]] = [set() for _ in sizes]
    for scope in scopes:
        for v in scope:
            beside[v].update(scope)
    for v, others in enumerate(beside):
        others.discard(v)

    def entries(v: int) -> float:
        return math.prod((float(sizes[u]) for u in beside[v]), start=float(sizes[v]))

    weight = {v: entries(v) for v in range(len(sizes))}
    order, separators = [], []
    while weight:
        v = min(weight, key=lambda u: (u == last, weight[u], u))
        if weight[v] > MAX_BUCKET:
            raise TooWideError(weight[v])
        del weight[v]
        order.append(v)
        # The longest axis last: numpy's inner loop.
        separators.append(tuple(sorted(beside[v], key=lambda u: (sizes[u], u))))
        for u in beside[v]:
            beside[u] |= beside[v]
            beside[u] -= {u, v}
        for u in beside[v]:
            weight[u] = entries(u)
    return order, separators


def centre(order: Sequence[int], separators: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> int:
    """The variable around which no branch of the bucket tree has more than half of the options.

    Options count by the logarithms of the ``sizes``, as choices multiply.
    """
    place = {v: i for i, v in enumerate(order)}
    weight = [math.log(sizes[v]) for v in order]
    half = sum(weight) / 2
    for i, separator in enumerate(separators[:-1]):
        if weight[i] >= half:
            return order[i]
        weight[min((place[v] for v in separator), default=len(order) - 1)] += weight[i]
    return order[-1]


def build_buckets(
    scopes: Sequence[tuple[int, ...]],
    order: Sequence[int],
    separators: Sequence[tuple[int, ...]],
    sizes: Sequence[int],
) -> tuple[Bucket, ...]:
    """The buckets in elimination order; a part of the graph that ends early hangs on the last one."""
    place = {v: i for i, v in enumerate(order)}
    local: list[list[int]] = [[] for _ in order]
    children: list[list[int]] = [[] for _ in order]
    for index, held in enumerate(scopes):
        local[min(place[v] for v in held)].append(index)
    for i, separator in enumerate(separators[:-1]):
        children[min((place[v] for v in separator), default=len(order) - 1)].append(i)
    buckets = []
    for i, v in enumerate(order):
        scope = (v, *separators[i])
        buckets.append(
            Bucket(
                scope,
                tuple(sizes[u] for u in scope),
                tuple((index, _view_of(scopes[index], scope)) for index in local[i]),
                tuple((child, _view_of(separators[child], scope)) for child in children[i]),
            )
        )
    return tuple(buckets)


def _view_of(inner: tuple[int, ...], scope: tuple[int, ...]) -> View:
    places = [scope.index(v) for v in inner]
    return View(
        (0, *(int(i) + 1 for i in np.argsort(places))),
        (slice(None), *(slice(None) if v in inner else None for v in scope)),
        tuple(axis for axis, v in enumerate(scope, 1) if v not in inner),
    )
