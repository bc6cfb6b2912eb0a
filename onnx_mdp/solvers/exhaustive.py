"""Brute force over all choices: the yardstick that the other solvers are tested against."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from onnx_mdp.errors import UsageError
from onnx_mdp.planning.problem import PruningProblem, Solution, SolveLimits

__all__ = ["MAX_COMBINATIONS", "solve_exhaustively"]

MAX_COMBINATIONS = 2_000_000
_CHUNK = 1 << 16

_Choices = NDArray[np.int64]


def solve_exhaustively(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    """Return the best choice within the budget; among equals the cheapest, then the first in order.

    `limits` are ignored: the answer is exact. Raises UsageError above `MAX_COMBINATIONS` combinations.
    """
    started = time.perf_counter()
    best: tuple[float, int, tuple[int, ...]] | None = None
    fastest_ns: int | None = None
    for consistent in _consistent_choices(problem):
        choices = consistent[_are_within_budgets(problem, consistent)]
        if not len(choices):
            continue
        value, cost_ns = _evaluate_all(problem, choices)
        least = int(cost_ns.min())
        fastest_ns = least if fastest_ns is None else min(least, fastest_ns)
        fits = np.flatnonzero(cost_ns <= budget_ns)
        if fits.size:
            first = fits[np.lexsort((cost_ns[fits], -value[fits]))[0]]
            found = (float(value[first]), -int(cost_ns[first]), tuple(int(i) for i in choices[first]))
            best = found if best is None or found[:2] > best[:2] else best
    seconds = time.perf_counter() - started
    if best is None or fastest_ns is None:
        return Solution.infeasible(fastest_ns, "exhaustive", seconds)
    best_value, best_cost = problem.evaluate(best[2])
    return Solution(best[2], best_value, best_cost, best_value, "optimal", fastest_ns, "exhaustive", seconds)


def _consistent_choices(problem: PruningProblem) -> Iterator[_Choices]:
    """Yield the consistent choices in lexicographic order, int64[some, variables] at a time."""
    counts = tuple(len(variable.widths) for variable in problem.variables)
    total = math.prod(counts)
    if total > MAX_COMBINATIONS:
        raise UsageError(
            f"the exhaustive solver stops at {MAX_COMBINATIONS} combinations and this problem has {total}; "
            "use another solver"
        )
    for start in range(0, total, _CHUNK):
        flat = np.arange(start, min(start + _CHUNK, total))
        choices = np.stack(np.unravel_index(flat, counts), axis=1) if counts else np.zeros((1, 0), np.int64)
        kept = choices[_are_consistent(problem, choices)]
        if len(kept):
            yield kept


def _are_consistent(problem: PruningProblem, choices: _Choices) -> NDArray[np.bool_]:
    right = np.ones(len(choices), dtype=bool)
    for law in problem.sums:
        terms = [c * _widths(problem, choices, part) for part, c in law.parts]
        right &= _widths(problem, choices, law.total) == law.offset + np.sum(terms, axis=0)
    for block in problem.blocks:
        absent = choices[:, block.members] == 0
        right &= absent.all(axis=1) | ~absent.any(axis=1)
    return right


def _are_within_budgets(problem: PruningProblem, choices: _Choices) -> NDArray[np.bool_]:
    within = np.ones(len(choices), dtype=bool)
    for budget in problem.budgets:
        amount = np.full(len(choices), -np.inf if budget.peak and budget.factors else 0.0)
        for factor in budget.factors:
            assert factor.value is not None
            used = factor.value[tuple(choices[:, index] for index in factor.scope)]
            amount = np.maximum(amount, used) if budget.peak else amount + used
        within &= budget.offset + amount <= budget.allowance
    return within


def _widths(problem: PruningProblem, choices: _Choices, index: int) -> _Choices:
    return np.asarray(problem.variables[index].widths, dtype=np.int64)[choices[:, index]]


def _evaluate_all(problem: PruningProblem, choices: _Choices) -> tuple[NDArray[np.float64], _Choices]:
    value = np.zeros(len(choices))
    cost_ns = np.full(len(choices), problem.offset_ns, dtype=np.int64)
    for factor in problem.factors:
        at = tuple(choices[:, index] for index in factor.scope)
        if factor.value is not None:
            value += factor.value[at]
        if factor.cost_ns is not None:
            cost_ns += factor.cost_ns[at]
    return value, cost_ns
