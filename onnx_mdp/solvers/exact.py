"""The exact solver: a Lagrangian bound, options fixed by it, and Pareto labels until value and bound meet.

1. On a few options of each variable, the dual gives multipliers and an incumbent.
2. One pass over all options at those multipliers bounds every option. Only those in a window just below the
   bound are searched. Nothing is lost: what is left out is worth less than the lower end of the window.
3. On what is left, the dual again; then labels above a threshold that starts just below the bound and comes
   down until a choice appears. Where the window holds none, a wider one is searched.

A time limit ends this at any point with the incumbent and the bound of that moment. The tables may have any
shape; nothing is assumed to be convex or monotone. The paper (arXiv 2504.02168) solves the same problem by
outer approximation, which is not exact for it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np

from onnx_mdp.errors import SolverError
from onnx_mdp.planning.problem import PruningProblem, Solution, SolveLimits
from onnx_mdp.solvers.buckets import Floats
from onnx_mdp.solvers.compiled import CompiledProblem
from onnx_mdp.solvers.dual import Dual, solve_dual
from onnx_mdp.solvers.incumbent import Incumbent
from onnx_mdp.solvers.search import Search

__all__ = ["Exact", "price", "solve_exact", "upper_bound"]

_NAME = "exact"


def solve_exact(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    """Return the best choice within the budget and its proven bound.

    Raises TooWideError where the graph cannot be eliminated variable by variable, and SolverError when the
    time ends before any choice within several budgets was found.
    """
    return Exact(problem).solve(budget_ns, limits)


def upper_bound(problem: PruningProblem, budget_ns: int) -> float:
    """The Lagrangian bound: no choice within the budget is worth more (−inf where none fits)."""
    dual = _dual_of(problem, budget_ns)
    return -np.inf if dual.cheapest is not None else dual.bound


def price(problem: PruningProblem, budget_ns: int) -> float:
    """What one more nanosecond is worth: the multiplier of the latency at the lowest bound."""
    if not any(factor.cost_ns is not None for factor in problem.factors):
        return 0.0
    return float(_dual_of(problem, budget_ns).multipliers[0])


def _dual_of(problem: PruningProblem, budget_ns: int) -> Dual:
    compiled = CompiledProblem(problem)
    allowance = compiled.allowance(budget_ns)
    return solve_dual(compiled.network, allowance, None, lambda: False, compiled.lowest)


class Exact:
    """A compiled problem; what one budget teaches of bounds and multipliers serves the next."""

    def __init__(self, problem: PruningProblem) -> None:
        """Compile the problem; raises TooWideError as `solve_exact`."""
        self.compiled = CompiledProblem(problem)
        self._multipliers: Floats | None = None  # of the solve before

    def solve(self, budget_ns: int, limits: SolveLimits) -> Solution:
        """Return the best choice within the budget."""
        (answer,) = self.solve_all([budget_ns], limits)
        return answer

    def solve_all(self, budgets_ns: Sequence[int], limits: SolveLimits) -> list[Solution]:
        """Return the best choices for ascending budgets, in ``limits.seconds`` for each on average."""
        started = time.perf_counter()
        end = started + limits.seconds * len(budgets_ns)
        known = [Incumbent(self.compiled, budget_ns, limits.gap) for budget_ns in budgets_ns]
        for one in known:
            one.multipliers = self._multipliers
        Search(self.compiled, lambda: time.perf_counter() > end).run(known)
        self._multipliers = known[-1].multipliers
        for smaller, larger in itertools.pairwise(known):
            if smaller.choice is not None and smaller.value > larger.value:
                larger.offer_choice(smaller.choice)
        seconds = (time.perf_counter() - started) / len(known)
        if any(one.choice is None and not one.infeasible for one in known):
            raise SolverError(
                f"no choice within the budgets was found in {limits.seconds:g} s; allow more seconds"
            )
        return [one.solution(_NAME, seconds) for one in known]
