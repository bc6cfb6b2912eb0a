"""What pruners came to, each tool in a process of its own, so that a crash of one is a result and no more."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.contenders import PEERS
from benchmarks.harness import ROOT, Verdict, note

__all__ = ["Attempts", "Row"]

_SECONDS = 900.0  # of one attempt


@dataclass(frozen=True, slots=True)
class Row:
    """One tool on one model; shares of the original's, and None where the tool did not manage."""

    model: str
    ratio: float
    method: str
    measured: float | None = None
    noise: float = 0.0
    kept: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    remark: str = ""
    verdict: Verdict = "pass"


class Attempts:
    """The rows of a run, kept line by line, so that one that was interrupted goes on with ``--resume``."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._path = given.output / "equal_latency.rows.jsonl"
        self._given = given
        if not given.resume:
            self._path.unlink(missing_ok=True)
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        rows = [Row(**json.loads(line)) for line in lines]
        self._rows = {(row.model, row.ratio, row.method): row for row in rows}

    def cell(self, name: str, ratio: float) -> list[Row]:
        """All methods on one model at one ratio. Ours share a process, as they share table and importance."""
        ratios, methods = self._given.ratios, self._given.methods
        self._attempt(name, ratios, [m for m in methods if m not in PEERS])
        for method in (m for m in methods if m in PEERS):
            self._attempt(name, [ratio], [method])
        return [self._rows[name, ratio, method] for method in methods]

    def _attempt(self, name: str, ratios: Sequence[float], methods: Sequence[str]) -> None:
        if all((name, *pair) in self._rows for pair in itertools.product(ratios, methods)):
            return
        rows = _tried(name, ratios, methods, self._given)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
        self._rows |= {(row.model, row.ratio, row.method): row for row in rows}


def _tried(
    name: str, ratios: Sequence[float], methods: Sequence[str], given: argparse.Namespace
) -> list[Row]:
    """Attempts in one process of their own, which prints a line each; those that it died of have none."""
    note(f"{name} at {', '.join(f'{ratio:g}' for ratio in ratios)} by {', '.join(methods)} …")
    command = [sys.executable, "-m", "benchmarks.equal_latency", "--inside", "--models", name]
    command += ["--ratios", *(f"{ratio:g}" for ratio in ratios), "--methods", *methods]
    command += ["--threads", str(given.threads), "--seed", str(given.seed)]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=_SECONDS * len(methods) * len(ratios),
        )
        said, end = done.stdout, f"ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        said, end = (late.stdout or b"").decode(), f"more than {_SECONDS:g} s"
    found = [Row(**json.loads(line)) for line in said.splitlines() if line.startswith("{")]
    there = {(row.ratio, row.method) for row in found}
    pairs = itertools.product(ratios, methods)
    return found + [Row(name, *pair, remark=end) for pair in pairs if pair not in there]
