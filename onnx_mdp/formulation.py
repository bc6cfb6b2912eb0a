"""Structure, importance and latency table in; a pruning problem out; and its solution back to a plan.

Each prunable dimension becomes a variable over its width choices; the inner dimensions of a removable block
get one more option, *absent*, and take it together: a removed block costs and is worth nothing. Each cost
term becomes a table over the one or two dimensions it depends on (a layer that reads several, as after a
concat, over their running sum), in integer nanoseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_mdp._version import __version__
from onnx_mdp.errors import UnsupportedModelError
from onnx_mdp.latency import LatencyTable, Variant, term_ms
from onnx_mdp.plan import PruningPlan
from onnx_mdp.problem import (
    Block,
    Budget,
    Choice,
    Factor,
    PruningProblem,
    Solution,
    Variable,
    WidthSum,
)
from onnx_mdp.resources import Product, mac_products, memory_moments, parameter_products
from onnx_mdp.scoring import Importance, ranking
from onnx_mdp.structure import Extent, Structure
from onnx_mdp.width_rules import WidthRules, allowed_widths, kept_blocks

__all__ = [
    "Caps",
    "Formulation",
    "formulate",
    "plan_from_choice",
    "plan_from_solution",
    "to_ns",
    "variant_from_choice",
]

_MAX_ARITY = 4


@dataclass(frozen=True, slots=True)
class Caps:
    """Limits beside the latency: parameters, multiply-accumulates, bytes of activations alive at once, and
    other tables (another device, another batch size) each with its milliseconds.
    """

    params: float | None = None
    macs: float | None = None
    memory: float | None = None
    latencies: tuple[tuple[LatencyTable, float], ...] = ()

    @property
    def any(self) -> bool:
        """Whether anything is limited."""
        return bool(self.latencies) or any(c is not None for c in (self.params, self.macs, self.memory))


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


def formulate(
    structure: Structure,
    importance: Importance,
    table: LatencyTable,
    rules: WidthRules = WidthRules(),  # noqa: B008 - a frozen value, safe to share
    caps: Caps = Caps(),
) -> Formulation:
    """Build the pruning problem of a model on a device; values are shares of the total importance.

    Raises:
        UsageError: the rules fit no dimension, or ask for a width that does not exist.
        UnsupportedModelError: more dimensions meet in one product than a table has axes.
    """
    builder = _Builder(structure, importance, allowed_widths(structure, table.choices, rules))
    builder.add_blocks(importance, kept_blocks(structure, rules))
    costs, fixed_ns = builder.latency(table)
    builder.factors += costs
    budgets = builder.budgets(caps)
    blocks = tuple(Block(name, tuple(members)) for name, members in builder.members.items() if members)
    problem = PruningProblem(
        variables=tuple(builder.variables),
        factors=tuple(builder.factors),
        sums=tuple(builder.sums),
        blocks=blocks,
        offset_ns=to_ns(table.calibration.offset_ms) + fixed_ns,
        budgets=tuple(budgets),
    )
    return Formulation(problem, dict(builder.variable), dict(builder.switch))


class _Builder:
    """Collects variables and factors; a resource of `formulate` alone."""

    def __init__(
        self, structure: Structure, importance: Importance, widths: Mapping[int, tuple[int, ...]]
    ) -> None:
        self.structure = structure
        self.widths = widths
        self.variables: list[Variable] = []
        self.factors: list[Factor] = []
        self.sums: list[WidthSum] = []
        self.variable: dict[int, int] = {}
        self.switch: dict[str, int] = {}
        self.members: dict[str, list[int]] = {b.name: [] for b in structure.blocks}
        self.totals: dict[Extent, int] = {}
        self.inside = {i: b.name for b in structure.blocks for i in (*b.operations, b.joint)}
        self.total = importance.total or 1.0

    def add_blocks(self, importance: Importance, kept: frozenset[str]) -> None:
        """Add the dimensions, with an absent state in blocks that may go, and what each block is worth."""
        for name in kept:
            self.members.pop(name)
        for index in self.structure.prunable:
            self._add_dimension(index, importance.units[index] / self.total)
        for name, members in self.members.items():
            if not members:
                members.append(self._add(f"block {name}", (0, 1)))
            switch = self.switch[name] = members[0]
            worth = np.full(len(self.variables[switch].widths), importance.blocks.get(name, 0.0) / self.total)
            worth[0] = 0.0
            self.factors.append(Factor((switch,), value=worth))

    def _add(self, name: str, widths: Sequence[int]) -> int:
        self.variables.append(Variable(name, tuple(widths)))
        return len(self.variables) - 1

    def _add_dimension(self, index: int, scores: npt.NDArray[np.float64]) -> None:
        dimension = self.structure.dimensions[index]
        widths = self.widths[index]
        if dimension.block in self.members:
            widths = (0, *widths)
        place = self._add(dimension.name, widths)
        self.variable[index] = place
        if dimension.block in self.members:
            self.members[dimension.block].append(place)
        best = np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])])
        self.factors.append(Factor((place,), value=best[list(widths)]))

    def latency(self, table: LatencyTable) -> tuple[list[Factor], int]:
        """The cost table of every term of a latency table, and what no choice changes, in nanoseconds."""
        factors, fixed_ns = [], 0
        for term in table.terms:
            reads, makes = self._axis(term.reads), self._axis(term.makes)
            scope, gate = self._scope((reads, makes), term.operation)
            costs = np.zeros([len(self.variables[v].widths) for v in scope], np.int64)
            for place in itertools.product(*map(range, costs.shape)):
                chosen = dict(zip(scope, place, strict=True))
                if not any(chosen[v] == 0 for v in gate):
                    costs[place] = to_ns(term_ms(table, term, reads.at(chosen), makes.at(chosen)))
            if scope:
                factors.append(Factor(scope, cost_ns=costs))
            else:
                fixed_ns += int(costs)
        return factors, fixed_ns

    def budgets(self, caps: Caps) -> list[Budget]:
        """The budgets beside the latency."""
        found = []
        if caps.params is not None:
            found.append(self._summed("parameters", caps.params, parameter_products(self.structure)))
        if caps.macs is not None:
            found.append(self._summed("multiply-accumulates", caps.macs, mac_products(self.structure)))
        if caps.memory is not None:
            found.append(self._peak(caps.memory))
        for table, milliseconds in caps.latencies:
            factors, fixed_ns = self.latency(table)
            amounts = tuple(
                Factor(f.scope, f.cost_ns.astype(np.float64)) for f in factors if f.cost_ns is not None
            )
            fixed = float(to_ns(table.calibration.offset_ms) + fixed_ns)
            name = f"latency on {table.context['device']}"
            found.append(Budget(name, float(to_ns(milliseconds)), amounts, fixed))
        return found

    def _summed(self, name: str, limit: float, products: Iterable[Product]) -> Budget:
        amounts = [self._amount((product,)) for product in products]
        factors = tuple(Factor(scope, table) for scope, table in amounts if scope)
        return Budget(name, limit, factors, sum(float(table) for scope, table in amounts if not scope))

    def _peak(self, limit: float) -> Budget:
        amounts = [self._amount(moment) for moment in memory_moments(self.structure)]
        factors = [Factor(scope, table) for scope, table in amounts if scope]
        least = max((float(table) for scope, table in amounts if not scope), default=0.0)
        factors.append(Factor((0,), np.full(len(self.variables[0].widths), least)))
        return Budget("activation memory", limit, tuple(factors), peak=True)

    def _amount(self, products: Sequence[Product]) -> tuple[tuple[int, ...], npt.NDArray[np.float64]]:
        """A sum of products as a table."""
        axes = [tuple(map(self._axis, product.extents)) for product in products]
        scopes = [self._scope(own, p.operation) for own, p in zip(axes, products, strict=True)]
        scope = tuple(dict.fromkeys(v for own, _ in scopes for v in own))
        if len(scope) > _MAX_ARITY:
            names = ", ".join(self.variables[v].name for v in scope)
            raise UnsupportedModelError(f"a budget depends on more than {_MAX_ARITY} widths at once: {names}")
        amounts = np.zeros([len(self.variables[v].widths) for v in scope])
        for own, product, (_, gate) in zip(axes, products, scopes, strict=True):
            part = np.full(amounts.shape, product.unit)
            for axis in own:
                part *= self._along(scope, axis.variable, axis.widths)
            for variable in gate:
                there = np.arange(len(self.variables[variable].widths)) > 0
                part *= self._along(scope, variable, there)
            amounts += part
        return scope, amounts

    def _along(
        self, scope: tuple[int, ...], variable: int | None, line: Sequence[Any] | npt.NDArray[Any]
    ) -> npt.NDArray[np.float64]:
        """A line of numbers on the axis of its variable."""
        shape = [len(line) if v == variable else 1 for v in scope]
        return np.asarray(line, np.float64).reshape(shape if variable is not None else ())

    def _scope(self, axes: Iterable[_Axis], operation: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The variables of the axes and of the block around an operation, and those that may remove it."""
        scope = list(dict.fromkeys(axis.variable for axis in axes if axis.variable is not None))
        members = self.members.get(self.inside.get(operation, "") if operation is not None else "", [])
        gate = [v for v in scope if v in members]
        if members and not gate:
            gate = [members[0]]
            scope += gate
        return tuple(scope), tuple(gate)

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


def plan_from_solution(
    structure: Structure,
    formulation: Formulation,
    importance: Importance,
    table: LatencyTable,
    solution: Solution,
    *,
    state: float = 1.0,
    seed: int = 0,
    command: str = "",
) -> PruningPlan:
    """The plan of a solution, with how it was found; ``state`` scales the table to the machine of now."""
    assert solution.choice is not None
    plan = plan_from_choice(structure, formulation, importance, solution.choice)
    return replace(
        plan,
        predicted_ms=solution.cost_ns * 1e-6 * state,
        importance_share=solution.value,
        status=solution.status,
        bound=solution.bound,
        gap=solution.gap,
        solver=solution.solver,
        seconds=solution.seconds,
        fastest_ms=None if solution.fastest_ns is None else solution.fastest_ns * 1e-6 * state,
        provenance={
            "model": structure.shadow.source,
            "inputs": {name: list(shape) for name, shape in structure.shadow.inputs.items()},
            "table": table.key,
            "context": dict(table.context),
            "criterion": importance.criterion,
            "seed": seed,
            "version": __version__,
            "command": command,
            **({} if solution.note is None else {"note": solution.note}),
        },
    )


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
