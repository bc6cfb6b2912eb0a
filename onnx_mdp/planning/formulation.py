"""Structure, importance and latency table in; a pruning problem out.

Each prunable dimension becomes a variable over its width choices; the inner dimensions of a removable block
get one more option, *absent*, and take it together: a removed block costs and is worth nothing. Each cost
term becomes a table over the one to four dimensions it depends on (a layer that reads several, as after a
concat, over their running sum), in integer nanoseconds. The widths of a head are worth something only where
the head stays, so their value is a table over heads and width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.structure import Extent, Structure
from onnx_mdp.errors import UnsupportedModelError
from onnx_mdp.importance.scoring import Importance, ranking
from onnx_mdp.planning.problem import (
    Block,
    Budget,
    Factor,
    PruningProblem,
    Variable,
    WidthSum,
)
from onnx_mdp.planning.resources import Product, mac_products, memory_moments, parameter_products
from onnx_mdp.planning.width_rules import WidthRules, allowed_widths, kept_blocks, tied_blocks
from onnx_mdp.tables.latency import LatencyTable, term_ms

__all__ = ["Caps", "Formulation", "formulate", "to_ns"]

_MAX_ARITY = 4


@dataclass(frozen=True, slots=True)
class Caps:
    """Limits beside the latency: parameters, multiply-accumulates, bytes of activations alive at once, and
    other tables (another device, another batch size) each with its milliseconds.
    """

    params: float | None = None
    macs: float | None = None
    memory: float | None = None
    latencies: tuple[tuple[LatencyTable, float], ...] = ()

    @property
    def any(self) -> bool:
        """Whether anything is limited."""
        return bool(self.latencies) or any(c is not None for c in (self.params, self.macs, self.memory))


@dataclass(frozen=True, slots=True)
class Formulation:
    """A problem and what its variables stand for.

    ``variable`` maps a dimension to its variable; ``switch`` maps a block to the variable whose option 0
    means that the block is gone.
    """

    problem: PruningProblem
    variable: Mapping[int, int]
    switch: Mapping[str, int]


def to_ns(ms: float) -> int:
    """Milliseconds as integer nanoseconds."""
    return round(ms * 1e6)


def formulate(
    structure: Structure,
    importance: Importance,
    table: LatencyTable,
    rules: WidthRules = WidthRules(),
    caps: Caps = Caps(),
) -> Formulation:
    """Build the pruning problem of a model on a device; values are shares of the total importance.

    Raises:
        UsageError: the rules fit no dimension, or ask for a width that does not exist.
        UnsupportedModelError: more dimensions meet in one product than a table has axes.
    """
    builder = _Builder(structure, importance, allowed_widths(structure, table.choices, rules))
    builder.add_blocks(importance, kept_blocks(structure, rules))
    costs, fixed_ns = builder.latency(table)
    builder.factors += costs
    budgets = builder.budgets(caps)
    blocks = tuple(
        Block(" + ".join(tied), tuple(m for name in tied for m in builder.members[name]))
        for tied in tied_blocks(structure, rules)
        if tied[0] in builder.members
    )
    problem = PruningProblem(
        variables=tuple(builder.variables),
        factors=tuple(builder.factors),
        sums=tuple(builder.sums),
        blocks=blocks,
        offset_ns=to_ns(table.calibration.offset_ms) + fixed_ns,
        budgets=tuple(budgets),
    )
    return Formulation(problem, dict(builder.variable), dict(builder.switch))


class _Builder:
    """Collects variables and factors; a resource of `formulate` alone."""

    def __init__(
        self, structure: Structure, importance: Importance, widths: Mapping[int, tuple[int, ...]]
    ) -> None:
        self.structure = structure
        self.importance = importance
        self.widths = widths
        self.variables: list[Variable] = []
        self.factors: list[Factor] = []
        self.sums: list[WidthSum] = []
        self.variable: dict[int, int] = {}
        self.switch: dict[str, int] = {}
        self.members: dict[str, list[int]] = {b.name: [] for b in structure.blocks}
        self.totals: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self.inside = {i: b.name for b in structure.blocks for i in (*b.operations, b.joint)}
        self.total = importance.total or 1.0

    def add_blocks(self, importance: Importance, kept: frozenset[str]) -> None:
        """Add the dimensions, with an absent state in blocks that may go, and what each block is worth."""
        for name in kept:
            self.members.pop(name)
        for index in self.structure.prunable:
            self._add_dimension(index, importance.units[index] / self.total)
        self._add_heads()
        for name, members in self.members.items():
            if not members:
                members.append(self._add(f"block {name}", (0, 1)))
            switch = self.switch[name] = members[0]
            worth = np.full(len(self.variables[switch].widths), importance.blocks.get(name, 0.0) / self.total)
            worth[0] = 0.0
            self.factors.append(Factor((switch,), value=worth))

    def _add(self, name: str, widths: Sequence[int]) -> int:
        self.variables.append(Variable(name, tuple(widths)))
        return len(self.variables) - 1

    def _add_dimension(self, index: int, scores: npt.NDArray[np.float64]) -> None:
        dimension = self.structure.dimensions[index]
        widths = self.widths[index]
        if dimension.block in self.members:
            widths = (0, *widths)
        place = self._add(dimension.name, widths)
        self.variable[index] = place
        if dimension.block in self.members:
            self.members[dimension.block].append(place)
        if dimension.rows > 1 or index in self.importance.inner:
            return
        best = np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])])
        self.factors.append(Factor((place,), value=best[list(widths)]))

    def _add_heads(self) -> None:
        """Values of heads, and of widths as the sum over the heads that stay."""
        for index, place in self.variable.items():
            dimension = self.structure.dimensions[index]
            scores = self.importance.units[index] / self.total
            widths = list(self.variables[place].widths)
            if index in self.importance.inner:
                own = scores[ranking(self.importance, index)]
                self.factors.append(Factor((place,), value=np.concatenate([[0.0], np.cumsum(own)])[widths]))
            if dimension.rows == 1:
                continue
            rows = np.sort(scores.reshape(dimension.rows, -1), axis=1)[:, ::-1].cumsum(1)
            rows = np.concatenate([np.zeros((dimension.rows, 1)), rows], axis=1)[:, widths]
            if dimension.heads in self.variable:
                heads = self.variable[dimension.heads]
                rows = rows[ranking(self.importance, dimension.heads)].cumsum(0)
                rows = np.concatenate([np.zeros((1, len(widths))), rows])
                value = rows[list(self.variables[heads].widths)]
                self.factors.append(Factor((heads, place), value=value))
            else:
                self.factors.append(Factor((place,), value=rows.sum(0)))

    def latency(self, table: LatencyTable) -> tuple[list[Factor], int]:
        """The cost table of every term of a latency table, and what no choice changes, in nanoseconds."""
        factors, fixed_ns = [], 0
        for term in table.terms:
            reads, makes = self._axis(term.reads), self._axis(term.makes)
            scope, gate = self._scope((reads, makes), term.operation)
            if len(scope) > _MAX_ARITY:
                raise UnsupportedModelError(f"one layer depends on more than {_MAX_ARITY} widths: {term.key}")
            costs = np.zeros([len(self.variables[v].widths) for v in scope], np.int64)
            known: dict[tuple[int, int], int] = {}
            for place in itertools.product(*map(range, costs.shape)):
                chosen = dict(zip(scope, place, strict=True))
                if not any(chosen[v] == 0 for v in gate):
                    ab = reads.at(chosen), makes.at(chosen)
                    if ab not in known:
                        known[ab] = to_ns(term_ms(table, term, *ab))
                    costs[place] = known[ab]
            if scope:
                factors.append(Factor(scope, cost_ns=costs))
            else:
                fixed_ns += int(costs)
        return factors, fixed_ns

    def budgets(self, caps: Caps) -> list[Budget]:
        """The budgets beside the latency."""
        found = []
        if caps.params is not None:
            found.append(self._summed("parameters", caps.params, parameter_products(self.structure)))
        if caps.macs is not None:
            found.append(self._summed("multiply-accumulates", caps.macs, mac_products(self.structure)))
        if caps.memory is not None:
            found.append(self._peak(caps.memory))
        for table, milliseconds in caps.latencies:
            factors, fixed_ns = self.latency(table)
            amounts = tuple(
                Factor(f.scope, f.cost_ns.astype(np.float64)) for f in factors if f.cost_ns is not None
            )
            fixed = float(to_ns(table.calibration.offset_ms) + fixed_ns)
            name = f"latency on {table.context['device']}"
            found.append(Budget(name, float(to_ns(milliseconds)), amounts, fixed))
        return found

    def _summed(self, name: str, limit: float, products: Iterable[Product]) -> Budget:
        amounts = [self._amount((product,)) for product in products]
        factors = tuple(Factor(scope, table) for scope, table in amounts if scope)
        return Budget(name, limit, factors, sum(float(table) for scope, table in amounts if not scope))

    def _peak(self, limit: float) -> Budget:
        amounts = [self._amount(moment) for moment in memory_moments(self.structure)]
        factors = [Factor(scope, table) for scope, table in amounts if scope]
        least = max((float(table) for scope, table in amounts if not scope), default=0.0)
        factors.append(Factor((0,), np.full(len(self.variables[0].widths), least)))
        return Budget("activation memory", limit, tuple(factors), peak=True)

    def _amount(self, products: Sequence[Product]) -> tuple[tuple[int, ...], npt.NDArray[np.float64]]:
        """A sum of products as a table."""
        axes = [tuple(map(self._axis, product.extents)) for product in products]
        scopes = [self._scope(own, p.operation) for own, p in zip(axes, products, strict=True)]
        scope = tuple(dict.fromkeys(v for own, _ in scopes for v in own))
        if len(scope) > _MAX_ARITY:
            names = ", ".join(self.variables[v].name for v in scope)
            raise UnsupportedModelError(f"a budget depends on more than {_MAX_ARITY} widths at once: {names}")
        amounts = np.zeros([len(self.variables[v].widths) for v in scope])
        for own, product, (_, gate) in zip(axes, products, scopes, strict=True):
            part = np.full(amounts.shape, product.unit)
            for axis in own:
                part *= _along(scope, axis)
            for variable in gate:
                there = np.arange(len(self.variables[variable].widths)) > 0
                part *= _along(scope, _Axis((variable,), there))
            amounts += part
        return scope, amounts

    def _scope(self, axes: Iterable[_Axis], operation: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The variables of the axes and of the block around an operation, and those that may remove it."""
        scope = list(dict.fromkeys(variable for axis in axes for variable in axis.scope))
        members = self.members.get(self.inside.get(operation, "") if operation is not None else "", [])
        gate = [v for v in scope if v in members]
        if members and not gate:
            gate = [members[0]]
            scope += gate
        return tuple(scope), tuple(gate)

    def _axis(self, extent: Extent) -> _Axis:
        """The variables that an extent depends on, and the extent at each of their options."""
        fixed = extent.fixed
        terms: list[tuple[tuple[int, ...], int]] = []
        for dimensions, coefficient in extent.terms:
            free = tuple(self.variable[i] for i in dimensions if i in self.variable)
            times = [self.structure.dimensions[i].count for i in dimensions if i not in self.variable]
            coefficient *= math.prod(times)
            if free:
                terms.append((free, coefficient))
            else:
                fixed += coefficient
        scope = tuple(dict.fromkeys(v for free, _ in terms for v in free))
        if len(scope) > 1 and all(len(free) == 1 for free, _ in terms):
            place = self._total(fixed, tuple((free[0], coefficient) for free, coefficient in terms))
            return _Axis((place,), np.asarray(self.variables[place].widths))
        if len(scope) >= _MAX_ARITY:
            names = ", ".join(self.variables[v].name for v in scope)
            raise UnsupportedModelError(f"one width is a sum over products of more than 3 others: {names}")
        widths = np.full([len(self.variables[v].widths) for v in scope], fixed, np.int64)
        for free, coefficient in terms:
            product = np.full(widths.shape, coefficient, np.int64)
            for variable in free:
                line = _Axis((variable,), np.asarray(self.variables[variable].widths))
                product *= _along(scope, line).astype(np.int64)
            widths += product
        return _Axis(scope, widths)

    def _total(self, fixed: int, terms: tuple[tuple[int, int], ...]) -> int:
        """A variable for a running sum; its options are all sums that the parts can reach."""
        if (fixed, terms) not in self.totals:
            reachable = {fixed}
            for place, coefficient in terms:
                widths = self.variables[place].widths
                reachable = {total + coefficient * w for total in reachable for w in widths}
            place = self._add(f"sum {len(self.sums)}", sorted(reachable))
            self.sums.append(WidthSum(place, terms, fixed))
            self.totals[fixed, terms] = place
        return self.totals[fixed, terms]


@dataclass(frozen=True, slots=True)
class _Axis:
    """A width as a function of the options of the variables in ``scope``."""

    scope: tuple[int, ...]
    widths: npt.NDArray[Any]

    def at(self, chosen: Mapping[int, int]) -> int:
        return int(self.widths[tuple(chosen[v] for v in self.scope)])


def _along(scope: tuple[int, ...], axis: _Axis) -> npt.NDArray[np.float64]:
    """The widths of an axis, laid along its variables among those of ``scope``."""
    order = sorted(range(len(axis.scope)), key=lambda place: scope.index(axis.scope[place]))
    shape = [1] * len(scope)
    for place in order:
        shape[scope.index(axis.scope[place])] = axis.widths.shape[place]
    return np.asarray(axis.widths, np.float64).transpose(order).reshape(shape)
