"""Tables of documents from what benchmarks wrote, between marks that name the result.

::

    <!-- result: quick/prune_cells -->
    (made by `python -m benchmarks.run`; edits are lost)
    <!-- end of result -->
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
_BLOCK = re.compile(r"<!-- result: ([\w/]+) -->\n.*?<!-- end of result -->", re.DOTALL)


def markdown_table(document: Mapping[str, Any]) -> str:
    """The table of a result, where it was measured and what came of its claim.

    >>> table = {"title": "t", "columns": ["model", "ms"], "cells": [["a|b", "1.5"]]}
    >>> header = {"device": "cpu", "onnxruntime": "1.32", "date": "2026-11-26T22:00:00+00:00", "threads": 1}
    >>> print(markdown_table({"table": table, "header": header, "verdict": "pass", "summary": "all held"}))
    | model | ms |
    |---|---|
    | a\\|b | 1.5 |
    <BLANKLINE>
    PASS: all held. (cpu, ONNX Runtime 1.32, 1 thread, 2026-11-26)
    """
    table, header = document["table"], document["header"]
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["cells"]]
    rows = ["|" + "|".join(_cell(cell) for cell in line) + "|" for line in lines]
    threads = f"{header['threads']} thread{'s' * (header['threads'] != 1)}"
    where = f"{header['device']}, ONNX Runtime {header['onnxruntime']}, {threads}, {header['date'][:10]}"
    return "\n".join([*rows, "", f"{document['verdict'].upper()}: {document['summary']}. ({where})"])


def _cell(text: str) -> str:
    return text if text == "---" else f" {text} ".replace("|", "\\|")


def filled(text: str) -> str:
    """A document with every block made anew.

    Raises:
        UsageError: a mark names no result.
    """

    def made(block: re.Match[str]) -> str:
        path = RESULTS / f"{block[1]}.json"
        if not path.is_file():
            raise UsageError(f"no result {path}; run `python -m benchmarks.run` first")
        table = markdown_table(json.loads(path.read_text(encoding="utf-8")))
        return f"<!-- result: {block[1]} -->\n{table}\n<!-- end of result -->"

    return _BLOCK.sub(made, text)


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
