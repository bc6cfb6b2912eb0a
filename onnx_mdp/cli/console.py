"""What a person sees while a command works: progress and notes on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Screen"]

_STAGES = {
    "gradients": "taking the gradient of each calibration input",
    "score": "measuring what each dimension is worth",
    "score blocks": "measuring what each block is worth",
    "profile": "profiling variants",
    "calibrate": "calibrating the table",
    "solve": "solving",
    "bench": "measuring models",
    "fleet": "measuring on the devices",
    "doctor": "trying providers and the clock",
    "measure": "measuring against the unpruned model",
    "train": "fine-tuning",
    "verify": "verifying against the masked original",
}


@dataclass(frozen=True, slots=True)
class Screen:
    """Where output goes: ``quiet`` drops notes and progress, ``as_json`` makes stdout one document."""

    quiet: bool = False
    as_json: bool = False

    def note(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """One line on stderr, always."""
        print(f"warning: {text}", file=sys.stderr)

    def table(self, renderable: RenderableType) -> None:
        """A table: on stdout, or on stderr when stdout carries JSON."""
        if not (self.as_json and self.quiet):
            Console(stderr=self.as_json, soft_wrap=False).print(renderable)

    def result(self, line: str, document: dict[str, Any]) -> None:
        """The final line, or with ``--json`` the document, on stdout."""
        print(json.dumps(document, indent=2, sort_keys=True) if self.as_json else line)

    @contextmanager
    def progress(self) -> Iterator[Any]:
        """Yield a callback ``(stage, done, total)`` that draws one bar for each stage."""
        console = Console(stderr=True)
        if self.quiet or not console.is_terminal:
            yield self._lines()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            tasks: dict[str, Any] = {}

            def advance(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(_STAGES.get(stage, stage), total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield advance

    def _lines(self) -> Any:
        """Without a terminal: one line when a stage begins."""
        seen: set[str] = set()

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in seen:
                seen.add(stage)
                self.note(f"{_STAGES.get(stage, stage)} …")

        return advance
