"""Several budgets in one call, sharing what does not depend on the budget: tables, bounds, labels.

An option's bound is ``m(λ) + λ·budget`` with ``m`` the same for every budget, so a pass over all options
that one budget needed serves the others. Neighbouring budgets are then searched together, on the network of
the options that any of them may need: each pass takes the multipliers of all, and labels, each of one budget,
are joined in the same steps. What that does not prove is solved alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np

from onnx_mdp.problem import PruningProblem, Solution, SolveLimits
from onnx_mdp.solvers import Solver, solve
from onnx_mdp.solvers.beliefs import Ints, find_beliefs
from onnx_mdp.solvers.buckets import Floats, TooWideError
from onnx_mdp.solvers.dual import solve_duals
from onnx_mdp.solvers.exact import Exact, close, judged_by, window
from onnx_mdp.solvers.incumbent import Incumbent
from onnx_mdp.solvers.network import Network
from onnx_mdp.solvers.pareto_labels import Limits, StoppedError

__all__ = ["solve_front"]

_TOGETHER = 6  # budgets; their options and labels add up, while the number of steps does not grow
_AS_GOOD = 1e-2  # of the bound: passes for other budgets that come so close are enough
_SMALL = 1 << 18  # entries of a pass: then each budget has its own
_CROWDED = 5_000  # labels in one bucket: then each budget alone is cheaper


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
    ascending = [int(budgets_ns[index]) for index in order]
    together = _together(shared, ascending, limits) if shared else [None] * len(ascending)
    found: dict[int, Solution] = {}
    hint = None
    for index, known in zip(order, together, strict=True):
        start = hint

        def one(_: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
            assert shared is not None
            return known or shared.solve(budget_ns, limits, start)  # noqa: B023 - called before the next round

        answer = solve(problem, budgets_ns[index], one if shared else solver, limits)
        hint = answer.choice or hint
        found[index] = answer
    return tuple(found[index] for index in range(len(budgets_ns)))


def _shared(problem: PruningProblem) -> Exact | None:
    try:
        return Exact(problem)
    except TooWideError:
        return None


def _together(exact: Exact, budgets_ns: Sequence[int], limits: SolveLimits) -> list[Solution | None]:
    """Proven answers for ascending budgets, None where a solve of its own is needed."""
    if not exact.paying or exact.summed or not exact.possible or len(budgets_ns) < 2:
        return [None] * len(budgets_ns)
    started = time.perf_counter()
    known = [
        Incumbent(exact.problem, budget_ns, exact.allowance(budget_ns), limits, exact.rounding)
        for budget_ns in budgets_ns
    ]

    def stop() -> bool:
        return time.perf_counter() - started > limits.seconds * len(known)

    first = exact.coarse if exact.worth_a_look else exact.network
    allowances, nothing = [k.allowance for k in known], [-np.inf] * len(known)
    duals = solve_duals(first, allowances, [None] * len(known), stop, nothing)
    able = []
    for one, dual in zip(known, duals, strict=True):
        one.offer(first, dual.best)
        if one.choice is not None and dual.cheapest is None and np.isfinite(dual.bound):
            able.append((one, dual.multipliers, dual.bound))
    for group in _groups(able):
        _search(exact, group, stop)
    seconds = (time.perf_counter() - started) / len(known)
    for smaller, larger in itertools.pairwise(known):
        if smaller.choice is not None:
            larger.offer_choice(smaller.choice)
    return [k.solution("exact", seconds) if k.choice is not None and k.closed else None for k in known]


_Able = tuple[Incumbent, Floats, float]  # multipliers and bound of a first look


def _groups(able: Sequence[_Able]) -> Iterator[Sequence[_Able]]:
    count = -(-len(able) // _TOGETHER)
    for index in range(count):
        yield able[index * len(able) // count : (index + 1) * len(able) // count]


def _search(exact: Exact, group: Sequence[_Able], stop: Callable[[], bool]) -> None:
    """Close the gaps of neighbouring budgets, as far as windows below their bounds allow."""
    known = [one for one, _, _ in group]
    kept = [np.zeros(size, bool) for size in exact.network.sizes]
    as_good = _AS_GOOD if exact.network.entries > _SMALL else 0.0
    for one, multipliers, bound in group:
        top, bounds = exact.bounds_near(one.allowance, multipliers, bound, as_good)
        one.lower(top)
        one.least = bound - max(window(bounds, top), 1e3 * exact.rounding)
        threshold = one.threshold()
        kept = [k | (b > threshold) for k, b in zip(kept, bounds, strict=True)]
    network = _restricted(exact.network, [np.flatnonzero(k) for k in kept])
    if network is None:
        return
    starts = [multipliers for _, multipliers, _ in group]
    network = _windowed(network, known, np.array(starts))
    if network is None:
        return
    allowances = [one.allowance for one in known]
    duals = solve_duals(network, allowances, starts, stop, [max(k.value, k.least) for k in known])
    for one, dual in zip(known, duals, strict=True):
        one.offer(network, dual.best)
        one.lower(-np.inf if dual.cheapest is not None else dual.bound)
    pool = np.array([dual.multipliers for dual in duals])
    budgets = judged_by(np.array(allowances), pool)
    beliefs = find_beliefs(network, budgets, _thresholds(known))
    network = _restricted(network, beliefs.surviving(_thresholds(known)))
    if network is None:
        return
    beliefs = find_beliefs(network, budgets, _thresholds(known))
    for one, reached in zip(known, beliefs.bounds().tolist(), strict=True):
        one.lower(reached)
    with suppress(StoppedError):
        close(known, network, beliefs, Limits(stop, _CROWDED, strict=True), exact.lowest)


def _windowed(network: Network, known: Sequence[Incumbent], pool: Floats) -> Network | None:
    """The network of what each budget needs, by a pass at the multipliers of all of them."""
    totals, marginals = network.marginals(pool)
    kept = [np.zeros(size, bool) for size in network.sizes]
    for one in known:
        extra = pool @ one.allowance
        one.lower(float((totals + extra).min()))
        bounds = [(found + extra[:, None]).min(axis=0) for found in marginals]
        one.least = max(one.least, one.bound - window(bounds, one.bound))
        threshold = np.inf if one.searched else one.threshold()
        kept = [k | (b > threshold) for k, b in zip(kept, bounds, strict=True)]
    return _restricted(network, [np.flatnonzero(k) for k in kept])


def _thresholds(known: Sequence[Incumbent]) -> Floats:
    """What a choice of each budget must be worth to matter; inf where nothing more is asked."""
    return np.array([np.inf if one.searched else one.threshold() for one in known])


def _restricted(network: Network, kept: Sequence[Ints]) -> Network | None:
    """The smaller network, or None where no option or no choice is left."""
    smaller = network.restrict(kept) if all(len(options) for options in kept) else None
    return smaller if smaller is not None and smaller.sizes else None
