"""The Lagrangian dual of the pruning problem: multipliers whose bound is lowest, and the points on the way.

For every λ >= 0, ``max_x value(x) + λ·(allowance − cost(x))`` is an upper bound of the best value within the
allowance. With one resource the bound is convex and piecewise linear in λ, and walking along the hull of
(cost, value) finds its minimum after a few passes; with more, cutting planes (Kelley 1960) do, steadied by
stepping halfway to the best multipliers so far. Every pass also finds a choice, and its bound holds for any
allowance: several allowances walk along the hull together, a pass for all of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_mdp.solvers.buckets import Floats
from onnx_mdp.solvers.network import Network, Point

__all__ = ["Dual", "solve_dual", "solve_duals"]

_WALKS = 60
_ERROR = 1e-14  # of the terms of a bound; large multipliers make them large
_SAME = 1e-11  # relative; the pass found nothing above the segment
# The bound can still fall by at most this share of its distance to the best value: labels close that faster.
_GOOD_ENOUGH = 0.05

_Asked = tuple[float, float]  # weight of the value, multiplier
_Walk = Generator[_Asked, tuple[float, Point], "Dual"]


@dataclass(frozen=True, slots=True, eq=False)
class Dual:
    """Multipliers, their bound (inf: none), the best point within the allowance, and the cheapest.

    ``cheapest`` is set where one resource is too short for any choice. ``reached`` tells whether ``best``
    needs no multipliers: then nothing is better. ``beside`` are the points whose mixture reaches the bound.
    """

    multipliers: Floats
    bound: float
    best: Point | None
    cheapest: Point | None = None
    reached: bool = False
    beside: tuple[Point, ...] = ()


class _Passes:
    """Runs passes and remembers what they found; a resource of this module."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.points: list[Point] = []
        self.values = np.zeros(0)  # of the points
        self.costs = np.zeros((0, network.resources))
        self.bounding = np.zeros(0, bool)  # passes of weight 0 say nothing of values
        self.pool = np.zeros((0, network.resources))
        self.totals = np.zeros(0)

    def visit(self, pool: Floats, weights: Floats) -> list[tuple[float, Point]]:
        totals, points = self.network.best(pool, weights)
        self.points += points
        self.values = np.append(self.values, [point.value for point in points])
        self.costs = np.vstack([self.costs, *(point.cost for point in points)])
        self.bounding = np.append(self.bounding, weights > 0)
        self.pool = np.vstack([self.pool, pool])
        self.totals = np.append(self.totals, totals)
        return list(zip(totals.tolist(), points, strict=True))

    def best(self, allowance: Floats) -> Point | None:
        fitting = np.flatnonzero((self.costs <= allowance).all(axis=1))
        return self.points[fitting[self.values[fitting].argmax()]] if len(fitting) else None

    def lowest(self, allowance: Floats) -> tuple[float, Floats]:
        """The lowest bound, and its multipliers."""
        if not self.bounding.any():
            return np.inf, np.zeros(self.network.resources)
        reach = (self.pool * (np.abs(allowance) + np.abs(self.costs))).sum(axis=1)
        bounds = np.where(self.bounding, self.totals + self.pool @ allowance + _ERROR * reach, np.inf)
        least = int(bounds.argmin())
        return float(bounds[least]), self.pool[least]

    def around(self, limit: float) -> tuple[Point | None, Point | None]:
        """The points next to a limit of the only resource: one that costs too much, and one that fits."""
        order = np.lexsort((self.values, self.costs[:, 0]))
        fitting = int(np.searchsorted(self.costs[order, 0], limit, side="right"))
        under = self.points[order[fitting - 1]] if fitting else None
        if fitting == len(order):
            return None, under
        dear = order[fitting:][self.costs[order[fitting:], 0] == self.costs[order[fitting], 0]]
        return self.points[dear[-1]], under

    def dual(self, allowance: Floats, cheapest: Point | None = None, *, reached: bool = False) -> Dual:
        bound, multipliers = self.lowest(allowance)
        best = self.best(allowance)
        beside = self.around(float(allowance[0])) if self.network.resources == 1 else (best,)
        points = tuple(point for point in beside if point is not None)
        return Dual(multipliers, bound, best, cheapest, reached, points)


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
    if network.resources == 1:
        return solve_duals(network, [allowance], [start], stop, [known])[0]
    passes = _Passes(network)
    if network.resources == 0:
        passes.visit(np.zeros((1, 0)), np.ones(1))
        return passes.dual(allowance, reached=True)
    return _cut(passes, allowance, start, stop, lowest)


def solve_duals(
    network: Network,
    allowances: Sequence[Floats],
    starts: Sequence[Floats | None],
    stop: Callable[[], bool],
    known: Sequence[float],
) -> list[Dual]:
    """Minimise the bound for each allowance of the only resource; arguments as for `solve_dual`."""
    passes = _Passes(network)
    walks: dict[int, _Walk] = {}
    asked: dict[int, _Asked] = {}
    found: dict[int, Dual] = {}

    def advance(index: int, answer: tuple[float, Point] | None) -> None:
        try:
            asked[index] = next(walks[index]) if answer is None else walks[index].send(answer)
        except StopIteration as end:
            asked.pop(index, None)
            found[index] = end.value

    for index, (allowance, start, value) in enumerate(zip(allowances, starts, known, strict=True)):
        first = 0.0 if start is None else float(start[0])
        walks[index] = _walk(passes, allowance, first, stop, value)
        advance(index, None)
    while asked:
        wanted = list(dict.fromkeys(asked.values()))
        weights, pool = np.array([w for w, _ in wanted]), np.array([[m] for _, m in wanted])
        answers = dict(zip(wanted, passes.visit(pool, weights), strict=True))
        for index, question in list(asked.items()):
            advance(index, answers[question])
    return [found[index] for index in range(len(allowances))]


def _walk(
    passes: _Passes, allowance: Floats, multiplier: float, stop: Callable[[], bool], known: float
) -> _Walk:
    """Between a point that costs too much and one that fits, the slope of their segment is the next λ."""
    limit = float(allowance[0])
    factor = 1.5
    for _ in range(8):  # away from the start, further each time, until there is a point on either side
        if multiplier <= 0 or None not in passes.around(limit):
            break
        _, point = yield 1.0, multiplier
        multiplier = multiplier * factor if point.cost[0] > limit else multiplier / factor
        factor *= factor
    over, under = passes.around(limit)
    if over is None:
        total, over = yield 1.0, 0.0
        if total == -np.inf:  # whatever it costs, no choice is allowed
            return passes.dual(allowance)
        if over.cost[0] <= limit:
            return passes.dual(allowance, reached=True)
    if under is None:
        total, under = yield 0.0, 1.0
        if total == -np.inf:
            return Dual(np.zeros(1), -np.inf, None)
        if under.cost[0] > limit:
            return passes.dual(allowance, under)
    for _ in range(_WALKS):
        over, under = passes.around(limit)
        assert over is not None
        assert under is not None
        if over.value <= under.value or stop():
            break
        multiplier = (over.value - under.value) / float(over.cost[0] - under.cost[0])
        if _near(passes, allowance, under.value + multiplier * (limit - float(under.cost[0])), known):
            break
        total, _ = yield 1.0, multiplier
        if total - (over.value - multiplier * float(over.cost[0])) <= _SAME * max(1.0, abs(total)):
            break
    return passes.dual(allowance)


def _near(passes: _Passes, allowance: Floats, least: float, known: float) -> bool:
    """Whether a bound that cannot fall below ``least`` is good enough."""
    best = passes.best(allowance)
    value = max(known, -np.inf if best is None else best.value)
    bound, _ = passes.lowest(allowance)
    return bound - least <= _GOOD_ENOUGH * (bound - value)


def _cut(
    passes: _Passes, allowance: Floats, start: Floats | None, stop: Callable[[], bool], lowest: float
) -> Dual:
    """Kelley's method on multipliers scaled by the allowance, in a box that grows when it binds."""
    from scipy.optimize import linprog  # takes longer to load than most problems to solve

    scale = np.abs(allowance) + 1e-30
    resources = len(scale)
    values, slacks = [], []

    def visit(scaled: Floats) -> None:
        ((_, point),) = passes.visit((scaled / scale)[None], np.ones(1))
        values.append(point.value)
        slacks.append((allowance - point.cost) / scale)

    visit(np.zeros(resources) if start is None else start * scale)
    if start is None and passes.best(allowance) is not None:
        return passes.dual(allowance, reached=True)
    box = 20.0 * abs(values[0]) + 1.0
    for count in range(_WALKS):
        bound, multipliers = passes.lowest(allowance)
        if bound < lowest or stop():
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
        if bound - float(found.fun or 0.0) <= 1e-6 * max(1e-9, abs(bound)):
            break
        visit(0.5 * scaled + 0.5 * multipliers * scale if count > 1 else scaled)
    return passes.dual(allowance)
