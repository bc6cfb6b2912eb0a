"""What each command does: options in, files and printed results out, an exit code back."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.cli.finetune_commands import FinetuneOptions, Trained, check_finetuning, finetune_model
from onnx_mdp.cli.mask_commands import MaskOptions, check_masking, prune_in_training
from onnx_mdp.cli.options import (
    Options,
    PlanOptions,
    accepted_fallback,
    calibration,
    command_line,
    load_structure,
    parse_shapes,
    read_inputs,
    with_plan_inputs,
)
from onnx_mdp.errors import UsageError
from onnx_mdp.files import Content, check_output, write_text
from onnx_mdp.handover import bench_hint, open_handover
from onnx_mdp.large_models import for_session, save_model
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import PruneResult, apply_plan, prune
from onnx_mdp.plan import check_plan, load_plan, plan_json
from onnx_mdp.planning.closed_loop import Request, tolerance
from onnx_mdp.repairing.repair import parse_methods
from onnx_mdp.reports.documents import analyze_document, profile_document, prune_document, verify_document
from onnx_mdp.reports.figures import structure_svg
from onnx_mdp.reports.repair_report import repair_text
from onnx_mdp.reports.report import analysis_table, cost_table, plan_table, printable
from onnx_mdp.running.runtime import context
from onnx_mdp.surgery.changed_weights import (
    ChangedWeights,
    how_weights_changed,
    require_finite,
    weights_apart,
)
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import Evidence, verify
from onnx_mdp.tables.cost_terms import width
from onnx_mdp.tables.latency import LatencyTable, build_table, term_ms
from onnx_mdp.tables.lut_store import LutStore, open_store
from onnx_mdp.tables.table_file import load_table, table_json
from onnx_mdp.tables.variants import full_variant, measure_models

__all__ = [
    "PruneOptions",
    "run_analyze",
    "run_apply",
    "run_profile",
    "run_prune",
    "run_verify",
]

_EXIT = {"met": 0, "nothing_to_do": 0, "handed_over": 0, "missed": 1, "infeasible": 4}


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What `prune` takes besides the common options."""

    target_ms: float | None = None
    target_ratio: float | None = None
    output: Path | None = None
    plan: PlanOptions = field(default_factory=PlanOptions)
    choices: int = 16
    repair: str = "none"
    overwrite: bool = False
    dry_run: bool = False
    finetune: FinetuneOptions | None = None
    masks: MaskOptions = field(default_factory=MaskOptions)
    lut: Path | None = None
    handover: Path | None = None


def run_analyze(path: Path, options: Options, table: Path | None = None) -> int:
    """Print what can be pruned, what cannot, why, and how much that holds: with a table, in milliseconds."""
    _, structure = load_structure(path, options)
    times = None if table is None else _base_terms(structure, load_table(table, structure))
    if options.screen.as_json:
        options.screen.result("", analyze_document(structure, times))
    else:
        options.screen.table(analysis_table(structure, times))
    return 0


def run_profile(
    path: Path,
    options: Options,
    *,
    choices: int = 16,
    output: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Measure the latency table of a model, or show the stored one; write it to a file if wanted."""
    if output is not None:
        check_output(output, overwrite=overwrite)
    model, structure = load_structure(path, options)
    fallback = accepted_fallback(model, structure, options)
    with open_store(options.store) as store, options.screen.progress() as progress:
        table = build_table(
            structure, options.runtime(), store, seed=options.seed, max_choices=choices, progress=progress
        )
    if output is not None:
        write_text(table_json(structure, table), output, overwrite=overwrite)
    if not options.screen.as_json:
        options.screen.table(cost_table(structure, _base_terms(structure, table)))
    calibration = table.calibration
    source = (
        f"{table.measured} variants profiled" if table.measured else "nothing profiled, all from the store"
    )
    if table.shared:
        source = f"{table.shared:.0%} of the keys known from another model, {source}"
    line = (
        f"base {table.base_ms:.3f} ms on {table.context['device']} · {table.context['provider']}, "
        f"{table.context['threads']} thread(s), B={table.granularity} · "
        f"{len(table.coefficients)} shape keys · "
        f"held-out error median {calibration.median_error:.1%}, worst {calibration.worst_error:.1%} · "
        f"noise F {calibration.noise:.1%} · {source} in {table.seconds:.1f} s"
    )
    document = profile_document(structure, table) | {"output": None if output is None else str(output)}
    document |= fallback
    options.screen.result(line if output is None else f"{line} → {output}", document)
    return 0


def _base_terms(structure: Structure, table: LatencyTable) -> dict[int, float]:
    kept = full_variant(structure).kept
    return {t.operation: term_ms(table, t, width(t.reads, kept), width(t.makes, kept)) for t in table.terms}


def _check_wanted(wanted: PruneOptions) -> None:
    wanted.plan.check(trains=wanted.finetune is not None)
    targets = [t for t in (wanted.target_ms, wanted.target_ratio) if t is not None]
    if len(targets) != 1:
        raise UsageError("give exactly one of --target-ms and --target-ratio")
    if not 0 < targets[0] < math.inf:
        raise UsageError("the target must be a number larger than 0")
    if wanted.handover is not None and wanted.lut is None:
        raise UsageError("--handover needs the table that the device measured; pass --lut TABLE.json")
    if wanted.handover is not None and wanted.masks.masked:
        raise UsageError("--handover is for a model that is sliced before it is trained; use --mode one-shot")
    wanted.masks.check(finetune=wanted.finetune is not None)
    if parse_methods(wanted.repair) and wanted.masks.masked:
        raise UsageError("--repair is for a model that is sliced before it is trained; use --mode one-shot")
    if parse_methods(wanted.repair) and wanted.plan.data is None:
        raise UsageError("--repair needs calibration inputs; pass --data")


def _outputs(path: Path, output: Path | None) -> tuple[Path, Path, Path]:
    model = output if output is not None else Path(f"{path.stem}.pruned.onnx")
    stem = model.name.removesuffix(".onnx")
    return model, model.with_name(f"{stem}.plan.json"), model.with_name(f"{stem}.structure.svg")


def run_prune(path: Path, options: Options, wanted: PruneOptions) -> int:
    """Prune a model to a latency and write the model, its plan and a figure of it."""
    _check_wanted(wanted)
    outputs = _outputs(path, wanted.output)
    if not wanted.dry_run:
        for output in outputs:
            check_output(output, overwrite=wanted.overwrite)
    model, structure = load_structure(path, options)
    if wanted.finetune is not None:
        check_finetuning(model, parse_shapes(options.input_shapes, model), options, wanted.finetune)
        if wanted.masks.masked:
            check_masking(structure, wanted.finetune, wanted.masks)
    fallback = accepted_fallback(model, structure, options)
    data = calibration(structure, model, wanted.plan, options)
    request = Request(
        target_ms=wanted.target_ms,
        target_ratio=wanted.target_ratio,
        runtime=options.runtime(),
        criterion=wanted.plan.scorer(data, options.seed),
        solver=wanted.plan.solver,
        limits=wanted.plan.limits,
        max_choices=wanted.choices,
        seed=options.seed,
        command=command_line(),
        rules=wanted.plan.rules(),
        caps=wanted.plan.caps(structure),
        rescale_attention=wanted.plan.rescales(structure),
        repair=parse_methods(wanted.repair),
    )
    feeds = data.feeds if data else ()
    with ExitStack() as stack:
        source = _table_source(structure, options, wanted, stack)
        handover = None if wanted.handover is None else open_handover(wanted.handover, model)
        progress = stack.enter_context(options.screen.progress())
        result = prune(model, structure, request, source, feeds=feeds, handover=handover, progress=progress)
    trained = None
    if wanted.masks.masked and wanted.finetune is not None and result.status == "met" and not wanted.dry_run:
        options.screen.note("the target can be met; what follows prunes the original anew, while it trains")
        shapes = parse_shapes(options.input_shapes, model)
        result, trained = prune_in_training(
            model, result, request, shapes, feeds, options, wanted.finetune, wanted.masks
        )
    if result.evidence is not None:
        _tell_of(result.evidence, options)
    if result.plan is not None and "note" in result.plan.provenance:
        options.screen.warn(str(result.plan.provenance["note"]))
    written = _write(result, outputs, wanted)
    if result.plan is not None and not options.screen.as_json:
        options.screen.table(plan_table(structure, result.plan))
    line, document = _summary(result, written[0]), prune_document(result, written) | fallback
    if not wanted.masks.masked:
        trained = _finetuned(model, result, written, options, wanted)
    if trained is not None:
        line, document = f"{line}\n{trained.line}", document | {"finetuning": dict(trained.document)}
    if data and written[0] and trained is None and structure.shadow.plain and not request.repair:
        options.screen.note("the weights are the original's; --repair lstsq refits them on the same inputs")
    if wanted.handover is not None and result.status == "handed_over" and result.table is not None:
        options.screen.note(bench_hint(wanted.handover, result.table.context))
    options.screen.result(line, document)
    return _EXIT[result.status]


def _table_source(
    structure: Structure, options: Options, wanted: PruneOptions, stack: ExitStack
) -> LutStore | LatencyTable:
    """The table that was given, or the store that holds what is measured for one."""
    if wanted.lut is None:
        return stack.enter_context(open_store(options.store))
    table = load_table(wanted.lut, structure)
    if wanted.handover is None and dict(table.context) != context(options.runtime()):
        options.screen.warn(
            f"the table was measured on {printable(str(table.context.get('device')))}, the result is "
            "measured here; --handover FOLDER has it measured there"
        )
    return table


def _finetuned(
    model: ir.Model,
    result: PruneResult,
    written: tuple[Path | None, Path | None, Path | None],
    options: Options,
    wanted: PruneOptions,
) -> Trained | None:
    """Train what was written, with the original as teacher; its file is replaced by the trained one."""
    if wanted.finetune is None or written[0] is None or result.model is None:
        return None
    options.screen.note(f"{written[0]} is pruned and verified; what follows only trains its weights")
    shapes = parse_shapes(options.input_shapes, result.model)
    return finetune_model(result.model, model, shapes, written[0], options, wanted.finetune, overwrite=True)


def _tell_of(evidence: Evidence, options: Options) -> None:
    """Say how it was compared, and of outputs that no input changes that they would hide a wrong cut."""
    if evidence.judged is not None:
        options.screen.note(evidence.judged)
    if evidence.constant:
        names = ", ".join(map(printable, evidence.constant))
        options.screen.warn(
            f"the inputs tried hardly change {names}, so comparing it proves little; pass inputs with --data"
        )


def _write(
    result: PruneResult, outputs: tuple[Path, Path, Path], wanted: PruneOptions
) -> tuple[Path | None, Path | None, Path | None]:
    """Write a model that meets its target; nothing of one that does not."""
    if result.status != "met" or result.model is None or result.plan is None or wanted.dry_run:
        return None, None, None
    model, plan, figure = outputs
    beside: dict[Path, Content] = {
        figure: structure_svg(result.structure, result.plan).encode(),
        plan: plan_json(result.plan).encode(),
    }
    save_model(result.model, model, overwrite=wanted.overwrite, beside=beside)
    return outputs


def _summary(result: PruneResult, written: Path | None) -> str:
    """The final line of a prune."""
    target, base = f"target {result.target_ms:.3f} ms", f"base {result.base_ms:.3f} ms"
    if result.status == "nothing_to_do":
        return f"NOTHING TO DO  {base} already meets the {target}; nothing was written"
    if result.status == "infeasible":
        return (
            f"INFEASIBLE  {target} is below the smallest reachable latency, {result.fastest_ms or 0:.3f} ms "
            f"({base}); nothing was written"
        )
    if result.status == "handed_over":
        return (
            f"HANDED OVER  {target} · {base} by the table · {result.jobs} models to measure on the device, "
            f"{result.iterations} were; nothing was written"
        )
    assert result.evidence is not None
    verdict = "PASS" if result.status == "met" else "MISSED"
    where = f" → {written}" if written else " · nothing was written"
    return (
        f"{verdict}  {target} · predicted {result.predicted_ms:.3f} · measured {result.measured_ms:.3f} ms · "
        f"base then {result.base_ms:.3f}, now {result.base_now_ms:.3f} ms · noise F {result.noise:.1%} · "
        f"parameters {result.params[0] / 1e6:.2f} → {result.params[1] / 1e6:.2f} M · "
        f"verified, error {result.evidence.worst:.1e} of the scale{repair_text(result.repaired)}{where}"
    )


def run_apply(path: Path, plan_path: Path, output: Path, options: Options, *, overwrite: bool) -> int:
    """Replay a plan on the model that it was made for."""
    check_output(output, overwrite=overwrite)
    plan = load_plan(plan_path)
    model, structure = load_structure(path, with_plan_inputs(options, plan))
    pruned, evidence = apply_plan(model, structure, plan)
    _tell_of(evidence, options)
    if "repair" in plan.provenance:
        options.screen.note("the weights are as they were sliced; `onnx-mdp repair` repairs them again")
    save_model(pruned, output, overwrite=overwrite)
    line = f"APPLIED  verified, error {evidence.worst:.1e} of the scale → {output}"
    document = verify_document(evidence, None) | {"output": str(output)}
    options.screen.result(line, document)
    return 0


def run_verify(
    original: Path,
    pruned: Path,
    plan_path: Path,
    options: Options,
    *,
    max_ms: float | None,
    data: Path | None = None,
    preprocess: str | None = None,
) -> int:
    """Check that a pruned file equals the masked original, and optionally that it is fast enough."""
    plan = load_plan(plan_path)
    model, structure = load_structure(original, with_plan_inputs(options, plan))
    check_plan(plan, structure)
    slim = load_model(pruned)
    feeds = read_inputs(structure, model, data, preprocess, 2, options).feeds if data else ()
    weights, sliced = None, slim
    if how_weights_changed(slim) is not None:
        # What the law is about is the slicing; of the file, all but its weights can be checked.
        sliced = rewrite(structure, plan)
        weights = weights_apart(sliced, slim)
        require_finite(structure, plan, slim, feeds[:1])
    evidence = verify(model, structure, sliced, plan, feeds=feeds)
    _tell_of(evidence, options)
    measured = None
    if max_ms is not None:
        timing = measure_models([for_session(slim)], structure.shadow.inputs, options.runtime(), budget_s=5.0)
        measured, limit = timing.ms[0], max_ms * (1 + tolerance(timing.noise))
    fast = measured is None or measured <= limit
    verdict = _verdict(evidence, measured, fast, weights)
    options.screen.result(verdict, verify_document(evidence, measured, weights))
    return 0 if evidence.verified and fast else 1


def _verdict(evidence: Evidence, measured: float | None, fast: bool, weights: ChangedWeights | None) -> str:
    law = (
        f"pruned = masked original, error {evidence.worst:.1e} of the scale on {evidence.inputs_tried} inputs"
        if evidence.verified
        else f"differs from the masked original by {evidence.worst:.1e} of the scale"
        + (f"; checker: {printable(evidence.checker)}" if evidence.checker else "")
    )
    if weights is not None:
        law = (
            f"as sliced by the plan, {law} · this file is that graph with other numbers in {weights.changed} "
            f"of {weights.total} float tensors ({printable(weights.how)}), which the law does not cover"
        )
    speed = "" if measured is None else f" · measured {measured:.3f} ms{'' if fast else ', above --max-ms'}"
    return f"{'PASS' if evidence.verified and fast else 'FAIL'}  {law}{speed}"
