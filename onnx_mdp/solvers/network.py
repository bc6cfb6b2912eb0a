"""A factor graph with exact (max, +) passes over it.

For multipliers λ, one upward pass finds ``max_x Σ value − λ·cost`` over all choices, whatever the tables look
like; a downward pass turns it into the *max-marginal* of every option: the best that any choice with that
option can reach. This is bucket elimination (Dechter 1999, section 4) on the tree decomposition that a greedy
order gives; its work is the sum of the bucket sizes, small for the graphs of real networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_mdp.problem import Choice
from onnx_mdp.solvers.buckets import (
    Bucket,
    Floats,
    blocks,
    build_buckets,
    elimination,
    gather,
    kept_shape,
    largest,
)

__all__ = ["Network", "Options", "Point", "Table"]

Options = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Value float64[options of each] (−inf: forbidden) and cost float64[resources, options of each]."""

    scope: tuple[int, ...]
    value: Floats
    cost: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """A choice of local options, its value, and its cost of each resource."""

    places: NDArray[np.intp]
    value: float
    cost: Floats


class Network:
    """Variables with options, tables over them, and the buckets of an elimination order.

    ``options[v]`` are the original options of local variable ``v``; variables with a single option are not
    in here, their tables are part of ``value`` and ``cost``, the constants.
    """

    def __init__(
        self,
        variables: Sequence[int],
        options: Sequence[Options],
        tables: Iterable[Table],
        constant: tuple[float, Floats],
        fixed: dict[int, int],
    ) -> None:
        """Fold single options into the constants, merge the tables, order the variables, build buckets."""
        alive = [place for place, kept in enumerate(options) if len(kept) > 1]
        self.variables = tuple(variables[place] for place in alive)
        self.options = tuple(options[place] for place in alive)
        self.sizes = tuple(len(kept) for kept in self.options)
        single = {variables[place]: int(kept[0]) for place, kept in enumerate(options) if len(kept) == 1}
        self.fixed = fixed | single
        self.resources = len(constant[1])
        left, (self.value, self.cost) = _squeezed(tables, {v: i for i, v in enumerate(alive)}, constant)
        self.tables = _absorbed(_merged(left))
        order, separators = elimination([t.scope for t in self.tables], self.sizes)
        self.buckets = build_buckets([t.scope for t in self.tables], order, separators, self.sizes)

    @property
    def entries(self) -> int:
        """Table entries that one pass visits."""
        return sum(bucket.entries for bucket in self.buckets)

    def choice(self, places: NDArray[np.intp], count: int) -> Choice:
        """The options of the first ``count`` original variables (those after are running sums)."""
        whole = dict(self.fixed)
        for variable, kept, place in zip(self.variables, self.options, places, strict=True):
            whole[variable] = int(kept[place])
        return tuple(whole[variable] for variable in range(count))

    def restrict(self, kept: Sequence[Options]) -> Network:
        """The network of the local options that are kept, at least one of each variable."""
        tables = []
        for table in self.tables:
            at: tuple[Any, ...] = np.ix_(*(kept[v] for v in table.scope))
            tables.append(Table(table.scope, table.value[at], table.cost[(slice(None), *at)]))
        options = [own[some] for own, some in zip(self.options, kept, strict=True)]
        return Network(self.variables, options, tables, (self.value, self.cost), self.fixed)

    def theta(self, weight: float, multipliers: Floats) -> list[Floats]:
        """``weight · value − multipliers · cost`` of every table; weight 0 keeps what is forbidden."""
        thetas = []
        for table in self.tables:
            worth = table.value if weight else np.where(table.value == -np.inf, -np.inf, 0.0)
            thetas.append(_less(worth, multipliers, table.cost))
        return thetas

    def ascend(self, theta: Sequence[Floats]) -> list[Floats]:
        """The message of every bucket; that of the last one is the maximum over all choices."""
        messages: list[Floats] = []
        for bucket in self.buckets:
            messages.append(largest(self._parts(bucket, theta, messages), bucket.shape))
        return messages

    def descend(
        self, theta: Sequence[Floats], messages: Sequence[Floats], take: Callable[[int, int, Floats], None]
    ) -> None:
        """Visit what the best choice through every tuple reaches.

        ``take(bucket, first, block)`` gets float64[k, ...], for the bucket's variable at k options from
        ``first`` on, and must not keep it. Buckets come last to first.
        """
        outside: dict[int, Floats] = {}
        for index in range(len(self.buckets) - 1, -1, -1):
            bucket = self.buckets[index]
            parts = self._parts(bucket, theta, messages)
            if index in outside:
                parts.append(outside[index][None])
            inward = {c: np.full(kept_shape(bucket.shape, view), -np.inf) for c, view in bucket.children}
            for first, block in blocks(parts, bucket.shape):
                take(index, first, block)
                for child, view in bucket.children:
                    gather(inward[child], block, first, view)
            for child, view in bucket.children:
                arrived = view.back(inward[child])
                dead = np.isneginf(messages[child])
                outside[child] = np.where(dead, -np.inf, arrived - np.where(dead, 0.0, messages[child]))

    def best(self, weight: float, multipliers: Floats) -> tuple[float, Point]:
        """The maximum of ``weight · value − multipliers · cost``, constants included, and where it is."""
        theta = self.theta(weight, multipliers)
        messages = self.ascend(theta)
        total = weight * self.value - float(multipliers @ self.cost)
        total += float(messages[-1]) if messages else 0.0
        return total, self.point(self._trace(theta, messages))

    def marginals(self, multipliers: Floats) -> tuple[float, list[Floats]]:
        """The maximum of ``value − multipliers · cost`` and that of all choices with each option."""
        theta = self.theta(1.0, multipliers)
        messages = self.ascend(theta)
        found = [np.full(size, -np.inf) for size in self.sizes]

        def take(index: int, first: int, block: Floats) -> None:
            variable = self.buckets[index].scope[0]
            found[variable][first : first + len(block)] = block.reshape(len(block), -1).max(axis=1)

        self.descend(theta, messages, take)
        constant = self.value - float(multipliers @ self.cost)
        total = float(messages[-1]) if messages else 0.0
        return total + constant, [marginal + constant for marginal in found]

    def point(self, places: NDArray[np.intp]) -> Point:
        """Value and cost of a choice of local options."""
        value, cost = self.value, self.cost.copy()
        for table in self.tables:
            at = tuple(places[v] for v in table.scope)
            value += float(table.value[at])
            cost += table.cost[(slice(None), *at)]
        return Point(places, value, cost)

    def _trace(self, theta: Sequence[Floats], messages: Sequence[Floats]) -> NDArray[np.intp]:
        places = np.zeros(len(self.sizes), np.intp)
        for bucket in reversed(self.buckets):
            chosen = [places[v] for v in bucket.scope[1:]]
            line = np.zeros(bucket.shape[0])
            for part in self._parts(bucket, theta, messages):
                at = tuple(0 if part.shape[axis] == 1 else place for axis, place in enumerate(chosen, 1))
                line = line + part[(slice(None), *at)]
            places[bucket.scope[0]] = int(line.argmax())
        return places

    def _parts(self, bucket: Bucket, theta: Sequence[Floats], messages: Sequence[Floats]) -> list[Floats]:
        parts = [view.of(theta[table]) for table, view in bucket.tables]
        return parts + [view.of(messages[child]) for child, view in bucket.children]


def _squeezed(
    tables: Iterable[Table], alive: Mapping[int, int], constant: tuple[float, Floats]
) -> tuple[list[Table], tuple[float, Floats]]:
    """Drop the axes of variables with one option; tables without any other are constants."""
    value, cost = constant
    left = []
    for table in tables:
        axes = tuple(axis for axis, v in enumerate(table.scope) if v not in alive)
        worth = table.value.squeeze(axes)
        paid = table.cost.squeeze(tuple(axis + 1 for axis in axes))
        if worth.ndim:
            left.append(Table(tuple(alive[v] for v in table.scope if v in alive), worth, paid))
        else:
            value, cost = value + float(worth), cost + paid
    return left, (value, cost)


def _merged(tables: Iterable[Table]) -> list[Table]:
    """One table a scope, scopes ascending."""
    merged: dict[tuple[int, ...], Table] = {}
    for table in tables:
        order = tuple(int(i) for i in np.argsort(table.scope))
        scope = tuple(table.scope[i] for i in order)
        value = table.value.transpose(order)
        cost = table.cost.transpose(0, *(i + 1 for i in order))
        if scope in merged:
            value, cost = value + merged[scope].value, cost + merged[scope].cost
        merged[scope] = Table(scope, value, cost)
    return list(merged.values())


def _absorbed(tables: Sequence[Table]) -> list[Table]:
    """Fold each table into the smallest one whose scope contains its own."""
    kept: list[Table] = []
    holding: dict[int, list[int]] = {}
    for table in sorted(tables, key=lambda t: (-len(t.scope), -t.value.size)):
        near = holding.get(table.scope[0], [])
        hosts = [i for i in near if set(table.scope) < set(kept[i].scope)]
        if not hosts:
            for v in table.scope:
                holding.setdefault(v, []).append(len(kept))
            kept.append(table)
            continue
        host = min(hosts, key=lambda i: kept[i].value.size)
        scope = kept[host].scope
        at = tuple(slice(None) if v in table.scope else None for v in scope)
        value = kept[host].value + table.value[at]
        cost = kept[host].cost + table.cost[(slice(None), *at)]
        kept[host] = Table(scope, value, cost)
    return kept


def _less(worth: Floats, multipliers: Floats, cost: Floats) -> Floats:
    for multiplier, paid in zip(multipliers, cost, strict=True):
        if multiplier:
            worth = worth - multiplier * paid
    return worth
