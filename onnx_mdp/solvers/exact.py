"""The exact solver: a Lagrangian bound, options fixed by it, and Pareto labels until value and bound meet.

1. On a few options of each variable, the dual and a first look at labels give multipliers and an incumbent.
2. One pass over all options at those multipliers bounds every option; what cannot beat the incumbent goes.
   Nothing is lost: the bound is a certificate.
3. On what is left, the dual again; then labels above a threshold that starts just below the bound and comes
   down until a choice appears. Everything that was left out is worth no more than the threshold, so each
   round either lowers the bound or finds the best choice.

A time limit ends this at any point with the incumbent and the bound of that moment. The tables may have any
shape; nothing is assumed to be convex or monotone. The paper (arXiv 2504.02168) solves the same problem by
outer approximation, which is not exact for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from onnx_mdp.errors import SolverError
from onnx_mdp.problem import Choice, PruningProblem, Solution, SolveLimits, Status
from onnx_mdp.solvers.buckets import Floats
from onnx_mdp.solvers.compilation import compile_network
from onnx_mdp.solvers.dual import Dual, solve_dual
from onnx_mdp.solvers.network import Network, Point
from onnx_mdp.solvers.pareto_labels import (
    Beliefs,
    CrowdedError,
    Ints,
    Limits,
    StoppedError,
    best_above,
    find_beliefs,
)

__all__ = ["Exact", "price", "solve_exact", "upper_bound"]

_NAME = "exact"
_COARSE = 12  # options a variable on the first look
_CROWDED = 3000  # labels in one bucket: then fixing a variable that most buckets see is cheaper
_HUB_LEAST, _HUB_SHARE = 4, 0.3  # buckets
_MOST_LABELS = 300_000  # in one bucket; more are cut to the most promising, and the bound says so
_FIRST_STEP = 1e-5  # of the bound
_AS_GOOD = 1e-3  # of the bound: passes of other solves that come so close are enough
_FIRST_SHARE = 0.08  # of the window
_FEW = 6  # options a variable in the first window below the bound
_WIDER = 3.0
_NEARLY = 0.7  # of all options in the window: it may as well be open
_SHARE = 0.999  # of the gap that may be left; the rest is for rounding
_ROUNDING = 1e-12  # of the largest possible value
# Other multipliers bound other tuples better, most of all where one variable moves all others.
_POOL = (1.0, 0.85, 1.18)
_POOL_OF_MANY = (1.0, 0.9, 1.1)


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
    exact = Exact(problem)
    return solve_dual(exact.network, exact.allowance(budget_ns), None, lambda: False, exact.lowest)


class Exact:
    """A compiled problem; solving it for several budgets shares the bounds on options."""

    def __init__(self, problem: PruningProblem) -> None:
        """Compile the problem; see `compile_network`."""
        self.problem = problem
        self.network = compile_network(problem)
        self.summed = [budget for budget in problem.budgets if not budget.peak]
        self.paying = self.network.resources > len(self.summed)
        tables = self.network.tables
        finite = [t.value[np.isfinite(t.value)] for t in tables]
        self.possible = np.isfinite(self.network.value) and all(len(values) for values in finite)
        constant = self.network.value if self.possible else 0.0
        largest = abs(constant) + sum(float(np.abs(v).max(initial=0.0)) for v in finite)
        self.rounding = _ROUNDING * (largest or 1.0)
        least = constant + sum(float(v.min(initial=0.0)) for v in finite)
        self.lowest = least - 1e9 * self.rounding  # a bound so low proves that nothing fits
        self.in_sums = {v for law in problem.sums for v in (law.total, *(part for part, _ in law.parts))}
        self.marginals: list[tuple[Floats, float, list[Floats]]] = []
        self.multipliers: Floats | None = None  # of the solve before

    def solve(self, budget_ns: int, limits: SolveLimits, hint: Choice | None = None) -> Solution:
        """Return the best choice within the budget; ``hint`` is a choice to start from."""
        started = time.perf_counter()
        search = _Search(self, budget_ns, limits, started)
        if hint is not None:
            search.offer_choice(hint)
        search.run()
        if search.multipliers is not None:
            self.multipliers = search.multipliers
        return search.solution()

    def allowance(self, budget_ns: int) -> Floats:
        """What the choices may cost of each resource, constants that no choice changes taken off."""
        own = [float(budget_ns - self.problem.offset_ns)] if self.paying else []
        return np.array(own + [budget.allowance - budget.offset for budget in self.summed])

    @cached_property
    def coarse(self) -> Network:
        """Some evenly spaced options of each variable; all of those in width sums, which need each other."""
        network = self.network
        kept = [
            np.arange(size)
            if size <= _COARSE or variable in self.in_sums or variable >= len(self.problem.variables)
            else np.unique(np.linspace(0, size - 1, _COARSE).round().astype(np.intp))
            for variable, size in zip(network.variables, network.sizes, strict=True)
        ]
        return network.restrict(kept)

    def bounds(self, allowance: Floats) -> tuple[float, list[Floats]]:
        """The bound of all choices, and of those with each option, by all passes so far."""
        top = np.inf
        options = [np.full(size, np.inf) for size in self.network.sizes]
        for multipliers, total, found in self.marginals:
            extra = float(multipliers @ allowance)
            top = min(top, total + extra)
            options = [np.minimum(o, f + extra) for o, f in zip(options, found, strict=True)]
        return top, options

    def add_pass(self, multipliers: Floats) -> None:
        """Bound every option of the whole network at these multipliers; later solves use it too."""
        self.marginals.append((multipliers, *self.network.marginals(multipliers)))


def _window(bounds: Sequence[Floats], top: float) -> float:
    """How far below ``top`` a few options of each variable reach."""
    every = np.sort(np.concatenate(bounds))[::-1]
    count = min(_FEW * len(bounds), len(every)) - 1
    return max(top - float(every[count]), _FIRST_STEP * abs(top))


def _hub(network: Network) -> int:
    """The variable that most buckets see, or -1 if there is none that many see."""
    seen = np.bincount([v for bucket in network.buckets for v in bucket.scope], minlength=1)
    hub = int(seen.argmax())
    return hub if seen[hub] > max(_HUB_LEAST, _HUB_SHARE * len(network.buckets)) else -1


class _Search:
    """One solve: the incumbent, the bound, and what was discarded; a resource of `Exact.solve`."""

    def __init__(self, exact: Exact, budget_ns: int, limits: SolveLimits, started: float) -> None:
        self.exact = exact
        self.problem, self.budget_ns, self.limits, self.started = exact.problem, budget_ns, limits, started
        self.allowance = exact.allowance(budget_ns)
        self.value = -np.inf
        self.choice: Choice | None = None
        self.bound, self.floor, self.least = np.inf, -np.inf, -np.inf
        self.cheapest_ns: int | None = None
        self.infeasible = False
        self.multipliers: Floats | None = None
        self.coarse_bound = -np.inf

    def stop(self) -> bool:
        return time.perf_counter() - self.started > self.limits.seconds

    @property
    def closed(self) -> bool:
        if self.infeasible or self.bound == -np.inf:
            return True
        left = max(self.limits.gap * abs(self.bound), 3 * self.exact.rounding)
        return self.choice is not None and self.bound - self.value <= left

    def threshold(self) -> float:
        """What a choice must be worth to matter now; whatever is left out below it may be worth that much."""
        if self.choice is None:
            return self.least
        gap = self.limits.gap / (1 + self.limits.gap)  # of the bound, which may be the smaller of the two
        spare = max(_SHARE * gap * abs(self.value), self.exact.rounding)
        self.floor = max(self.floor, self.value + spare)
        return max(self.least, self.value + spare)

    def lower(self, bound: float) -> None:
        self.bound = max(self.value, self.floor, self.least, min(self.bound, bound))

    def offer(self, network: Network, point: Point | None) -> None:
        """Take a point of a restricted network that fits as the incumbent if it is better."""
        if point is not None and point.value > self.value and (point.cost <= self.allowance).all():
            self.value = point.value
            self.choice = network.choice(point.places, len(self.problem.variables))

    def offer_choice(self, choice: Choice) -> None:
        value, cost_ns = self.problem.evaluate(choice)
        if cost_ns <= self.budget_ns and self.problem.within_budgets(choice) and value > self.value:
            self.value, self.choice = value, choice

    def run(self) -> None:
        if not self.exact.paying and self.problem.offset_ns > self.budget_ns:
            self.infeasible, self.cheapest_ns = True, self.problem.offset_ns
            return
        if not self.exact.possible:
            self.infeasible = True
            return
        network = self.exact.network
        start = self._look_coarsely()
        if start is None or self.choice is None:
            dual = self._dual(network, start)
            if dual is None or self.closed:
                return
            start = dual.multipliers
        self.multipliers = start
        bounds = self._bounds(start)
        below = max(_window(bounds, self.bound), 1e3 * self.exact.rounding)
        top = self.bound
        while not (self.closed or self.stop()):
            self.least = top - below
            kept = sum(int((bound > self.least).sum()) for bound in bounds)
            if self.least < min(self.exact.lowest, self.value) or kept > _NEARLY * sum(map(len, bounds)):
                self.least = -np.inf  # all that may beat the incumbent
            self._search_above(bounds, start)
            if self.least == -np.inf:
                self.infeasible = self.choice is None and self.bound == -np.inf
                return
            below *= _WIDER

    def _bounds(self, multipliers: Floats) -> list[Floats]:
        """What choices with each option are worth at most; a new pass unless those before are as good."""
        top, bounds = self.exact.bounds(self.allowance)
        if not np.isfinite(top) or top - self.coarse_bound > _AS_GOOD * abs(top):
            self.exact.add_pass(multipliers)
            top, bounds = self.exact.bounds(self.allowance)
        self.lower(top)
        return bounds

    def _search_above(self, bounds: Sequence[Floats], multipliers: Floats) -> None:
        """Search the choices worth more than ``least``; the bound ends there or where the best one is."""
        threshold = self.threshold()
        network = self._restricted(self.exact.network, [np.flatnonzero(b > threshold) for b in bounds])
        if network is None or self.closed or self._single(network):
            return
        self._search_network(network, multipliers)

    def _search_network(self, network: Network, multipliers: Floats) -> None:
        """Lower the bound of a network to ``least`` or to its best choice."""
        dual = self._dual(network, multipliers)
        if dual is None or self.closed:
            return
        smaller = self._fix(network, dual.multipliers)
        if smaller is None or self.closed or self._single(smaller):
            return
        try:
            self._close(smaller, dual.multipliers)
        except CrowdedError:
            self._branch(smaller, dual.multipliers)

    def _branch(self, network: Network, multipliers: Floats) -> None:
        """Search with the most connected variable fixed to each of its options, the most promising first."""
        hub = _hub(network)
        _, marginals = network.marginals(multipliers)
        outer, reached = self.bound, -np.inf
        for option in np.argsort(-marginals[hub], kind="stable"):
            kept = [np.arange(size) for size in network.sizes]
            kept[hub] = np.array([option])
            self.bound = outer
            branch = network.restrict(kept)
            if not self._single(branch) and not self.stop():
                self._search_network(branch, multipliers)
            reached = max(reached, self.bound)
            self.infeasible, self.cheapest_ns = False, None  # said of the branch alone
        self.bound = outer
        self.lower(reached)

    def _look_coarsely(self) -> Floats | None:
        """Multipliers of the network with few options, whose choices become incumbents."""
        exact = self.exact
        if max(exact.network.sizes, default=0) <= _COARSE or exact.network.resources == 0:
            return None
        network = exact.coarse
        dual = solve_dual(network, self.allowance, exact.multipliers, self.stop, exact.lowest)
        self.offer(network, dual.best)
        if dual.cheapest is not None or not np.isfinite(dual.bound) or dual.bound < exact.lowest:
            return None
        self.coarse_bound = dual.bound
        return dual.multipliers

    def _fix(self, network: Network, multipliers: Floats) -> Network | None:
        total, marginals = network.marginals(multipliers)
        extra = float(multipliers @ self.allowance)
        self.lower(total + extra)
        threshold = self.threshold()
        return self._restricted(network, [np.flatnonzero(m + extra > threshold) for m in marginals])

    def _restricted(self, network: Network, kept: Sequence[Ints]) -> Network | None:
        """The smaller network, or None when a variable has no option left: nothing reaches the threshold."""
        if all(len(options) for options in kept):
            return network.restrict(kept)
        self.lower(-np.inf)
        return None

    def _dual(self, network: Network, start: Floats | None) -> Dual | None:
        """Multipliers of the bound, or None when the search is over."""
        known = max(self.value, self.least)
        dual = solve_dual(network, self.allowance, start, self.stop, self.exact.lowest, known)
        if dual.cheapest is not None and self.choice is None and self.least == -np.inf:
            self.infeasible = True
            if self.exact.paying:
                self.cheapest_ns = round(float(dual.cheapest.cost[0])) + self.problem.offset_ns
            return None
        self.offer(network, dual.best)
        if dual.cheapest is not None or dual.bound < self.exact.lowest:
            self.lower(-np.inf)
            self.infeasible = self.choice is None and self.least == -np.inf
            return None
        self.lower(dual.bound)
        if dual.reached and self.choice is not None:
            self.lower(self.value)
            return None
        return dual

    def _close(self, network: Network, multipliers: Floats) -> None:
        """Labels above a falling threshold, until one choice proves to be the best."""
        if self._single(network):
            return
        shares = _POOL if len(multipliers) == 1 else _POOL_OF_MANY
        pool = np.array([share * multipliers for share in shares])
        beliefs = find_beliefs(network, pool, self.allowance, self.threshold())
        smaller = self._shrunk(network, beliefs)
        if smaller is None:
            return
        if self._single(smaller):
            return
        if smaller is not network:
            network = smaller
            beliefs = find_beliefs(network, pool, self.allowance, self.threshold())
        self.lower(beliefs.bound())
        crowded = _hub(network) >= 0
        limits = Limits(self.stop, _CROWDED if crowded else _MOST_LABELS, crowded)
        top = self.bound
        step = max(_FIRST_STEP * abs(top), 3 * self.exact.rounding)
        if np.isfinite(self.least):
            step = max(step, _FIRST_SHARE * (top - self.least))
        try:
            while not self.closed:
                least = self.threshold()
                threshold = max(least, top - step)
                if threshold < self.exact.lowest:
                    threshold = least
                found = best_above(beliefs, threshold, limits)
                self.offer(network, found.point)
                self.lower(max(threshold, found.dropped, self.value))
                if found.dropped > -np.inf or threshold <= least:
                    break
                step *= 3.0 if found.labels < 100 else 1.8 if found.labels < 1000 else 1.35
        except StoppedError:
            pass

    def _single(self, network: Network) -> bool:
        """Whether only one choice is left; it is taken if it fits, and nothing else is better."""
        if network.sizes:
            return False
        self.offer(network, network.point(np.zeros(0, np.intp)))
        self.lower(-np.inf)
        return True

    def _shrunk(self, network: Network, beliefs: Beliefs) -> Network | None:
        """The network of the options that the whole pool leaves, if that is worth building."""
        kept = beliefs.surviving(self.threshold())
        if not all(len(options) for options in kept):
            self.lower(-np.inf)
            return None
        worthwhile = sum(map(len, kept)) < 0.8 * sum(network.sizes)
        return network.restrict(kept) if worthwhile else network

    def solution(self) -> Solution:
        seconds = time.perf_counter() - self.started
        if self.choice is not None:
            value, cost_ns = self.problem.evaluate(self.choice)
            status: Status = "optimal" if self.closed else "feasible"
            bound = max(self.bound, value)
            return Solution(self.choice, value, cost_ns, bound, status, self.cheapest_ns, _NAME, seconds)
        if self.infeasible:
            return Solution.infeasible(self.cheapest_ns, _NAME, seconds)
        raise SolverError(
            f"no choice within the budgets was found in {self.limits.seconds:g} s; allow more seconds"
        )
