"""The main command: a model and a target in; a slim model, its plan and a figure out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    tell_of_evidence,
    width_rules,
)
from onnx_mdp.cli.pruning_recipe import recipe_text
from onnx_mdp.cli.report_commands import report_files, report_paths, trained_report_files
from onnx_mdp.data.calibration import CalibrationData
from onnx_mdp.errors import UsageError
from onnx_mdp.files import Content, check_output, write_files
from onnx_mdp.handover import bench_hint, open_handover
from onnx_mdp.importance.scoring import criterion_name
from onnx_mdp.pipeline import PruneResult, prune
from onnx_mdp.planning.closed_loop import Request
from onnx_mdp.repairing.repair import parse_methods
from onnx_mdp.reports.documents import prune_document
from onnx_mdp.reports.repair_report import repair_text
from onnx_mdp.reports.report import plan_table, printable
from onnx_mdp.reports.report_contents import Circumstances
from onnx_mdp.reports.result_files import result_paths, write_result
from onnx_mdp.running.runtime import context
from onnx_mdp.tables.latency import LatencyTable
from onnx_mdp.tables.lut_store import LutStore, open_store
from onnx_mdp.tables.table_file import load_table

__all__ = ["PruneOptions", "run_prune"]

_EXIT = {"met": 0, "nothing_to_do": 0, "handed_over": 0, "missed": 1, "infeasible": 4}


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What `prune` takes besides the common options, and all that it was told, for a recipe of it."""

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
    report: bool = False
    parameters: Mapping[str, Any] | None = None


def _check_wanted(wanted: PruneOptions) -> None:
    wanted.plan.check(labelled=wanted.finetune is not None or wanted.report)
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


def run_prune(path: Path, options: Options, wanted: PruneOptions) -> int:
    """Prune a model to a latency and write the model, its plan and a figure of it."""
    _check_wanted(wanted)
    outputs = result_paths(wanted.output or Path(f"{path.stem}.pruned.onnx"))
    recipe_file = outputs[0].with_name(f"{outputs[0].name.removesuffix('.onnx')}.recipe.yaml")
    if not wanted.dry_run:
        for output in (*outputs, recipe_file, *(report_paths(outputs[0]) if wanted.report else ())):
            check_output(output, overwrite=wanted.overwrite)
    model, structure = load_structure(path, options)
    if wanted.finetune is not None:
        training = replace(wanted.finetune, resume=wanted.masks.resume)
        shapes = parse_shapes(options.input_shapes, model)
        check_finetuning(model, shapes, options, training, overwrite=wanted.overwrite)
        if wanted.masks.masked:
            check_masking(structure, wanted.finetune, wanted.masks)
    rules = width_rules(model, structure, wanted.plan, options)
    fallback = accepted_fallback(model, structure, options)
    data = calibration(structure, model, wanted.plan, options, labelled=wanted.report)
    repair = parse_methods(wanted.repair)
    request = Request(
        target_ms=wanted.target_ms,
        target_ratio=wanted.target_ratio,
        runtime=options.runtime(),
        criterion=wanted.plan.scorer(data, options.seed, repair),
        solver=wanted.plan.solver,
        limits=wanted.plan.limits,
        max_choices=wanted.choices,
        seed=options.seed,
        command=command_line(),
        rules=rules,
        caps=wanted.plan.caps(structure),
        rescale_attention=wanted.plan.rescales(structure),
        repair=repair,
    )
    if wanted.plan.criterion is None and request.criterion == "refit":
        options.screen.note("units are ranked by what the repair leaves of them; --criterion drift is faster")
    recipe: dict[Path, Content] = {}
    if wanted.parameters is not None:
        recipe[recipe_file] = recipe_text(wanted.parameters, structure.shadow.source).encode()
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
        tell_of_evidence(result.evidence, options)
    if result.plan is not None and "note" in result.plan.provenance:
        options.screen.warn(str(result.plan.provenance["note"]))
    around = _circumstances(model, path, outputs[0], request, wanted, data, trained)
    trains = wanted.finetune is not None and not wanted.masks.masked and result.status == "met"
    reported = wanted.report and not wanted.dry_run and result.status != "handed_over"
    reports = report_files(result, around) if reported and not trains else {}
    written = _write(result, outputs, wanted, reports, recipe)
    if result.plan is not None and not options.screen.as_json:
        options.screen.table(plan_table(structure, result.plan))
    line, document = _summary(result, written[0]), prune_document(result, written) | fallback
    document["recipe"] = str(recipe_file) if written[0] and recipe else None
    if not wanted.masks.masked:
        trained = _finetuned(model, result, written, options, wanted)
        if trained is not None and written[0] is not None and reported:
            reports = trained_report_files(result, around, trained.line)
            write_files(reports)
    if reports:
        document |= {"reports": [str(report) for report in reports]}
        options.screen.note(f"the report is {next(iter(reports))}")
    if trained is not None:
        line, document = f"{line}\n{trained.line}", document | {"finetuning": dict(trained.document)}
    if data and written[0] and trained is None and structure.shadow.plain and not request.repair:
        options.screen.note("the weights are the original's; --repair lstsq refits them on the same inputs")
    if wanted.handover is not None and result.status == "handed_over" and result.table is not None:
        options.screen.note(bench_hint(wanted.handover, result.table.context))
    options.screen.result(line, document)
    return _EXIT[result.status]


def _circumstances(
    model: ir.Model,
    path: Path,
    output: Path,
    request: Request,
    wanted: PruneOptions,
    data: CalibrationData | None,
    trained: Trained | None,
) -> Circumstances:
    """What a report tells besides the result."""
    return Circumstances(
        original=model,
        path=path,
        output=output,
        runtime=request.runtime,
        command=request.command,
        criterion=criterion_name(request.criterion),
        data=data,
        data_name=None if wanted.plan.data is None else wanted.plan.data.resolve().name,
        then=() if trained is None else (trained.line,),
        elsewhere=wanted.handover is not None,
    )


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


def _write(
    result: PruneResult,
    outputs: tuple[Path, Path, Path],
    wanted: PruneOptions,
    reports: Mapping[Path, Content],
    recipe: Mapping[Path, Content],
) -> tuple[Path | None, Path | None, Path | None]:
    """Write a model that meets its target, with its recipe and reports; of another, the reports."""
    if result.status != "met" or result.model is None or result.plan is None or wanted.dry_run:
        write_files(reports)
        return None, None, None
    write_result(result, outputs, overwrite=wanted.overwrite, beside={**recipe, **reports})
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
