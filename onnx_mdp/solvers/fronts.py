"""Several budgets in one call, sharing what does not depend on the budget: tables, bounds, incumbents.

An option's bound is ``m(λ) + λ·budget`` with ``m`` the same for every budget, so a pass over all options
that one budget needed serves the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx_mdp.problem import PruningProblem, Solution, SolveLimits
from onnx_mdp.solvers import Solver, solve
from onnx_mdp.solvers.buckets import TooWideError
from onnx_mdp.solvers.exact import Exact

__all__ = ["solve_front"]


def solve_front(
    problem: PruningProblem,
    budgets_ns: Sequence[int],
    solver: str | Solver = "exact",
    limits: SolveLimits = SolveLimits(),  # noqa: B008 - a frozen value, safe to share
) -> tuple[Solution, ...]:
    """Return the best choice within each budget, in the order given; more budget is never worth less.

    ``limits`` are those of a single solve. Raises as `solve`.
    """
    order = sorted(range(len(budgets_ns)), key=lambda i: budgets_ns[i])
    shared = _shared(problem) if solver == "exact" else None
    found: dict[int, Solution] = {}
    hint = None
    for index in order:
        start = hint

        def one(_: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
            assert shared is not None
            return shared.solve(budget_ns, limits, start)  # noqa: B023 - called before the next round

        answer = solve(problem, budgets_ns[index], one if shared else solver, limits)
        hint = answer.choice or hint
        found[index] = answer
    return tuple(found[index] for index in range(len(budgets_ns)))


def _shared(problem: PruningProblem) -> Exact | None:
    try:
        return Exact(problem)
    except TooWideError:
        return None
