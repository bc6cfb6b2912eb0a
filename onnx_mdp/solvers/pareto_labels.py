"""The best choice above a threshold: Pareto labels, kept only while a bound says that they can reach it.

A label is a partial choice of the variables below a bucket: its value, its cost of each resource, and where
it came from. Bucket by bucket, labels of the children are joined; of those that agree on what is still open,
one that costs more and is worth less than another goes, and so does every label whose value, completed as
well as any of a pool of multipliers allows, does not exceed the threshold. A high threshold keeps very few:
the caller starts just below its upper bound and goes down until one choice appears, and that is the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onnx_mdp.solvers.buckets import Bucket, Floats
from onnx_mdp.solvers.network import Network, Point

__all__ = [
    "Beliefs",
    "CrowdedError",
    "Found",
    "Ints",
    "Limits",
    "StoppedError",
    "best_above",
    "find_beliefs",
]

_JOINS = 1 << 18  # labels that are joined at once
_JOINS_EACH = 100
_RIVALS = 48  # with several resources, a group of labels is compared with so many of its best

Ints = NDArray[np.intp]


class StoppedError(Exception):
    """The time is up."""


class CrowdedError(Exception):
    """More labels than the caller wants."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up: ``stop`` tells that the time is up; above ``most`` labels in a bucket the most
    promising are kept, or with ``strict`` CrowdedError is raised.
    """

    stop: Callable[[], bool]
    most: int
    strict: bool = False

    def check(self, joins: int = 0) -> None:
        """Raise for time, and for the joins that ``most`` labels would hardly need."""
        if self.stop():
            raise StoppedError
        if self.strict and joins > _JOINS_EACH * self.most:
            raise CrowdedError


@dataclass(slots=True)
class _Tuples:
    """The tuples of a bucket that may be part of a choice above the threshold.

    ``flat`` are their indices, ``upper`` float64[multipliers, tuples] what a choice through them reaches at
    most, ``least`` float64[resources, tuples] what it costs at least.
    """

    flat: Ints = field(default_factory=lambda: np.zeros(0, np.intp))
    upper: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    least: Floats = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True, slots=True, eq=False)
class Beliefs:
    """Bounds on every tuple of a network, for a pool of multipliers float64[multipliers, resources]."""

    network: Network
    pool: Floats
    allowance: Floats
    tuples: tuple[_Tuples, ...]
    upward: tuple[list[Floats], ...]
    cheapest: tuple[list[Floats], ...]

    def surviving(self, threshold: float) -> list[Ints]:
        """The local options of each variable through which a choice above ``threshold`` may lead."""
        kept: list[Ints] = [np.zeros(0, np.intp)] * len(self.network.sizes)
        for bucket, tuples in zip(self.network.buckets, self.tuples, strict=True):
            alive = tuples.flat[tuples.upper.min(axis=0) > threshold]
            kept[bucket.scope[0]] = np.unique(alive // max(1, bucket.entries // bucket.shape[0]))
        return kept

    def bound(self) -> float:
        """An upper bound of every choice that was above the threshold of the beliefs, or −inf."""
        tops = [t.upper.min(axis=0).max(initial=-np.inf) for t in self.tuples]
        return float(min(tops, default=np.inf))


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The best point above the threshold or None, the bound of what was dropped, and labels made."""

    point: Point | None
    dropped: float
    labels: int


def find_beliefs(network: Network, pool: Floats, allowance: Floats, threshold: float) -> Beliefs:
    """Bound every tuple by each multiplier of the pool; keep those above ``threshold`` that can be paid."""
    tuples = tuple(_Tuples() for _ in network.buckets)
    upward, cheapest = [], []
    for count, multipliers in enumerate(pool):
        theta = network.theta(1.0, multipliers)
        messages = network.ascend(theta)
        constant = network.value + float(multipliers @ (allowance - network.cost))
        if count == 0:
            _select(network, theta, messages, tuples, threshold - constant)
            upper = [t.upper for t in tuples]
        else:
            upper = _look_up(network, theta, messages, tuples)
        for kept, row in zip(tuples, upper, strict=True):
            kept.upper = np.vstack([kept.upper[:count], row + constant]) if count else row + constant
        upward.append(messages)
    for resource, unit in enumerate(np.eye(network.resources)):
        theta = network.theta(0.0, unit)
        messages = network.ascend(theta)
        rows = _look_up(network, theta, messages, tuples)
        for kept, row in zip(tuples, rows, strict=True):
            least = network.cost[resource] - row
            kept.least = np.vstack([kept.least, least]) if resource else least
        cheapest.append(messages)
    for kept in tuples:
        alive = kept.upper.min(axis=0) > threshold
        if network.resources:
            alive &= (kept.least <= allowance[:, None]).all(axis=0)
        else:
            kept.least = np.zeros((0, len(kept.flat)))
        kept.flat, kept.upper, kept.least = kept.flat[alive], kept.upper[:, alive], kept.least[:, alive]
    return Beliefs(network, pool, allowance, tuples, tuple(upward), tuple(cheapest))


def _select(
    network: Network,
    theta: Sequence[Floats],
    messages: Sequence[Floats],
    tuples: Sequence[_Tuples],
    threshold: float,
) -> None:
    """Choose the tuples above the threshold, and note their bound as the first row."""
    places: list[list[Ints]] = [[] for _ in tuples]
    bounds: list[list[Floats]] = [[] for _ in tuples]

    def take(index: int, first: int, block: Floats) -> None:
        line = block.ravel()
        found = np.flatnonzero(line > threshold)
        places[index].append(found + first * (line.size // len(block)))
        bounds[index].append(line[found])

    network.descend(theta, messages, take)
    for kept, flat, upper in zip(tuples, places, bounds, strict=True):
        kept.flat, kept.upper = np.concatenate(flat), np.concatenate(upper)[None]


def _look_up(
    network: Network, theta: Sequence[Floats], messages: Sequence[Floats], tuples: Sequence[_Tuples]
) -> list[Floats]:
    """What a downward pass says of the chosen tuples, float64[1, tuples] a bucket."""
    rows: list[list[Floats]] = [[] for _ in tuples]

    def take(index: int, first: int, block: Floats) -> None:
        line, flat = block.ravel(), tuples[index].flat
        start = first * (line.size // len(block))
        low, high = np.searchsorted(flat, (start, start + line.size))
        rows[index].append(line[flat[low:high] - start])

    network.descend(theta, messages, take)
    return [np.concatenate(row)[None] for row in rows]


@dataclass(slots=True, eq=False)
class _Labels:
    """Labels of one bucket, those of one separator state (``keys``, ascending) beside each other."""

    keys: Ints
    starts: Ints
    value: Floats
    cost: Floats
    option: Ints
    sources: dict[int, Ints]


@dataclass(slots=True, eq=False)
class _Partial:
    """Labels being joined: each belongs to a tuple; ``sources`` are labels of the children so far."""

    owner: Ints
    value: Floats
    cost: Floats
    sources: dict[int, Ints]

    def take(self, kept: Ints) -> _Partial:
        sources = {child: labels[kept] for child, labels in self.sources.items()}
        return _Partial(self.owner[kept], self.value[kept], self.cost[:, kept], sources)


@dataclass(slots=True, eq=False)
class _Rest:
    """For each tuple, what the part of the choice outside the label adds at most, and costs at least."""

    worth: Floats
    cost: Floats


def best_above(beliefs: Beliefs, threshold: float, limits: Limits) -> Found:
    """Return the best choice worth more than ``threshold``, or none.

    Labels that were cut are worth no more than ``dropped``. Raises StoppedError and CrowdedError as the
    limits say.
    """
    network = beliefs.network
    made: list[_Labels] = []
    dropped, count = -np.inf, 0
    for index, bucket in enumerate(network.buckets):
        limits.check()
        joined, rest = _join(beliefs, index, made, threshold, limits)
        if len(joined.value) > limits.most:
            if limits.strict:
                raise CrowdedError
            upper = _upper(beliefs.pool, joined, rest)
            order = np.argpartition(-upper, limits.most)
            dropped = max(dropped, float(upper[order[limits.most :]].max()))
            joined = joined.take(np.sort(order[: limits.most]))
        made.append(_grouped(bucket, beliefs.tuples[index].flat, joined))
        count += len(made[-1].value)
        if not len(made[-1].value):
            return Found(None, dropped, count)
    top = made[-1]
    best = int(top.value.argmax())
    return Found(network.point(_trace(network, made, best)), dropped, count)


def _join(
    beliefs: Beliefs, index: int, made: Sequence[_Labels], threshold: float, limits: Limits
) -> tuple[_Partial, _Rest]:
    """One label a tuple, then the labels of one child after the other, smallest first."""
    network, bucket, tuples = beliefs.network, beliefs.network.buckets[index], beliefs.tuples[index]
    chosen = tuples.upper.min(axis=0) > threshold
    flat = tuples.flat[chosen]
    at = dict(zip(bucket.scope, np.unravel_index(flat, bucket.shape), strict=True))
    value, cost = np.zeros(len(flat)), np.zeros((network.resources, len(flat)))
    for table, _ in bucket.tables:
        place = tuple(at[v] for v in network.tables[table].scope)
        value += network.tables[table].value[place]
        cost += network.tables[table].cost[(slice(None), *place)]
    rest = _Rest(tuples.upper[:, chosen] - (value - beliefs.pool @ cost), tuples.least[:, chosen] - cost)
    partial = _Partial(np.flatnonzero(chosen), value, cost, {})
    place_of = np.cumsum(chosen) - 1
    for child, _ in sorted(bucket.children, key=lambda pair: len(made[pair[0]].value)):
        separator = network.buckets[child].scope[1:]
        there = tuple(at[v] for v in separator)
        for row, messages in enumerate(beliefs.upward):
            rest.worth[row] -= messages[child][there]
        for row, messages in enumerate(beliefs.cheapest):
            rest.cost[row] += messages[child][there]
        keys = _key(there, network.buckets[child].shape[1:], len(flat))
        partial = _joined(beliefs, partial, place_of, rest, child, keys, made[child], threshold, limits)
    return partial, _Rest(rest.worth[:, place_of[partial.owner]], rest.cost[:, place_of[partial.owner]])


def _key(at: tuple[Ints, ...], shape: tuple[int, ...], count: int) -> Ints:
    return np.ravel_multi_index(at, shape) if at else np.zeros(count, np.intp)


def _joined(
    beliefs: Beliefs,
    partial: _Partial,
    place_of: Ints,
    rest: _Rest,
    child: int,
    keys: Ints,
    labels: _Labels,
    threshold: float,
    limits: Limits,
) -> _Partial:
    """Every partial label with every label of the child that agrees with its tuple, if bounds allow."""
    found = np.minimum(np.searchsorted(labels.keys, keys), len(labels.keys) - 1)
    fits = labels.keys[found] == keys
    starts = labels.starts[found]
    counts = np.where(fits, labels.starts[found + 1] - starts, 0)[place_of[partial.owner]]
    limits.check(joins=int(counts.sum()))
    pieces = []
    for low, high in _chunks(counts):
        limits.check()
        count = counts[low:high]
        mine = np.repeat(np.arange(low, high), count)
        place = place_of[partial.owner[mine]]
        theirs = starts[place] + np.arange(len(mine)) - np.repeat(np.cumsum(count) - count, count)
        value = partial.value[mine] + labels.value[theirs]
        cost = partial.cost[:, mine] + labels.cost[:, theirs]
        alive = (cost <= beliefs.allowance[:, None] - rest.cost[:, place]).all(axis=0)
        for multipliers, worth in zip(beliefs.pool, rest.worth, strict=True):
            alive &= value - multipliers @ cost + worth[place] > threshold
        kept = np.flatnonzero(alive)
        mine, theirs = mine[kept], theirs[kept]
        sources = {before: own[mine] for before, own in partial.sources.items()} | {child: theirs}
        piece = _Partial(partial.owner[mine], value[kept], cost[:, kept], sources)
        pieces.append(piece.take(_undominated(piece.owner, piece.value, piece.cost)))
    return _concatenated(pieces, partial, child)


def _chunks(counts: Ints) -> Iterator[tuple[int, int]]:
    """Ranges of labels that have about `_JOINS` partners together."""
    ends = np.cumsum(counts)
    low = 0
    while low < len(counts):
        done = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, done + _JOINS, side="right")))
        yield low, high
        low = high


def _concatenated(pieces: Sequence[_Partial], empty: _Partial, child: int) -> _Partial:
    if not pieces:
        none = np.zeros(0, np.intp)
        return _Partial(none, np.zeros(0), empty.cost[:, :0], dict.fromkeys([*empty.sources, child], none))
    if len(pieces) == 1:
        return pieces[0]
    sources = {c: np.concatenate([p.sources[c] for p in pieces]) for c in pieces[0].sources}
    return _Partial(
        np.concatenate([p.owner for p in pieces]),
        np.concatenate([p.value for p in pieces]),
        np.concatenate([p.cost for p in pieces], axis=1),
        sources,
    )


def _upper(pool: Floats, partial: _Partial, rest: _Rest) -> Floats:
    upper: Floats = (partial.value - pool @ partial.cost + rest.worth).min(axis=0)
    return upper


def _grouped(bucket: Bucket, flat: Ints, partial: _Partial) -> _Labels:
    """Labels by the state of what is still open, without those that another one there beats."""
    width = max(1, bucket.entries // bucket.shape[0])
    option, key = np.divmod(flat[partial.owner], width)
    order = _undominated(key, partial.value, partial.cost)
    partial, key, option = partial.take(order), key[order], option[order]
    keys, starts = np.unique(key, return_index=True)
    starts = np.append(starts, len(key))
    return _Labels(keys, starts, partial.value, partial.cost, option, partial.sources)


def _undominated(group: Ints, value: Floats, cost: Floats) -> Ints:
    """Indices of labels that no other of their group beats in value and all costs, by group.

    With several resources a label is compared with the best few of its group: some beaten ones stay.
    """
    if len(cost) == 1:
        order = np.lexsort((-value, cost[0], group))
        return order[_records(group[order], value[order])]
    order = np.lexsort((-value, group))
    if not len(cost):
        return order[_records(group[order], value[order])]
    group, cost = group[order], cost[:, order]
    starts = np.flatnonzero(np.append(True, group[1:] != group[:-1])) if len(group) else group
    rank = np.arange(len(group)) - np.repeat(starts, np.diff(np.append(starts, len(group))))
    alive = np.ones(len(group), bool)
    first = np.arange(len(group)) - rank
    for rival in range(min(_RIVALS, int(rank.max(initial=0)))):
        behind = np.flatnonzero(alive & (rank > rival))
        against = first[behind] + rival
        beaten = alive[against] & (cost[:, behind] >= cost[:, against]).all(axis=0)
        alive[behind[beaten]] = False
    return order[alive]


def _records(group: Ints, value: Floats) -> NDArray[np.bool_]:
    """Where a value exceeds all before it in its group; groups lie beside each other."""
    changed = np.ones(len(value), bool)
    np.not_equal(group[1:], group[:-1], out=changed[1:])
    if changed.all():
        return changed
    rank = np.unique(value, return_inverse=True)[1]
    height = rank + np.cumsum(changed) * (len(value) + 1)
    highest = np.maximum.accumulate(height)
    return np.append(True, height[1:] > highest[:-1])


def _trace(network: Network, made: Sequence[_Labels], best: int) -> Ints:
    places = np.zeros(len(network.sizes), np.intp)
    open_ = [(len(made) - 1, best)]
    while open_:
        index, label = open_.pop()
        places[network.buckets[index].scope[0]] = made[index].option[label]
        open_ += [(child, int(labels[label])) for child, labels in made[index].sources.items()]
    return places
