"""The command that repairs a pruned file: a plan and inputs in, the same graph with other weights out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnx_mdp.cli.options import Options, load_structure, read_inputs, with_plan_inputs
from onnx_mdp.errors import UsageError
from onnx_mdp.files import check_output
from onnx_mdp.large_models import save_model
from onnx_mdp.model_io import load_model
from onnx_mdp.plan import check_plan, load_plan
from onnx_mdp.repairing.repair import check_repair, parse_methods, repair
from onnx_mdp.reports.documents import repair_document
from onnx_mdp.reports.repair_report import repair_table, repair_text
from onnx_mdp.surgery.changed_weights import weights_apart
from onnx_mdp.surgery.rewriting import rewrite

__all__ = ["RepairOptions", "run_repair"]


@dataclass(frozen=True, slots=True)
class RepairOptions:
    """What `repair` takes besides: methods, calibration inputs, and where to write."""

    methods: str
    data: Path
    output: Path
    preprocess: str | None = None
    samples: int = 64
    overwrite: bool = False


def run_repair(original: Path, pruned: Path, plan_path: Path, options: Options, wanted: RepairOptions) -> int:
    """Repair what a plan left of a model, and write it."""
    methods = parse_methods(wanted.methods)
    if not methods:
        raise UsageError("--repair none repairs nothing; name a method")
    check_output(wanted.output, overwrite=wanted.overwrite)
    plan = load_plan(plan_path)
    model, structure = load_structure(original, with_plan_inputs(options, plan))
    check_plan(plan, structure)
    check_repair(structure, methods)
    slim = load_model(pruned)
    weights_apart(rewrite(structure, plan), slim)
    data = read_inputs(structure, model, wanted.data, wanted.preprocess, wanted.samples, options)
    with options.screen.progress() as progress:
        repaired = repair(structure, plan, slim, data.feeds, methods, progress)
    save_model(repaired.model, wanted.output, overwrite=wanted.overwrite)
    if not options.screen.as_json:
        options.screen.table(repair_table(repaired))
    line = f"REPAIRED{repair_text(repaired).removeprefix(' · then repaired')} → {wanted.output}"
    document = {"schema_version": 1, **repair_document(repaired), "output": str(wanted.output)}
    options.screen.result(line, document)
    return 0
