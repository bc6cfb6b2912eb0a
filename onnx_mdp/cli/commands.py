"""Analyze, profile, apply and verify: options in, files and printed results out, an exit code back."""

from __future__ import annotations

from pathlib import Path

from onnx_mdp.cli.options import (
    Options,
    accepted_fallback,
    load_structure,
    read_inputs,
    tell_of_evidence,
    with_plan_inputs,
)
from onnx_mdp.files import check_output, write_text
from onnx_mdp.large_models import for_session, save_model
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import apply_plan, verify_file
from onnx_mdp.plan import load_plan
from onnx_mdp.planning.closed_loop import tolerance
from onnx_mdp.reports.documents import analyze_document, profile_document, verify_document
from onnx_mdp.reports.report import analysis_table, cost_table, printable
from onnx_mdp.reports.time_shares import operation_ms
from onnx_mdp.surgery.changed_weights import (
    ChangedWeights,
)
from onnx_mdp.surgery.verification import Evidence
from onnx_mdp.tables.latency import build_table
from onnx_mdp.tables.lut_store import open_store
from onnx_mdp.tables.table_file import load_table, table_json
from onnx_mdp.tables.variants import full_variant, measure_models

__all__ = [
    "run_analyze",
    "run_apply",
    "run_profile",
    "run_verify",
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
        f"noise F {calibration.noise:.1%} · {source} in {table.seconds:.1f} s"
    )
    document = profile_document(structure, table) | {"output": None if output is None else str(output)}
    document |= fallback
    options.screen.result(line if output is None else f"{line} → {output}", document)
    return 0


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
    slim = load_model(pruned)
    feeds = read_inputs(structure, model, data, preprocess, 2, options).feeds if data else ()
    evidence, weights = verify_file(model, structure, slim, plan, feeds)
    tell_of_evidence(evidence, options)
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
