"""The best choices above thresholds: Pareto labels, kept only while a bound says that they can reach one.

A label is a partial choice of the variables below a bucket: its value, its cost of each resource, and where
it came from. Bucket by bucket, labels of the children are joined; of those that agree on what is still open,
one that costs more and is worth less than another goes, and so does every label whose value, completed as
well as any of a pool of multipliers allows, does not exceed the threshold. A high threshold keeps very few:
the caller starts just below its upper bound and goes down until one choice appears, and that is the best.
Several budgets are searched at once, each with its threshold and labels of its own: they share the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_mdp.solvers.beliefs import Beliefs, Ints, Tuples
from onnx_mdp.solvers.buckets import Bucket, Floats
from onnx_mdp.solvers.network import Network, Point

__all__ = ["Found", "Limits", "StoppedError", "best_above"]

_JOINS = 1 << 18  # labels that are joined at once
_JOINS_EACH = 50
_ERROR = 1e-13  # of the terms of a sum
_RIVALS = 48  # with several resources, a group of labels is compared with so many of its best


class StoppedError(Exception):
    """The time is up."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up: ``stop`` tells that the time is up; of more than ``most`` labels in a bucket the
    most promising of a budget are kept, or with ``strict`` the budget is given up.
    """

    stop: Callable[[], bool]
    most: int
    strict: bool = False

    def check(self) -> None:
        """Raise when the time is up."""
        if self.stop():
            raise StoppedError

    def crowded(self, labels: Ints, each: int = 1) -> Ints:
        """The budgets with too many, by the number of ``labels`` of each; one may stand for ``each``."""
        return np.flatnonzero(labels > each * self.most)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """For each budget the best point that was found, at or above the threshold if there is one; the bound
    float64[budgets] of what was dropped (inf: the budget was given up); how many labels each one made.
    """

    points: tuple[Point | None, ...]
    dropped: Floats
    labels: Ints


@dataclass(slots=True, eq=False)
class _Labels:
    """Labels of one bucket, those of one separator state (``keys``, ascending) beside each other, the ones
    with the largest ``reach`` (worth at the first multipliers of their budget) first.
    """

    keys: Ints
    starts: Ints
    value: Floats
    cost: Floats
    reach: Floats
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
    """Of the chosen tuples: whose they are, and what the part of the choice outside a label adds at most to
    ``value − λ·cost``, float64[rows, tuples], and costs at least, float64[resources, tuples].

    ``multipliers`` is float64[rows, resources, tuples], ``place_of`` finds a tuple among the chosen.
    """

    budget: Ints
    place_of: Ints
    worth: Floats
    cost: Floats
    multipliers: Floats

    def reach(self, place: Ints, value: Floats, cost: Floats) -> Floats:
        """What choices with these labels of these tuples are worth at most, float64[rows, labels]."""
        paid = (self.multipliers[:, :, place] * cost).sum(axis=1)
        reach: Floats = value - paid + self.worth[:, place]
        return reach

    def needed(self, place: Ints, partial: _Partial, thresholds: Floats) -> Floats:
        """What another label must be worth at the first multipliers, less rounding, float64[labels]."""
        paid = (self.multipliers[0][:, place] * partial.cost).sum(axis=0)
        threshold, rest = thresholds[self.budget[place]], self.worth[0, place]
        size = abs(threshold) + abs(rest) + abs(partial.value) + abs(paid)
        needed: Floats = threshold - rest - partial.value + paid - _ERROR * size
        return needed


class _Growth:
    """One run of `best_above`: thresholds, which rise where a budget is given up, and what was dropped."""

    def __init__(self, beliefs: Beliefs, thresholds: Floats, limits: Limits) -> None:
        self.beliefs, self.limits = beliefs, limits
        self.thresholds = thresholds.copy()
        self.dropped = np.full(len(thresholds), -np.inf)
        self.joins = np.zeros(len(thresholds), np.intp)
        self.made: list[_Labels] = []

    def join(self, index: int) -> tuple[_Partial, _Rest]:
        """One label a tuple, then the labels of one child after the other, smallest first."""
        network, tuples = self.beliefs.network, self.beliefs.tuples[index]
        bucket = network.buckets[index]
        chosen = np.flatnonzero(tuples.above(self.thresholds))
        flat, budget = tuples.flat[chosen], tuples.budget[chosen]
        at = dict(zip(bucket.scope, np.unravel_index(flat, bucket.shape), strict=True))
        value, cost = np.zeros(len(flat)), np.zeros((network.resources, len(flat)))
        for table, _ in bucket.tables:
            place: tuple[Any, ...] = tuple(at[v] for v in network.tables[table].scope)
            value += network.tables[table].value[place]
            cost += network.tables[table].cost[(slice(None), *place)]
        place_of = np.zeros(len(tuples.flat), np.intp)
        place_of[chosen] = np.arange(len(chosen))
        multipliers = self.beliefs.budgets.pool.transpose(1, 2, 0)[:, :, budget]
        worth = tuples.upper[:, chosen] - (value - (multipliers * cost).sum(axis=1))
        rest = _Rest(budget, place_of, worth, tuples.least[:, chosen] - cost, multipliers)
        partial = _Partial(chosen, value, cost, {})
        for child, _ in sorted(bucket.children, key=lambda pair: len(self.made[pair[0]].value)):
            there: tuple[Any, ...] = tuple(at[v] for v in network.buckets[child].scope[1:])
            rest.worth -= self.beliefs.upward[child][(budget, slice(None), *there)].T
            rest.cost += self.beliefs.cheapest[child][(slice(None), *there)].reshape(network.resources, -1)
            keys = _key(there, network.buckets[child], budget)
            partial = self._joined(partial, rest, child, keys)
        return partial, rest

    def _joined(self, partial: _Partial, rest: _Rest, child: int, keys: Ints) -> _Partial:
        """Every partial label with every label of the child that agrees with its tuple, if bounds allow."""
        labels = self.made[child]
        found = np.minimum(np.searchsorted(labels.keys, keys), len(labels.keys) - 1)
        fits = labels.keys[found] == keys
        starts = labels.starts[found]
        ends = np.where(fits, labels.starts[found + 1], starts)
        own = rest.place_of[partial.owner]
        enough = rest.needed(own, partial, self.thresholds)
        counts = _first_below(labels.reach, starts[own], ends[own], enough) - starts[own]
        if self.limits.strict:
            counts = self._without_crowded(counts, rest.budget[own])
        pieces = []
        for low, high in _chunks(counts):
            self.limits.check()
            count = counts[low:high]
            mine = np.repeat(np.arange(low, high), count)
            place = rest.place_of[partial.owner[mine]]
            theirs = starts[place] + np.arange(len(mine)) - np.repeat(np.cumsum(count) - count, count)
            value = partial.value[mine] + labels.value[theirs]
            cost = partial.cost[:, mine] + labels.cost[:, theirs]
            budget = rest.budget[place]
            alive = (rest.reach(place, value, cost) > self.thresholds[budget]).all(axis=0)
            allowances = self.beliefs.budgets.allowances[budget].T
            alive &= (cost + rest.cost[:, place] <= allowances).all(axis=0)
            kept = np.flatnonzero(alive)
            mine, theirs = mine[kept], theirs[kept]
            sources = {before: own[mine] for before, own in partial.sources.items()} | {child: theirs}
            piece = _Partial(partial.owner[mine], value[kept], cost[:, kept], sources)
            pieces.append(piece.take(_undominated(piece.owner, piece.value, piece.cost)))
        return _concatenated(pieces, partial, child)

    def _without_crowded(self, counts: Ints, budget: Ints) -> Ints:
        """No joins for budgets that would need more in all than their labels justify."""
        self.joins += np.bincount(budget, counts, len(self.thresholds)).astype(np.intp)
        crowded = self.limits.crowded(self.joins, _JOINS_EACH)
        self._give_up(crowded)
        return np.where(np.isin(budget, crowded), 0, counts) if len(crowded) else counts

    def _give_up(self, budgets: Ints) -> None:
        self.thresholds[budgets] = np.inf
        self.dropped[budgets] = np.inf

    def thinned(self, joined: _Partial, rest: _Rest) -> _Partial:
        """The labels without those of crowded budgets, or without their least promising."""
        place = rest.place_of[joined.owner]
        budget = rest.budget[place]
        kept = np.ones(len(budget), bool)
        crowded = self.limits.crowded(np.bincount(budget, minlength=len(self.thresholds)))
        for one in crowded:
            own = np.flatnonzero(budget == one)
            if self.limits.strict:
                kept[own] = False
                continue
            reach = rest.reach(place[own], joined.value[own], joined.cost[:, own]).min(axis=0)
            out = own[np.argpartition(-reach, self.limits.most)[self.limits.most :]]
            self.dropped[one] = max(self.dropped[one], float(reach[np.isin(own, out)].max()))
            kept[out] = False
        if self.limits.strict:
            self._give_up(crowded)
        return joined.take(np.flatnonzero(kept)) if len(crowded) else joined

    def tops(self) -> Iterator[Point | None]:
        """The most valuable whole choice of each budget."""
        network, labels = self.beliefs.network, self.made[-1]
        for budget in range(len(self.thresholds)):
            place = int(np.searchsorted(labels.keys, budget))
            if place == len(labels.keys) or labels.keys[place] != budget:
                yield None
                continue
            first, end = labels.starts[place : place + 2]
            best = int(first + labels.value[first:end].argmax())
            yield network.points(_trace(network, self.made, best)[None])[0]


def best_above(beliefs: Beliefs, thresholds: Floats, limits: Limits) -> Found:
    """Return the best choice of each budget worth more than its threshold, or none; inf asks for none.

    Labels that were cut are worth no more than ``dropped``. Raises StoppedError when the time is up.
    """
    growth = _Growth(beliefs, thresholds, limits)
    count = np.zeros(len(thresholds), np.intp)
    for index, bucket in enumerate(beliefs.network.buckets):
        limits.check()
        joined, rest = growth.join(index)
        joined = growth.thinned(joined, rest)
        first = beliefs.budgets.pool[:, 0]
        growth.made.append(_grouped(bucket, beliefs.tuples[index], joined, first))
        count += np.bincount(rest.budget[rest.place_of[joined.owner]], minlength=len(count))
        if not len(joined.value):
            return Found((None,) * len(thresholds), growth.dropped, count)
    return Found(tuple(growth.tops()), growth.dropped, count)


def _first_below(reach: Floats, low: Ints, high: Ints, need: Floats) -> Ints:
    """Where, in each descending range from ``low`` to ``high``, the values that exceed ``need`` end."""
    low, high = low.copy(), high.copy()
    for _ in range(int((high - low).max(initial=0)).bit_length()):
        middle = (low + high) >> 1
        enough = (low < high) & (reach[np.minimum(middle, len(reach) - 1)] > need)
        low = np.where(enough, middle + 1, low)
        high = np.where(enough, high, middle)
    return low


def _key(at: tuple[Ints, ...], bucket: Bucket, budget: Ints) -> Ints:
    """The separator state of a bucket, and whose it is."""
    state = np.ravel_multi_index(at, bucket.shape[1:]) if at else 0
    key: Ints = budget * _states(bucket) + state
    return key


def _states(bucket: Bucket) -> int:
    return max(1, bucket.entries // bucket.shape[0])


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


def _grouped(bucket: Bucket, tuples: Tuples, partial: _Partial, multipliers: Floats) -> _Labels:
    """Labels by budget and the state of what is still open, without those that another one there beats;
    ``multipliers`` are the first ones, float64[budgets, resources].
    """
    option, key = np.divmod(tuples.flat[partial.owner], _states(bucket))
    key += tuples.budget[partial.owner] * _states(bucket)
    order = _undominated(key, partial.value, partial.cost)
    paid = (multipliers[tuples.budget[partial.owner[order]]].T * partial.cost[:, order]).sum(axis=0)
    reach = partial.value[order] - paid
    best_first = np.lexsort((-reach, key[order]))
    order, reach = order[best_first], reach[best_first]
    partial, key, option = partial.take(order), key[order], option[order]
    keys, starts = np.unique(key, return_index=True)
    starts = np.append(starts, len(key))
    return _Labels(keys, starts, partial.value, partial.cost, reach, option, partial.sources)


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
