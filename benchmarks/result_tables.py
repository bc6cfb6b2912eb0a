"""Tables of documents from what benchmarks wrote, between marks that name the result.

::

    <!-- result: quick/prune_cells -->
    (made by `python -m benchmarks.run`; edits are lost)
    <!-- end of result -->

and sentences, between marks inside a line: ``<!-- summary: all/targets -->…<!-- end -->``. A mark
``<!-- overview: … -->`` gets the short table of a result. The name ``overview`` is of all results of a
folder, how each ended and what it took.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from onnx_mdp.errors import UsageError

__all__ = ["RESULTS", "filled", "markdown_table", "refresh", "stale_documents"]

RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"<!-- (result|overview): ([\w/]+) -->\n.*?<!-- end of result -->", re.DOTALL)
_SENTENCE = re.compile(r"<!-- summary: ([\w/]+) -->.*?<!-- end -->", re.DOTALL)


def markdown_table(document: Mapping[str, Any], kind: str = "table") -> str:
    """The table of a result, or its ``overview``, where it was measured and what came of its claim.

    >>> table = {"title": "t", "columns": ["model", "ms"], "cells": [["a|b", "1.5"]]}
    >>> header = {"device": "cpu", "onnxruntime": "1.32", "date": "2026-11-26T22:00:00+00:00", "threads": 1}
    >>> print(markdown_table({"table": table, "header": header, "verdict": "pass", "summary": "all held"}))
    | model | ms |
    |---|---|
    | a\\|b | 1.5 |
    <BLANKLINE>
    PASS: all held. (cpu, ONNX Runtime 1.32, 1 thread, 2026-11-26)
    """
    table, header = document[kind], document["header"]
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["cells"]]
    rows = ["|" + "|".join(_cell(cell) for cell in line) + "|" for line in lines]
    threads = f"{header['threads']} thread{'s' * (header['threads'] != 1)}"
    where = f"{header['device']}, ONNX Runtime {header['onnxruntime']}, {threads}, {header['date'][:10]}"
    return "\n".join([*rows, "", f"{document['verdict'].upper()}: {document['summary']}. ({where})"])


def _cell(text: str) -> str:
    return text if text == "---" else f" {text} ".replace("|", "\\|")


def filled(text: str) -> str:
    """A document with every table and every sentence made anew.

    Raises:
        UsageError: a mark names no result.
    """
    text = _BLOCK.sub(_made_table, text)
    return _SENTENCE.sub(
        lambda found: f"<!-- summary: {found[1]} -->{_result(found[1])['summary']}<!-- end -->", text
    )


def _made_table(block: re.Match[str]) -> str:
    kind, name = block.groups()
    table = markdown_table(_result(name), "table" if kind == "result" else kind)
    return f"<!-- {kind}: {name} -->\n{table}\n<!-- end of result -->"


def _result(name: str) -> Mapping[str, Any]:
    path = RESULTS / f"{name}.json"
    if path.stem == "overview":
        return _overview(path.parent)
    if not path.is_file():
        raise UsageError(f"no result {path}; run `python -m benchmarks.run` first")
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _overview(folder: Path) -> dict[str, Any]:
    """All results of a folder as one."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
    }
    if not found:
        raise UsageError(f"no results in {folder}; run `python -m benchmarks.run` first")
    verdicts = [one["verdict"] for one in found.values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "inconclusive", "fail") if v in verdicts)
    minutes = sum(one["seconds"] for one in found.values()) / 60
    cells = [[name, one["verdict"], f"{one['seconds']}", one["summary"]] for name, one in found.items()]
    return {
        "table": {"columns": ["benchmark", "verdict", "seconds", "summary"], "cells": cells},
        "header": max((one["header"] for one in found.values()), key=lambda header: header["date"]),
        "verdict": "fail" if "fail" in verdicts else "pass",
        "summary": f"{len(found)} benchmarks in {minutes:.0f} minutes: {counts}",
    }


def _documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "onnx_mdp" / "docs").glob("*.md"))]


def stale_documents() -> list[str]:
    """The documents that say something else than the results."""
    texts = {path: path.read_text(encoding="utf-8") for path in _documents()}
    return [path.name for path, text in texts.items() if filled(text) != text]


def refresh() -> None:
    """Fill every document anew."""
    for path in _documents():
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            path.write_text(filled(text), encoding="utf-8")
