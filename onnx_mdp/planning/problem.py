"""The pruning problem: a factor graph of width choices with values, costs and a budget.

A **choice** picks one option of every variable. Its value and cost are sums of table entries,

    value(x) = Σ_f V_f(x_f)        cost_ns(x) = offset_ns + Σ_f C_f(x_f),

and it is **consistent** when every width sum and every block holds. A solver maximises the value over
the consistent choices whose cost fits a budget. Tables may have any shape: nothing is assumed to be
monotone, convex or separable. Costs are integers, so a sum does not depend on its order.

There is no ONNX in here: `formulate` makes the problem, the solvers read it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Block",
    "Budget",
    "Choice",
    "Factor",
    "PruningProblem",
    "Solution",
    "SolveLimits",
    "Status",
    "Variable",
    "WidthSum",
    "valued_by_cost",
]

Choice = tuple[int, ...]
Status = Literal["optimal", "feasible", "infeasible"]

_MAX_ARITY = 4
# Beyond 2**53 neighbouring integers share one float64, and a linear solver could not tell them apart.
_MAX_TOTAL_NS = 2**53
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Variable:
    """One dimension and the widths that it may take, ascending and distinct.

    Width 0 can only be the first option and means absent: the block around it is removed.
    """

    name: str
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        widths = tuple(int(width) for width in self.widths)
        if not widths or widths[0] < 0 or any(a >= b for a, b in itertools.pairwise(widths)):
            raise ValueError(
                f"variable {self.name!r}: widths must be distinct, ascending and >= 0, got {widths}"
            )
        object.__setattr__(self, "widths", widths)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """Tables over the options of one to four variables; a table that is None is zero everywhere.

    `value` is float64 and finite, higher is better; `cost_ns` is int64 nanoseconds. The shape of both is
    the number of options of each variable in `scope`, in that order. The arrays are copied and read-only.
    """

    scope: tuple[int, ...]
    value: NDArray[np.float64] | None = None
    cost_ns: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        scope = tuple(int(index) for index in self.scope)
        if not 1 <= len(scope) <= _MAX_ARITY or len(set(scope)) != len(scope):
            raise ValueError(f"factor over {scope}: a scope is 1 to {_MAX_ARITY} distinct variables")
        if self.value is None and self.cost_ns is None:
            raise ValueError(f"factor over {scope}: give a value table, a cost table, or both")
        object.__setattr__(self, "scope", scope)
        if self.value is not None:
            object.__setattr__(self, "value", _value_table(self.value, scope))
        if self.cost_ns is not None:
            object.__setattr__(self, "cost_ns", _cost_table(self.cost_ns, scope))


@dataclass(frozen=True, slots=True)
class WidthSum:
    """The law ``width(total) = offset + Σ coefficient · width(part)`` over ``parts`` = (part, coefficient).

    It joins the dimension that a layer reads to those it is made of: a concat, or several dimensions.
    """

    total: int
    parts: tuple[tuple[int, int], ...]
    offset: int = 0

    def __post_init__(self) -> None:
        parts = tuple((int(part), int(coefficient)) for part, coefficient in self.parts)
        indices = (self.total, *(part for part, _ in parts))
        if not parts or len(set(indices)) != len(indices) or any(c == 0 for _, c in parts):
            raise ValueError(
                f"width sum of variable {self.total}: needs distinct parts, other than the total, "
                f"with coefficients other than 0, got {parts}"
            )
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True, slots=True)
class Block:
    """A removable branch: its member variables take option 0 (width 0, absent) together or none does."""

    name: str
    members: tuple[int, ...]

    def __post_init__(self) -> None:
        members = tuple(int(member) for member in self.members)
        if not members or len(set(members)) != len(members):
            raise ValueError(f"block {self.name!r}: needs distinct members, got {members}")
        object.__setattr__(self, "members", members)


@dataclass(frozen=True, slots=True)
class Budget:
    """One more resource that may run out: ``offset + Σ_f A_f(x_f) <= limit``, in any unit.

    The amounts A are the `value` tables of `factors`: the parameters, the operations, the latency on another
    device. With `peak` the largest of them counts and not their sum, as for memory that is used again. A sum
    may exceed the limit by rounding, 1e-12 of the largest possible sum.
    """

    name: str
    limit: float
    factors: tuple[Factor, ...]
    offset: float = 0.0
    peak: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        if not (math.isfinite(self.limit) and math.isfinite(self.offset)):
            raise ValueError(f"budget {self.name!r}: limit and offset must be finite")
        if any(factor.value is None or factor.cost_ns is not None for factor in self.factors):
            raise ValueError(f"budget {self.name!r}: its factors have amounts as values, and no costs")

    @property
    def allowance(self) -> float:
        """The limit with the room that rounding needs."""
        tables = [factor.value for factor in self.factors if factor.value is not None]
        return self.limit + _ROUNDING * (abs(self.offset) + sum(float(abs(t).max(initial=0)) for t in tables))

    def amount(self, choice: Sequence[int]) -> float:
        """Return what a choice uses."""
        used = [self.offset]
        for factor in self.factors:
            assert factor.value is not None
            used.append(float(factor.value[tuple(choice[index] for index in factor.scope)]))
        return self.offset + max(used[1:], default=0.0) if self.peak else math.fsum(used)


@dataclass(frozen=True, slots=True)
class PruningProblem:
    """Variables, factors over them, the laws between widths, and the cost that no choice changes.

    `budgets` hold beside the one for the cost that a solver is given. Raises ValueError when an index, a
    shape or an absent state does not fit, or when the widest choice (every variable at its last option, the
    unpruned model) breaks a width sum or a block.
    """

    variables: tuple[Variable, ...]
    factors: tuple[Factor, ...]
    sums: tuple[WidthSum, ...] = ()
    blocks: tuple[Block, ...] = ()
    offset_ns: int = 0
    budgets: tuple[Budget, ...] = ()

    def __post_init__(self) -> None:
        for field in ("variables", "factors", "sums", "blocks", "budgets"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        object.__setattr__(self, "offset_ns", int(self.offset_ns))
        _check_indices(self)
        _check_shapes(self)
        _check_absent_states(self)
        if not self.is_consistent(self.widest()):
            raise ValueError("the widest choice, the unpruned model, breaks a width sum or a block")

    def widths(self, choice: Sequence[int]) -> tuple[int, ...]:
        """Return the chosen width of every variable, in the order of `variables`."""
        return tuple(variable.widths[option] for variable, option in zip(self.variables, choice, strict=True))

    def widest(self) -> Choice:
        """Return the choice of the unpruned model: the last option of every variable."""
        return tuple(len(variable.widths) - 1 for variable in self.variables)

    def evaluate(self, choice: Sequence[int]) -> tuple[float, int]:
        """Return the value and the cost in nanoseconds of a choice, consistent or not.

        Raises ValueError when the choice does not name one existing option of every variable.
        """
        if not _names_options(self, choice):
            raise ValueError(f"a choice names one option of each of {len(self.variables)} variables")
        values, costs = [0.0], [self.offset_ns]
        for factor in self.factors:
            at = tuple(choice[index] for index in factor.scope)
            if factor.value is not None:
                values.append(float(factor.value[at]))
            if factor.cost_ns is not None:
                costs.append(int(factor.cost_ns[at]))
        return math.fsum(values), sum(costs)

    def is_consistent(self, choice: Sequence[int]) -> bool:
        """Tell whether the choice names existing options and obeys every width sum and block."""
        if not _names_options(self, choice):
            return False
        widths = self.widths(choice)
        return all(
            widths[law.total] == law.offset + sum(c * widths[part] for part, c in law.parts)
            for law in self.sums
        ) and all(len({choice[member] == 0 for member in block.members}) == 1 for block in self.blocks)

    def within_budgets(self, choice: Sequence[int]) -> bool:
        """Tell whether the choice fits all of `budgets`; what it costs is not asked."""
        return all(budget.amount(choice) <= budget.allowance for budget in self.budgets)


@dataclass(frozen=True, slots=True)
class SolveLimits:
    """What a solver may spend: wall-clock seconds, and the relative gap at which it may stop."""

    seconds: float = 60.0
    gap: float = 1e-6

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and 0 <= self.gap < 1):
            raise ValueError(f"limits need seconds > 0 and 0 <= gap < 1, got {self.seconds} and {self.gap}")


@dataclass(frozen=True, slots=True)
class Solution:
    """What a solver found, and how good it is proven to be.

    Status `optimal`: `choice` is within the asked gap of the best. `feasible`: `choice` fits the budget,
    but the solver stopped early. `infeasible`: nothing fits; `choice` is None, `value` and `bound` are
    -inf, and `cost_ns` repeats `fastest_ns`, the smallest cost that can be reached (0 and None where the
    other budgets of the problem cannot be met at any cost).

    `bound` is never below the value of any choice that fits. `fastest_ns` is None where it was not needed.
    `note` is a sentence for the user about how it was solved, if that was unusual.
    """

    choice: Choice | None
    value: float
    cost_ns: int
    bound: float
    status: Status
    fastest_ns: int | None
    solver: str
    seconds: float
    note: str | None = None

    @property
    def gap(self) -> float:
        """Proven relative distance to the best value, >= 0: (bound - value) / \\|bound\\|."""
        if self.bound <= self.value:
            return 0.0
        return (self.bound - self.value) / max(abs(self.bound), np.finfo(np.float64).tiny)

    @classmethod
    def infeasible(cls, fastest_ns: int | None, solver: str, seconds: float) -> Solution:
        """Return the answer that nothing fits, with the smallest reachable cost in nanoseconds."""
        nothing = -math.inf
        return cls(None, nothing, fastest_ns or 0, nothing, "infeasible", fastest_ns, solver, seconds)


def valued_by_cost(problem: PruningProblem) -> PruningProblem:
    """Return the same choices without costs, each worth minus its cost: the best one is the fastest."""
    factors = tuple(
        replace(factor, value=-factor.cost_ns.astype(np.float64), cost_ns=None)
        for factor in problem.factors
        if factor.cost_ns is not None
    )
    return replace(problem, factors=factors, offset_ns=0)


def _value_table(table: Any, scope: tuple[int, ...]) -> NDArray[np.float64]:
    copy = np.array(table, dtype=np.float64)
    if not np.isfinite(copy).all():
        raise ValueError(f"factor over {scope}: values must be finite")
    copy.setflags(write=False)
    return copy


def _cost_table(table: Any, scope: tuple[int, ...]) -> NDArray[np.int64]:
    if np.asarray(table).dtype.kind not in "iu":
        raise ValueError(f"factor over {scope}: costs must be integers, in nanoseconds")
    copy = np.array(table, dtype=np.int64)
    copy.setflags(write=False)
    return copy


def _names_options(problem: PruningProblem, choice: Sequence[int]) -> bool:
    return len(choice) == len(problem.variables) and all(
        0 <= option < len(variable.widths) for variable, option in zip(problem.variables, choice, strict=True)
    )


def _check_indices(problem: PruningProblem) -> None:
    named = [(f"factor over {factor.scope}", factor.scope) for factor in _all_factors(problem)]
    named += [(f"width sum {law}", (law.total, *(part for part, _ in law.parts))) for law in problem.sums]
    named += [(f"block {block.name!r}", block.members) for block in problem.blocks]
    for what, indices in named:
        if not all(0 <= index < len(problem.variables) for index in indices):
            raise ValueError(f"{what} names a variable outside 0..{len(problem.variables) - 1}")


def _all_factors(problem: PruningProblem) -> list[Factor]:
    return [*problem.factors, *(factor for budget in problem.budgets for factor in budget.factors)]


def _check_shapes(problem: PruningProblem) -> None:
    largest_ns = abs(problem.offset_ns)
    for factor in _all_factors(problem):
        shape = tuple(len(problem.variables[index].widths) for index in factor.scope)
        for what, table in (("values", factor.value), ("costs", factor.cost_ns)):
            if table is not None and table.shape != shape:
                raise ValueError(
                    f"factor over {factor.scope}: {what} have shape {table.shape}, "
                    f"but the variables have {shape} options"
                )
        if factor.cost_ns is not None:
            largest_ns += max(abs(int(factor.cost_ns.min())), abs(int(factor.cost_ns.max())))
    if largest_ns >= _MAX_TOTAL_NS:
        raise ValueError(f"costs may add up to {largest_ns} ns, more than floats hold exactly (2**53)")


def _check_absent_states(problem: PruningProblem) -> None:
    for block in problem.blocks:
        for member in block.members:
            if problem.variables[member].widths[0] != 0:
                name = problem.variables[member].name
                raise ValueError(f"block {block.name!r}: the first width of member {name!r} must be 0")
