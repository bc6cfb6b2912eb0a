"""The best choices above thresholds: Pareto labels, kept only while a bound says that they can reach one.

A label is a partial choice of the variables below a bucket: its value, its cost of each resource, and where
it came from. Bucket by bucket, labels of the children are joined; of those that agree on what is still open,
one that costs more and is worth less than another goes, and so does every label whose value, completed as
well as any of a pool of multipliers allows, does not exceed the threshold. A high threshold keeps very few:
the caller starts just below its upper bound and goes down until one choice appears, and that is the best.
Several budgets are searched at once, each with its threshold and labels of its own: they share the steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_mdp.solvers.beliefs import Beliefs, Ints
from onnx_mdp.solvers.buckets import Floats
from onnx_mdp.solvers.labels import Labels, Partial, Places, Rest, concatenated, first_below, undominated
from onnx_mdp.solvers.network import Network, Point

__all__ = ["Found", "Limits", "StoppedError", "best_above"]

_JOINS = 1 << 18  # labels that are joined at once
_JOINS_EACH = 50
_MANY = 100  # combinations in a state that are worth a join of their own


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


class _Growth:
    """One run of `best_above`: thresholds, which rise where a budget is given up, and what was dropped."""

    def __init__(self, beliefs: Beliefs, thresholds: Floats, limits: Limits) -> None:
        self.beliefs, self.limits = beliefs, limits
        self.thresholds = thresholds.copy()
        self.dropped = np.full(len(thresholds), -np.inf)
        self.joins, self.count = np.zeros((2, len(thresholds)), np.intp)
        self.made: list[Labels] = []

    def grow(self, index: int) -> bool:
        """Make the labels of a bucket; tells whether there are any."""
        network, tuples = self.beliefs.network, self.beliefs.tuples[index]
        bucket = network.buckets[index]
        chosen = np.flatnonzero(tuples.above(self.thresholds))
        at = np.unravel_index(tuples.flat[chosen], bucket.shape)
        bounds = tuples.upper[:, chosen], tuples.least[:, chosen]
        places = Places(bucket.scope, at, tuples.budget[chosen], *bounds)
        tables = [table for table, _ in bucket.tables]
        children = [child for child, _ in bucket.children]
        if index < len(network.buckets) - 1 or network.resources != 1:
            joined = self._join(places, tables, children)
        else:
            one, other = self._halves(children)
            joined = self._met(places, self._join(places, tables, one), self._join(places, [], other))
        made = self._grouped(joined, places, self._keys(places, bucket.scope[1:]))
        made.owner = places.at[0][made.owner]
        self.made.append(made)
        return len(joined.value) > 0

    def _join(self, places: Places, tables: Sequence[int], children: Sequence[int]) -> Partial:
        """One label a place, of the tables there, then labels of one child after another, fewest first."""
        network, budget = self.beliefs.network, places.budget
        value, cost = np.zeros(len(budget)), np.zeros((network.resources, len(budget)))
        for table in tables:
            place: tuple[Any, ...] = places.of(network.tables[table].scope)
            value += network.tables[table].value[place]
            cost += network.tables[table].cost[(slice(None), *place)]
        judges = self.beliefs.budgets.judges[budget].T
        multipliers = self.beliefs.budgets.pool[judges].transpose(0, 2, 1)
        worth = places.upper - (value - (multipliers * cost).sum(axis=1))
        rest = Rest(budget, worth, places.least - cost, multipliers)
        partial = Partial(np.arange(len(budget)), value, cost, {})
        for group, labels, key in sorted(self._groups(places, children), key=lambda g: len(g[1].value)):
            for child in group:
                there: tuple[Any, ...] = places.of(network.buckets[child].scope[1:])
                rest.worth -= self.beliefs.upward[child][(judges, *there)]
                cheapest = self.beliefs.cheapest[child][(slice(None), *there)]
                rest.cost += cheapest.reshape(network.resources, -1)
            partial = self._joined(partial, rest, labels, key)
        self.count += np.bincount(budget[partial.owner], minlength=len(self.count))
        return self._thinned(partial, rest)

    def _groups(
        self, places: Places, children: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], Labels, Ints]]:
        """Children whose labels join the places, as a group where they see the same few variables of them:
        then they are joined before. With the keys of the places.
        """
        alike: dict[frozenset[int], list[int]] = {}
        for child in children:
            alike.setdefault(frozenset(self.beliefs.network.buckets[child].scope[1:]), []).append(child)
        for scope, group in alike.items():
            if len(scope) < len(places.scope) and len(group) > 1 and self._combinations(group) > _MANY:
                key = self._keys(places, tuple(scope))
                inner = places.within(tuple(scope), key)
                joined = self._join(inner, [], group)
                yield group, self._grouped(joined, inner, self._keys(inner, inner.scope)), key
                continue
            for child in group:
                made = self.made[child]
                own = dataclasses.replace(made, sources={child: np.arange(len(made.value))})
                yield [child], own, self._keys(places, self.beliefs.network.buckets[child].scope[1:])

    def _keys(self, places: Places, scope: tuple[int, ...]) -> Ints:
        """The state of some variables, and whose it is."""
        sizes = [self.beliefs.network.sizes[v] for v in scope]
        state = np.ravel_multi_index(places.of(scope), sizes) if scope else 0
        key: Ints = places.budget * math.prod(sizes) + state
        return key

    def _grouped(self, partial: Partial, places: Places, key: Ints) -> Labels:
        """Labels by the key of their place, without those that another one there beats."""
        order = undominated(key[partial.owner], partial.value, partial.cost)
        judges = self.beliefs.budgets.judges[places.budget[partial.owner[order]], 0]
        multipliers = self.beliefs.budgets.pool[judges]
        reach = partial.value[order] - (multipliers.T * partial.cost[:, order]).sum(axis=0)
        best_first = np.lexsort((-reach, key[partial.owner[order]]))
        order, reach = order[best_first], reach[best_first]
        partial = partial.take(order)
        keys, starts = np.unique(key[partial.owner], return_index=True)
        starts = np.append(starts, len(order))
        return Labels(keys, starts, partial.value, partial.cost, reach, partial.owner, partial.sources)

    def _halves(self, children: Sequence[int]) -> tuple[list[int], list[int]]:
        """Two parts of the children whose labels have about as many combinations."""
        halves: tuple[list[int], list[int]] = ([], [])
        for child in sorted(children, key=lambda c: -self.made[c].spread):
            lighter = min(halves, key=self._combinations)
            lighter.append(child)
        return halves

    def _combinations(self, children: Sequence[int]) -> float:
        return math.prod((self.made[child].spread for child in children), start=1.0)

    def _met(self, places: Places, one: Partial, other: Partial) -> Partial:
        """The best pair of labels of the two halves for each budget, if it is above the threshold."""
        network = self.beliefs.network
        one, other = (half.take(undominated(half.owner, half.value, half.cost)) for half in (one, other))
        allowances = self.beliefs.budgets.allowances[places.budget[other.owner], 0]
        limit = allowances - network.cost[0] - other.cost[0]
        starts = np.searchsorted(one.owner, other.owner)
        ends = np.searchsorted(one.owner, other.owner, side="right")
        found = first_below(-one.cost[0], starts, ends, np.nextafter(-limit, -np.inf)) - 1
        mine = np.flatnonzero(found >= starts)
        theirs = found[mine]
        value = one.value[theirs] + other.value[mine]
        budget = places.budget[other.owner[mine]]
        order = np.lexsort((-value, budget))
        best = order[np.unique(budget[order], return_index=True)[1]]
        best = best[network.value + value[best] > self.thresholds[budget[best]]]
        mine, theirs = mine[best], theirs[best]
        cost = one.cost[:, theirs] + other.cost[:, mine]
        sources = {c: labels[theirs] for c, labels in one.sources.items()}
        sources |= {c: labels[mine] for c, labels in other.sources.items()}
        return Partial(other.owner[mine], value[best], cost, sources)

    def _joined(self, partial: Partial, rest: Rest, labels: Labels, keys: Ints) -> Partial:
        """Every partial label with every other that has the key of its place, if bounds allow."""
        if not len(labels.keys):
            return concatenated([], partial, labels)
        found = np.minimum(np.searchsorted(labels.keys, keys), len(labels.keys) - 1)
        fits = labels.keys[found] == keys
        starts = labels.starts[found]
        ends = np.where(fits, labels.starts[found + 1], starts)
        own = partial.owner
        enough = rest.needed(own, partial, self.thresholds)
        counts = first_below(labels.reach, starts[own], ends[own], enough) - starts[own]
        if self.limits.strict:
            counts = self._without_crowded(counts, rest.budget[own])
        pieces = []
        for low, high in _chunks(counts):
            self.limits.check()
            count = counts[low:high]
            mine = np.repeat(np.arange(low, high), count)
            place = partial.owner[mine]
            theirs = starts[place] + np.arange(len(mine)) - np.repeat(np.cumsum(count) - count, count)
            value = partial.value[mine] + labels.value[theirs]
            cost = partial.cost[:, mine] + labels.cost[:, theirs]
            budget = rest.budget[place]
            alive = (rest.reach(place, value, cost) > self.thresholds[budget]).all(axis=0)
            allowances = self.beliefs.budgets.allowances[budget].T
            alive &= (cost + rest.cost[:, place] <= allowances).all(axis=0)
            kept = np.flatnonzero(alive)
            mine, theirs = mine[kept], theirs[kept]
            sources = {before: own[mine] for before, own in partial.sources.items()}
            sources |= {child: own[theirs] for child, own in labels.sources.items()}
            piece = Partial(partial.owner[mine], value[kept], cost[:, kept], sources)
            pieces.append(piece.take(undominated(piece.owner, piece.value, piece.cost)))
        return concatenated(pieces, partial, labels)

    def _without_crowded(self, counts: Ints, budget: Ints) -> Ints:
        """No joins for budgets that would need more in all than their labels justify."""
        self.joins += np.bincount(budget, counts, len(self.thresholds)).astype(np.intp)
        crowded = self.limits.crowded(self.joins, _JOINS_EACH)
        self._give_up(crowded)
        return np.where(np.isin(budget, crowded), 0, counts) if len(crowded) else counts

    def _give_up(self, budgets: Ints) -> None:
        self.thresholds[budgets] = np.inf
        self.dropped[budgets] = np.inf

    def _thinned(self, joined: Partial, rest: Rest) -> Partial:
        """The labels without those of crowded budgets, or without their least promising."""
        budget = rest.budget[joined.owner]
        kept = np.ones(len(budget), bool)
        crowded = self.limits.crowded(np.bincount(budget, minlength=len(self.thresholds)))
        for one in crowded:
            own = np.flatnonzero(budget == one)
            if self.limits.strict:
                kept[own] = False
                continue
            reach = rest.reach(joined.owner[own], joined.value[own], joined.cost[:, own]).min(axis=0)
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
    for index in range(len(beliefs.network.buckets)):
        limits.check()
        if not growth.grow(index):
            return Found((None,) * len(thresholds), growth.dropped, growth.count)
    return Found(tuple(growth.tops()), growth.dropped, growth.count)


def _chunks(counts: Ints) -> Iterator[tuple[int, int]]:
    """Ranges of labels that have about `_JOINS` partners together."""
    ends = np.cumsum(counts)
    low = 0
    while low < len(counts):
        done = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, done + _JOINS, side="right")))
        yield low, high
        low = high


def _trace(network: Network, made: Sequence[Labels], best: int) -> Ints:
    places = np.zeros(len(network.sizes), np.intp)
    open_ = [(len(made) - 1, best)]
    while open_:
        index, label = open_.pop()
        places[network.buckets[index].scope[0]] = made[index].owner[label]
        open_ += [(child, int(labels[label])) for child, labels in made[index].sources.items()]
    return places
