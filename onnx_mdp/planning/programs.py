"""The pruning problems of a model on a device, and the one whose plan it holds for.

What weights cost depends on how much of the model is left: a latency table, and so a problem, holds for one
share of them that is read from memory in each run (`onnx_mdp.tables.memory`). The problem to solve is the one
of the share that its own plan has: a fixed point, found in a few solves. Plans that read more than
their problem says count as too slow. Where weights cost the same in every model, there is one problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.importance.scoring import Importance
from onnx_mdp.planning.formulation import Caps, Formulation, formulate
from onnx_mdp.planning.problem import PruningProblem, Solution, SolveLimits
from onnx_mdp.planning.solution_plan import variant_from_choice
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.solvers import solve
from onnx_mdp.solvers.fronts import solve_front
from onnx_mdp.tables.latency import LatencyTable, priced_at, touched
from onnx_mdp.tables.variants import Variant, full_variant

__all__ = ["Answer", "Programs"]

_CLOSE = 0.01  # a hundredth of what weights cost is a thousandth of a latency
_EQUAL = 1e-3
_MOST_SOLVES = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """A solution, and the problem that it solves."""

    formulation: Formulation
    solution: Solution


class Programs:
    """Formulations by share of weights read again, each made when it is asked for."""

    def __init__(
        self,
        structure: Structure,
        importance: Importance,
        table: LatencyTable,
        rules: WidthRules = WidthRules(),
        caps: Caps = Caps(),
    ) -> None:
        """Formulate what holds for the unpruned model.

        Raises:
            UsageError: the rules fit no dimension, or ask for a width that does not exist.
            UnsupportedModelError: more dimensions meet in one product than a table has axes.
        """
        self.structure, self.importance, self.table = structure, importance, table
        self._rules, self._caps = rules, caps
        self._made: dict[float, Formulation] = {}
        self._most = self._share(full_variant(structure))
        self.unpruned = self._at(self._most)

    def solve(self, budget_ns: int, solver: str = "exact", limits: SolveLimits = SolveLimits()) -> Answer:
        """The most valuable plan whose latency fits the budget, as `onnx_mdp.solvers.solve` finds it."""
        return self.answer(lambda p: solve(p, budget_ns, solver, limits), lambda s: s.value, limits.seconds)

    def solve_front(
        self,
        budgets_ns: Sequence[int],
        solver: str = "exact",
        limits: SolveLimits = SolveLimits(),
    ) -> list[Answer]:
        """As `solve` for each budget; together where one problem holds for all."""
        if not self._most:
            found = solve_front(self.unpruned.problem, budgets_ns, solver, limits)
            return [Answer(self.unpruned, solution) for solution in found]
        return [self.solve(budget_ns, solver, limits) for budget_ns in budgets_ns]

    def answer(
        self,
        solver: Callable[[PruningProblem], Solution],
        worth: Callable[[Solution], float],
        seconds: float,
    ) -> Answer:
        """What a solver answers to the problem that holds for its own choice; of several the worthiest.

        No other problem is begun when ``seconds`` are over. Those of the solution are of all problems.
        """
        best: Answer | None = None
        low, high, share = self._least(), self._most, self._most
        tried: dict[float, Answer] = {}
        spent = 0.0
        while share not in tried and len(tried) < _MOST_SOLVES and spent < seconds:
            found = tried[share] = Answer(self._at(share), solver(self._at(share).problem))
            spent += found.solution.seconds
            choice = found.solution.choice
            if choice is None:  # at this price; at a lower one?
                high, own = share, low
            else:
                own = self._share(variant_from_choice(self.structure, found.formulation, choice))
                if own > share:
                    low = share
                else:
                    high = share
                    if best is None or worth(found.solution) > worth(best.solution):
                        best = found
                    if share - own <= _EQUAL:
                        break
            share = min(max(own, low), high)
            if share in tried and high - low > _CLOSE:
                share = (low + high) / 2
        chosen = best or tried.get(self._least(), found)
        return replace(chosen, solution=replace(chosen.solution, seconds=spent))

    def _at(self, share: float) -> Formulation:
        if share not in self._made:
            table = priced_at(self.table, share)
            self._made[share] = formulate(self.structure, self.importance, table, self._rules, self._caps)
        return self._made[share]

    def _share(self, variant: Variant) -> float:
        return self.table.calibration.memory.share(touched(self.table, self.structure, variant))

    def _least(self) -> float:
        """No plan reads less: the narrowest widths, without any block that may go."""
        kept = dict(full_variant(self.structure).kept)
        kept |= {index: widths[0] for index, widths in self.table.choices.items()}
        return self._share(Variant(kept, frozenset(block.name for block in self.structure.blocks)))
