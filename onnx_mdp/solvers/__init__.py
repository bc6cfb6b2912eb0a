"""Solvers of the pruning problem by name, and one entry that checks whatever they answer.

A solver is a function of (problem, budget_ns, limits). To add one, write it in its own module and name it
in `SOLVERS`, or pass the function itself to `solve`. Modules load when they are used: Pyomo is slow.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

from onnx_mdp.errors import MissingBackendError, SolverError, UsageError
from onnx_mdp.problem import PruningProblem, Solution, SolveLimits, valued_by_cost

__all__ = ["SOLVERS", "SolveLimits", "Solver", "fastest", "solve"]

Solver = Callable[[PruningProblem, int, SolveLimits], Solution]


def _solve_highs(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    _require("highs", "pip install pyomo highspy", "pyomo.environ", "highspy")
    from onnx_mdp.solvers.pyomo_milp import solve_milp

    return solve_milp(problem, budget_ns, limits)


def _solve_exhaustive(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    from onnx_mdp.solvers.exhaustive import solve_exhaustively

    return solve_exhaustively(problem, budget_ns, limits)


SOLVERS: dict[str, Solver] = {
    "exhaustive": _solve_exhaustive,
    "highs": _solve_highs,
}


def solve(
    problem: PruningProblem,
    budget_ns: int,
    solver: str | Solver = "highs",
    limits: SolveLimits = SolveLimits(),  # noqa: B008 - a frozen value, safe to share
) -> Solution:
    """Return the most valuable consistent choice whose cost fits `budget_ns` (nanoseconds, inclusive).

    Value and cost are read again from the problem's tables, whatever the solver said. Raises UsageError
    for an unknown solver, MissingBackendError when its package is missing, and SolverError when the solver
    fails or its choice is inconsistent or over the budget.
    """
    answer = _solver(solver)(problem, int(budget_ns), limits)
    if answer.choice is None:
        _check_infeasible(answer, int(budget_ns))
        return answer
    if not problem.is_consistent(answer.choice):
        raise SolverError(f"solver {answer.solver} returned an inconsistent choice; report this as a bug")
    value, cost_ns = problem.evaluate(answer.choice)
    if cost_ns > budget_ns:
        raise SolverError(
            f"solver {answer.solver} returned {cost_ns} ns for a budget of {budget_ns} ns; "
            "report this as a bug"
        )
    return replace(answer, value=value, cost_ns=cost_ns, bound=max(answer.bound, value))


def fastest(
    problem: PruningProblem,
    solver: str | Solver = "highs",
    limits: SolveLimits = SolveLimits(gap=0.0),  # noqa: B008 - a frozen value, safe to share
) -> Solution:
    """Return the consistent choice of smallest cost, with `fastest_ns` = `cost_ns`.

    The value is not maximised: `bound` repeats it and says nothing about slower choices. Status `feasible`
    means that the limits ended the search before the cost was proven to be the smallest. Raises as `solve`.
    """
    answer = solve(valued_by_cost(problem), 0, solver, limits)
    if answer.choice is None:
        raise SolverError(f"solver {answer.solver} found no consistent choice; report this as a bug")
    value, cost_ns = problem.evaluate(answer.choice)
    return replace(answer, value=value, bound=value, cost_ns=cost_ns, fastest_ns=cost_ns)


def _solver(solver: str | Solver) -> Solver:
    if callable(solver):
        return solver
    if solver not in SOLVERS:
        raise UsageError(f"unknown solver {solver!r}; choose one of {', '.join(sorted(SOLVERS))}")
    return SOLVERS[solver]


def _check_infeasible(answer: Solution, budget_ns: int) -> None:
    if answer.status != "infeasible" or answer.fastest_ns is None:
        raise SolverError(f"solver {answer.solver} returned neither a choice nor the smallest reachable cost")
    if answer.fastest_ns <= budget_ns:
        raise SolverError(
            f"solver {answer.solver} calls {budget_ns} ns infeasible and {answer.fastest_ns} ns reachable; "
            "report this as a bug"
        )


def _require(solver: str, install: str, *modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingBackendError(
                f"solver {solver!r} needs {module}, which does not import ({error}); run: {install}"
            ) from error
