"""The report of a prune: beside the model that it is about, and written again from its JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from onnx_mdp.errors import UsageError
from onnx_mdp.files import Content, write_text
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import PruneResult
from onnx_mdp.reports.html_page import html_page
from onnx_mdp.reports.markdown_page import markdown_page
from onnx_mdp.reports.pages import Page
from onnx_mdp.reports.report_contents import Circumstances, report_of
from onnx_mdp.reports.report_file import load_report, report_json
from onnx_mdp.reports.report_sections import report_page

__all__ = ["render_report", "report_files", "report_paths", "trained_report_files"]

_WRITERS: Mapping[str, Callable[[Page], str]] = {".html": html_page, ".md": markdown_page}


def report_paths(model: Path) -> tuple[Path, Path, Path]:
    """The HTML, the Markdown and the JSON that stand beside a model."""
    stem = model.name.removesuffix(".onnx")
    html, markdown, document = (model.with_name(f"{stem}.report.{form}") for form in ("html", "md", "json"))
    return html, markdown, document


def report_files(result: PruneResult, around: Circumstances) -> dict[Path, Content]:
    """What to write beside the output of a prune, or where it would stand."""
    report = report_of(result, around)
    page = report_page(report)
    texts = html_page(page), markdown_page(page), report_json(report)
    return {path: text.encode() for path, text in zip(report_paths(around.output), texts, strict=True)}


def trained_report_files(result: PruneResult, around: Circumstances, line: str) -> dict[Path, Content]:
    """The same of a model that was trained after it was written; ``line`` is what the training said."""
    then = (*around.then, line.removesuffix(f" → {around.output}"))
    slim = replace(result, model=load_model(around.output))
    return report_files(slim, replace(around, written=True, then=then))


def render_report(path: Path, output: Path, *, overwrite: bool) -> None:
    """Write the HTML or the Markdown of a report file.

    Raises:
        UsageError: the file is no report, or ``output`` ends neither in .html nor in .md.
    """
    writer = _WRITERS.get(output.suffix)
    if writer is None:
        raise UsageError(f"{output} ends neither in .html nor in .md; give one of them with -o")
    write_text(writer(report_page(load_report(path))), output, overwrite=overwrite)
