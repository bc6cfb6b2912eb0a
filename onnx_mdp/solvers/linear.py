"""A baseline after HALP (arXiv 2110.10811): a layer's latency is linear in the channels that it makes.

What a layer reads is taken at full width, so that the model does not see what pruning one layer saves in the
next. That makes a knapsack, which is solved exactly; its budget shrinks until the true tables say that the
choice fits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from onnx_mdp.errors import SolverError
from onnx_mdp.planning.problem import Factor, PruningProblem, Solution, SolveLimits
from onnx_mdp.solvers.exact import Exact

__all__ = ["solve_linearly"]

_ROUNDS = 30


def solve_linearly(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    """Return a choice within the budget that the linear model calls best; its bound is infinite.

    Raises SolverError where no budget of the linear model leads to a choice that fits.
    """
    started = time.perf_counter()
    simple = Exact(_linear(problem))
    low, high = _least_ns(simple), simple.compiled.problem.evaluate(problem.widest())[1]
    found = None
    for _ in range(_ROUNDS):
        middle = (low + high) // 2
        left = limits.seconds - (time.perf_counter() - started)
        if left <= 0 or middle in (low, high):
            break
        answer = simple.solve(middle, SolveLimits(left, limits.gap))
        assert answer.choice is not None
        if problem.evaluate(answer.choice)[1] <= budget_ns and problem.within_budgets(answer.choice):
            found, low = answer.choice, middle
        else:
            high = middle
    if found is None:
        raise SolverError("the linear model finds no choice within the budget; use another solver")
    value, cost_ns = problem.evaluate(found)
    seconds = time.perf_counter() - started
    return Solution(found, value, cost_ns, math.inf, "feasible", None, "linear", seconds)


def _linear(problem: PruningProblem) -> PruningProblem:
    """The same choices, each cost table replaced by lines through zero, one for each width it makes."""
    factors = []
    for factor in problem.factors:
        factors += [replace(factor, cost_ns=None)] if factor.value is not None else []
        factors += _lines(problem, factor)
    return replace(problem, factors=tuple(factors), budgets=())


def _lines(problem: PruningProblem, factor: Factor) -> Iterator[Factor]:
    """`formulate` names the width that a layer reads first; a table over one width is about that width."""
    if factor.cost_ns is None:
        return
    made = factor.scope[1:] or factor.scope
    whole = int(factor.cost_ns[(-1,) * factor.cost_ns.ndim])
    for variable in made:
        widths = np.asarray(problem.variables[variable].widths)
        line = (whole / len(made) * widths / widths[-1]).round().astype(np.int64)
        yield Factor((variable,), cost_ns=line)


def _least_ns(exact: Exact) -> int:
    _, (point,) = exact.compiled.network.best(np.ones((1, 1)), np.zeros(1))
    return int(point.cost[0]) + exact.compiled.problem.offset_ns
