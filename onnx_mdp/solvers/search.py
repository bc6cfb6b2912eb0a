"""The search of a compiled problem for one budget, or for several neighbouring ones together.

An option's bound is ``m(λ) + λ·allowance`` with ``m`` the same for every budget, so a pass over all options
that one budget needed serves the others. Neighbours are searched on the network of the options that any of
them may need: each pass takes the multipliers of all, and labels, each of one budget, are joined in the same
steps. Where labels crowd, the variable that most buckets see is fixed to each of its options in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from onnx_mdp.solvers.beliefs import Budgets, Ints, find_beliefs
from onnx_mdp.solvers.buckets import Floats
from onnx_mdp.solvers.compiled import CompiledProblem, OptionBounds, Wanted
from onnx_mdp.solvers.deepening import FIRST_STEP, close
from onnx_mdp.solvers.dual import Dual, solve_dual, solve_duals
from onnx_mdp.solvers.incumbent import Incumbent
from onnx_mdp.solvers.network import Network
from onnx_mdp.solvers.pareto_labels import Limits, StoppedError

__all__ = ["Search"]

_TOGETHER, _LARGE_TOGETHER = 20, 10  # budgets; options and labels add up, while the number of steps does not
_SMALL, _LARGE = 1 << 15, 1 << 20  # entries of a pass
_DEPTH, _DEEPEST = 3e-4, 2e-3  # of the bound: how far below it passes over a large network look
_CROWDED = 12_000  # labels in one bucket: then fixing a variable that most buckets see is cheaper
_HUB_LEAST, _HUB_SHARE = 4, 0.3  # buckets
_MOST_LABELS = 300_000  # in one bucket; more are cut to the most promising, and the bound says so
_FEW = 6  # options a variable in the first window below the bound
_WIDER = 3.0
_NEARLY = 0.7  # of all options in the window: it may as well be open
# Other multipliers bound other tuples better: a little beside the best those whose choices cost too much or
# too little, and far from them those of a network where one variable moves all others.
_POOL = (1.0, 0.95, 1.05, 0.85, 1.18, 0.7, 1.4)
_POOL_OF_MANY = (1.0, 0.9, 1.1)
_ALIKE = 0.3  # of the way to the best: multipliers of a neighbour so near are as good

_Known = Sequence[Incumbent]


class Search:
    """One search; a resource of `Exact`. ``stop`` tells that the time is up."""

    def __init__(self, compiled: CompiledProblem, stop: Callable[[], bool]) -> None:
        """Search nothing yet."""
        self.compiled, self.stop = compiled, stop
        self.large = compiled.network.entries > _LARGE

    def run(self, known: _Known) -> None:
        """Close the gap of each budget, ascending, unless the time is up first."""
        compiled = self.compiled
        for one in known:
            if not compiled.paying and compiled.problem.offset_ns > one.budget_ns:
                one.infeasible, one.cheapest_ns = True, compiled.problem.offset_ns
            elif not compiled.possible:
                one.infeasible = True
        self._look(_open(known))
        together = _LARGE_TOGETHER if self.large else _TOGETHER
        together = together if compiled.network.resources == 1 else 1
        for most in (together, together, 1):  # the second time with better multipliers
            some = [one for one in _open(known) if most == 1 or not one.alone]
            for group in _groups(some, most):
                self._search(group)

    def _look(self, known: _Known) -> None:
        """Find multipliers on few options of each variable, whose choices become incumbents."""
        coarse = self.compiled.coarse
        able = []
        if coarse is not None:
            for one, dual in self._duals(coarse, known):
                one.offer(coarse, dual.best)
                if dual.cheapest is None and np.isfinite(dual.bound) and dual.bound >= self.compiled.lowest:
                    one.multipliers, one.near = dual.multipliers, dual.bound
                    count = len(self.compiled.problem.variables)
                    one.beside = [coarse.choice(point.places, count) for point in dual.beside]
                    able.append(one)
        rest = [one for one in known if one not in able or one.choice is None]
        for one in self._bounded(self.compiled.network, rest):
            one.near = one.bound

    def _look_closer(self, known: _Known) -> None:
        """Better multipliers and incumbents, from the options around those of the first look."""
        choices = [choice for one in known for choice in one.beside]
        choices += [one.choice for one in known if one.choice is not None]
        if not choices:
            return
        near = self.compiled.around(choices)
        for one, dual in self._duals(near, known):
            one.offer(near, dual.best)
            if dual.cheapest is None and dual.bound > one.near:
                one.multipliers, one.near = dual.multipliers, dual.bound

    def _search(self, known: _Known) -> None:
        """Search the choices in a window below the bound of each budget, then in wider ones."""
        compiled = self.compiled
        loose = self.large and len(known) > 1
        if loose and any(one.bound == np.inf for one in known):  # not again for what a first search left
            self._look_closer(known)
        windows, tops = {}, {}
        depths = [_DEPTH * abs(one.near) for one in known]
        bounds = dict(zip(known, self._option_bounds(known, depths), strict=True))
        for one, found in bounds.items():
            one.alone = False
            one.lower(found.top)
            tops[one] = found.top
            windows[one] = max(_window(found.options, found.top), 1e3 * one.rounding)
            while tops[one] - windows[one] >= one.bound:
                windows[one] *= _WIDER
        left = list(known)
        while left and not self.stop():
            for one in left:
                one.least = tops[one] - windows[one]
                if one.least < bounds[one].floor - one.rounding:
                    (bounds[one],) = self._option_bounds([one], [2 * windows[one]])
                options = bounds[one].options
                kept = sum(int((bound > one.least).sum()) for bound in options)
                nearly = kept > _NEARLY * sum(map(len, options))
                if nearly or one.least < min(compiled.lowest, one.value):
                    one.least = -np.inf  # all that may beat the incumbent
                windows[one] *= _WIDER
            network = self._union(compiled.network, left, {one: bounds[one].options for one in left})
            if network is not None:
                self._explore(network, left)
            for one in left:
                one.infeasible |= one.least == one.bound == -np.inf and one.choice is None
            left = [one for one in _open(left) if one.least > -np.inf and not (loose or one.alone)]

    def _option_bounds(self, known: _Known, depths: Sequence[float]) -> list[OptionBounds]:
        """The bounds of the options of the whole network; if it is large, to depths below their maxima."""
        wanted = []
        for one, depth in zip(known, depths, strict=True):
            assert one.multipliers is not None
            shallow = self.large and depth < _DEEPEST * abs(one.near)
            wanted.append(Wanted(one.allowance, one.multipliers, one.near, depth if shallow else np.inf))
        return self.compiled.bounds_near(wanted)

    def _explore(self, network: Network, known: _Known) -> None:
        """Lower the bound of each budget in this network to ``least`` or to the best choice."""
        left = self._bounded(network, known)
        if not left:
            return
        bounds = self._marginals(network, left)
        floors = {one: one.least for one in left}
        tops = {one: one.bound for one in left}
        windows = {one: max(_window(bounds[one], one.bound), 1e3 * one.rounding) for one in left}
        if network.entries <= _SMALL:  # labels step down by themselves
            windows = dict.fromkeys(left, np.inf)
        while left and not self.stop():
            for one in left:
                least = tops[one] - windows[one]
                hopeless = least < min(self.compiled.lowest, one.value)
                one.least = floors[one] if hopeless else max(floors[one], least)
                windows[one] *= _WIDER
            fixed = self._union(network, left, bounds, centred=True)
            if fixed is not None:
                self._close(fixed, _unsearched(left))
            left = [one for one in _open(left) if one.least > floors[one] and not one.alone]

    def _close(self, network: Network, known: _Known) -> None:
        """Labels, and where they crowd, a variable fixed to each of its options."""
        pool = np.array([one.multipliers for one in known])
        budgets = _judged_by(np.array([one.allowance for one in known]), pool)
        beliefs = find_beliefs(network, budgets, _thresholds(known))
        kept = beliefs.surviving(_thresholds(known))
        if not all(map(len, kept)) or sum(map(len, kept)) < 0.8 * sum(network.sizes):
            smaller = self._restricted(network, kept, known, centred=True)
            if smaller is None:
                return
            network, beliefs = smaller, find_beliefs(smaller, budgets, _thresholds(known))
        for one, reached in zip(known, beliefs.bounds().tolist(), strict=True):
            one.lower(reached)
        hub = _hub(network)
        strict = hub >= 0 or len(known) > 1
        limits = Limits(self.stop, _CROWDED if strict else _MOST_LABELS, strict)
        try:
            crowded = close(known, network, beliefs, limits, self.compiled.lowest)
        except StoppedError:
            return
        if crowded and hub >= 0:
            self._branch(network, crowded, hub)
        else:
            for one in crowded:
                one.alone = True

    def _branch(self, network: Network, known: _Known, hub: int) -> None:
        """Search with a variable fixed to each of its options, the most promising first."""
        bounds = {one: own[hub] for one, own in self._marginals(network, known).items()}
        outer = {one: one.bound for one in known}
        reached = dict.fromkeys(known, -np.inf)
        promise = np.max([bounds[one] - one.bound for one in known], axis=0)
        for option in np.argsort(-promise, kind="stable"):
            some = [one for one in known if bounds[one][option] > one.threshold()]
            if not some or self.stop():
                for one in some:
                    reached[one] = outer[one]
                continue
            for one in some:
                one.bound = outer[one]
            kept = [np.arange(size) for size in network.sizes]
            kept[hub] = np.array([option])
            branch = self._restricted(network, kept, some)
            if branch is not None:
                self._explore(branch, some)
            for one in some:
                reached[one] = max(reached[one], one.bound)
        for one in known:
            one.bound = outer[one]
            one.lower(reached[one])

    def _duals(self, network: Network, known: _Known) -> list[tuple[Incumbent, Dual]]:
        allowances, starts = [one.allowance for one in known], [one.multipliers for one in known]
        most = [max(one.value, one.least) for one in known]
        if network.resources == 1:
            found = solve_duals(network, allowances, starts, self.stop, most)
        else:
            lowest = self.compiled.lowest
            found = [
                solve_dual(network, allowance, start, self.stop, lowest, value)
                for allowance, start, value in zip(allowances, starts, most, strict=True)
            ]
        return list(zip(known, found, strict=True))

    def _bounded(self, network: Network, known: _Known) -> list[Incumbent]:
        """Lower bounds by the dual; the budgets that are not settled by that."""
        left = []
        for one, dual in self._duals(network, known):
            one.offer(network, dual.best)
            nothing = dual.cheapest is not None or dual.bound < self.compiled.lowest
            one.lower(-np.inf if nothing else dual.bound)
            if not nothing or one.multipliers is None:
                one.multipliers, one.near = dual.multipliers, max(one.near, dual.bound)
            if nothing and network is self.compiled.network and one.choice is None:
                one.infeasible = True
                if dual.cheapest is not None and self.compiled.paying:
                    cheapest = float(dual.cheapest.cost[0])
                    one.cheapest_ns = round(cheapest) + self.compiled.problem.offset_ns
            elif dual.reached and one.choice is not None:
                one.lower(one.value)
            elif not nothing:
                left.append(one)
        return _unsearched(left)

    def _marginals(self, network: Network, known: _Known) -> dict[Incumbent, list[Floats]]:
        """The bounds of each budget's options by the multipliers of all; lowers the bounds of the whole."""
        pool = np.array([one.multipliers for one in known])
        totals, marginals = network.marginals(pool)
        bounds = {}
        for one in known:
            extra = pool @ one.allowance
            one.lower(float((totals + extra).min()))
            bounds[one] = [(found + extra[:, None]).min(axis=0) for found in marginals]
        return bounds

    def _union(
        self,
        network: Network,
        known: _Known,
        bounds: dict[Incumbent, list[Floats]],
        *,
        centred: bool = False,
    ) -> Network | None:
        kept = [np.zeros(size, bool) for size in network.sizes]
        for one in known:
            if not one.searched:
                threshold = one.threshold()
                kept = [k | (b > threshold) for k, b in zip(kept, bounds[one], strict=True)]
        return self._restricted(network, [np.flatnonzero(k) for k in kept], known, centred=centred)

    def _restricted(
        self, network: Network, kept: Sequence[Ints], known: _Known, *, centred: bool = False
    ) -> Network | None:
        """The smaller network; None where no more than one choice is left, which is taken if it fits."""
        smaller = network.restrict(kept, centred=centred) if all(map(len, kept)) else None
        if smaller is not None and smaller.sizes:
            return smaller
        for one in known:
            if smaller is not None:
                one.offer(smaller, smaller.points(np.zeros((1, 0), np.intp))[0])
            one.lower(-np.inf)
        return None


def _open(known: _Known) -> list[Incumbent]:
    return [one for one in known if not one.closed]


def _unsearched(known: _Known) -> list[Incumbent]:
    return [one for one in known if not one.searched]


def _groups(known: _Known, most: int) -> Iterator[_Known]:
    count = -(-len(known) // most)
    for index in range(count):
        yield known[index * len(known) // count : (index + 1) * len(known) // count]


def _thresholds(known: _Known) -> Floats:
    """What a choice of each budget must be worth to matter; inf where nothing more is asked."""
    return np.array([np.inf if one.searched else one.threshold() for one in known])


def _judged_by(allowances: Floats, multipliers: Floats) -> Budgets:
    """Budgets with their best multipliers, float64[budgets, resources], and some beside them, which may be
    those of their neighbours.
    """
    shares = _POOL if multipliers.shape[1] == 1 else _POOL_OF_MANY
    pool = list(multipliers)
    judges = np.tile(np.arange(len(pool)), (len(shares), 1)).T
    for place, share in itertools.product(range(len(multipliers)), range(1, len(shares))):
        best = multipliers[place]
        wanted, spare = shares[share] * best, _ALIKE * abs(shares[share] - 1) * float(best.max(initial=0.0))
        far = [float(abs(have - wanted).max(initial=0.0)) for have in pool]
        judges[place, share] = int(np.argmin(far))
        if min(far) > spare:
            judges[place, share] = len(pool)
            pool.append(wanted)
    return Budgets(allowances, np.array(pool), judges)


def _window(bounds: Sequence[Floats], top: float) -> float:
    """How far below ``top`` a few options of each variable reach."""
    every = np.sort(np.concatenate(bounds))[::-1]
    count = min(_FEW * len(bounds), len(every)) - 1
    return max(top - float(every[count]), FIRST_STEP * abs(top))


def _hub(network: Network) -> int:
    """The variable that most buckets see, or -1 if there is none that many see."""
    seen = np.bincount([v for bucket in network.buckets for v in bucket.scope], minlength=1)
    hub = int(seen.argmax())
    return hub if seen[hub] > max(_HUB_LEAST, _HUB_SHARE * len(network.buckets)) else -1
