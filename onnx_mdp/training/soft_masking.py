"""Soft masking: a model is pruned while it trains, and the solver decides again and again which units.

::

    Structure ─gated→ network ─train→ scores ─┐          last masks, best weights
       table, budget of the step ─────────────┴solve→ masks ─▶ ─write_back→ rewrite → verify → Model

The idea is that of SMCP (Humble et al. 2022) with the program of `formulation` in place of a knapsack: all
widths and blocks are decided at once, under a budget of latency that comes down from that of the unpruned
model to the target. Where latency is measured, the last decision is the closed loop of an ordinary prune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.closed_loop import Candidate, Clock, Loop, Request, close_loop
from onnx_mdp.errors import MdpError
from onnx_mdp.formulation import formulate, to_ns
from onnx_mdp.large_models import for_session
from onnx_mdp.latency import LatencyTable, full_variant, predict_ms, variant_of_plan
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.rewriting import rewrite
from onnx_mdp.scoring import Importance
from onnx_mdp.shadow import prepare
from onnx_mdp.solution_plan import plan_from_solution
from onnx_mdp.solvers import solve
from onnx_mdp.structure import Structure, analyze_shadow
from onnx_mdp.training.distributed import Group
from onnx_mdp.training.finetuning import FinetuneRequest, FinetuneResult, Masking, finetune
from onnx_mdp.training.masks import Decision, MaskedNetwork, Masks, Schedule
from onnx_mdp.verification import Evidence, require, verify

__all__ = ["Budgets", "MaskedResult", "train_with_masks"]

Progress = Callable[[str, int, int], None]
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class MaskedResult:
    """What training with masks came to; ``dense`` has the trained weights of all units.

    ``measured`` is the candidate that the closed loop chose, if latency was measured.
    """

    training: FinetuneResult
    plan: PruningPlan
    dense: ir.Model
    evidence: Evidence
    decisions: tuple[Decision, ...]
    measured: Candidate | None


class Budgets:
    """Decides which units stay under the budget of each moment: a `masks.Decide`."""

    def __init__(
        self,
        structure: Structure,
        table: LatencyTable,
        request: Request,
        base_ms: float | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        """With ``base_ms``, measured now, the last decision closes the loop; else the table is trusted."""
        self.structure, self.table, self.request = structure, table, request
        self.base_ms, self.progress = base_ms, progress
        self.measured: Candidate | None = None
        self.full_ms = predict_ms(table, structure, full_variant(structure))
        self.goal_ms = request.goal_ms(base_ms or self.full_ms)

    def __call__(
        self, importance: Importance, share: float, before: PruningPlan | None, last: bool
    ) -> PruningPlan:
        """The plan for a share of the way to the target; units that ``before`` has not stay away.

        Raises:
            MdpError: nothing is that fast.
        """
        table = self.table
        if before is not None:
            importance, table = self._without(importance, before)
        plan = self._closed(importance, table) if last and self.base_ms else None
        if plan is None:
            plan = self._solved(importance, table, share)
        if before is not None:
            plan = replace(plan, removed_blocks=tuple(sorted({*plan.removed_blocks, *before.removed_blocks})))
        return plan

    def _solved(self, importance: Importance, table: LatencyTable, share: float) -> PruningPlan:
        state = (self.base_ms or self.full_ms) / self.full_ms
        start = self.full_ms * state
        budget = start - share * max(0.0, start - self.goal_ms)
        request = self.request
        formulation = formulate(self.structure, importance, table, request.rules, request.caps)
        solution = solve(formulation.problem, to_ns(budget / state), request.solver, request.limits)
        if solution.choice is None:
            raise self._unreachable(
                None if solution.fastest_ns is None else solution.fastest_ns * 1e-6 * state
            )
        return plan_from_solution(
            self.structure,
            formulation,
            importance,
            table,
            solution,
            state=state,
            rescale_attention=request.rescale_attention,
            seed=request.seed,
            command=request.command,
        )

    def _closed(self, importance: Importance, table: LatencyTable) -> PruningPlan:
        """By the closed loop: solve, rewrite and measure until the target is met."""
        assert self.base_ms is not None
        request = self.request
        formulation = formulate(self.structure, importance, table, request.rules, request.caps)
        data = for_session(self.structure.shadow.model)
        loop = Loop(self.structure, request, importance, table, formulation, data, Clock())
        found = close_loop(loop, self.goal_ms, self.base_ms, self.progress)
        if found.best is None:
            raise self._unreachable(found.fastest_ms)
        self.measured = found.best
        return found.best.plan

    def _without(self, importance: Importance, before: PruningPlan) -> tuple[Importance, LatencyTable]:
        """Units that are gone are worth nothing, rank last, and no width holds them."""
        structure = self.structure
        gone = removed_classes(before, structure)
        units = {
            index: np.where(gone[list(structure.dimensions[index].units)], 0.0, np.maximum(scores, _TINY))
            for index, scores in importance.units.items()
        }
        blocks = {name: 0.0 if name in before.removed_blocks else v for name, v in importance.blocks.items()}
        kept = variant_of_plan(structure, before).kept
        choices = {
            index: tuple(width for width in widths if width <= kept[index])
            for index, widths in self.table.choices.items()
        }
        return replace(importance, units=units, blocks=blocks), replace(self.table, choices=choices)

    def _unreachable(self, fastest_ms: float | None) -> MdpError:
        known = "" if fastest_ms is None else f"; the fastest that is possible takes {fastest_ms:.4g} ms"
        return MdpError(f"no structure takes {self.goal_ms:.4g} ms{known}: choose a larger target")


def train_with_masks(
    structure: Structure,
    teacher: ir.Model | None,
    types: Mapping[str, np.dtype[Any]],
    request: FinetuneRequest,
    schedule: Schedule,
    budgets: Budgets,
    group: Group,
    progress: Progress,
    report: Callable[[str], None],
    *,
    first: Importance | None = None,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]] = (),
) -> MaskedResult:
    """Prune a model while it trains; ``first`` are the scores of the mode ``one-shot``.

    Raises:
        MdpError: one of those of `finetuning.finetune`, or no structure meets the target.
        VerificationError: the slim model is not the masked one; nothing of it is returned.
    """
    network = MaskedNetwork(structure, group.device)
    made: list[Masks] = []
    held: dict[str, Any] = {}

    def masks(steps: int) -> Masks:
        made.append(Masks(structure, network, schedule, steps, budgets, group, first))
        return made[-1]

    def slim(trained: ir.Model, plan: PruningPlan) -> ir.Model:
        again = analyze_shadow(prepare(trained, structure.shadow.inputs, structure.shadow.states))
        plan = replace(plan, provenance={**plan.provenance, "model": again.shadow.source})
        model = rewrite(again, plan)
        evidence = verify(trained, again, model, plan, feeds=feeds)
        require(evidence)
        held.update(dense=trained, plan=plan, evidence=evidence)
        return model

    masking = Masking(network, masks, slim, {"masks": str(schedule), "goal": f"{budgets.goal_ms:.6g} ms"})
    result = finetune(
        structure.shadow.model,
        teacher,
        structure.shadow.inputs,
        types,
        request,
        group,
        progress,
        report,
        masking,
    )
    return MaskedResult(
        result,
        held["plan"],
        held["dense"],
        held["evidence"],
        tuple(made[-1].decisions),
        budgets.measured,
    )
