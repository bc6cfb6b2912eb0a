"""The Lagrangian dual of the pruning problem: multipliers whose bound is lowest, and the points on the way.

For every λ >= 0, ``max_x value(x) + λ·(allowance − cost(x))`` is an upper bound of the best value within the
allowance. With one resource the bound is convex and piecewise linear in λ, and walking along the hull of
(cost, value) finds its minimum after a few passes; with more, cutting planes (Kelley 1960) do, steadied by
stepping halfway to the best multipliers so far. Every pass also finds a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnx_mdp.solvers.buckets import Floats
from onnx_mdp.solvers.network import Network, Point

__all__ = ["Dual", "solve_dual"]

_WALKS = 60
_ERROR = 1e-14  # of the terms of a bound; large multipliers make them large
_SAME = 1e-11  # relative; the pass found nothing above the segment
# The bound can still fall by at most this share of its distance to the best value: labels close that faster.
_GOOD_ENOUGH = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Dual:
    """Multipliers, their bound (inf: none), the best point within the allowance, and the cheapest.

    ``cheapest`` is set where one resource is too short for any choice. ``reached`` tells whether ``best``
    needs no multipliers: then nothing is better.
    """

    multipliers: Floats
    bound: float
    best: Point | None
    cheapest: Point | None = None
    reached: bool = False


class _Passes:
    """Runs passes and remembers the lowest bound and the best point; a resource of this module."""

    def __init__(self, network: Network, allowance: Floats, stop: Callable[[], bool], known: float) -> None:
        self.network, self.allowance, self.stop = network, allowance, stop
        self.known = known
        self.bound = np.inf
        self.multipliers = np.zeros(network.resources)
        self.best: Point | None = None

    def visit(self, multipliers: Floats, weight: float = 1.0) -> tuple[float, Point]:
        total, point = self.network.best(weight, multipliers)
        if (point.cost <= self.allowance).all() and (self.best is None or point.value > self.best.value):
            self.best = point
        reach = np.abs(multipliers) @ (np.abs(self.allowance) + np.abs(point.cost))
        bound = total + float(multipliers @ self.allowance) + _ERROR * float(reach)
        if weight and bound < self.bound:
            self.bound, self.multipliers = bound, multipliers
        return total, point

    def near(self, least: float) -> bool:
        """Whether a bound that cannot fall below ``least`` is good enough."""
        value = max(self.known, -np.inf if self.best is None else self.best.value)
        return self.bound - least <= _GOOD_ENOUGH * (self.bound - value)

    def result(self, cheapest: Point | None = None, *, reached: bool = False) -> Dual:
        return Dual(self.multipliers, self.bound, self.best, cheapest, reached)


def solve_dual(
    network: Network,
    allowance: Floats,
    start: Floats | None,
    stop: Callable[[], bool],
    lowest: float,
    known: float = -np.inf,
) -> Dual:
    """Minimise the bound, from the multipliers ``start`` if there are any; end early when ``stop`` says so.

    ``lowest`` is below the value of every choice: a bound below it proves that none fits. ``known`` is the
    value of a choice that fits.
    """
    passes = _Passes(network, allowance, stop, known)
    if network.resources == 0:
        passes.visit(np.zeros(0))
        return passes.result(reached=True)
    if network.resources == 1:
        return _walk(passes, None if start is None else float(start[0]))
    return _cut(passes, start, lowest)


def _walk(passes: _Passes, start: float | None) -> Dual:
    """Between a point that costs too much and one that fits, the slope of their segment is the next λ."""
    limit = float(passes.allowance[0])

    def visit(multiplier: float, weight: float = 1.0) -> tuple[float, Point]:
        return passes.visit(np.array([multiplier]), weight)

    over, under = _bracket(visit, limit, start)
    if over is None:
        total, over = visit(0.0)
        if total == -np.inf:  # whatever it costs, no choice is allowed
            return passes.result()
        if over.cost[0] <= limit:
            return passes.result(reached=True)
    if under is None:
        total, under = visit(1.0, weight=0.0)
        if total == -np.inf:
            passes.bound = -np.inf
            return passes.result()
        if under.cost[0] > limit:
            return passes.result(cheapest=under)
    for _ in range(_WALKS):
        if over.cost[0] <= under.cost[0] or over.value <= under.value or passes.stop():
            break
        multiplier = (over.value - under.value) / float(over.cost[0] - under.cost[0])
        if passes.near(under.value + multiplier * (limit - float(under.cost[0]))):
            break
        total, point = visit(multiplier)
        if total - (over.value - multiplier * float(over.cost[0])) <= _SAME * max(1.0, abs(total)):
            break
        if point.cost[0] > limit:
            over = point
        else:
            under = point
    return passes.result()


def _bracket(
    visit: Callable[[float], tuple[float, Point]], limit: float, start: float | None
) -> tuple[Point | None, Point | None]:
    """Step away from ``start``, further each time, until there is a point on either side of the limit."""
    over: Point | None = None
    under: Point | None = None
    factor = 1.5
    multiplier = start or 0.0
    for _ in range(8):
        if multiplier <= 0 or (over is not None and under is not None):
            break
        _, point = visit(multiplier)
        if point.cost[0] > limit:
            over, multiplier = point, multiplier * factor
        else:
            under, multiplier = point, multiplier / factor
        factor *= factor
    return over, under


def _cut(passes: _Passes, start: Floats | None, lowest: float) -> Dual:
    """Kelley's method on multipliers scaled by the allowance, in a box that grows when it binds."""
    from scipy.optimize import linprog  # takes longer to load than most problems to solve

    scale = np.abs(passes.allowance) + 1e-30
    resources = len(scale)
    values, slacks = [], []

    def visit(scaled: Floats) -> None:
        _, point = passes.visit(scaled / scale)
        values.append(point.value)
        slacks.append((passes.allowance - point.cost) / scale)

    visit(np.zeros(resources) if start is None else start * scale)
    if start is None and passes.best is not None:
        return passes.result(reached=True)
    box = 20.0 * abs(values[0]) + 1.0
    for count in range(_WALKS):
        if passes.bound < lowest or passes.stop():
            break
        planes = np.hstack([np.array(slacks), -np.ones((len(values), 1))])
        bounds = [(0.0, box)] * resources + [(None, None)]
        found = linprog(
            np.append(np.zeros(resources), 1.0), planes, -np.array(values), bounds=bounds, method="highs"
        )
        if found.x is None:
            break
        scaled = found.x[:resources]
        if (scaled > 0.999 * box).any() and box < 1e8 * (1 + abs(values[0])):
            box *= 10.0
            visit(scaled)
            continue
        if passes.bound - float(found.fun or 0.0) <= 1e-6 * max(1e-9, abs(passes.bound)):
            break
        visit(0.5 * scaled + 0.5 * passes.multipliers * scale if count > 1 else scaled)
    return passes.result()
