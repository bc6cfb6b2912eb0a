"""A verification as a page for a pull request: the verdict, its figures, and what they do not cover.

A pure function of the document that ``verify --json`` prints, so that a stored document gives the same page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from onnx_mdp.reports.pages import Column, Page, Section, Table
from onnx_mdp.reports.quantities import milliseconds, percent, ratio

__all__ = ["failure_page", "verify_page"]

_FOOT = "A latency is that of the machine that measured it: a shared runner is not the device."
_CHECKS = (Column("check"), Column(""), Column("found"), Column("allowed"))
_OUTPUTS = (Column("output", "name"), Column("cosine", "number"), Column("largest difference", "number"))


def verify_page(document: Mapping[str, Any]) -> Page:
    """The summary of a verification."""
    passed, drift = bool(document["passed"]), document["drift"]
    outputs = tuple((name, f"{d['cosine']:.5f}", f"{d['max_abs']:.3g}") for name, d in drift.items())
    sections = (
        Section("Checks", (Table(_CHECKS, tuple(_checks(document))),)),
        Section("Outputs against the unpruned model", (Table(_OUTPUTS, outputs),)) if outputs else None,
        Section("What this covers", tuple(_coverage(document))),
    )
    return _page(document["files"], passed, "", tuple(section for section in sections if section))


def failure_page(files: Mapping[str, str], reason: str) -> Page:
    """The summary where no verification came to its end."""
    return _page(files, False, f" Not verified: {reason}", ())


def _page(files: Mapping[str, str], passed: bool, more: str, sections: tuple[Section, ...]) -> Page:
    return Page(
        title=f"onnx-mdp verify: {files['pruned']}",
        word="PASS" if passed else "FAIL",
        good=passed,
        sentence=f"Made from {files['original']} by the plan {files['plan']}.{more}",
        sections=sections,
        foot=_FOOT,
    )


def _checks(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    error = document["max_error"] / max(document["scale"], 1e-30)
    found = f"error {error:.1e} of the largest output, on {document['inputs_tried']} inputs"
    yield "pruned = masked original", _mark(document["verified"]), found, ""
    if document["checker"]:
        yield "ONNX checker", _mark(False), document["checker"], ""
    if document["measured_ms"] is not None:
        where = document["context"]
        at = f"{where['provider']}, {where['threads']} thread(s), {where['precision']}, {where['device']}"
        allowed = f"{document['max_ms']:g} ms, with noise {milliseconds(document['limit_ms'])}"
        yield "latency", _mark(document["fast"]), f"{milliseconds(document['measured_ms'])} on {at}", allowed
    before, after = document["params"]
    yield "parameters", "", f"{before:,} → {after:,} ({percent(ratio(after, before))})", ""


def _coverage(document: Mapping[str, Any]) -> Iterator[str]:
    weights = document["weights"]
    if weights is None:
        yield (
            "Covered: the file computes what the original computes with the removed units masked, on the "
            "inputs tried. Not covered: accuracy, which depends on what was removed; measure it."
        )
    else:
        yield (
            "Covered: the file is the graph that the plan leaves, and that graph computes what the masked "
            f"original computes. Not covered: {weights['changed']} of {weights['total']} float tensors hold "
            f"other numbers since ({weights['how']}); measure the accuracy."
        )
    if document["constant_outputs"]:
        names = ", ".join(document["constant_outputs"])
        yield f"The inputs tried hardly change {names}, so comparing it proves little: pass --data."
    if document["judged"]:
        yield f"How it was compared: {document['judged']}."
    if document["measured_ms"] is None:
        yield "Not timed: pass --max-ms."


def _mark(good: bool) -> str:
    return "✅" if good else "❌"
