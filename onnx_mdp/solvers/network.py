"""A factor graph with exact (max, +) passes over it, for several vectors of multipliers at a time.

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

from onnx_mdp.planning.problem import Choice
from onnx_mdp.solvers.buckets import (
    Bucket,
    Floats,
    at_states,
    blocks,
    build_buckets,
    centre,
    elimination,
    gather,
    kept_shape,
    largest,
    scatter,
)

__all__ = ["Network", "Options", "Point", "Table"]

Options = NDArray[np.intp]

_LARGE = 1 << 14  # entries of a bucket whose tuples are worth a choice
_SPARSE = 0.4  # of the states


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
        *,
        centred: bool = False,
    ) -> None:
        """Fold single options into the constants, merge the tables, order the variables, build buckets.

        The last bucket of a ``centred`` network is in the middle of its tree.
        """
        alive = [place for place, kept in enumerate(options) if len(kept) > 1]
        self.variables = tuple(variables[place] for place in alive)
        self.options = tuple(options[place] for place in alive)
        self.sizes = tuple(len(kept) for kept in self.options)
        single = {variables[place]: int(kept[0]) for place, kept in enumerate(options) if len(kept) == 1}
        self.fixed = fixed | single
        self.resources = len(constant[1])
        left, (self.value, self.cost) = _squeezed(tables, {v: i for i, v in enumerate(alive)}, constant)
        self.tables = _absorbed(_merged(left))
        scopes = [table.scope for table in self.tables]
        order, separators = elimination(scopes, self.sizes)
        if centred and order:
            order, separators = elimination(scopes, self.sizes, centre(order, separators, self.sizes))
        self.buckets = build_buckets(scopes, order, separators, self.sizes)

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

    def restrict(self, kept: Sequence[Options], *, centred: bool = False) -> Network:
        """The network of the local options that are kept, at least one of each variable."""
        tables = []
        for table in self.tables:
            at: tuple[Any, ...] = np.ix_(*(kept[v] for v in table.scope))
            tables.append(Table(table.scope, table.value[at], table.cost[(slice(None), *at)]))
        options = [own[some] for own, some in zip(self.options, kept, strict=True)]
        constant = (self.value, self.cost)
        return Network(self.variables, options, tables, constant, self.fixed, centred=centred)

    def theta(self, pool: Floats, weights: Floats) -> list[Floats]:
        """``weight · value − multipliers · cost`` of every table, float64[rows, options of each].

        ``pool`` is float64[rows, resources], ``weights`` float64[rows]; weight 0 keeps what is forbidden.
        """
        return [_weighed(table, pool, weights) for table in self.tables]

    def ascend(self, theta: Sequence[Floats], rows: int) -> list[Floats]:
        """The message of every bucket; that of the last one is the maximum over all choices."""
        messages: list[Floats] = []
        for bucket in self.buckets:
            messages.append(largest(self._parts(bucket, theta, messages), rows, bucket.shape))
        return messages

    def descend(
        self,
        theta: Sequence[Floats],
        messages: Sequence[Floats],
        take: Callable[[int, int, Floats], None],
        floors: Floats | None = None,
    ) -> None:
        """Visit what the best choice through every tuple reaches.

        ``take(bucket, first, block)`` gets float64[rows, k, ...], for the bucket's variable at k options
        from ``first`` on, and must not keep it. Buckets come last to first. Tuples that do not reach
        ``floors``, float64[rows], may be left out; then the last axis stands for all but the variable.
        """
        rows = len(messages[0]) if messages else 0
        outside: dict[int, Floats] = {}
        for index in range(len(self.buckets) - 1, -1, -1):
            bucket = self.buckets[index]
            parts = self._parts(bucket, theta, messages)
            if index in outside:
                parts.append(outside[index][:, None])
            # Children that see the same variables are told the same.
            views = {view.others: view for _, view in bucket.children}
            inward = {
                others: np.full((rows, *kept_shape(bucket.shape, view)), -np.inf)
                for others, view in views.items()
            }
            states = _promising(bucket, messages[index], outside.get(index), floors)
            if states is None:
                for first, block in blocks(parts, rows, bucket.shape):
                    take(index, first, block)
                    for others, view in views.items():
                        gather(inward[others], block, first, view)
            elif len(states[0]):
                block = at_states(parts, states)
                take(index, 0, block)
                for others, view in views.items():
                    scatter(inward[others], block, states, view)
            for child, view in bucket.children:
                arrived = view.back(inward[view.others])
                dead = np.isneginf(messages[child])
                outside[child] = np.where(dead, -np.inf, arrived - np.where(dead, 0.0, messages[child]))

    def best(self, pool: Floats, weights: Floats) -> tuple[Floats, list[Point]]:
        """The maxima of ``weight · value − multipliers · cost``, constants included, and where they are.

        Arguments as for `theta`; float64[rows] and a point a row.
        """
        theta = self.theta(pool, weights)
        messages = self.ascend(theta, len(pool))
        totals = weights * self.value - pool @ self.cost
        if messages:
            totals = totals + messages[-1]
        return totals, self.points(self._trace(theta, messages, len(pool)))

    def marginals(self, pool: Floats, depths: Floats | None = None) -> tuple[Floats, list[Floats]]:
        """The maxima of ``value − multipliers · cost`` and those of all choices with each option.

        float64[rows], and float64[rows, options] of every variable. Those that are further than
        ``depths``, float64[rows], below the maximum of their row are only bounded by that.
        """
        theta = self.theta(pool, np.ones(len(pool)))
        messages = self.ascend(theta, len(pool))
        found = [np.full((len(pool), size), -np.inf) for size in self.sizes]

        def take(index: int, first: int, block: Floats) -> None:
            rows, count = block.shape[:2]
            variable = self.buckets[index].scope[0]
            found[variable][:, first : first + count] = block.reshape(rows, count, -1).max(axis=2)

        if messages and depths is not None:
            floors = messages[-1] - depths
            self.descend(theta, messages, take, floors)
            found = [np.maximum(marginal, floors[:, None]) for marginal in found]
        else:
            self.descend(theta, messages, take)
        constant = self.value - pool @ self.cost
        totals = constant + messages[-1] if messages else constant
        return totals, [marginal + constant[:, None] for marginal in found]

    def points(self, places: NDArray[np.intp]) -> list[Point]:
        """Values and costs of choices of local options, ``places`` intp[rows, variables]."""
        values = np.full(len(places), self.value)
        costs = np.repeat(self.cost[None], len(places), axis=0)
        for table in self.tables:
            at: tuple[Any, ...] = tuple(places[:, v] for v in table.scope)
            values += table.value[at]
            costs += table.cost[(slice(None), *at)].T
        return [Point(*one) for one in zip(places, values.tolist(), costs, strict=True)]

    def _trace(self, theta: Sequence[Floats], messages: Sequence[Floats], rows: int) -> NDArray[np.intp]:
        places = np.zeros((rows, len(self.sizes)), np.intp)
        each = np.arange(rows)
        for bucket in reversed(self.buckets):
            chosen = [places[:, v] for v in bucket.scope[1:]]
            line = np.zeros((rows, bucket.shape[0]))
            for part in self._parts(bucket, theta, messages):
                axes = enumerate(chosen, 2)
                at: list[Any] = [0 if part.shape[axis] == 1 else place for axis, place in axes]
                line = line + part[(each, slice(None), *at)]
            places[:, bucket.scope[0]] = line.argmax(axis=1)
        return places

    def _parts(self, bucket: Bucket, theta: Sequence[Floats], messages: Sequence[Floats]) -> list[Floats]:
        parts = [view.of(theta[table]) for table, view in bucket.tables]
        return parts + [view.of(messages[child]) for child, view in bucket.children]


def _promising(
    bucket: Bucket, message: Floats, outside: Floats | None, floors: Floats | None
) -> tuple[NDArray[np.intp], ...] | None:
    """The states of a large bucket's separator that reach the floor of a row; None: visit all."""
    if floors is None or outside is None or bucket.entries < _LARGE or len(bucket.shape) == 1:
        return None
    reach = message + outside > floors.reshape(-1, *[1] * len(bucket.shape[1:]))
    states = np.nonzero(reach.any(axis=0))
    return states if len(states[0]) < _SPARSE * reach[0].size else None


def _weighed(table: Table, pool: Floats, weights: Floats) -> Floats:
    at = (slice(None), *[None] * table.value.ndim)
    worth = table.value[None]
    if (weights == 1).all():
        worth = np.repeat(worth, len(pool), axis=0)
    else:
        allowed = worth > -np.inf
        worth = np.where(allowed, weights[at] * np.where(allowed, worth, 0.0), -np.inf)
    for multipliers, paid in zip(pool.T, table.cost, strict=True):
        if multipliers.any():
            worth -= multipliers[at] * paid
    return worth


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
