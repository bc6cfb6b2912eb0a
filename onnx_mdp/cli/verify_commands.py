"""What `verify` does: a pruned file against its plan and a latency, for a verdict and an exit code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_mdp.cli.options import Options, load_structure, read_inputs, tell_of_evidence, with_plan_inputs
from onnx_mdp.errors import MeasurementError, UsageError, VerificationError
from onnx_mdp.files import check_output, write_text
from onnx_mdp.large_models import for_session
from onnx_mdp.model_io import load_model, parameter_count
from onnx_mdp.pipeline import verify_file
from onnx_mdp.plan import load_plan
from onnx_mdp.planning.closed_loop import tolerance
from onnx_mdp.reports.documents import verify_document
from onnx_mdp.reports.markdown_page import markdown_page
from onnx_mdp.reports.pages import Page
from onnx_mdp.reports.report import printable
from onnx_mdp.reports.verify_summary import failure_page, verify_page
from onnx_mdp.running.runtime import context
from onnx_mdp.surgery.changed_weights import ChangedWeights
from onnx_mdp.surgery.verification import Evidence
from onnx_mdp.tables.variants import measure_models

__all__ = ["VerifyOptions", "run_verify"]


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """The files, the most milliseconds, real inputs, and where a Markdown summary goes (``-``: stdout)."""

    original: Path
    pruned: Path
    plan: Path
    max_ms: float | None = None
    data: Path | None = None
    preprocess: str | None = None
    markdown: Path | None = None

    @property
    def files(self) -> dict[str, str]:
        """The names of the files, without folders."""
        return {"original": self.original.name, "pruned": self.pruned.name, "plan": self.plan.name}

    @property
    def on_screen(self) -> bool:
        """Whether the summary takes the place of the verdict on stdout."""
        return self.markdown == Path("-")


def run_verify(wanted: VerifyOptions, options: Options) -> int:
    """Check that a pruned file equals the masked original, and optionally that it is fast enough."""
    if wanted.on_screen and options.screen.as_json:
        raise UsageError("--markdown - and --json both write to stdout; give --markdown a file")
    if wanted.markdown is not None and not wanted.on_screen:
        check_output(wanted.markdown, overwrite=True)
    try:
        verdict, document = _verified(wanted, options)
    except (MeasurementError, VerificationError) as error:
        _write(wanted, options, failure_page(wanted.files, str(error)))
        raise
    _write(wanted, options, verify_page(document))
    if not wanted.on_screen:
        options.screen.result(verdict, document)
    return 0 if document["passed"] else 1


def _write(wanted: VerifyOptions, options: Options, page: Page) -> None:
    if wanted.on_screen:
        options.screen.result(markdown_page(page).rstrip("\n"), {})
    elif wanted.markdown is not None:
        write_text(markdown_page(page), wanted.markdown, overwrite=True)


def _verified(wanted: VerifyOptions, options: Options) -> tuple[str, dict[str, Any]]:
    """The verdict in one line, and the document."""
    plan = load_plan(wanted.plan)
    model, structure = load_structure(wanted.original, with_plan_inputs(options, plan))
    slim = load_model(wanted.pruned)
    data = wanted.data
    feeds = read_inputs(structure, model, data, wanted.preprocess, 2, options).feeds if data else ()
    evidence, weights = verify_file(model, structure, slim, plan, feeds)
    tell_of_evidence(evidence, options)
    measured, limit = None, None
    if wanted.max_ms is not None:
        timing = measure_models([for_session(slim)], structure.shadow.inputs, options.runtime(), budget_s=5.0)
        measured, limit = timing.ms[0], wanted.max_ms * (1 + tolerance(timing.noise))
    fast = measured is None or limit is None or measured <= limit
    document = verify_document(evidence, measured, weights) | {
        "passed": evidence.verified and fast,
        "fast": fast,
        "max_ms": wanted.max_ms,
        "limit_ms": limit,
        "files": wanted.files,
        "params": [parameter_count(model), parameter_count(slim)],
        "context": None if measured is None else context(options.runtime()),
    }
    return _verdict(evidence, measured, fast, weights), document


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
