"""Pareto labels: partial choices with their values and costs, where they are joined, and which ones stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_mdp.solvers.beliefs import Ints
from onnx_mdp.solvers.buckets import Floats

__all__ = ["Labels", "Partial", "Places", "Rest", "concatenated", "first_below", "undominated"]

_ERROR = 1e-13  # of the terms of a sum
_FINITE = 1e300
_RIVALS = 48  # with several resources, a group of labels is compared with so many of its best


@dataclass(slots=True, eq=False)
class Labels:
    """Labels, those of one state and budget (``keys``, ascending) beside each other, the ones with the
    largest ``reach`` (worth at the first multipliers of their budget) first.

    ``owner`` is the option of the variable of their bucket, ``sources`` the labels of children they are of.
    """

    keys: Ints
    starts: Ints
    value: Floats
    cost: Floats
    reach: Floats
    owner: Ints
    sources: dict[int, Ints]

    @property
    def spread(self) -> float:
        """Labels in a state on average."""
        return len(self.value) / max(1, len(self.keys))


@dataclass(slots=True, eq=False)
class Partial:
    """Labels being joined: each belongs to a place, its ``owner``."""

    owner: Ints
    value: Floats
    cost: Floats
    sources: dict[int, Ints]

    def take(self, kept: Ints) -> Partial:
        sources = {child: labels[kept] for child, labels in self.sources.items()}
        return Partial(self.owner[kept], self.value[kept], self.cost[:, kept], sources)


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where labels are joined: states of some variables, each for a budget, with the bounds of `Tuples`.

    ``at`` is the option of each variable in ``scope``.
    """

    scope: tuple[int, ...]
    at: tuple[Ints, ...]
    budget: Ints
    upper: Floats
    least: Floats

    def of(self, variables: Sequence[int]) -> tuple[Ints, ...]:
        return tuple(self.at[self.scope.index(v)] for v in variables)

    def within(self, scope: tuple[int, ...], key: Ints) -> Places:
        """The states of some of the variables, which ``key`` tells apart, with the best of their bounds."""
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        first = order[starts]
        return Places(
            scope,
            tuple(at[first] for at in self.of(scope)),
            self.budget[first],
            np.maximum.reduceat(self.upper[:, order], starts, axis=1),
            np.minimum.reduceat(self.least[:, order], starts, axis=1),
        )


@dataclass(slots=True, eq=False)
class Rest:
    """For each place, what the part of the choice outside a label adds at most to ``value − λ·cost``,
    float64[rows, places], and costs at least, float64[resources, places].

    ``multipliers`` is float64[rows, resources, places], ``budget`` whose the places are.
    """

    budget: Ints
    worth: Floats
    cost: Floats
    multipliers: Floats

    def reach(self, place: Ints, value: Floats, cost: Floats) -> Floats:
        """What choices with these labels of these places are worth at most, float64[rows, labels]."""
        paid = (self.multipliers[:, :, place] * cost).sum(axis=1)
        reach: Floats = value - paid + self.worth[:, place]
        return reach

    def needed(self, place: Ints, partial: Partial, thresholds: Floats) -> Floats:
        """What another label must be worth at the first multipliers, less rounding, float64[labels]."""
        paid = (self.multipliers[0][:, place] * partial.cost).sum(axis=0)
        threshold, rest = thresholds[self.budget[place]], self.worth[0, place]
        size = abs(threshold) + abs(rest) + abs(partial.value) + abs(paid)
        needed: Floats = threshold - rest - partial.value + paid - _ERROR * np.minimum(size, _FINITE)
        return needed


def first_below(reach: Floats, low: Ints, high: Ints, need: Floats) -> Ints:
    """Where, in each descending range from ``low`` to ``high``, the values that exceed ``need`` end."""
    low, high = low.copy(), high.copy()
    for _ in range(int((high - low).max(initial=0)).bit_length()):
        middle = (low + high) >> 1
        enough = (low < high) & (reach[np.minimum(middle, len(reach) - 1)] > need)
        low = np.where(enough, middle + 1, low)
        high = np.where(enough, high, middle)
    return low


def concatenated(pieces: Sequence[Partial], empty: Partial, labels: Labels) -> Partial:
    if not pieces:
        none = np.zeros(0, np.intp)
        return Partial(
            none, np.zeros(0), empty.cost[:, :0], dict.fromkeys([*empty.sources, *labels.sources], none)
        )
    if len(pieces) == 1:
        return pieces[0]
    sources = {c: np.concatenate([p.sources[c] for p in pieces]) for c in pieces[0].sources}
    return Partial(
        np.concatenate([p.owner for p in pieces]),
        np.concatenate([p.value for p in pieces]),
        np.concatenate([p.cost for p in pieces], axis=1),
        sources,
    )


def undominated(group: Ints, value: Floats, cost: Floats) -> Ints:
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
