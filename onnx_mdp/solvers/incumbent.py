"""What is known of one budget while it is searched: the best choice so far, and what no other exceeds."""

from __future__ import annotations

import numpy as np

from onnx_mdp.planning.problem import Choice, Solution, Status
from onnx_mdp.solvers.buckets import Floats
from onnx_mdp.solvers.compiled import CompiledProblem
from onnx_mdp.solvers.network import Network, Point

__all__ = ["Incumbent"]

_SHARE = 0.999  # of the gap that may be left; the rest is for rounding


class Incumbent:
    """The best choice within a budget, the bound, and what was left out; a resource of one search.

    ``allowance`` is float64[resources]. ``least`` is set by a search that looks only at choices worth more:
    then the bound goes no lower. ``multipliers`` are the best known, and ``near`` a limit below which the
    bound cannot come; ``beside`` are the choices whose mixture reached it on the first look. ``infeasible``
    says that no choice fits, and ``cheapest_ns`` what the cheapest costs. ``alone`` asks for a search of
    its own.
    """

    def __init__(self, compiled: CompiledProblem, budget_ns: int, gap: float) -> None:
        """Start with nothing; ``gap`` is what may be left, as a share of the bound."""
        self.problem, self.budget_ns, self.gap = compiled.problem, budget_ns, gap
        self.allowance, self.rounding = compiled.allowance(budget_ns), compiled.rounding
        self.value = -np.inf
        self.choice: Choice | None = None
        self.bound, self.floor, self.least = np.inf, -np.inf, -np.inf
        self.infeasible = False
        self.cheapest_ns: int | None = None
        self.multipliers: Floats | None = None
        self.near = -np.inf
        self.beside: list[Choice] = []
        self.alone = False

    @property
    def closed(self) -> bool:
        """Whether nothing is worth more than the gap allows; a bound of −inf says that nothing fits."""
        if self.infeasible or self.bound == -np.inf:
            return True
        left = max(self.gap * abs(self.bound), 3 * self.rounding)
        return self.choice is not None and self.bound < np.inf and self.bound - self.value <= left

    @property
    def searched(self) -> bool:
        """Whether nothing worth more than the threshold can be left."""
        return self.closed or self.bound <= self.threshold()

    def threshold(self) -> float:
        """What a choice must be worth to matter now; whatever is left out below it may be worth that much."""
        if self.choice is None:
            return self.least
        gap = self.gap / (1 + self.gap)  # of the bound, which may be the smaller of the two
        spare = max(_SHARE * gap * abs(self.value), self.rounding)
        self.floor = max(self.floor, self.value + spare)
        return max(self.least, self.value + spare)

    def lower(self, bound: float) -> None:
        """Note a bound; it stays above what was left out."""
        self.bound = max(self.value, self.floor, self.least, min(self.bound, bound))

    def offer(self, network: Network, point: Point | None) -> None:
        """Take a point of a restricted network if it fits and is better."""
        if point is not None and point.value > self.value and (point.cost <= self.allowance).all():
            self.value = point.value
            self.choice = network.choice(point.places, len(self.problem.variables))

    def offer_choice(self, choice: Choice) -> None:
        """Take a choice if it fits and is better."""
        value, cost_ns = self.problem.evaluate(choice)
        if cost_ns <= self.budget_ns and self.problem.within_budgets(choice) and value > self.value:
            self.value, self.choice = value, choice

    def solution(self, solver: str, seconds: float) -> Solution:
        """The choice with its bound, or that there is none."""
        if self.choice is None:
            return Solution.infeasible(self.cheapest_ns, solver, seconds)
        value, cost_ns = self.problem.evaluate(self.choice)
        status: Status = "optimal" if self.closed else "feasible"
        bound = max(self.bound, value)
        return Solution(self.choice, value, cost_ns, bound, status, self.cheapest_ns, solver, seconds)
