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
from onnx_mdp.problem import Choice, PruningProblem, Solution, SolveLimits
from onnx_mdp.solvers.beliefs import Beliefs, Budgets, Ints, find_beliefs
from onnx_mdp.solvers.buckets import Floats
from onnx_mdp.solvers.compilation import compile_network
from onnx_mdp.solvers.dual import Dual, solve_dual
from onnx_mdp.solvers.incumbent import Incumbent
from onnx_mdp.solvers.network import Network
from onnx_mdp.solvers.pareto_labels import Limits, StoppedError, best_above

__all__ = ["Exact", "close", "judged_by", "price", "solve_exact", "upper_bound", "window"]

_NAME = "exact"
_COARSE = 12  # options a variable on the first look
_CROWDED = 3000  # labels in one bucket: then fixing a variable that most buckets see is cheaper
_HUB_LEAST, _HUB_SHARE = 4, 0.3  # buckets
_MOST_LABELS = 300_000  # in one bucket; more are cut to the most promising, and the bound says so
_FIRST_STEP = 1e-5  # of the bound
_AS_GOOD = 1e-3
_FIRST_SHARE = 0.08  # of the window
_FEW = 6  # options a variable in the first window below the bound
_WIDER = 3.0
_NEARLY = 0.7  # of all options in the window: it may as well be open
_ROUNDING = 1e-12  # of the largest possible value
# Other multipliers bound other tuples better, most of all where one variable moves all others.
_POOL = (1.0, 0.7, 0.85, 1.18, 1.4)
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
            search.known.offer_choice(hint)
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

    @property
    def worth_a_look(self) -> bool:
        """Whether `coarse` is smaller than the whole."""
        return max(self.network.sizes, default=0) > _COARSE and self.network.resources > 0

    def bounds(self, allowance: Floats) -> tuple[float, list[Floats]]:
        """The bound of all choices, and of those with each option, by all passes so far."""
        top = np.inf
        options = [np.full(size, np.inf) for size in self.network.sizes]
        for multipliers, total, found in self.marginals:
            extra = float(multipliers @ allowance)
            top = min(top, total + extra)
            options = [np.minimum(o, f + extra) for o, f in zip(options, found, strict=True)]
        return top, options

    def bounds_near(
        self, allowance: Floats, multipliers: Floats, near: float, as_good: float = _AS_GOOD
    ) -> tuple[float, list[Floats]]:
        """`bounds` after a pass at these multipliers, unless those before come close to ``near``."""
        top, bounds = self.bounds(allowance)
        if not np.isfinite(top) or top - near > as_good * abs(top):
            self.add_pass(multipliers)
            top, bounds = self.bounds(allowance)
        return top, bounds

    def add_pass(self, multipliers: Floats) -> None:
        """Bound every option of the whole network at these multipliers; later solves use it too."""
        totals, found = self.network.marginals(multipliers[None])
        self.marginals.append((multipliers, float(totals[0]), [rows[0] for rows in found]))


def close(
    known: Sequence[Incumbent], network: Network, beliefs: Beliefs, limits: Limits, lowest: float
) -> bool:
    """Labels above falling thresholds, until the best choice of each budget of the beliefs is proven.

    False says that budgets were given up as crowded. Raises StoppedError when the time is up.
    """
    tops = [one.bound for one in known]
    steps = [max(_FIRST_STEP * abs(one.bound), 3 * one.rounding) for one in known]
    for index, one in enumerate(known):
        if np.isfinite(one.least):
            steps[index] = max(steps[index], _FIRST_SHARE * (tops[index] - one.least))
    open_ = [index for index, one in enumerate(known) if not one.searched]
    crowded, each = False, 0.0
    while open_:
        thresholds = np.full(len(known), np.inf)
        for index in open_:
            least = known[index].threshold()
            threshold = tops[index] - steps[index]
            thresholds[index] = least if threshold < lowest else max(least, threshold)
        found = best_above(beliefs, thresholds, limits)
        crowded |= bool((found.dropped == np.inf).any())
        before, each = each, found.labels / len(open_)
        slowly = each < 1000 or each < 1.5 * before
        for index in open_:
            known[index].offer(network, found.points[index])
            known[index].lower(max(float(thresholds[index]), float(found.dropped[index]), known[index].value))
            steps[index] *= 3.0 if each < 100 else 1.8 if slowly else 1.35
        cut = found.dropped > -np.inf
        open_ = [index for index in open_ if not (known[index].searched or cut[index])]
    return not crowded


def judged_by(allowances: Floats, multipliers: Floats) -> Budgets:
    """Budgets with their best multipliers, float64[budgets, resources], and some beside them."""
    shares = np.array(_POOL if multipliers.shape[1] == 1 else _POOL_OF_MANY)
    return Budgets(allowances, shares[:, None] * multipliers[:, None])


def window(bounds: Sequence[Floats], top: float) -> float:
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
    """One solve; a resource of `Exact.solve`."""

    def __init__(self, exact: Exact, budget_ns: int, limits: SolveLimits, started: float) -> None:
        self.exact = exact
        self.allowance = exact.allowance(budget_ns)
        self.known = Incumbent(exact.problem, budget_ns, self.allowance, limits, exact.rounding)
        self.seconds, self.started = limits.seconds, started
        self.cheapest_ns: int | None = None
        self.infeasible = False
        self.multipliers: Floats | None = None
        self.coarse_bound = -np.inf

    def stop(self) -> bool:
        return time.perf_counter() - self.started > self.seconds

    @property
    def closed(self) -> bool:
        return self.infeasible or self.known.closed

    def run(self) -> None:
        problem, known = self.exact.problem, self.known
        if not self.exact.paying and problem.offset_ns > known.budget_ns:
            self.infeasible, self.cheapest_ns = True, problem.offset_ns
            return
        if not self.exact.possible:
            self.infeasible = True
            return
        network = self.exact.network
        start = self._look_coarsely()
        if start is None or known.choice is None:
            dual = self._dual(network, start)
            if dual is None or self.closed:
                return
            start = dual.multipliers
        self.multipliers = start
        bounds = self._bounds(start)
        below = max(window(bounds, known.bound), 1e3 * self.exact.rounding)
        top = known.bound
        while not (self.closed or self.stop()):
            known.least = top - below
            kept = sum(int((bound > known.least).sum()) for bound in bounds)
            if known.least < min(self.exact.lowest, known.value) or kept > _NEARLY * sum(map(len, bounds)):
                known.least = -np.inf  # all that may beat the incumbent
            self._search_above(bounds, start)
            if known.least == -np.inf:
                self.infeasible = known.choice is None and known.bound == -np.inf
                return
            below *= _WIDER

    def _bounds(self, multipliers: Floats) -> list[Floats]:
        """What choices with each option are worth at most; a new pass unless those before are as good."""
        top, bounds = self.exact.bounds_near(self.allowance, multipliers, self.coarse_bound)
        self.known.lower(top)
        return bounds

    def _search_above(self, bounds: Sequence[Floats], multipliers: Floats) -> None:
        """Search the choices worth more than ``least``; the bound ends there or where the best one is."""
        threshold = self.known.threshold()
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
        if not self._close(smaller, dual.multipliers):
            self._branch(smaller, dual.multipliers)

    def _branch(self, network: Network, multipliers: Floats) -> None:
        """Search with the most connected variable fixed to each of its options, the most promising first."""
        hub = _hub(network)
        _, marginals = network.marginals(multipliers[None])
        outer, reached = self.known.bound, -np.inf
        for option in np.argsort(-marginals[hub][0], kind="stable"):
            kept = [np.arange(size) for size in network.sizes]
            kept[hub] = np.array([option])
            self.known.bound = outer
            branch = network.restrict(kept)
            if not self._single(branch) and not self.stop():
                self._search_network(branch, multipliers)
            reached = max(reached, self.known.bound)
            self.infeasible, self.cheapest_ns = False, None  # said of the branch alone
        self.known.bound = outer
        self.known.lower(reached)

    def _look_coarsely(self) -> Floats | None:
        """Multipliers of the network with few options, whose choices become incumbents."""
        exact = self.exact
        if not exact.worth_a_look:
            return None
        network = exact.coarse
        dual = solve_dual(network, self.allowance, exact.multipliers, self.stop, exact.lowest)
        self.known.offer(network, dual.best)
        if dual.cheapest is not None or not np.isfinite(dual.bound) or dual.bound < exact.lowest:
            return None
        self.coarse_bound = dual.bound
        return dual.multipliers

    def _fix(self, network: Network, multipliers: Floats) -> Network | None:
        totals, marginals = network.marginals(multipliers[None])
        extra = float(multipliers @ self.allowance)
        self.known.lower(float(totals[0]) + extra)
        threshold = self.known.threshold()
        return self._restricted(network, [np.flatnonzero(m[0] + extra > threshold) for m in marginals])

    def _restricted(self, network: Network, kept: Sequence[Ints]) -> Network | None:
        """The smaller network, or None when a variable has no option left: nothing reaches the threshold."""
        if all(len(options) for options in kept):
            return network.restrict(kept)
        self.known.lower(-np.inf)
        return None

    def _dual(self, network: Network, start: Floats | None) -> Dual | None:
        """Multipliers of the bound, or None when the search is over."""
        known = self.known
        most = max(known.value, known.least)
        dual = solve_dual(network, self.allowance, start, self.stop, self.exact.lowest, most)
        if dual.cheapest is not None and known.choice is None and known.least == -np.inf:
            self.infeasible = True
            if self.exact.paying:
                self.cheapest_ns = round(float(dual.cheapest.cost[0])) + self.exact.problem.offset_ns
            return None
        known.offer(network, dual.best)
        if dual.cheapest is not None or dual.bound < self.exact.lowest:
            known.lower(-np.inf)
            self.infeasible = known.choice is None and known.least == -np.inf
            return None
        known.lower(dual.bound)
        if dual.reached and known.choice is not None:
            known.lower(known.value)
            return None
        return dual

    def _close(self, network: Network, multipliers: Floats) -> bool:
        """Labels above a falling threshold, until one choice proves to be the best; False: too many."""
        if self._single(network):
            return True
        budgets = judged_by(self.allowance[None], multipliers[None])
        beliefs = find_beliefs(network, budgets, self._thresholds())
        smaller = self._shrunk(network, beliefs)
        if smaller is None or self._single(smaller):
            return True
        if smaller is not network:
            network = smaller
            beliefs = find_beliefs(network, budgets, self._thresholds())
        self.known.lower(float(beliefs.bounds()[0]))
        crowded = _hub(network) >= 0
        limits = Limits(self.stop, _CROWDED if crowded else _MOST_LABELS, crowded)
        try:
            return close([self.known], network, beliefs, limits, self.exact.lowest)
        except StoppedError:
            return True

    def _thresholds(self) -> Floats:
        return np.array([self.known.threshold()])

    def _single(self, network: Network) -> bool:
        """Whether only one choice is left; it is taken if it fits, and nothing else is better."""
        if network.sizes:
            return False
        self.known.offer(network, network.points(np.zeros((1, 0), np.intp))[0])
        self.known.lower(-np.inf)
        return True

    def _shrunk(self, network: Network, beliefs: Beliefs) -> Network | None:
        """The network of the options that the whole pool leaves, if that is worth building."""
        kept = beliefs.surviving(self._thresholds())
        if not all(len(options) for options in kept):
            self.known.lower(-np.inf)
            return None
        worthwhile = sum(map(len, kept)) < 0.8 * sum(network.sizes)
        return network.restrict(kept) if worthwhile else network

    def solution(self) -> Solution:
        seconds = time.perf_counter() - self.started
        if self.known.choice is not None:
            return self.known.solution(_NAME, seconds, self.cheapest_ns)
        if self.infeasible:
            return Solution.infeasible(self.cheapest_ns, _NAME, seconds)
        raise SolverError(f"no choice within the budgets was found in {self.seconds:g} s; allow more seconds")
