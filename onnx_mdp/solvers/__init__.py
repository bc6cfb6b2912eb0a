"""Solvers of the pruning problem by name, and one entry that checks whatever they answer.

``exact`` is the default; ``highs`` is the independent cross-check; ``mindtpy`` is the paper's route;
``greedy`` and ``linear`` are baselines; ``exhaustive`` is brute force for tests.

A solver is a function of (problem, budget_ns, limits). To add one, write it in its own module and name it
in `SOLVERS`, or pass the function itself to `solve`. Modules load when they are used: Pyomo is slow.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace

from onnx_mdp.errors import MissingBackendError, SolverError, UsageError
from onnx_mdp.planning.problem import Budget, Factor, PruningProblem, Solution, SolveLimits, valued_by_cost

__all__ = ["SOLVERS", "SolveLimits", "Solver", "cheapest", "fastest", "solve"]

Solver = Callable[[PruningProblem, int, SolveLimits], Solution]


def _solve_highs(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    _require("highs", "pip install pyomo highspy", "pyomo.environ", "highspy")
    from onnx_mdp.solvers.pyomo_milp import solve_milp

    return solve_milp(problem, budget_ns, limits)


def _solve_exhaustive(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    from onnx_mdp.solvers.exhaustive import solve_exhaustively

    return solve_exhaustively(problem, budget_ns, limits)


def _solve_exact(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    from onnx_mdp.solvers.buckets import TooWideError
    from onnx_mdp.solvers.exact import solve_exact

    try:
        return solve_exact(problem, budget_ns, limits)
    except TooWideError as error:
        answer = _solve_highs(problem, budget_ns, limits)
        return replace(answer, note=f"too many widths depend on each other ({error}): solved with highs")


def _solve_greedily(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    from onnx_mdp.solvers.greedy import solve_greedily

    return _checked(solve_greedily, problem, budget_ns, limits)


def _solve_linearly(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    from onnx_mdp.solvers.linear import solve_linearly

    return _checked(solve_linearly, problem, budget_ns, limits)


def _solve_mindtpy(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    _require("mindtpy", "pip install 'onnx-mdp[mindtpy]'", "pyomo.environ", "highspy")
    from onnx_mdp.solvers.mindtpy import solve_by_outer_approximation

    return _checked(solve_by_outer_approximation, problem, budget_ns, limits)


def _checked(heuristic: Solver, problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    """Answer by a method that proves nothing; the exact one tells whether anything fits, and the bound."""
    from onnx_mdp.solvers.buckets import TooWideError
    from onnx_mdp.solvers.exact import upper_bound

    least_ns = _fastest_within_budgets(problem, "exact", limits)
    if least_ns is None or least_ns > budget_ns:
        return Solution.infeasible(least_ns, "exact", 0.0)
    answer = heuristic(problem, budget_ns, limits)
    try:
        bound = max(answer.value, upper_bound(problem, budget_ns))
    except TooWideError:
        bound = math.inf
    return replace(answer, bound=bound, status="feasible", fastest_ns=least_ns)


SOLVERS: dict[str, Solver] = {
    "exact": _solve_exact,
    "exhaustive": _solve_exhaustive,
    "greedy": _solve_greedily,
    "highs": _solve_highs,
    "linear": _solve_linearly,
    "mindtpy": _solve_mindtpy,
}
_HEURISTICS = ("greedy", "linear", "mindtpy")


def solve(
    problem: PruningProblem,
    budget_ns: int,
    solver: str | Solver = "exact",
    limits: SolveLimits = SolveLimits(),
) -> Solution:
    """Return the most valuable consistent choice whose cost fits `budget_ns` (nanoseconds, inclusive).

    Value and cost are read again from the problem's tables, whatever the solver said. Raises UsageError
    for an unknown solver, MissingBackendError when its package is missing, and SolverError when the solver
    fails or its choice is inconsistent or over the budget.
    """
    answer = _solver(solver)(problem, int(budget_ns), limits)
    if answer.choice is None and answer.fastest_ns is None:
        answer = replace(answer, fastest_ns=_fastest_within_budgets(problem, solver, limits))
    if answer.choice is None:
        _check_infeasible(problem, answer, int(budget_ns))
        return replace(answer, cost_ns=answer.fastest_ns or 0)
    if not problem.is_consistent(answer.choice):
        raise SolverError(f"solver {answer.solver} returned an inconsistent choice; report this as a bug")
    if not problem.within_budgets(answer.choice):
        raise SolverError(f"solver {answer.solver} returned a choice over a budget; report this as a bug")
    value, cost_ns = problem.evaluate(answer.choice)
    if cost_ns > budget_ns:
        raise SolverError(
            f"solver {answer.solver} returned {cost_ns} ns for a budget of {budget_ns} ns; "
            "report this as a bug"
        )
    return replace(answer, value=value, cost_ns=cost_ns, bound=max(answer.bound, value))


def fastest(
    problem: PruningProblem,
    solver: str | Solver = "exact",
    limits: SolveLimits = SolveLimits(gap=0.0),
) -> Solution:
    """Return the consistent choice of smallest cost, with `fastest_ns` = `cost_ns`.

    The value is not maximised: `bound` repeats it and says nothing about slower choices. Status `feasible`
    means that the limits ended the search before the cost was proven to be the smallest. Solvers that prove
    nothing leave this to `exact`. Raises as `solve`.
    """
    if solver in _HEURISTICS:
        solver = "exact"
    answer = solve(valued_by_cost(problem), 0, solver, limits)
    if answer.choice is None:
        raise SolverError(f"solver {answer.solver} found no consistent choice; report this as a bug")
    value, cost_ns = problem.evaluate(answer.choice)
    return replace(answer, value=value, bound=value, cost_ns=cost_ns, fastest_ns=cost_ns)


def cheapest(
    problem: PruningProblem,
    least_value: float,
    solver: str | Solver = "exact",
    limits: SolveLimits = SolveLimits(),
) -> Solution:
    """Return the choice of smallest cost among those worth at least ``least_value``.

    ``bound`` is the value of the choice and says nothing about others; ``fastest_ns`` is the proven lower
    limit of the cost, equal to ``cost_ns`` with status `optimal` and gap 0. Infeasible, with no cost, when
    nothing is worth that much. Raises as `solve`.
    """
    amounts = tuple(Factor(f.scope, -f.value) for f in problem.factors if f.value is not None)
    worth = Budget("importance", -least_value, amounts)
    swapped = replace(valued_by_cost(problem), budgets=(*problem.budgets, worth))
    answer = solve(swapped, 0, solver, limits)
    if answer.choice is None:
        return Solution.infeasible(None, answer.solver, answer.seconds)
    value, cost_ns = problem.evaluate(answer.choice)
    limit_ns = problem.offset_ns + math.ceil(-answer.bound - 0.5)
    return replace(answer, value=value, bound=value, cost_ns=cost_ns, fastest_ns=min(limit_ns, cost_ns))


def _fastest_within_budgets(problem: PruningProblem, solver: str | Solver, limits: SolveLimits) -> int | None:
    """The smallest cost where other budgets count too; None when no choice fits those."""
    answer = _solver(solver)(valued_by_cost(problem), 0, SolveLimits(limits.seconds, 0.0))
    return None if answer.choice is None else problem.evaluate(answer.choice)[1]


def _solver(solver: str | Solver) -> Solver:
    if callable(solver):
        return solver
    if solver not in SOLVERS:
        raise UsageError(f"unknown solver {solver!r}; choose one of {', '.join(sorted(SOLVERS))}")
    return SOLVERS[solver]


def _check_infeasible(problem: PruningProblem, answer: Solution, budget_ns: int) -> None:
    if answer.status == "infeasible" and answer.fastest_ns is None and problem.budgets:
        return
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
