"""Why a plan looks as it does: the price of a millisecond, the next cuts, the limits, the removed blocks."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from onnx_mdp.planning.formulation import Formulation
from onnx_mdp.planning.problem import Budget, Factor, PruningProblem, Solution, SolveLimits
from onnx_mdp.solvers import solve
from onnx_mdp.solvers.buckets import TooWideError
from onnx_mdp.solvers.exact import price
from onnx_mdp.solvers.greedy import cuts

__all__ = ["BlockReason", "Explanation", "LimitUse", "NextCut", "explain"]


@dataclass(frozen=True, slots=True)
class NextCut:
    """A single further cut: importance lost (a share of the total) and milliseconds saved by the table."""

    name: str
    importance: float
    saved_ms: float


@dataclass(frozen=True, slots=True)
class LimitUse:
    """A limit, what the plan uses of it, and the importance that lifting it would gain (0: it is slack)."""

    name: str
    used: float
    limit: float
    gain: float


@dataclass(frozen=True, slots=True)
class BlockReason:
    """A removed block: the importance that the best plan with it loses, at the same limits.

    None: with this block kept, no plan fits.
    """

    name: str
    loss: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """``price`` is the importance (share of the total) that one more millisecond would buy."""

    price: float
    next_cuts: tuple[NextCut, ...]
    limits: tuple[LimitUse, ...]
    blocks: tuple[BlockReason, ...]


def explain(
    formulation: Formulation,
    budget_ns: int,
    solution: Solution,
    *,
    most: int = 5,
    limits: SolveLimits = SolveLimits(),
) -> Explanation:
    """Explain a solution of the problem within ``budget_ns``; solves once more for each removed block."""
    assert solution.choice is not None
    problem = formulation.problem
    cheapest = heapq.nsmallest(most, cuts(problem, solution.choice), key=lambda cut: cut.price)
    removed = [name for name, switch in formulation.switch.items() if solution.choice[switch] == 0]
    return Explanation(
        price=_price(problem, budget_ns) * 1e6,
        next_cuts=tuple(NextCut(cut.name, cut.value_lost, cut.saved_ns * 1e-6) for cut in cheapest),
        limits=tuple(_uses(problem, budget_ns, solution, limits)),
        blocks=tuple(_reason(formulation, name, budget_ns, solution, limits) for name in removed),
    )


def _price(problem: PruningProblem, budget_ns: int) -> float:
    try:
        return price(problem, budget_ns)
    except TooWideError:
        return math.nan


def _uses(
    problem: PruningProblem, budget_ns: int, solution: Solution, limits: SolveLimits
) -> Iterator[LimitUse]:
    assert solution.choice is not None
    slowest = problem.offset_ns + sum(int(f.cost_ns.max()) for f in problem.factors if f.cost_ns is not None)
    free = solve(problem, max(slowest, budget_ns), limits=limits)
    gain = max(0.0, free.value - solution.value)
    yield LimitUse("latency", solution.cost_ns * 1e-6, budget_ns * 1e-6, gain)
    for budget in problem.budgets:
        others = tuple(other for other in problem.budgets if other is not budget)
        free = solve(replace(problem, budgets=others), budget_ns, limits=limits)
        gain = max(0.0, free.value - solution.value)
        yield LimitUse(budget.name, budget.amount(solution.choice), budget.limit, gain)


def _reason(
    formulation: Formulation, name: str, budget_ns: int, solution: Solution, limits: SolveLimits
) -> BlockReason:
    problem, switch = formulation.problem, formulation.switch[name]
    gone = np.zeros(len(problem.variables[switch].widths))
    gone[0] = 1.0
    stay = Budget(f"keep {name}", 0.5, (Factor((switch,), gone),), peak=True)
    best = solve(replace(problem, budgets=(*problem.budgets, stay)), budget_ns, limits=limits)
    return BlockReason(name, None if best.choice is None else max(0.0, solution.value - best.value))
