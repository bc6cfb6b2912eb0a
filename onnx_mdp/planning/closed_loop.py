"""The closed loop: solve, rewrite, measure, scale the table by what was measured, until the target is met."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.importance.scoring import Criterion
from onnx_mdp.large_models import LargeModel, for_session
from onnx_mdp.plan import PruningPlan, plan_identity
from onnx_mdp.planning.formulation import Caps, to_ns
from onnx_mdp.planning.problem import Solution, SolveLimits
from onnx_mdp.planning.programs import Programs
from onnx_mdp.planning.solution_plan import plan_from_solution
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.latency import LatencyTable
from onnx_mdp.tables.variants import measure_models

__all__ = [
    "HEADROOM",
    "MAX_ROUNDS",
    "Candidate",
    "Clock",
    "Found",
    "Loop",
    "Request",
    "Round",
    "best",
    "close_loop",
    "planned",
    "rounds_of",
    "tolerance",
]

MAX_ROUNDS = 4
_ROUND_SECONDS = 4.5  # of interleaved measuring
HEADROOM = 0.012  # two measurements of one ratio differ by 1 to 1.5 % on a shared machine

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to prune for: exactly one of ``target_ms`` and ``target_ratio`` (of the unpruned latency).

    ``rules`` and ``caps`` hold besides; a latency that is met already is no reason to stop where caps are
    set. ``repair`` names the methods of `onnx_mdp.repairing.repair` that follow, once the law was verified.
    """

    target_ms: float | None = None
    target_ratio: float | None = None
    runtime: Runtime = field(default_factory=Runtime)
    criterion: str | Criterion = "magnitude"
    solver: str = "exact"
    limits: SolveLimits = field(default_factory=SolveLimits)
    max_choices: int = 16
    seed: int = 0
    command: str = ""
    rules: WidthRules = field(default_factory=WidthRules)
    caps: Caps = field(default_factory=Caps)
    rescale_attention: bool = False
    repair: tuple[str, ...] = ()

    def goal_ms(self, base_ms: float) -> float:
        """The target in milliseconds, for a model that takes ``base_ms`` unpruned."""
        if self.target_ms is not None:
            return self.target_ms
        assert self.target_ratio is not None
        return self.target_ratio * base_ms


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        """Start the first stage now."""
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Charge the time since the last lap to ``stage``."""
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self.last
        self.last = now


@dataclass(frozen=True, slots=True)
class Loop:
    """What stays the same while the loop closes."""

    request: Request
    programs: Programs
    base: bytes | LargeModel
    clock: Clock

    @property
    def structure(self) -> Structure:
        """Of the unpruned model."""
        return self.programs.structure

    @property
    def table(self) -> LatencyTable:
        """The latency table that plans are made by."""
        return self.programs.table


@dataclass(frozen=True, slots=True)
class Candidate:
    """One plan that was rewritten and measured; ``value`` is its share of the importance."""

    plan: PruningPlan
    model: ir.Model
    predicted_ms: float
    measured_ms: float
    base_now_ms: float
    noise: float
    value: float


@dataclass(frozen=True, slots=True)
class Round:
    """What one candidate was predicted and measured to take, and whether it is the one to deliver."""

    predicted_ms: float
    measured_ms: float
    base_now_ms: float
    noise: float
    value: float
    delivered: bool


@dataclass(frozen=True, slots=True)
class Found:
    """The candidate to deliver, how many were measured, and the smallest reachable latency if known."""

    best: Candidate | None
    iterations: int
    fastest_ms: float | None
    rounds: tuple[Round, ...] = ()


def tolerance(noise: float) -> float:
    """How far measured and target may differ: 2 %, or twice the noise floor F."""
    return max(0.02, 2.0 * noise)


def close_loop(loop: Loop, target: float, base_ms: float, progress: Progress) -> Found:
    """Solve, rewrite, measure; scale the table by what was measured; until the target is met.

    It aims a little below the target, so that a second measurement still meets it, unless that cannot
    be reached. A measurement that uses up that headroom is good enough only at the second attempt, and one
    that leaves more of the target unused than the tolerance only at the last.
    """
    aim = target * (1 - HEADROOM)
    state = base_ms / loop.table.base_ms
    candidates: list[Candidate] = []
    tried: set[str] = set()
    fastest: float | None = None
    once = False
    for step in range(MAX_ROUNDS):
        progress("solve", step, MAX_ROUNDS)
        solution, plan = planned(loop, aim, state)
        if solution.fastest_ns is not None:
            fastest = solution.fastest_ns * 1e-6 * state
        if plan is None and aim < target:
            aim = target
            continue
        if plan is None:
            break
        if (identity := plan_identity(plan)) in tried:
            break
        tried.add(identity)
        candidate = _measure_plan(loop, plan, solution, base_ms, progress, step)
        candidates.append(candidate)
        slack = tolerance(candidate.noise)
        if min(target * (1 - slack), aim) <= candidate.measured_ms <= aim * (1 + slack):
            if once or _with_headroom(candidate, aim):
                break
            once = True
        state *= candidate.measured_ms / candidate.predicted_ms
    found = best(candidates, target)
    if fastest is None and found is not None and found.measured_ms > target * (1 + tolerance(found.noise)):
        unreachable, _ = planned(loop, 0.0, state)
        fastest = None if unreachable.fastest_ns is None else unreachable.fastest_ns * 1e-6 * state
    return Found(found, len(candidates), fastest, rounds_of(candidates, found))


def rounds_of(candidates: Sequence[Candidate], delivered: Candidate | None) -> tuple[Round, ...]:
    """The candidates without their models, in the order in which they were measured."""
    return tuple(
        Round(c.predicted_ms, c.measured_ms, c.base_now_ms, c.noise, c.value, c is delivered)
        for c in candidates
    )


def planned(loop: Loop, aim: float, state: float) -> tuple[Solution, PruningPlan | None]:
    """Solve for ``aim`` milliseconds on a machine that is ``state`` times as slow as the table says."""
    answer = loop.programs.solve(to_ns(aim / state), loop.request.solver, loop.request.limits)
    solution = answer.solution
    loop.clock.lap("solve")
    if solution.choice is None:
        return solution, None
    plan = plan_from_solution(
        loop.structure,
        answer.formulation,
        loop.programs.importance,
        loop.table,
        solution,
        state=state,
        rescale_attention=loop.request.rescale_attention,
        seed=loop.request.seed,
        command=loop.request.command,
    )
    return solution, plan


def _measure_plan(
    loop: Loop, plan: PruningPlan, solution: Solution, base_ms: float, progress: Progress, step: int
) -> Candidate:
    model = rewrite(loop.structure, plan)
    loop.clock.lap("rewrite")
    timing = measure_models(
        [loop.base, for_session(model)],
        loop.structure.shadow.inputs,
        loop.request.runtime,
        seed=loop.request.seed + step,
        budget_s=_ROUND_SECONDS,
        on_round=lambda done, total: progress("measure", done, total),
    )
    loop.clock.lap("measure")
    assert plan.predicted_ms is not None
    return Candidate(
        plan=plan,
        model=model,
        predicted_ms=plan.predicted_ms,
        measured_ms=timing.ms[1] * base_ms / timing.ms[0],
        base_now_ms=timing.ms[0],
        noise=timing.noise,
        value=solution.value,
    )


def _with_headroom(candidate: Candidate, aim: float) -> bool:
    """Whether half of the headroom is left and the target within the tolerance."""
    above = max(HEADROOM / 2, candidate.noise)
    least = aim / (1 - HEADROOM) * (1 - tolerance(candidate.noise))
    return min(least, aim) <= candidate.measured_ms <= aim * (1 + above)


def best(candidates: Sequence[Candidate], target: float) -> Candidate | None:
    """The most valuable candidate with headroom, else well within the tolerance, else within it; else the
    fastest.
    """
    safe = [c for c in candidates if _with_headroom(c, target * (1 - HEADROOM))]
    if safe:
        return max(safe, key=lambda c: c.value)
    for share in (0.5, 1.0):
        fitting = [c for c in candidates if c.measured_ms <= target * (1 + share * tolerance(c.noise))]
        if fitting:
            return max(fitting, key=lambda c: c.value)
    return min(candidates, key=lambda c: c.measured_ms, default=None)
