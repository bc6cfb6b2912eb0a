"""The paper's figures beside ours, on what runs here, and why they differ.

Claim: where paper and kept results measure the same thing on whatever machine each had, ours is the quicker
or the more exact one: seconds of a solve and of a table, and the error of the latency model.

Of the paper (Sun et al., CVPR 2025; arXiv 2504.02168) figures of its tables 4, 5 and 7 and of its figures 5
to 8 are quoted. Ours are read from the results that `benchmarks.run` kept; nothing is measured here, and what
was not run is said to be missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.harness import Verdict, arguments, combined, print_table, publish, run_main
from benchmarks.result_tables import RESULTS

__all__ = ["Row", "main"]

_MISSING = "not run"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity; ``holds`` is whether ours is the better one, None where nobody can compare."""

    where: str
    what: str
    paper: str
    ours: str
    holds: bool | None
    why: str

    @property
    def verdict(self) -> Verdict:
        """What cannot be compared, or was not run, is open."""
        return "inconclusive" if self.holds is None else "pass" if self.holds else "fail"


def _kept(name: str) -> Rows:
    """Of everything, or of the trainings of CIFAR's ResNet-20, which are kept beside it."""
    for path in (RESULTS / folder / f"{name}.json" for folder in ("all", "resnet20")):
        if path.is_file():
            found: Rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            return found
    return ()


def _solving() -> Iterator[Row]:
    paper_s = {"resnet50 by 32": ("ResNet-50", 5.4), "deit_base": ("DeiT-Base", 452.0)}
    why = "exact elimination on integer tables; MindtPy's outer approximation there"
    for instance, (name, seconds) in paper_s.items():
        found = [r for r in _kept("solver") if r["solver"] == "exact" and r["instance"] == instance]
        ours = [r["median_s"] for r in found if r["task"] == "solve"]
        shown = f"{ours[0]:.2f} s, gap ≤ {found[0]['gap']:.0e}" if ours else _MISSING
        yield Row("table 4", f"to solve, {name}", f"{seconds:g} s", shown, _less(ours, seconds), why)


def _tables() -> Iterator[Row]:
    found = [r for r in _kept("latency_prediction") if r["model"].startswith("resnet50")]
    ours = [r["table_s"] for r in found]
    shown = f"{ours[0]:.0f} s" if ours else _MISSING
    why = "whole variants under a profiler, one fit; every layer at every width there, on a GPU"
    yield Row("table 4", "to build a table, ResNet-50", "152 min", shown, _less(ours, 152 * 60), why)
    linear = [median(map(abs, r["errors"]["linear"])) for r in found]
    table = [median(map(abs, r["errors"]["calibrated"])) for r in found]
    shown = f"{table[0]:.1%}, linear {linear[0]:.1%}" if table else _MISSING
    why = "linear does not see that inputs become narrower; the paper draws it without a number"
    yield Row(
        "figure 5", "error of the latency model", "linear is far off", shown, _less(table, *linear), why
    )


def _structure() -> Iterator[Row]:
    kept = _kept("pruned_structure")
    stages = [r for r in kept if r["model"].startswith("resnet50") and r["blocks"]]
    shallow, deep = (stages[0], stages[-1]) if stages else (None, None)
    shown = ", ".join(f"{r['work']:.0%} of MACs stay at {r['side']}²" for r in (shallow, deep) if r)
    holds = shallow["work"] < deep["work"] if shallow and deep else None
    why = "random weights here, so it is the pull of the latency alone"
    yield Row("figure 6", "ResNet-50 less 85 %", "shallow layers are cut most", shown or _MISSING, holds, why)


def _accuracy() -> Iterator[Row]:
    soft = _kept("soft_masking")
    gains = {
        speedup: median(r["accuracy"] for r in soft if r["mode"] == "soft" and r["speedup"] == speedup)
        - median(r["accuracy"] for r in soft if r["mode"] == "one-shot" and r["speedup"] == speedup)
        for speedup in sorted({r["speedup"] for r in soft})
    }
    shown = ", ".join(f"{100 * gain:+.1f} points at {s:g}×" for s, gain in gains.items()) or _MISSING
    holds = None if len(gains) < 2 else gains[max(gains)] > gains[min(gains)]
    why = "CIFAR ResNet and few steps; ImageNet and 90 epochs there"
    yield Row("figure 7", "soft masking over one-shot", "pays at high ratios", shown, holds, why)
    native = [r for r in _kept("native_networks") if r["claimed"]]
    shown = ", ".join(
        f"{r['model']} {r['pruned']:.1%}, {r['native']} {r['native_accuracy']:.1%}" for r in native
    )
    holds = all(r["pruned"] >= r["native_accuracy"] for r in native) if native else None
    why = "untrained and refitted on 500 images; fine-tuned there"
    yield Row("figure 8", "pruned against natively small", "pruned is ahead", shown or _MISSING, holds, why)
    why = "needs ImageNet's training set, which is not at hand"
    yield Row("table 7", "MobileNetV2", "72.6 % at 2.63×", _MISSING, None, why)
    yield Row("table 5", "ResNet-50 on a CPU", "75.2 % at 118 images/s", _MISSING, None, why)


def _less(ours: Sequence[float], *theirs: float) -> bool | None:
    return ours[0] < theirs[0] if ours and theirs else None


def main(argv: Sequence[str] | None = None) -> int:
    """Read what is kept and return the exit code."""
    given = arguments(__doc__, ()).parse_args(argv)
    rows = [*_solving(), *_tables(), *_structure(), *_accuracy()]
    columns: Mapping[str, Callable[[Row], str]] = {
        "in the paper": lambda r: r.where,
        "what": lambda r: r.what,
        "paper": lambda r: r.paper,
        "here": lambda r: r.ours,
        "verdict": lambda r: r.verdict,
        "why they differ": lambda r: r.why,
    }
    table = print_table("the paper's figures and ours", columns, rows)
    held = sum(row.holds is True for row in rows)
    compared = sum(row.holds is not None for row in rows)
    summary = f"{held} of {compared} that can be compared; {len(rows) - compared} cannot or were not run"
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
