"""The tables of the linear program, and which options simple bounds leave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_mdp.planning.problem import Factor, PruningProblem, WidthSum

__all__ = ["MilpTable", "live_options", "merged", "milp_tables", "restricted"]

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]
_Mask = NDArray[np.bool_]

# Dearer than any sum of costs that a problem may hold.
_NEVER_NS = 2**53


@dataclass(frozen=True, slots=True)
class MilpTable:
    """One factor over ascending variables: value, cost, which tuples may be used at all, and what each
    uses of the other budgets, float64[budgets, options of each].
    """

    scope: tuple[int, ...]
    value: _Floats
    cost: _Ints
    allowed: _Mask
    amounts: _Floats


def milp_tables(problem: PruningProblem) -> list[MilpTable]:
    """Return the factors, those of equal scope merged, with the tuples that blocks forbid."""
    tables = []
    for factor in problem.factors:
        shape = tuple(len(problem.variables[index].widths) for index in factor.scope)
        value = np.zeros(shape) if factor.value is None else factor.value
        cost = np.zeros(shape, np.int64) if factor.cost_ns is None else factor.cost_ns
        order = np.argsort(factor.scope)
        scope = tuple(factor.scope[axis] for axis in order)
        value, cost = value.transpose(order), cost.transpose(order)
        amounts = np.zeros((len(problem.budgets), *value.shape))
        tables.append(MilpTable(scope, value, cost, _possible(problem, scope), amounts))
    for row, budget in enumerate(problem.budgets):
        tables += [_amounts(problem, factor, row) for factor in budget.factors]
    return merged(tables)


def _amounts(problem: PruningProblem, factor: Factor, row: int) -> MilpTable:
    """Return a factor of one of the other budgets, worth and costing nothing."""
    assert factor.value is not None
    order = np.argsort(factor.scope)
    scope = tuple(factor.scope[axis] for axis in order)
    used = factor.value.transpose(order)
    amounts = np.zeros((len(problem.budgets), *used.shape))
    nothing, possible = np.zeros(used.shape), _possible(problem, scope)
    budget = problem.budgets[row]
    if budget.peak:
        possible &= used <= budget.allowance - budget.offset
    else:
        amounts[row] = used
    return MilpTable(scope, nothing, nothing.astype(np.int64), possible, amounts)


def _possible(problem: PruningProblem, scope: tuple[int, ...]) -> _Mask:
    """Return which tuples hold all or none of the absent states of a block, bool[options of each]."""
    shape = tuple(len(problem.variables[index].widths) for index in scope)
    grid = dict(zip(scope, np.indices(shape, sparse=True), strict=True))
    possible = np.ones(shape, dtype=bool)
    for block in problem.blocks:
        inside = [grid[member] == 0 for member in block.members if member in grid]
        for absent in inside[1:]:
            possible &= absent == inside[0]
    return possible


def merged(tables: Iterable[MilpTable]) -> list[MilpTable]:
    merged: dict[tuple[int, ...], MilpTable] = {}
    for table in tables:
        if table.scope in merged:
            one = merged[table.scope]
            both = one.allowed & table.allowed
            amounts = one.amounts + table.amounts
            table = MilpTable(table.scope, one.value + table.value, one.cost + table.cost, both, amounts)
        merged[table.scope] = table
    return list(merged.values())


def live_options(problem: PruningProblem, tables: Sequence[MilpTable], budget_ns: int) -> list[_Mask] | None:
    """Return the options that simple bounds leave to each variable, or None when nothing can fit."""
    live = [np.ones(len(variable.widths), dtype=bool) for variable in problem.variables]
    before = None
    while before != (before := [int(mask.sum()) for mask in live]):
        if not all(before) or not _keep_affordable(live, tables, budget_ns - problem.offset_ns):
            return None
        for law in problem.sums:
            _keep_reachable(live, law, problem)
        for block in problem.blocks:
            _keep_together(live, block.members)
    return live


def _keep_affordable(live: list[_Mask], tables: Sequence[MilpTable], slack: int) -> bool:
    """Drop options whose cost, beside the least of everything else, exceeds the budget; False if all do."""
    extra = [np.zeros(len(mask), dtype=np.int64) for mask in live]
    usable = [np.ones(len(mask), dtype=bool) for mask in live]
    for table in tables:
        dear = np.where(table.allowed, table.cost, _NEVER_NS)[_among(table, live)]
        least = int(dear.min())
        slack -= least
        for axis, index in enumerate(table.scope):
            cheapest = dear.min(axis=tuple(other for other in range(dear.ndim) if other != axis))
            usable[index][live[index]] &= cheapest < _NEVER_NS
            extra[index][live[index]] += np.where(cheapest < _NEVER_NS, cheapest - least, 0)
    for mask, added, possible in zip(live, extra, usable, strict=True):
        mask &= possible & (added <= slack)
    return slack >= 0


def _keep_reachable(live: list[_Mask], law: WidthSum, problem: PruningProblem) -> None:
    """Drop the options of the total and the parts of a width sum that complete no solution of it."""
    terms = [c * np.asarray(problem.variables[part].widths, np.int64) for part, c in law.parts]
    before = [np.array([law.offset])]
    for (part, _), term in zip(law.parts, terms, strict=True):
        before.append(np.unique(np.add.outer(before[-1], term[live[part]])))
    totals = np.asarray(problem.variables[law.total].widths, np.int64)
    live[law.total] &= np.isin(totals, before[-1])
    after = totals[live[law.total]]
    for (part, _), term, sums in zip(law.parts[::-1], terms[::-1], before[-2::-1], strict=True):
        live[part] &= np.isin(np.add.outer(term, sums), after).any(axis=1)
        after = np.unique(np.subtract.outer(after, term[live[part]]))


def _keep_together(live: list[_Mask], members: tuple[int, ...]) -> None:
    absent = all(live[member][0] for member in members)
    present = all(live[member][1:].any() for member in members)
    for member in members:
        live[member][0] &= absent
        live[member][1:] &= present


def _among(table: MilpTable, live: Sequence[_Mask]) -> tuple[_Ints, ...]:
    return np.ix_(*(np.flatnonzero(live[index]) for index in table.scope))


def restricted(table: MilpTable, live: Sequence[_Mask]) -> MilpTable:
    """Drop dead options, and variables with one option left: a pair with such a variable becomes unary."""
    at = _among(table, live)
    value, cost, allowed = table.value[at], table.cost[at], table.allowed[at]
    scope = tuple(index for index, size in zip(table.scope, value.shape, strict=True) if size > 1)
    every: tuple[Any, ...] = (slice(None), *at)
    amounts = table.amounts[every].reshape(-1, *value.squeeze().shape)
    return MilpTable(scope, value.squeeze(), cost.squeeze(), allowed.squeeze(), amounts)
