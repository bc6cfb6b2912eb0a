"""A baseline: from the unpruned model, always the cut that loses the least value per nanosecond saved."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from onnx_mdp.errors import SolverError
from onnx_mdp.planning.problem import Choice, PruningProblem, Solution, SolveLimits

__all__ = ["Cut", "cuts", "solve_greedily"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A change of a choice that saves time: what it changes, and what it loses and saves."""

    name: str
    choice: Choice
    value_lost: float
    saved_ns: int

    @property
    def price(self) -> float:
        """Value lost per nanosecond."""
        return self.value_lost / self.saved_ns


def solve_greedily(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    """Return a choice within the budget; its bound is infinite.

    Raises SolverError where no single cut leads on, or the time ends before the budget is met.
    """
    started = time.perf_counter()
    choice = problem.widest()
    while problem.evaluate(choice)[1] > budget_ns or not problem.within_budgets(choice):
        best = min(cuts(problem, choice), key=lambda cut: (cut.price, cut.choice), default=None)
        if best is None:
            raise SolverError("the greedy solver finds no cut that saves time; use another solver")
        if time.perf_counter() - started > limits.seconds:
            raise SolverError(f"the greedy solver was not done in {limits.seconds:g} s; allow more seconds")
        choice = best.choice
    value, cost_ns = problem.evaluate(choice)
    seconds = time.perf_counter() - started
    return Solution(choice, value, cost_ns, math.inf, "feasible", None, "greedy", seconds)


def cuts(problem: PruningProblem, choice: Choice) -> Iterator[Cut]:
    """Every consistent choice that differs in one variable made narrower or one block removed, and is faster.

    Running sums follow the variables they are made of.
    """
    touching: dict[int, list[int]] = {}
    for index, factor in enumerate(problem.factors):
        for variable in factor.scope:
            touching.setdefault(variable, []).append(index)
    totals = {law.total for law in problem.sums}
    members = {member for block in problem.blocks for member in block.members}
    for variable, option in enumerate(choice):
        if variable not in totals:
            lowest = 1 if variable in members else 0
            for lower in range(lowest, option):
                name = f"{problem.variables[variable].name} to {problem.variables[variable].widths[lower]}"
                yield from _cut(problem, choice, {variable: lower}, touching, name)
    for block in problem.blocks:
        if choice[block.members[0]] > 0:
            changes = dict.fromkeys(block.members, 0)
            yield from _cut(problem, choice, changes, touching, f"without {block.name}")


def _cut(
    problem: PruningProblem,
    choice: Choice,
    changes: dict[int, int],
    touching: dict[int, list[int]],
    name: str,
) -> Iterator[Cut]:
    changed = list(choice)
    for variable, option in changes.items():
        changed[variable] = option
    moved = set(changes)
    for law in problem.sums:  # a sum may be part of a later one
        if moved & {part for part, _ in law.parts}:
            total = law.offset + sum(c * problem.variables[p].widths[changed[p]] for p, c in law.parts)
            widths = problem.variables[law.total].widths
            if total not in widths:
                return
            changed[law.total] = widths.index(total)
            moved.add(law.total)
    lost, saved = 0.0, 0
    for index in {i for variable in moved for i in touching.get(variable, ())}:
        factor = problem.factors[index]
        before = tuple(choice[v] for v in factor.scope)
        after = tuple(changed[v] for v in factor.scope)
        if factor.value is not None:
            lost += float(factor.value[before] - factor.value[after])
        if factor.cost_ns is not None:
            saved += int(factor.cost_ns[before]) - int(factor.cost_ns[after])
    if saved > 0:
        yield Cut(name, tuple(changed), lost, saved)
