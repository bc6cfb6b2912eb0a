"""The main job: analyze, score, profile, then solve, rewrite and measure until the target is met.

::

    Model ─analyze→ Structure ─┬─score→   Importance   ─┐
                               └─profile→ LatencyTable ─┴─formulate→ PruningProblem
          ─solve→ PruningPlan ─rewrite→ Model ─measure─┐   ─verify→ Evidence
             ▲                                         │
             └────────────── recalibrate ◄─────────────┘   until measured ≤ target
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp._version import __version__
from onnx_mdp.analysis.binding import bind_shapes
from onnx_mdp.analysis.shadow import prepare
from onnx_mdp.analysis.states import kept_shapes
from onnx_mdp.analysis.structure import Structure, analyze_shadow, macs
from onnx_mdp.errors import UnsupportedModelError, UsageError
from onnx_mdp.handover import Handover, close_elsewhere
from onnx_mdp.importance.scoring import score
from onnx_mdp.large_models import LargeModel, for_session
from onnx_mdp.model_io import parameter_count
from onnx_mdp.plan import PruningPlan, check_plan, plan_identity, removed_classes
from onnx_mdp.planning.closed_loop import Clock, Loop, Request, Round, close_loop, tolerance
from onnx_mdp.planning.programs import Programs
from onnx_mdp.repairing.repair import Repaired, check_repair, repair
from onnx_mdp.running.timing import Timing
from onnx_mdp.surgery.changed_weights import (
    ChangedWeights,
    how_weights_changed,
    require_finite,
    weights_apart,
)
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import Evidence, require, verify
from onnx_mdp.tables.latency import LatencyTable, build_table
from onnx_mdp.tables.lut_store import LutStore
from onnx_mdp.tables.variants import measure_models

__all__ = ["PruneResult", "Status", "analyze", "apply_plan", "prune", "stamp", "verify_file", "with_model"]

Progress = Callable[[str, int, int], None]
Status = Literal["met", "missed", "infeasible", "nothing_to_do", "handed_over"]
Feeds = Sequence[Mapping[str, npt.NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class PruneResult:
    """Everything that a prune found out; milliseconds are normalised to the state at ``base_ms``.

    ``base_now_ms`` is the unpruned model measured again, interleaved with the pruned one; ``noise`` the
    split-half error F of that measurement. ``model`` and ``plan`` are None where nothing was pruned.
    ``evidence`` is about the model as it was sliced, before it was ``repaired``, if it was. ``jobs`` are the
    models that the device has to measure first, where they were handed over; ``rounds`` are the candidates
    that were measured, and ``programs`` the problems that they solve.
    """

    status: Status
    target_ms: float
    base_ms: float
    base_now_ms: float
    predicted_ms: float | None
    measured_ms: float | None
    noise: float
    iterations: int
    params: tuple[int, int]
    macs: tuple[int, int]
    fastest_ms: float | None
    evidence: Evidence | None
    plan: PruningPlan | None
    model: ir.Model | None
    structure: Structure
    table: LatencyTable | None
    repaired: Repaired | None
    seconds: Mapping[str, float]
    jobs: int = 0
    rounds: tuple[Round, ...] = ()
    programs: Programs | None = None


def analyze(
    model: ir.Model,
    input_shapes: Mapping[str, Sequence[int]],
    batch: int = 1,
    states: Mapping[str, str] | None = None,
) -> Structure:
    """Find the prunable dimensions and residual blocks of a model.

    ``states`` maps inputs to the outputs that become them in the next frame; such a pair is pruned together.

    Raises:
        UsageError: an input shape is symbolic and was not given, or does not fit; there is no such state.
        UnsupportedModelError: the model is quantized or in half precision.
        MeasurementError: ONNX Runtime cannot run it.
    """
    return analyze_shadow(prepare(model, bind_shapes(model, input_shapes, batch), states))


def prune(
    original: ir.Model,
    structure: Structure,
    request: Request,
    store: LutStore | LatencyTable,
    *,
    feeds: Feeds = (),
    handover: Handover | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> PruneResult:
    """Prune a model to a latency on this machine, and verify the result.

    Instead of a store, which keeps what is measured for the table, a table may be given. With a ``handover``
    as well, nothing is measured here: the target is that of the table's machine, which measures the models.

    Raises:
        UsageError: what the device measured does not belong to the table, or the criterion not to the repair.
        UnsupportedModelError: the model has nothing that can be pruned.
        VerificationError: the pruned model is not what the plan says; nothing of it is returned.
    """
    if not structure.prunable and not structure.blocks:
        raise UnsupportedModelError(f"the model has no prunable dimension: {_why_frozen(structure)}")
    check_repair(structure, request.repair)
    if request.criterion == "refit" and "lstsq" not in request.repair:
        raise UsageError("criterion 'refit' plans for weights that are refitted; pass --repair lstsq too")
    clock = Clock()
    data = for_session(original)
    base = _base_of(structure, request, store, handover, data)
    base_ms, target = base.ms[0], request.goal_ms(base.ms[0])
    clock.lap("measure")
    unpruned = _unpruned(original, structure, target, base, clock)
    if target >= base_ms and not request.caps.any:
        return unpruned
    importance = score(structure, request.criterion, feeds, progress)
    clock.lap("score")
    table = store
    if not isinstance(table, LatencyTable):
        table = build_table(
            structure,
            request.runtime,
            table,
            seed=request.seed,
            max_choices=request.max_choices,
            progress=progress,
        )
    clock.lap("profile")
    programs = Programs(structure, importance, table, request.rules, request.caps)
    loop = Loop(request, programs, data, clock)
    if handover is None:
        found = close_loop(loop, target, base_ms, progress)
    else:
        found, jobs = close_elsewhere(loop, target, base_ms, handover)
        if jobs:
            return replace(
                unpruned,
                status="handed_over",
                iterations=found.iterations,
                fastest_ms=found.fastest_ms,
                table=table,
                jobs=len(jobs),
            )
    if found.best is None:
        return replace(
            unpruned,
            status="infeasible",
            fastest_ms=found.fastest_ms,
            table=table,
            programs=programs,
        )
    best = found.best
    model = stamp(best.model, best.plan)
    progress("verify", 0, 1)
    evidence = verify(original, structure, model, best.plan, feeds=feeds[:2])
    require(evidence)
    progress("verify", 1, 1)
    clock.lap("verify")
    met = best.measured_ms <= target * (1 + tolerance(best.noise))
    plan, repaired = best.plan, None
    if met and request.repair:
        repaired = repair(structure, plan, model, feeds, request.repair, progress)
        model = repaired.model
        plan = replace(plan, provenance={**plan.provenance, "repair": ",".join(request.repair)})
        clock.lap("repair")
    return replace(
        with_model(unpruned, model, plan, evidence),
        status="met" if met else "missed",
        base_now_ms=best.base_now_ms,
        measured_ms=best.measured_ms,
        noise=best.noise,
        iterations=found.iterations,
        fastest_ms=found.fastest_ms,
        table=table,
        repaired=repaired,
        rounds=found.rounds,
        programs=programs,
    )


def _base_of(
    structure: Structure,
    request: Request,
    store: LutStore | LatencyTable,
    handover: Handover | None,
    data: bytes | LargeModel,
) -> Timing:
    """The unpruned model, measured now, or when the table was calibrated if the device is elsewhere."""
    if handover is None:
        return measure_models(
            [data], structure.shadow.inputs, request.runtime, seed=request.seed, budget_s=2.0
        )
    if not isinstance(store, LatencyTable):
        raise UsageError("a handover needs a table that the device measured; pass it too")
    return Timing((store.base_ms,), store.calibration.noise, 0, ((store.base_ms,), (store.base_ms,)))


def with_model(result: PruneResult, model: ir.Model, plan: PruningPlan, evidence: Evidence) -> PruneResult:
    """A result with this model, and how large it is; measured it is not yet."""
    shapes = kept_shapes(result.structure, removed_classes(plan, result.structure))
    return replace(
        result,
        predicted_ms=plan.predicted_ms,
        params=(result.params[0], parameter_count(model)),
        macs=(result.macs[0], macs(prepare(model, shapes))),
        evidence=evidence,
        plan=plan,
        model=model,
    )


def _why_frozen(structure: Structure) -> str:
    reasons = list(dict.fromkeys(d.frozen for d in structure.dimensions if d.frozen))
    return "; ".join(reasons[:3]) if reasons else "it has no convolution or linear layer with weights"


def stamp(model: ir.Model, plan: PruningPlan) -> ir.Model:
    """Stamp a rewritten model with where it came from; the same plan gives the same bytes."""
    model.metadata_props["onnx_mdp.version"] = __version__
    model.metadata_props["onnx_mdp.plan"] = plan_identity(plan)
    if "model" in plan.provenance:
        model.metadata_props["onnx_mdp.source"] = str(plan.provenance["model"])
    return model


def apply_plan(original: ir.Model, structure: Structure, plan: PruningPlan) -> tuple[ir.Model, Evidence]:
    """Replay a plan: the same model bytes as the prune that made it, verified again.

    Raises:
        UsageError: the plan was made for another model.
        VerificationError: the pruned model is not what the plan says.
    """
    model = stamp(rewrite(structure, plan), plan)
    evidence = verify(original, structure, model, plan)
    require(evidence)
    return model, evidence


def verify_file(
    original: ir.Model, structure: Structure, pruned: ir.Model, plan: PruningPlan, feeds: Feeds = ()
) -> tuple[Evidence, ChangedWeights | None]:
    """Compare a pruned file with the masked original.

    Of a file that was trained or repaired since, the law is about its slicing: that is verified instead, and
    the file must be the same graph with other numbers, which are described.

    Raises:
        UsageError: the plan was made for another model.
        VerificationError: the trained file is another graph, or computes what is not finite.
    """
    check_plan(plan, structure)
    if how_weights_changed(pruned) is None:
        return verify(original, structure, pruned, plan, feeds=feeds), None
    sliced = rewrite(structure, plan)
    changed = weights_apart(sliced, pruned)
    require_finite(structure, plan, pruned, feeds[:1])
    return verify(original, structure, sliced, plan, feeds=feeds), changed


def _unpruned(
    original: ir.Model, structure: Structure, target: float, base: Timing, clock: Clock
) -> PruneResult:
    """What is known before anything is pruned; the whole result if the target is met already."""
    size, work = parameter_count(original), macs(structure.shadow)
    return PruneResult(
        status="nothing_to_do",
        target_ms=target,
        base_ms=base.ms[0],
        base_now_ms=base.ms[0],
        predicted_ms=None,
        measured_ms=None,
        noise=base.noise,
        iterations=0,
        params=(size, size),
        macs=(work, work),
        fastest_ms=None,
        evidence=None,
        plan=None,
        model=None,
        structure=structure,
        table=None,
        repaired=None,
        seconds=clock.laps,
    )
