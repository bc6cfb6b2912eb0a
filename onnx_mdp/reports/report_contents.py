"""From the result of a prune to what its report says."""

from __future__ import annotations

import hashlib
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_mdp._version import __version__
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.data.calibration import CalibrationData
from onnx_mdp.errors import SolverError
from onnx_mdp.machine import machine
from onnx_mdp.model_io import content_hash, is_large, model_bytes
from onnx_mdp.pipeline import PruneResult
from onnx_mdp.plan import PruningPlan, plan_json
from onnx_mdp.planning.closed_loop import tolerance
from onnx_mdp.planning.formulation import to_ns
from onnx_mdp.planning.problem import SolveLimits
from onnx_mdp.reports.fidelity import fidelity, finite
from onnx_mdp.reports.figures import layers_of
from onnx_mdp.reports.frozen_parts import frozen_parts
from onnx_mdp.reports.plan_report import front_points
from onnx_mdp.reports.report import kept_channels
from onnx_mdp.reports.report_file import (
    BlockLine,
    Costs,
    DimensionLine,
    FileLine,
    Front,
    Operation,
    OutputProof,
    Proof,
    Report,
)
from onnx_mdp.reports.time_shares import operation_ms
from onnx_mdp.running.runtime import Runtime, context
from onnx_mdp.surgery.verification import TOLERANCE, Evidence
from onnx_mdp.tables.latency import LatencyTable, predict_ms
from onnx_mdp.tables.variants import full_variant, variant_of_plan

__all__ = ["Circumstances", "report_of"]

_RATIOS = np.linspace(0.2, 1.0, 17)  # of the unpruned latency
_FRONT_LIMITS = SolveLimits(seconds=1.0, gap=1e-3)  # of each point


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a result does not know of itself; ``then`` tells what was done to the weights after the cut.

    ``written``: the output lies there already, and is what was done. ``elsewhere``: all was measured by the
    machine of the table, and nothing here.
    """

    original: ir.Model
    path: Path
    output: Path
    runtime: Runtime
    command: str
    criterion: str
    data: CalibrationData | None = None
    data_name: str | None = None
    then: tuple[str, ...] = ()
    written: bool = False
    elsewhere: bool = False


def report_of(result: PruneResult, around: Circumstances) -> Report:
    """Gather what a report says; runs both models on the calibration inputs, and solves for a front."""
    structure, plan, model = result.structure, result.plan, result.model
    met = result.status == "met"
    compared = None
    if around.data is not None and plan is not None and model is not None:
        compared = fidelity(around.original, structure, plan, model, around.data)
    assert result.status != "handed_over"
    front, notes = None, _notes(result, around)
    try:
        front = _front(result)
    except SolverError as error:  # the plan is there: what else could be had is no reason to lose it
        notes += (f"there is no Pareto front: {error}",)
    return Report(
        status=result.status,
        version=__version__,
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        command=around.command,
        model=around.path.name,
        output=around.output.name if met else None,
        target_ms=result.target_ms,
        base_ms=result.base_ms,
        base_now_ms=result.base_now_ms,
        predicted_ms=result.predicted_ms,
        measured_ms=result.measured_ms,
        fastest_ms=result.fastest_ms,
        noise=result.noise,
        tolerance=tolerance(result.noise),
        params=result.params,
        macs=result.macs,
        criterion=around.criterion,
        importance_share=None if plan is None else plan.importance_share,
        solver=None if plan is None else plan.solver,
        gap=None if plan is None else plan.gap,
        rounds=result.rounds,
        layers=() if plan is None else layers_of(structure, plan),
        blocks=() if plan is None else _blocks(structure, plan),
        costs=None if result.table is None else _costs(structure, result.table, plan),
        front=front,
        dimensions=() if plan is None else _dimensions(structure, plan),
        frozen=frozen_parts(structure, None if result.table is None else _full_ms(structure, result.table)),
        data=around.data_name,
        fidelity=compared,
        proof=None if result.evidence is None else _proof(result.evidence),
        then=(*_repaired(result), *around.then),
        notes=notes,
        environment=_environment(result.table if around.elsewhere else None, around.runtime),
        files=_files(result, around) if met else _files(result, around)[:1],
        seconds=dict(result.seconds),
    )


def _repaired(result: PruneResult) -> tuple[str, ...]:
    if result.repaired is None:
        return ()
    drifts = " → ".join(f"{drift:.3g}" for drift in result.repaired.drifts)
    return (f"weights repaired ({', '.join(result.repaired.methods)}): output drift {drifts}",)


def _notes(result: PruneResult, around: Circumstances) -> tuple[str, ...]:
    """What a reader has to know to judge the numbers."""
    notes = []
    if result.plan is not None and "note" in result.plan.provenance:
        notes.append(str(result.plan.provenance["note"]))
    table, here = result.table, context(around.runtime)
    if table is not None and dict(table.context) != here:
        what = "all latencies were" if around.elsewhere else "the table was"
        notes.append(f"{what} measured on {table.context.get('device')}, not where this was written")
    if around.runtime.allow_fallback:
        notes.append("nodes that the provider leaves to the CPU were accepted (--allow-fallback)")
    return tuple(notes)


def _blocks(structure: Structure, plan: PruningPlan) -> tuple[BlockLine, ...]:
    return tuple(BlockLine(b.name, b.kind, b.name in plan.removed_blocks) for b in structure.blocks)


def _dimensions(structure: Structure, plan: PruningPlan) -> tuple[DimensionLine, ...]:
    found = [(structure.dimensions[i], kept_channels(structure, plan, i)) for i in structure.prunable]
    return tuple(DimensionLine(d.name, d.kind, d.size, kept) for d, kept in found)


def _full_ms(structure: Structure, table: LatencyTable) -> dict[int, float]:
    return operation_ms(structure, table, full_variant(structure))


def _costs(structure: Structure, table: LatencyTable, plan: PruningPlan | None) -> Costs:
    before = _full_ms(structure, table)
    after = None if plan is None else operation_ms(structure, table, variant_of_plan(structure, plan))
    operations = [structure.shadow.operations[index] for index in before]
    around = table.calibration.offset_ms
    return Costs(
        tuple(
            Operation(
                op.name or op.outputs[0],
                op.op_type,
                before[op.index],
                None if after is None else after[op.index],
            )
            for op in operations
        ),
        (around, None if plan is None else around),
    )


def _front(result: PruneResult) -> Front | None:
    """The front by the table, scaled to the unpruned latency that was measured first."""
    structure, table, plan = result.structure, result.table, result.plan
    if table is None or result.programs is None:
        return None
    whole = predict_ms(table, structure, full_variant(structure))
    state = result.base_ms / whole
    rounding_ns = len(table.terms) + 1
    budgets = [to_ns(float(ratio) * whole) + rounding_ns for ratio in _RATIOS]
    front = result.programs.solve_front(budgets, "exact", _FRONT_LIMITS)
    answers = [answer.solution for answer in front]
    chosen = None
    if plan is not None and plan.importance_share is not None:
        chosen = state * predict_ms(table, structure, variant_of_plan(structure, plan)), plan.importance_share
    points = tuple((state * ms, share) for ms, share in front_points(answers))
    return Front(points, chosen, sum(answer.seconds for answer in answers))


def _proof(evidence: Evidence) -> Proof:
    outputs = []
    for name, apart in evidence.errors.items():
        drift = evidence.drift[name]
        moved = finite(drift.cosine), finite(drift.max_abs)
        outputs.append(OutputProof(name, apart.difference, apart.scale, *moved))
    return Proof(
        verified=evidence.verified,
        worst=evidence.worst,
        tolerance=TOLERANCE,
        inputs_tried=evidence.inputs_tried,
        outputs=tuple(outputs),
        runtime_noise=evidence.runtime_noise,
        checker=evidence.checker,
        constant=tuple(evidence.constant),
        judged=evidence.judged,
        followed=evidence.followed,
    )


def _environment(table: LatencyTable | None, runtime: Runtime) -> dict[str, str | int | float | bool | None]:
    """What was measured on, this machine or that of a table; neither its name nor that of its user."""
    if table is not None:
        return dict(table.context)
    return {
        **context(runtime),
        **asdict(machine()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _files(result: PruneResult, around: Circumstances) -> tuple[FileLine, ...]:
    lines = [FileLine("original", around.path.name, _sha256_of_file(around.path))]
    if result.model is not None and result.plan is not None:
        plan_name = f"{around.output.name.removesuffix('.onnx')}.plan.json"
        pruned = _sha256_of_file(around.output) if around.written else _sha256_of_model(result.model)
        lines.append(FileLine("pruned", around.output.name, pruned))
        lines.append(FileLine("plan", plan_name, hashlib.sha256(plan_json(result.plan).encode()).hexdigest()))
    return tuple(lines)


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256_of_model(model: ir.Model) -> str:
    """Of the file that `save_model` writes; of the content where that takes two files."""
    return content_hash(model) if is_large(model) else hashlib.sha256(model_bytes(model)).hexdigest()
