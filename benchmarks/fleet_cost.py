"""What tables for many models on many devices cost, on paper, from what was measured here.

Claim: 1,000 models on 50 devices take less than 8 hours of each device, because a device works on its own
table jobs alone, related models share theirs, and what was measured is never measured again.

Of the kept results, `latency_prediction` gives the seconds of a table and `related_networks` those of a model
whose layer shapes are known from another one. ``--families`` is how many models are the first of their kind;
the paper's 152 minutes for one ResNet-50 stand beside it. Nothing is measured by this script.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness import Verdict, arguments, combined, print_table, publish, run_main
from benchmarks.result_tables import RESULTS
from onnx_mdp.errors import UsageError

__all__ = ["Row", "device_hours", "main"]

_PAPER_S = 152 * 60.0
_MOST_HOURS = 8.0


@dataclass(frozen=True, slots=True)
class Row:
    """One way to fill the tables: hours of each device, and of all of them."""

    way: str
    first_s: float
    related_s: float
    hours: float
    device_hours: float
    claimed: bool

    @property
    def verdict(self) -> Verdict:
        """Only our shared tables are claimed."""
        return "fail" if self.claimed and self.hours > _MOST_HOURS else "pass"


def device_hours(first_s: float, related_s: float, models: int, families: int) -> float:
    """Hours of one device for the tables of all models, ``families`` of which have no relative yet.

    >>> device_hours(36.0, 18.0, 1000, 100)
    5.5
    """
    return (families * first_s + (models - families) * related_s) / 3600


def _kept(name: str) -> Mapping[str, Any]:
    for folder in ("all", "quick"):
        path = RESULTS / folder / f"{name}.json"
        if path.is_file():
            found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    raise UsageError(f"no result of {name} is kept; run `python -m benchmarks.run --all --only {name}` first")


def _rows(given: argparse.Namespace) -> list[Row]:
    alone = float(np.median([row["table_s"] for row in _kept("latency_prediction")["rows"]]))
    pairs = [row["seconds"] for row in _kept("related_networks")["rows"]]
    share = float(np.median([related / alone_s for related, alone_s in pairs]))
    ways = {
        "the paper's table, each model alone": (_PAPER_S, _PAPER_S, False),
        "ours, each model alone": (alone, alone, False),
        "ours, related models share": (alone, alone * share, True),
    }
    rows = []
    for way, (first_s, related_s, claimed) in ways.items():
        hours = device_hours(first_s, related_s, given.count, given.families)
        rows.append(Row(way, first_s, related_s, hours, hours * given.devices, claimed))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Compute the table and return the exit code."""
    parser = arguments(__doc__, ())
    parser.add_argument("--count", type=int, default=1000, help="models (default: 1000)")
    parser.add_argument("--families", type=int, default=100, help="of them without a relative (default: 100)")
    parser.add_argument("--devices", type=int, default=50, help="(default: 50)")
    given = parser.parse_args(argv)
    rows = _rows(given)
    columns: Mapping[str, Callable[[Row], str]] = {
        "tables": lambda r: r.way,
        "first of a kind": lambda r: f"{r.first_s:,.0f} s",
        "related": lambda r: f"{r.related_s:,.0f} s",
        "hours of each device": lambda r: f"{r.hours:,.1f}",
        "of all devices": lambda r: f"{r.device_hours:,.0f}",
        "verdict": lambda r: r.verdict,
    }
    table = print_table(f"{given.count:,} models on {given.devices} devices", columns, rows)
    summary = f"{rows[-1].hours:.1f} hours of each device, {rows[-1].device_hours:,.0f} of all"
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
