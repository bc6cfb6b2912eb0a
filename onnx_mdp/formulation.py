"""Structure, importance and latency table in; a pruning problem out; and its solution back to a plan.

Each prunable dimension becomes a variable over its width choices; the inner dimensions of a removable block
get one more option, *absent*, and take it together: a removed block costs and is worth nothing. Each cost
term becomes a table over the one or two dimensions it depends on (a layer that reads several, as after a
concat, over their running sum), in integer nanoseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_mdp.cost_terms import CostTerm
from onnx_mdp.latency import LatencyTable, Variant, term_ms
from onnx_mdp.plan import PruningPlan
from onnx_mdp.problem import Block, Choice, Factor, PruningProblem, Variable, WidthSum
from onnx_mdp.scoring import Importance, ranking
from onnx_mdp.structure import Extent, Structure

__all__ = ["Formulation", "formulate", "plan_from_choice", "to_ns", "variant_from_choice"]


@dataclass(frozen=True, slots=True)
class Formulation:
    """A problem and what its variables stand for.

    ``variable`` maps a dimension to its variable; ``switch`` maps a block to the variable whose option 0
    means that the block is gone.
    """

    problem: PruningProblem
    variable: Mapping[int, int]
    switch: Mapping[str, int]


def to_ns(ms: float) -> int:
    """Milliseconds as integer nanoseconds."""
    return round(ms * 1e6)


def formulate(structure: Structure, importance: Importance, table: LatencyTable) -> Formulation:
    """Build the pruning problem of a model on a device; values are shares of the total importance."""
    builder = _Builder(structure, importance, table)
    for term in table.terms:
        builder.add_term(term)
    blocks = tuple(Block(name, tuple(members)) for name, members in builder.members.items())
    problem = PruningProblem(
        variables=tuple(builder.variables),
        factors=tuple(builder.factors),
        sums=tuple(builder.sums),
        blocks=blocks,
        offset_ns=to_ns(table.calibration.offset_ms) + builder.offset_ns,
    )
    return Formulation(problem, dict(builder.variable), dict(builder.switch))


class _Builder:
    """Collects variables and factors; a resource of `formulate` alone."""

    def __init__(self, structure: Structure, importance: Importance, table: LatencyTable) -> None:
        self.structure = structure
        self.table = table
        self.variables: list[Variable] = []
        self.factors: list[Factor] = []
        self.sums: list[WidthSum] = []
        self.variable: dict[int, int] = {}
        self.switch: dict[str, int] = {}
        self.members: dict[str, list[int]] = {b.name: [] for b in structure.blocks}
        self.totals: dict[Extent, int] = {}
        self.offset_ns = 0
        self.inside = {i: b.name for b in structure.blocks for i in (*b.operations, b.joint)}
        total = importance.total or 1.0
        for index in structure.prunable:
            self._add_dimension(index, importance.units[index] / total)
        for block in structure.blocks:
            if not self.members[block.name]:
                self.members[block.name].append(self._add(f"block {block.name}", (0, 1)))
            switch = self.switch[block.name] = self.members[block.name][0]
            worth = np.full(
                len(self.variables[switch].widths), importance.blocks.get(block.name, 0.0) / total
            )
            worth[0] = 0.0
            self.factors.append(Factor((switch,), value=worth))

    def _add(self, name: str, widths: Sequence[int]) -> int:
        self.variables.append(Variable(name, tuple(widths)))
        return len(self.variables) - 1

    def _add_dimension(self, index: int, scores: npt.NDArray[np.float64]) -> None:
        dimension = self.structure.dimensions[index]
        widths = self.table.choices[index]
        if dimension.block is not None:
            widths = (0, *widths)
        place = self._add(dimension.name, widths)
        self.variable[index] = place
        if dimension.block is not None:
            self.members[dimension.block].append(place)
        best = np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])])
        self.factors.append(Factor((place,), value=best[list(widths)]))

    def add_term(self, term: CostTerm) -> None:
        """Add the cost table of one term, gated by the block around it."""
        reads, makes = self._axis(term.reads), self._axis(term.makes)
        scope = list(dict.fromkeys(v for v in (reads.variable, makes.variable) if v is not None))
        block = self.inside.get(term.operation)
        if block is not None and not any(v in self.members[block] for v in scope):
            scope.append(self.switch[block])
        shape = [len(self.variables[v].widths) for v in scope]
        costs = np.zeros(shape, np.int64)
        for place in itertools.product(*map(range, shape)):
            chosen = dict(zip(scope, place, strict=True))
            gone = block is not None and any(chosen[v] == 0 for v in scope if v in self.members[block])
            if not gone:
                costs[place] = to_ns(term_ms(self.table, term, reads.at(chosen), makes.at(chosen)))
        if scope:
            self.factors.append(Factor(tuple(scope), cost_ns=costs))
        else:
            self.offset_ns += int(costs)

    def _axis(self, extent: Extent) -> _Axis:
        """The variable that an extent depends on, and the extent at each of its options."""
        fixed = extent.fixed
        terms = []
        for index, coefficient in extent.terms:
            if index in self.variable:
                terms.append((self.variable[index], coefficient))
            else:
                fixed += coefficient * len(self.structure.dimensions[index].units)
        if not terms:
            return _Axis(None, (fixed,))
        if len(terms) == 1:
            place, coefficient = terms[0]
            return _Axis(place, tuple(fixed + coefficient * w for w in self.variables[place].widths))
        place = self._total(Extent(fixed, tuple(terms)))
        return _Axis(place, self.variables[place].widths)

    def _total(self, extent: Extent) -> int:
        """A variable for a running sum; its options are all sums that the parts can reach."""
        if extent not in self.totals:
            reachable = {extent.fixed}
            for place, coefficient in extent.terms:
                widths = self.variables[place].widths
                reachable = {total + coefficient * w for total in reachable for w in widths}
            place = self._add(f"sum {len(self.sums)}", sorted(reachable))
            self.sums.append(WidthSum(place, extent.terms, extent.fixed))
            self.totals[extent] = place
        return self.totals[extent]


@dataclass(frozen=True, slots=True)
class _Axis:
    """A width as a function of at most one variable's option."""

    variable: int | None
    widths: tuple[int, ...]

    def at(self, chosen: Mapping[int, int]) -> int:
        return self.widths[0 if self.variable is None else chosen[self.variable]]


def variant_from_choice(structure: Structure, formulation: Formulation, choice: Choice) -> Variant:
    """Kept units and removed blocks of a choice; dimensions of removed blocks count as full."""
    gone = frozenset(name for name, place in formulation.switch.items() if choice[place] == 0)
    kept = {i: len(d.units) for i, d in enumerate(structure.dimensions)}
    for index, place in formulation.variable.items():
        width = formulation.problem.variables[place].widths[choice[place]]
        kept[index] = width or kept[index]
    return Variant(kept, gone)


def plan_from_choice(
    structure: Structure, formulation: Formulation, importance: Importance, choice: Choice
) -> PruningPlan:
    """Keep the most important units of each dimension."""
    variant = variant_from_choice(structure, formulation, choice)
    keep = {}
    for index in formulation.variable:
        dimension = structure.dimensions[index]
        count = variant.kept[index]
        if count < len(dimension.units):
            keep[dimension.name] = tuple(sorted(ranking(importance, index)[:count].tolist()))
    removed = tuple(b.name for b in structure.blocks if b.name in variant.removed_blocks)
    return PruningPlan(keep=keep, removed_blocks=removed)
