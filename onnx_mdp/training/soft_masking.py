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

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MdpError, UnsupportedModelError, UsageError
from onnx_mdp.importance.scoring import MEASURED, Importance, score
from onnx_mdp.large_models import for_session
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.planning.closed_loop import Clock, Loop, Request, close_loop
from onnx_mdp.planning.formulation import to_ns
from onnx_mdp.planning.programs import Programs
from onnx_mdp.planning.solution_plan import plan_from_solution
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import Evidence, require, verify
from onnx_mdp.tables.latency import LatencyTable
from onnx_mdp.tables.variants import variant_of_plan
from onnx_mdp.training.batchnorm import normalised_layers
from onnx_mdp.training.distributed import Group
from onnx_mdp.training.finetuning import FinetuneRequest, FinetuneResult, Masking, finetune
from onnx_mdp.training.masks import Decision, MaskedNetwork, Masks, Schedule

__all__ = ["Budgets", "MaskedResult", "require_maskable", "train_with_masks"]

Progress = Callable[[str, int, int], None]
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class MaskedResult:
    """What training with masks came to; ``dense`` has the trained weights of all units.

    ``dense`` and ``evidence`` are None in processes that only help.
    """

    training: FinetuneResult
    plan: PruningPlan
    decisions: tuple[Decision, ...]
    dense: ir.Model | None
    evidence: Evidence | None


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
        self.goal_ms = request.goal_ms(base_ms or table.base_ms)

    @property
    def target(self) -> tuple[float | None, float | None]:
        """Milliseconds, or a share, as it was asked for."""
        return self.request.target_ms, self.request.target_ratio

    def __call__(
        self, importance: Importance, share: float, before: PruningPlan | None, last: bool
    ) -> PruningPlan:
        """The plan for a share of the way to the target; units that ``before`` has not stay away.

        Raises:
            MdpError: nothing is that fast.
        """
        table, rules = self.table, self.request.rules
        if before is not None:
            importance, table = self._without(importance, before)
            if share < 1:
                table, rules = self._with_what_stays(self._solved(importance, table, rules, 1.0), table)
        plan = self._closed(importance, table) if last and self.base_ms else None
        if plan is None:
            plan = self._solved(importance, table, rules, share)
        if before is not None:
            plan = replace(plan, removed_blocks=tuple(sorted({*plan.removed_blocks, *before.removed_blocks})))
        return plan

    def _solved(
        self, importance: Importance, table: LatencyTable, rules: WidthRules, share: float
    ) -> PruningPlan:
        start = self.base_ms or self.table.base_ms
        state = start / self.table.base_ms
        budget = start - share * max(0.0, start - self.goal_ms)
        request = self.request
        programs = Programs(self.structure, importance, table, rules, request.caps)
        answer = programs.solve(to_ns(budget / state), request.solver, request.limits)
        solution = answer.solution
        if solution.choice is None:
            raise self._unreachable(
                None if solution.fastest_ns is None else solution.fastest_ns * 1e-6 * state
            )
        return plan_from_solution(
            self.structure,
            answer.formulation,
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
        programs = Programs(self.structure, importance, table, request.rules, request.caps)
        data = for_session(self.structure.shadow.model)
        loop = Loop(request, programs, data, Clock())
        found = close_loop(loop, self.goal_ms, self.base_ms, self.progress)
        if found.best is None:
            raise self._unreachable(found.fastest_ms)
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

    def _with_what_stays(self, end: PruningPlan, table: LatencyTable) -> tuple[LatencyTable, WidthRules]:
        """Let nothing go on the way that is there in the end, as seen from here: it could not come back."""
        structure, gone, rules = self.structure, set(end.removed_blocks), self.request.rules
        kept = variant_of_plan(structure, end).kept
        choices = {
            index: tuple(w for w in widths if structure.dimensions[index].block in gone or w >= kept[index])
            for index, widths in table.choices.items()
        }
        blocks = rules.held.blocks | {block.name for block in structure.blocks if block.name not in gone}
        return replace(table, choices=choices), replace(rules, held=replace(rules.held, blocks=blocks))

    def _unreachable(self, fastest_ms: float | None) -> MdpError:
        known = "" if fastest_ms is None else f"; the fastest that is possible takes {fastest_ms:.4g} ms"
        return MdpError(f"no structure takes {self.goal_ms:.4g} ms{known}: choose a larger target")


def train_with_masks(
    structure: Structure,
    teacher: ir.Model | None,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, np.dtype[Any]],
    request: FinetuneRequest,
    schedule: Schedule,
    budgets: Budgets,
    group: Group,
    progress: Progress,
    report: Callable[[str], None],
    *,
    first: Callable[[], Importance] | None = None,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]] = (),
) -> MaskedResult:
    """Prune a model while it trains.

    ``first``, by default magnitudes, ranks for the first decision where slopes tell nothing: in ``one-shot``,
    and without labels, for a model that is compared with itself has no loss until something is masked. If it
    was measured (`scoring.MEASURED`), it scales all decisions.

    ``shapes`` and ``types`` are those of the inputs, as `finetuning.finetune` takes them. The result is that
    of the process that decides; in others it is of no use.

    Raises:
        UnsupportedModelError: the model is quantized or in half precision.
        MdpError: one of those of `finetuning.finetune`, or no structure meets the target.
        VerificationError: the slim model is not the masked one; nothing of it is returned.
    """
    require_maskable(structure, request.features)
    made: list[Masks] = []
    held: dict[str, Any] = {}

    def network(norms: Mapping[str, Any] | None) -> MaskedNetwork:
        bare = [n for n in normalised_layers(structure.shadow.model) if len(n.inputs) < 3 or not n.inputs[2]]
        if norms is not None and bare:
            layer = bare[0].name or bare[0].outputs[0].name
            raise UsageError(
                f"--insert-bn would give {layer} a bias, of which masks know nothing; use --mode one-shot"
            )
        return MaskedNetwork(structure, group.device, norms)

    def masks(network: MaskedNetwork, steps: int, labelled: bool) -> Masks:
        begin = (first() if first else score(structure, "magnitude")) if group.main else None
        scale = begin if begin is not None and begin.criterion in MEASURED else None
        blind = schedule.mode == "one-shot" or not labelled
        made.append(
            Masks(structure, network, schedule, steps, budgets, group, begin if blind else None, scale)
        )
        return made[-1]

    def slim(trained: ir.Model, plan: PruningPlan) -> ir.Model:
        after = _with_weights(structure, trained)
        model = rewrite(after, plan)
        evidence = verify(trained, after, model, plan, feeds=feeds)
        require(evidence)
        held.update(dense=trained, evidence=evidence)
        return model

    identity = {"masks": str(schedule), "target": str(budgets.target)}
    masking = Masking(network, masks, slim, identity)
    result = finetune(
        structure.shadow.model, teacher, shapes, types, request, group, progress, report, masking
    )
    return MaskedResult(
        result, made[-1].plan, tuple(made[-1].decisions), held.get("dense"), held.get("evidence")
    )


def require_maskable(structure: Structure, features: Sequence[str]) -> None:
    """Refuse what cannot be trained with masks.

    Raises:
        UnsupportedModelError: the model is quantized or in half precision.
        UsageError: inner tensors shall be matched.
    """
    if not structure.shadow.plain:
        raise UnsupportedModelError("training with masks needs a model in float32; use --mode one-shot")
    if features:
        raise UsageError(
            "--features compares tensors before they are masked; leave it out, or use --mode one-shot"
        )


def _with_weights(structure: Structure, trained: ir.Model) -> Structure:
    """The structure of the same graph with other weights."""
    shadow = structure.shadow
    stored = {
        name: value.const_value.numpy()
        for name, value in trained.graph.initializers.items()
        if value.const_value is not None
    }
    shadow = replace(shadow, model=trained, constants={**shadow.constants, **stored})
    return replace(structure, graph=replace(structure.graph, shadow=shadow))
