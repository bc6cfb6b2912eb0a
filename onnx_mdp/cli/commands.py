"""Analyze, profile and apply: options in, files and printed results out, an exit code back."""

from __future__ import annotations

from pathlib import Path

from onnx_mdp.cli.options import (
    Options,
    accepted_fallback,
    load_structure,
    tell_of_evidence,
    with_plan_inputs,
)
from onnx_mdp.files import check_output, write_text
from onnx_mdp.large_models import save_model
from onnx_mdp.pipeline import apply_plan
from onnx_mdp.plan import load_plan
from onnx_mdp.reports.documents import analyze_document, profile_document, verify_document
from onnx_mdp.reports.report import analysis_table, cost_table
from onnx_mdp.reports.time_shares import operation_ms
from onnx_mdp.tables.latency import LatencyTable, build_table
from onnx_mdp.tables.lut_store import open_store
from onnx_mdp.tables.table_file import load_table, table_json
from onnx_mdp.tables.variants import full_variant

__all__ = [
    "run_analyze",
    "run_apply",
    "run_profile",
]


def run_analyze(path: Path, options: Options, table: Path | None = None) -> int:
    """Print what can be pruned, what cannot, why, and how much that holds: with a table, in milliseconds."""
    _, structure = load_structure(path, options)
    times = (
        None
        if table is None
        else operation_ms(structure, load_table(table, structure), full_variant(structure))
    )
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
        options.screen.table(cost_table(structure, operation_ms(structure, table, full_variant(structure))))
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
        f"noise F {calibration.noise:.1%}{_memory(table)} · {source} in {table.seconds:.1f} s"
    )
    document = profile_document(structure, table) | {"output": None if output is None else str(output)}
    document |= fallback
    options.screen.result(line if output is None else f"{line} → {output}", document)
    return 0


def _memory(table: LatencyTable) -> str:
    calibration = table.calibration
    if not calibration.ms_per_mb:
        return ""
    price = calibration.scale * calibration.ms_per_mb
    return f" · weights beyond {calibration.cache_mb:.0f} MB of cache {price:.3f} ms/MB"


def run_apply(path: Path, plan_path: Path, output: Path, options: Options, *, overwrite: bool) -> int:
    """Replay a plan on the model that it was made for."""
    check_output(output, overwrite=overwrite)
    plan = load_plan(plan_path)
    model, structure = load_structure(path, with_plan_inputs(options, plan))
    pruned, evidence = apply_plan(model, structure, plan)
    tell_of_evidence(evidence, options)
    if "repair" in plan.provenance:
        options.screen.note("the weights are as they were sliced; `onnx-mdp repair` repairs them again")
    save_model(pruned, output, overwrite=overwrite)
    line = f"APPLIED  verified, error {evidence.worst:.1e} of the scale → {output}"
    document = verify_document(evidence, None) | {"output": str(output)}
    options.screen.result(line, document)
    return 0
