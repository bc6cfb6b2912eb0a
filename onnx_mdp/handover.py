"""The closed loop over two machines: candidates go to the device, and their measurements come back.

One folder goes back and forth. Each call of the same command plans anew, by the table and by what was
measured so far; models without a measurement are written, with a list of jobs for `bench`. A round is four
plans around the target, so that one trip is enough unless the table is off by more than they span.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnx_mdp.bench import Job, Result, job_of, jobs_text, read_results
from onnx_mdp.errors import UsageError
from onnx_mdp.files import make_folder, write_files
from onnx_mdp.large_models import save_model
from onnx_mdp.plan import PruningPlan, plan_identity
from onnx_mdp.planning.closed_loop import (
    HEADROOM,
    MAX_ROUNDS,
    Candidate,
    Found,
    Loop,
    best,
    planned,
    rounds_of,
    tolerance,
)
from onnx_mdp.surgery.rewriting import rewrite

__all__ = ["Handover", "bench_hint", "close_elsewhere", "open_handover"]

_JOBS_FILE, _RESULTS_FILE = "jobs.jsonl", "results.jsonl"
_BASE_FILE = "base.onnx"
_SPREAD = (1.0, 0.97, 1.02, 0.93)  # of the aim: plans of one round


@dataclass(frozen=True, slots=True)
class Handover:
    """A folder with the unpruned model, and what the device measured of the models in it."""

    folder: Path
    results: dict[str, Result]


def open_handover(folder: Path, original: ir.Model) -> Handover:
    """Make the folder, or read what came back in it.

    Raises:
        OutputError: it cannot be written.
        UsageError: its results are none.
    """
    make_folder(folder)
    save_model(original, folder / _BASE_FILE, overwrite=True)
    results = folder / _RESULTS_FILE
    return Handover(folder, read_results(results) if results.exists() else {})


def bench_hint(folder: Path, context: Mapping[str, str | int]) -> str:
    """What to do on the device that a table of this context was measured on."""
    words = ["onnx-mdp", "bench", "--jobs", _JOBS_FILE, "-o", _RESULTS_FILE]
    words += ["--ep", str(context.get("provider", "cpu")), "--threads", str(context.get("threads", 1))]
    if context.get("precision", "float32") != "float32":
        words += ["--ep-precision", str(context["precision"])]
    for option in filter(None, str(context.get("options", "")).split(",")):
        words += ["--ep-option", option]
    return (
        f"copy {folder} to {context.get('device', 'the device')}, run `{shlex.join(words)}` in it, copy "
        f"{_RESULTS_FILE} back, and run this command again"
    )


def close_elsewhere(
    loop: Loop, target: float, base_ms: float, handover: Handover
) -> tuple[Found, tuple[Job, ...]]:
    """Plan, and look the measurements up; return what was found and the jobs that the device has to do first.

    Raises:
        UsageError: a model was measured elsewhere than the table.
    """
    aim = target * (1 - HEADROOM)
    state = base_ms / loop.table.base_ms
    candidates: list[Candidate] = []
    seen: set[str] = set()
    fastest: float | None = None
    for _ in range(MAX_ROUNDS):
        found: list[Candidate] = []
        missing: list[Job] = []
        for share in _SPREAD:
            solution, plan = planned(loop, aim * share, state)
            if solution.fastest_ns is not None:
                fastest = solution.fastest_ns * 1e-6 * state
            if plan is None or plan_identity(plan) in seen:
                continue
            seen.add(plan_identity(plan))
            model = rewrite(loop.structure, plan)
            job = _job(loop, handover, model, plan)
            result = handover.results.get(job.identity)
            if result is None:
                missing.append(job)
            else:
                found.append(_candidate(loop, plan, model, result, base_ms, solution.value))
        loop.clock.lap("rewrite")
        candidates += found
        if missing:
            write_files({handover.folder / _JOBS_FILE: jobs_text(missing).encode()})
            return Found(None, len(candidates), fastest), tuple(missing)
        if not found or any(abs(c.measured_ms / aim - 1) <= tolerance(c.noise) for c in found):
            break
        nearest = min(found, key=lambda c: abs(c.measured_ms / aim - 1))
        state *= nearest.measured_ms / nearest.predicted_ms
    chosen = best(candidates, target)
    return Found(chosen, len(candidates), fastest, rounds_of(candidates, chosen)), ()


def _job(loop: Loop, handover: Handover, model: ir.Model, plan: PruningPlan) -> Job:
    path = handover.folder / f"{plan_identity(plan)}.onnx"
    save_model(model, path, overwrite=True)
    return job_of(path, handover.folder / _BASE_FILE, loop.structure.shadow.inputs)


def _candidate(
    loop: Loop, plan: PruningPlan, model: ir.Model, result: Result, base_ms: float, value: float
) -> Candidate:
    there, here = dict(result.context), dict(loop.table.context)
    if there != here:
        name = next(n for n in sorted(there | here) if there.get(n) != here.get(n))
        raise UsageError(
            f"the results were measured with {name} {there.get(name)!r}, the table with {here.get(name)!r}: "
            "run `bench` where the table was measured, with the same options"
        )
    assert plan.predicted_ms is not None
    if not result.base_ms:
        raise UsageError("the results lack the unpruned model: hand the list of jobs over as it was written")
    return Candidate(
        plan=plan,
        model=model,
        predicted_ms=plan.predicted_ms,
        measured_ms=result.ms * base_ms / result.base_ms,
        base_now_ms=result.base_ms,
        noise=result.noise,
        value=value,
    )
