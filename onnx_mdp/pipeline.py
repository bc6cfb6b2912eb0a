"""The main job: analyze, score, profile, then solve, rewrite and measure until the target is met.

::

    Model ─analyze→ Structure ─┬─score→   Importance   ─┐
                               └─profile→ LatencyTable ─┴─formulate→ PruningProblem
          ─solve→ PruningPlan ─rewrite→ Model ─measure─┐   ─verify→ Evidence
             ▲                                         │
             └────────────── recalibrate ◄─────────────┘   until measured ≤ target
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp._version import __version__
from onnx_mdp.binding import bind_shapes
from onnx_mdp.errors import UnsupportedModelError
from onnx_mdp.formulation import Formulation, formulate, plan_from_choice, to_ns
from onnx_mdp.latency import (
    LatencyTable,
    build_table,
    full_variant,
    measure_models,
    predict_ms,
)
from onnx_mdp.lut_store import LutStore
from onnx_mdp.model_io import model_bytes, parameter_count
from onnx_mdp.plan import PruningPlan, plan_json
from onnx_mdp.problem import Solution, SolveLimits
from onnx_mdp.rewriting import rewrite
from onnx_mdp.runtime import Runtime
from onnx_mdp.scoring import Criterion, Importance, score
from onnx_mdp.shadow import prepare
from onnx_mdp.solvers import solve
from onnx_mdp.structure import Structure, analyze_shadow, macs
from onnx_mdp.verification import Evidence, require, verify

__all__ = ["PruneResult", "Request", "Status", "analyze", "apply_plan", "prune", "tolerance"]

Progress = Callable[[str, int, int], None]
Status = Literal["met", "missed", "infeasible", "nothing_to_do"]
Feeds = Sequence[Mapping[str, npt.NDArray[Any]]]

_LOOP = 6


@dataclass(frozen=True, slots=True)
class Request:
    """What to prune for: exactly one of ``target_ms`` and ``target_ratio`` (of the unpruned latency)."""

    target_ms: float | None = None
    target_ratio: float | None = None
    runtime: Runtime = field(default_factory=Runtime)
    criterion: str | Criterion = "magnitude"
    solver: str = "highs"
    limits: SolveLimits = field(default_factory=SolveLimits)
    max_choices: int = 16
    seed: int = 0
    command: str = ""


@dataclass(frozen=True, slots=True)
class PruneResult:
    """Everything that a prune found out; milliseconds are normalised to the state at ``base_ms``.

    ``base_now_ms`` is the unpruned model measured again, interleaved with the pruned one; ``noise`` the
    split-half error F of that measurement. ``model`` and ``plan`` are None where nothing was pruned.
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
    seconds: Mapping[str, float]


def analyze(model: ir.Model, input_shapes: Mapping[str, Sequence[int]], batch: int = 1) -> Structure:
    """Find the prunable dimensions and residual blocks of a model.

    Raises:
        UsageError: an input shape is symbolic and was not given, or does not fit.
        UnsupportedModelError: the model is quantized or in half precision.
        MeasurementError: ONNX Runtime cannot run it.
    """
    return analyze_shadow(prepare(model, bind_shapes(model, input_shapes, batch)))


def tolerance(noise: float) -> float:
    """How far measured and target may differ: 2 %, or twice the noise floor F."""
    return max(0.02, 2.0 * noise)


def prune(
    original: ir.Model,
    structure: Structure,
    request: Request,
    store: LutStore,
    *,
    feeds: Feeds = (),
    progress: Progress = lambda stage, done, total: None,
) -> PruneResult:
    """Prune a model to a latency on this machine, and verify the result.

    Raises:
        UnsupportedModelError: the model has nothing that can be pruned.
        VerificationError: the pruned model is not what the plan says; nothing of it is returned.
    """
    if not structure.prunable and not structure.blocks:
        raise UnsupportedModelError(f"the model has no prunable dimension: {_why_frozen(structure)}")
    clock = _Clock()
    data = model_bytes(original)
    base = measure_models([data], structure.shadow.inputs, request.runtime, seed=request.seed, budget_s=3.0)
    target = _target(request, base.ms[0])
    clock.lap("measure")
    if target >= base.ms[0]:
        return _nothing_to_do(structure, target, base.ms[0], base.noise, original, clock)
    importance = score(structure, request.criterion, feeds, progress)
    clock.lap("score")
    table = build_table(
        structure,
        request.runtime,
        store,
        seed=request.seed,
        max_choices=request.max_choices,
        progress=progress,
    )
    clock.lap("profile")
    loop = _Loop(structure, request, importance, table, formulate(structure, importance, table), data, clock)
    found = _close_loop(loop, target, base.ms[0], progress)
    if found.best is None:
        return replace(
            _nothing_to_do(structure, target, base.ms[0], base.noise, original, clock),
            status="infeasible",
            fastest_ms=found.fastest_ms,
            table=table,
        )
    best = found.best
    model = _finish(best.model, best.plan)
    progress("verify", 0, 1)
    evidence = verify(original, structure, model, best.plan, feeds=feeds[:2])
    require(evidence)
    progress("verify", 1, 1)
    clock.lap("verify")
    slim = prepare(model, structure.shadow.inputs)
    met = best.measured_ms <= target * (1 + tolerance(best.noise))
    return PruneResult(
        status="met" if met else "missed",
        target_ms=target,
        base_ms=base.ms[0],
        base_now_ms=best.base_now_ms,
        predicted_ms=best.predicted_ms,
        measured_ms=best.measured_ms,
        noise=best.noise,
        iterations=found.iterations,
        params=(parameter_count(original), parameter_count(model)),
        macs=(macs(structure.shadow), macs(slim)),
        fastest_ms=found.fastest_ms,
        evidence=evidence,
        plan=best.plan,
        model=model,
        structure=structure,
        table=table,
        seconds=clock.laps,
    )


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self.last
        self.last = now


@dataclass(frozen=True, slots=True)
class _Loop:
    """What stays the same while the loop closes."""

    structure: Structure
    request: Request
    importance: Importance
    table: LatencyTable
    formulation: Formulation
    base: bytes
    clock: _Clock


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One plan that was rewritten and measured; ``solution_value`` is its share of the importance."""

    plan: PruningPlan
    model: ir.Model
    predicted_ms: float
    measured_ms: float
    base_now_ms: float
    noise: float
    value: float


@dataclass(frozen=True, slots=True)
class _Found:
    best: _Candidate | None
    iterations: int
    fastest_ms: float | None


def _target(request: Request, base_ms: float) -> float:
    if request.target_ms is not None:
        return request.target_ms
    assert request.target_ratio is not None
    return request.target_ratio * base_ms


def _why_frozen(structure: Structure) -> str:
    reasons = list(dict.fromkeys(d.frozen for d in structure.dimensions if d.frozen))
    return "; ".join(reasons[:3]) if reasons else "it has no convolution or linear layer with weights"


def _close_loop(loop: _Loop, target: float, base_ms: float, progress: Progress) -> _Found:
    """Solve, rewrite, measure; scale the table by what was measured; until the target is met."""
    state = base_ms / predict_ms(loop.table, loop.structure, full_variant(loop.structure))
    candidates: list[_Candidate] = []
    tried: set[str] = set()
    fastest: float | None = None
    for step in range(_LOOP):
        progress("solve", step, _LOOP)
        solution = solve(
            loop.formulation.problem, to_ns(target / state), loop.request.solver, loop.request.limits
        )
        loop.clock.lap("solve")
        if solution.fastest_ns is not None:
            fastest = solution.fastest_ns * 1e-6 * state
        if solution.choice is None:
            break
        plan = _plan(loop, solution, state)
        if (identity := _plan_identity(plan)) in tried:
            break
        tried.add(identity)
        candidate = _measure_plan(loop, plan, solution, base_ms, progress, step)
        candidates.append(candidate)
        if abs(candidate.measured_ms / target - 1) <= tolerance(candidate.noise):
            break
        state *= candidate.measured_ms / candidate.predicted_ms
    return _Found(_best(candidates, target), len(candidates), fastest)


def _plan(loop: _Loop, solution: Solution, state: float) -> PruningPlan:
    assert solution.choice is not None
    plan = plan_from_choice(loop.structure, loop.formulation, loop.importance, solution.choice)
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
            "model": loop.structure.shadow.source,
            "inputs": {name: list(shape) for name, shape in loop.structure.shadow.inputs.items()},
            "table": loop.table.key,
            "context": dict(loop.table.context),
            "criterion": loop.importance.criterion,
            "seed": loop.request.seed,
            "version": __version__,
            "command": loop.request.command,
        },
    )


def _measure_plan(
    loop: _Loop, plan: PruningPlan, solution: Solution, base_ms: float, progress: Progress, step: int
) -> _Candidate:
    model = rewrite(loop.structure, plan)
    loop.clock.lap("rewrite")
    timing = measure_models(
        [loop.base, model_bytes(model)],
        loop.structure.shadow.inputs,
        loop.request.runtime,
        seed=loop.request.seed + step,
        budget_s=6.0,
        on_round=lambda done, total: progress("measure", done, total),
    )
    loop.clock.lap("measure")
    assert plan.predicted_ms is not None
    return _Candidate(
        plan=plan,
        model=model,
        predicted_ms=plan.predicted_ms,
        measured_ms=timing.ms[1] * base_ms / timing.ms[0],
        base_now_ms=timing.ms[0],
        noise=timing.noise,
        value=solution.value,
    )


def _best(candidates: Sequence[_Candidate], target: float) -> _Candidate | None:
    """The most valuable candidate that meets the target; the fastest if none does."""
    fitting = [c for c in candidates if c.measured_ms <= target * (1 + tolerance(c.noise))]
    if fitting:
        return max(fitting, key=lambda c: c.value)
    return min(candidates, key=lambda c: c.measured_ms, default=None)


def _plan_identity(plan: PruningPlan) -> str:
    """A hash of what the plan does, not of how it was found."""
    bare = PruningPlan(
        keep=dict(sorted(plan.keep.items())), removed_blocks=tuple(sorted(plan.removed_blocks))
    )
    return hashlib.sha256(plan_json(bare).encode()).hexdigest()[:16]


def _finish(model: ir.Model, plan: PruningPlan) -> ir.Model:
    """Stamp a rewritten model with where it came from; the same plan gives the same bytes."""
    model.metadata_props["onnx_mdp.version"] = __version__
    model.metadata_props["onnx_mdp.plan"] = _plan_identity(plan)
    if "model" in plan.provenance:
        model.metadata_props["onnx_mdp.source"] = str(plan.provenance["model"])
    return model


def apply_plan(original: ir.Model, structure: Structure, plan: PruningPlan) -> tuple[ir.Model, Evidence]:
    """Replay a plan: the same model bytes as the prune that made it, verified again.

    Raises:
        UsageError: the plan was made for another model.
        VerificationError: the pruned model is not what the plan says.
    """
    model = _finish(rewrite(structure, plan), plan)
    evidence = verify(original, structure, model, plan)
    require(evidence)
    return model, evidence


def _nothing_to_do(
    structure: Structure, target: float, base_ms: float, noise: float, original: ir.Model, clock: _Clock
) -> PruneResult:
    size, work = parameter_count(original), macs(structure.shadow)
    return PruneResult(
        status="nothing_to_do",
        target_ms=target,
        base_ms=base_ms,
        base_now_ms=base_ms,
        predicted_ms=None,
        measured_ms=None,
        noise=noise,
        iterations=0,
        params=(size, size),
        macs=(work, work),
        fastest_ms=None,
        evidence=None,
        plan=None,
        model=None,
        structure=structure,
        table=None,
        seconds=clock.laps,
    )
