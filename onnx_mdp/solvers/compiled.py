"""A problem ready to be searched: its network, what choices may cost, and the bounds that were paid for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnx_mdp.planning.problem import Choice, PruningProblem
from onnx_mdp.solvers.buckets import Floats
from onnx_mdp.solvers.compilation import compile_network
from onnx_mdp.solvers.network import Network

__all__ = ["CompiledProblem", "OptionBounds", "Wanted"]

_ROWS, _ENTRIES = 5, 1 << 20  # of a pass for several allowances: what a cache holds
_COARSE = 12  # options a variable on the first look
_AS_GOOD = 1e-3  # of the bound: passes for other allowances that come so close are enough
_ROUNDING = 1e-12  # of the largest possible value


@dataclass(frozen=True, slots=True, eq=False)
class OptionBounds:
    """Upper bounds of all choices, ``top``, and of those with each option, down to ``floor``."""

    top: float
    floor: float
    options: list[Floats]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Bounds for an allowance by its ``multipliers``, unless others come about as close to ``near``.

    They look no further than ``depth`` below their maximum.
    """

    allowance: Floats
    multipliers: Floats
    near: float
    depth: float


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """What one vector of multipliers found: `Network.marginals`, of all variables in a row."""

    multipliers: Floats
    total: float
    depth: float
    marginals: Floats


class CompiledProblem:
    """The factor graph of a problem; searches for several budgets share the bounds on its options."""

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
        self._in_sums = {v for law in problem.sums for v in (law.total, *(part for part, _ in law.parts))}
        self._passes: list[_Pass] = []

    def allowance(self, budget_ns: int) -> Floats:
        """What the choices may cost of each resource, constants that no choice changes taken off."""
        own = [float(budget_ns - self.problem.offset_ns)] if self.paying else []
        return np.array(own + [budget.allowance - budget.offset for budget in self.summed])

    @cached_property
    def coarse(self) -> Network | None:
        """Some evenly spaced options of each variable; all of those in width sums, which need each other.

        None where that is no smaller, or where nothing has a price.
        """
        network = self.network
        if max(network.sizes, default=0) <= _COARSE or not network.resources:
            return None
        return network.restrict(
            [
                np.arange(size)
                if self._whole(v)
                else np.unique(np.linspace(0, size - 1, _COARSE).round().astype(np.intp))
                for v, size in enumerate(network.sizes)
            ]
        )

    def around(self, choices: Sequence[Choice]) -> Network:
        """The options near those of the choices, five times as dense as in `coarse`."""
        network, kept = self.network, []
        for v, (variable, size) in enumerate(zip(network.variables, network.sizes, strict=True)):
            if self._whole(v):
                kept.append(np.arange(size))
                continue
            chosen = np.searchsorted(network.options[v], [choice[variable] for choice in choices])
            reach = size / _COARSE
            step = max(1, int(np.ceil(reach / 5)))
            steps = np.arange(-np.ceil(reach / step), np.ceil(reach / step) + 1).astype(np.intp) * step
            near = np.unique(chosen[:, None] + steps)
            kept.append(near[(near >= 0) & (near < size)])
        return network.restrict(kept)

    def _whole(self, v: int) -> bool:
        """Whether a first look takes all options of a local variable."""
        variable = self.network.variables[v]
        summed = variable in self._in_sums or variable >= len(self.problem.variables)
        return summed or self.network.sizes[v] <= _COARSE

    def bounds_near(self, wanted: Sequence[Wanted]) -> list[OptionBounds]:
        """The bounds for several allowances by all passes over the network so far, and by those it takes."""
        rows = max(_ROWS, _ENTRIES // max(1, self.network.entries))
        for first in range(0, len(wanted), rows):
            missing = [one for one in wanted[first : first + rows] if not self._suffice(one)]
            if missing:
                depths = np.array([one.depth for one in missing])
                totals, marginals = self.network.marginals(
                    np.array([one.multipliers for one in missing]), depths
                )
                every = np.concatenate(marginals, axis=1)
                self._passes += map(_Pass, (one.multipliers for one in missing), totals, depths, every)
        return [self._bounds(one.allowance) for one in wanted]

    def _suffice(self, one: Wanted) -> bool:
        """Whether the passes so far come close to what is wanted, and look half as far below that."""
        if any((p.multipliers == one.multipliers).all() and p.depth >= one.depth for p in self._passes):
            return True
        found = self._bounds(one.allowance)
        spare = min(_AS_GOOD * abs(found.top), one.depth / 3)
        return found.top - one.near <= spare and found.floor <= one.near - one.depth / 2

    def _bounds(self, allowance: Floats) -> OptionBounds:
        if not self._passes:
            return OptionBounds(np.inf, np.inf, [])
        extra = np.array([float(one.multipliers @ allowance) for one in self._passes])
        tops = extra + [one.total for one in self._passes]
        floors = tops - [one.depth for one in self._passes]
        options = (np.array([one.marginals for one in self._passes]) + extra[:, None]).min(axis=0)
        ends = np.cumsum(self.network.sizes)[:-1]
        return OptionBounds(float(tops.min()), float(floors.min()), np.split(options, ends))
