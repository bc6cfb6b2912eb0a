"""What all benchmarks share: arguments, verdicts, and a table and a JSON file as output."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table

from onnx_mdp.errors import MdpError
from onnx_mdp.files import write_text
from onnx_mdp.running.runtime import device_name, import_onnxruntime

__all__ = [
    "NOISE_LIMIT",
    "ROOT",
    "Printed",
    "Verdict",
    "arguments",
    "claim",
    "combined",
    "header",
    "judge",
    "note",
    "print_table",
    "publish",
    "run_main",
    "side_by_side",
]

ROOT = Path(__file__).resolve().parents[1]
NOISE_LIMIT = 0.02  # the split-half error F above which a comparison of latencies proves nothing

Verdict = Literal["pass", "fail", "inconclusive"]
_Row = TypeVar("_Row")


def arguments(doc: str | None, models: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; ``models`` is the default selection."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=text)
    names = "of the zoo (see benchmarks/model_files.py), such as resnet50_dynamo for an export, or a file"
    parser.add_argument("--models", nargs="+", default=list(models), metavar="NAME", help=names)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "benchmarks", metavar="DIR")
    parser.add_argument("--threads", type=int, default=1, help="of the runtime (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(doc=doc)
    return parser


def claim(doc: str | None) -> str:
    """The paragraph of a docstring that begins with ``Claim:``, on one line."""
    paragraphs = (doc or "").split("\n\n")
    return next(" ".join(p.split()) for p in paragraphs if p.startswith("Claim:"))


def header(threads: int) -> dict[str, str | int]:
    """Where and when something was measured."""
    return {
        "device": device_name(),
        "cpus": os.cpu_count() or 1,
        "onnxruntime": str(import_onnxruntime().__version__),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": threads,
    }


def judge(holds: bool, noise: float) -> Verdict:
    """Whether a claim about latencies holds; above the noise limit nobody can say.

    >>> judge(True, 0.01), judge(False, 0.01), judge(False, 0.03), judge(True, float("nan"))
    ('pass', 'fail', 'inconclusive', 'inconclusive')
    """
    if not noise <= NOISE_LIMIT:
        return "inconclusive"
    return "pass" if holds else "fail"


def combined(verdicts: Sequence[Verdict]) -> Verdict:
    """One failure fails the whole; else one inconclusive part leaves it open, and so does no part at all.

    >>> combined(["pass", "inconclusive", "fail"]), combined(["pass", "inconclusive"]), combined([])
    ('fail', 'inconclusive', 'inconclusive')
    """
    if "fail" in verdicts:
        return "fail"
    return "pass" if verdicts and set(verdicts) == {"pass"} else "inconclusive"


def note(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Printed:
    """A table as it was printed, so that documents show what was measured and nothing else."""

    title: str
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


def print_table(title: str, columns: Mapping[str, Callable[[_Row], str]], rows: Sequence[_Row]) -> Printed:
    """Print one line a row on stdout; a file or a pipe gets lines as long as they need to be."""
    cells = tuple(tuple(show(row) for show in columns.values()) for row in rows)
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    for row in cells:
        table.add_row(*row)
    console = Console()
    Console(width=console.width if console.is_terminal else 400).print(table)
    return Printed(title, tuple(columns), cells)


def side_by_side(
    title: str,
    keys: Mapping[str, Callable[[_Row], str]],
    column: Callable[[_Row], str],
    cell: Callable[[_Row], str],
    rows: Sequence[_Row],
) -> Printed:
    """Print what ``cell`` says of rows with the same ``keys`` on one line, under what ``column`` says.

    >>> rows = [("a", 1, "x"), ("a", 2, "y"), ("b", 2, "z")]
    >>> side_by_side("", {"name": lambda r: r[0]}, lambda r: str(r[1]), lambda r: r[2], rows).cells[1]
    ┏...
    ('b', '', 'z')
    """
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(show(row) for show in keys.values()), {})[column(row)] = cell(row)
    columns: dict[str, Callable[[tuple[str, ...]], str]] = {
        name: partial(lambda place, line: line[place], place) for place, name in enumerate(keys)
    }
    for name in dict.fromkeys(map(column, rows)):
        columns[name] = partial(lambda name, line: lines[line].get(name, ""), name)
    return print_table(title, columns, list(lines))


def publish(
    script: str,
    given: argparse.Namespace,
    rows: Sequence[Any],
    table: Printed,
    verdict: Verdict,
    summary: str,
    overview: Printed | None = None,
) -> int:
    """Write ``DIR/<name of the script>.json``, print the last line, and return the exit code.

    ``overview`` is a table of the same that fits a page where the whole one is long.
    """
    document = {
        "claim": claim(given.doc),
        "header": header(given.threads),
        "verdict": verdict,
        "summary": summary,
        "table": asdict(table),
        "overview": asdict(overview or table),
        "rows": [_finite(asdict(row) | {"verdict": row.verdict}) for row in rows],
    }
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"{Path(script).stem}.json"
    write_text(json.dumps(document, indent=2) + "\n", path, overwrite=True)
    print(f"{verdict.upper()}  {summary} → {path}")
    return 1 if verdict == "fail" else 0


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_main(main: Callable[[], int]) -> None:
    """Exit with what ``main`` returns; an expected failure is one sentence on stderr."""
    try:
        sys.exit(main())
    except MdpError as error:
        note(f"error: {error}")
        sys.exit(2)  # 1 is for a claim that does not hold
