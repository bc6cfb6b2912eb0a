"""Several budgets in one call: `exact` searches neighbours together, other solvers one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_mdp.planning.problem import PruningProblem, Solution, SolveLimits
from onnx_mdp.solvers import Solver, solve
from onnx_mdp.solvers.buckets import TooWideError
from onnx_mdp.solvers.exact import Exact

__all__ = ["solve_front"]


def solve_front(
    problem: PruningProblem,
    budgets_ns: Sequence[int],
    solver: str | Solver = "exact",
    limits: SolveLimits = SolveLimits(),
) -> tuple[Solution, ...]:
    """Return the best choice within each budget, in the order given; more budget is never worth less.

    ``limits`` are those of a single solve. Raises as `solve`.
    """
    ascending = sorted({int(budget_ns) for budget_ns in budgets_ns})
    known = _together(problem, ascending, limits) if solver == "exact" else {}

    def answer_of(budget_ns: int) -> Solution:
        def look_up(_: PruningProblem, budget_ns: int, __: SolveLimits) -> Solution:
            return known[budget_ns]

        return solve(problem, budget_ns, look_up if known else solver, limits)

    found = {budget_ns: answer_of(budget_ns) for budget_ns in ascending}
    return tuple(found[int(budget_ns)] for budget_ns in budgets_ns)


def _together(problem: PruningProblem, budgets_ns: Sequence[int], limits: SolveLimits) -> dict[int, Solution]:
    try:
        exact = Exact(problem)
    except TooWideError:
        return {}
    return dict(zip(budgets_ns, exact.solve_all(budgets_ns, limits), strict=True))
