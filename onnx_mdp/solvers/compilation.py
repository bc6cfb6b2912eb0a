"""The tables of a pruning problem: blocks become forbidden tuples, width sums tables over running sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_mdp.planning.problem import PruningProblem, WidthSum
from onnx_mdp.solvers.buckets import MAX_BUCKET, TooWideError
from onnx_mdp.solvers.network import Network, Table

__all__ = ["compile_network"]


def compile_network(problem: PruningProblem) -> Network:
    """Turn a problem into tables; resource 0 is the latency if any choice changes it, then the budgets.

    Raises TooWideError where an elimination bucket, or a table of a width sum, would be too large.
    """
    paying = [factor for factor in problem.factors if factor.cost_ns is not None]
    summed = [budget for budget in problem.budgets if not budget.peak]
    resources = int(bool(paying)) + len(summed)
    sizes = [len(variable.widths) for variable in problem.variables]
    tables = []
    for factor in problem.factors:
        shape = tuple(sizes[v] for v in factor.scope)
        cost = np.zeros((resources, *shape))
        if factor.cost_ns is not None:
            cost[0] = factor.cost_ns
        tables.append(Table(factor.scope, np.zeros(shape) if factor.value is None else factor.value, cost))
    for row, budget in enumerate(summed, int(bool(paying))):
        for factor in budget.factors:
            assert factor.value is not None
            cost = np.zeros((resources, *factor.value.shape))
            cost[row] = factor.value
            tables.append(Table(factor.scope, np.zeros(factor.value.shape), cost))
    for budget in problem.budgets:
        for factor in budget.factors if budget.peak else ():
            assert factor.value is not None
            allowed = factor.value <= budget.allowance - budget.offset
            tables.append(_law_table(factor.scope, allowed, resources))
    for law in problem.sums:
        tables += _sum_tables(problem, law, sizes, resources)
    scopes = [set(table.scope) for table in tables]
    for block in problem.blocks:
        for one, other in _links(block.members, scopes):
            allowed = (np.arange(sizes[one]) == 0)[:, None] == (np.arange(sizes[other]) == 0)[None]
            tables.append(_law_table((one, other), allowed, resources))
    options = [np.arange(size) for size in sizes]
    return Network(range(len(sizes)), options, tables, (0.0, np.zeros(resources)), {})


def _law_table(scope: tuple[int, ...], allowed: NDArray[np.bool_], resources: int) -> Table:
    return Table(scope, np.where(allowed, 0.0, -np.inf), np.zeros((resources, *allowed.shape)))


def _links(members: Sequence[int], scopes: Sequence[set[int]]) -> list[tuple[int, int]]:
    """Pairs that tie the members together: all that meet in a table anyway, and what is missing."""
    together = [
        (a, b) for i, a in enumerate(members) for b in members[i + 1 :] if any({a, b} <= s for s in scopes)
    ]
    group = {member: member for member in members}

    def root(v: int) -> int:
        while group[v] != v:
            v = group[v]
        return v

    for a, b in together:
        group[root(a)] = root(b)
    links = list(together)
    for member in members[1:]:
        if root(member) != root(members[0]):
            links.append((members[0], member))
            group[root(member)] = root(members[0])
    return links


def _sum_tables(problem: PruningProblem, law: WidthSum, sizes: list[int], resources: int) -> list[Table]:
    """Tables that hold a width sum; sums of the first parts are new variables, added to ``sizes``."""
    tables = []
    *early, last = law.parts
    running = np.array([law.offset])
    scope: tuple[int, ...] = ()
    for count, (part, coefficient) in enumerate(early, 1):
        reached = np.add.outer(running, coefficient * np.asarray(problem.variables[part].widths)).ravel()
        if count == 1:
            running, scope = reached, (part,)  # one part: its own options say the sum
            continue
        sums = np.unique(reached)
        if reached.size * sums.size > MAX_BUCKET:
            raise TooWideError(float(reached.size) * sums.size)
        sizes.append(len(sums))
        shape = (*(sizes[v] for v in (*scope, part)), len(sums))
        allowed = (reached[:, None] == sums[None]).reshape(shape)
        tables.append(_law_table((*scope, part, len(sizes) - 1), allowed, resources))
        running, scope = sums, (len(sizes) - 1,)
    part, coefficient = last
    reached = np.add.outer(running, coefficient * np.asarray(problem.variables[part].widths))
    reached = reached if scope else reached[0]
    totals = np.asarray(problem.variables[law.total].widths)
    if reached.size * totals.size > MAX_BUCKET:
        raise TooWideError(float(reached.size) * totals.size)
    allowed = reached[..., None] == totals
    tables.append(_law_table((*scope, part, law.total), allowed, resources))
    return tables
