"""A verification as Markdown for a pull request: the verdict, its figures, and what they do not cover.

A pure function of the document that ``verify --json`` prints, so that a stored document gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from onnx_mdp.reports.report import printable

__all__ = ["failure_markdown", "verify_markdown"]


def verify_markdown(document: Mapping[str, Any]) -> str:
    """The summary of a verification; every name in it is escaped."""
    files = {kind: _code(document["files"][kind]) for kind in ("original", "pruned", "plan")}
    verdict = "passes" if document["passed"] else "fails"
    lines = [
        f"### onnx-mdp verify: {files['pruned']} {verdict}",
        "",
        f"Made from {files['original']} by the plan {files['plan']}.",
        "",
        "| | | |",
        "|:--|:--|:--|",
        *(f"| {mark} | {what} | {figure} |" for mark, what, figure in _rows(document)),
        "",
        *(f"- {sentence}" for sentence in _coverage(document)),
    ]
    return "\n".join(lines) + "\n"


def failure_markdown(files: Mapping[str, str], reason: str) -> str:
    """The summary where no verification came to its end."""
    return f"### onnx-mdp verify: {_code(files['pruned'])} fails\n\nNot verified: {_text(reason)}\n"


def _rows(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    error = document["max_error"] / max(document["scale"], 1e-30)
    tried = f"{error:.1e} of the largest output, on {document['inputs_tried']} inputs"
    yield _mark(document["verified"]), "pruned = masked original", f"error {tried}"
    if document["checker"]:
        yield _mark(False), "ONNX checker", _text(document["checker"])
    if document["measured_ms"] is not None:
        where = document["context"]
        most = f"at most {document['max_ms']:g} ms, with noise {document['limit_ms']:.3f} ms"
        at = f"{where['provider']} · {where['threads']} thread(s) · {where['precision']} · {where['device']}"
        figure = f"**{document['measured_ms']:.3f} ms**, {most} · {_text(at)}"
        yield _mark(document["fast"]), "latency", figure
    before, after = document["params"]
    yield "", "parameters", f"{before:,} → {after:,} ({after / max(before, 1):.0%})"
    for name, drift in document["drift"].items():
        figure = f"cosine {drift['cosine']:.5f}, largest difference {drift['max_abs']:.3g}"
        yield "", f"{_code(name)} against the unpruned model", figure


def _coverage(document: Mapping[str, Any]) -> Iterator[str]:
    weights = document["weights"]
    if weights is None:
        yield (
            "Covered: the file computes what the original computes with the removed units masked, on the "
            "inputs tried. Not covered: accuracy, which depends on what was removed; see the last rows, and "
            "measure it."
        )
    else:
        yield (
            "Covered: the file is the graph that the plan leaves, and that graph computes what the masked "
            f"original computes. Not covered: {weights['changed']} of {weights['total']} float tensors hold "
            f"other numbers since ({_text(weights['how'])}); measure the accuracy."
        )
    if document["constant_outputs"]:
        names = ", ".join(map(_code, document["constant_outputs"]))
        yield f"The inputs tried hardly change {names}, so comparing it proves little: pass `--data`."
    if document["judged"]:
        yield f"How it was compared: {_text(document['judged'])}."
    if document["measured_ms"] is None:
        yield "Not timed: pass `--max-ms`."
    else:
        yield "The latency is that of this machine, with these threads; a shared runner is not the device."


def _mark(good: bool) -> str:
    return "✅" if good else "❌"


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _text(text: str) -> str:
    """Text that neither Markdown nor HTML reads as its own: all but words and spaces as references.

    >>> _text("a|b <i> @c")
    'a&#124;b &#60;i&#62; &#64;c'
    """
    return "".join(c if c.isalnum() or c in " .,;()" else f"&#{ord(c)};" for c in printable(text))
