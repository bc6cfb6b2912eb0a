"""The command line prunes five networks to three latencies each, and a second look confirms every result.

Claim: in each of 15 cells, MobileNetV2, EfficientNet-Lite0, ResNet-56, ResNet-18 and ResNet-50 (the last two
from both exporters of torch: 21 rows) at 0.8, 0.6 and 0.4 of their latency, ``onnx-mdp prune`` exits with 0
and writes a model that measures at most its target + max(2 %, 2F), equals the masked original within 1e-5 of
the scale, passes the full ONNX checker, runs in plain ONNX Runtime and has fewer parameters.

Nothing of that is believed: the latency is measured again beside the unpruned model in three fresh processes,
``onnx-mdp verify`` compares the files, and parameters are counted here. F is the larger of the tool's noise
and that of the second measurement, half the range of the three. The first ratio of a model starts with an
empty store (*cold*); the others find its table (*warm*).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checking import Look, look_at
from benchmarks.harness import (
    Verdict,
    arguments,
    combined,
    judge,
    note,
    print_table,
    publish,
    run_main,
)
from benchmarks.metered import Metered, run_metered
from benchmarks.model_files import model_path
from onnx_mdp.planning.closed_loop import tolerance

__all__ = ["Row", "flaws_of", "main", "missed_target", "summary"]

_MODELS = (
    "mobilenet_v2",
    "efficientnet_lite0",
    "resnet56",
    "resnet18_torchscript",
    "resnet18_dynamo",
    "resnet50_torchscript",
    "resnet50_dynamo",
)
_LAW = 1e-5


@dataclass(frozen=True, slots=True)
class Row:
    """One model at one ratio: what the tool printed, what the second look found, and what both cost.

    ``flaws`` are broken promises that no noise excuses; ``too_slow`` says that a latency missed its target.
    """

    model: str
    ratio: float
    cold: bool
    prune: Mapping[str, Any]
    look: Look | None
    flaws: tuple[str, ...]
    too_slow: bool
    noise: float
    wall_s: float
    peak_mb: float
    verdict: Verdict


def _rows(name: str, given: argparse.Namespace) -> Iterator[Row]:
    original = model_path(name)
    with tempfile.TemporaryDirectory(prefix="onnx-mdp-cells-") as folder:
        for number, ratio in enumerate(given.ratios):
            note(f"{name} at {ratio:g} …")
            yield _row(name, original, Path(folder), ratio, number == 0, given)


def _row(name: str, original: Path, folder: Path, ratio: float, cold: bool, given: argparse.Namespace) -> Row:
    pruned, store = folder / f"{ratio:g}.onnx", folder / "store.sqlite"
    command = [sys.executable, "-m", "onnx_mdp", "prune", str(original), "--target-ratio", f"{ratio:g}"]
    command += ["--output", str(pruned), "--store", str(store), "--threads", str(given.threads)]
    done = run_metered(*command, "--seed", str(given.seed), "--json", "--quiet")
    found = json.loads(done.stdout) if done.stdout.strip() else {}
    look = look_at(original, pruned, given.threads, given.seed) if pruned.is_file() else None
    flaws = flaws_of(done, found, look)
    noise = max(found.get("noise", 0.0), look.noise if look else 0.0)
    too_slow = missed_target(found, look, ratio, noise)
    verdict: Verdict = "fail" if flaws else judge(not too_slow, noise)
    return Row(
        model=name,
        ratio=ratio,
        cold=cold,
        prune=found,
        look=look,
        flaws=flaws,
        too_slow=too_slow,
        noise=noise,
        wall_s=done.seconds,
        peak_mb=done.peak_mb,
        verdict=verdict,
    )


def flaws_of(done: Metered, found: Mapping[str, Any], look: Look | None) -> tuple[str, ...]:
    """What is wrong whatever the noise; a missed target is not, but then there is no file to look at."""
    if look is None:
        missed = found.get("status") == "missed"
        return () if missed else (f"exit code {done.code}: {found.get('status') or done.complaint}",)
    flaws = {
        f"exit code {done.code}: {done.complaint}": done.code != 0,
        f"law: {look.law_error:.1e} of the scale {look.complaint}": not look.law_error <= _LAW,
        f"checker: {look.checker}": look.checker is not None,
        f"ONNX Runtime: {look.runtime}": look.runtime is not None,
        f"{look.params[1]} parameters of {look.params[0]}": look.params[1] >= look.params[0],
    }
    return tuple(flaw for flaw, present in flaws.items() if present)


def missed_target(found: Mapping[str, Any], look: Look | None, ratio: float, noise: float) -> bool:
    """Whether the tool's measurement or the second one is above the target and its tolerance."""
    if look is None or not found.get("measured_ms"):
        return True
    allowed = 1 + tolerance(noise)
    return bool(found["measured_ms"] > found["target_ms"] * allowed or look.ratio > ratio * allowed)


def _seconds(row: Row) -> str:
    return " ".join(f"{stage} {spent:.1f}" for stage, spent in row.prune.get("seconds", {}).items())


def _ms(row: Row, key: str) -> str:
    value = row.prune.get(key)
    return "–" if value is None else f"{value:.2f}"


_COLUMNS = {
    "model": lambda r: r.model,
    "ratio": lambda r: f"{r.ratio:g}",
    "base ms": lambda r: _ms(r, "base_ms"),
    "target": lambda r: _ms(r, "target_ms"),
    "measured": lambda r: _ms(r, "measured_ms"),
    "again": lambda r: f"{r.look.ratio:.3f}" if r.look else "–",
    "F": lambda r: f"{r.noise:.1%}",
    "law": lambda r: f"{r.look.law_error:.0e}" if r.look else "–",
    "params": lambda r: f"{r.look.params[1] / r.look.params[0]:.2f}" if r.look else "–",
    "importance": lambda r: f"{r.prune.get('importance_share') or 0:.3f}",
    "blocks gone": lambda r: str(len(r.prune.get("removed_blocks", ()))),
    "loops": lambda r: str(r.prune.get("iterations", "–")),
    "stages, s": _seconds,
    "wall s": lambda r: f"{r.wall_s:.0f} {'cold' if r.cold else 'warm'}",
    "peak MB": lambda r: f"{r.peak_mb:.0f}",
    "verdict": lambda r: r.verdict,
}


_OVERVIEW = {name: show for name, show in _COLUMNS.items() if name not in ("base ms", "loops", "stages, s")}


def summary(rows: Sequence[Row]) -> str:
    """Cells and rows that hold: a cell is an architecture at a ratio, whatever the exporter."""
    cells: dict[tuple[str, float], list[Verdict]] = {}
    for row in rows:
        architecture = row.model.removesuffix("_torchscript").removesuffix("_dynamo")
        cells.setdefault((architecture, row.ratio), []).append(row.verdict)
    good = sum(combined(verdicts) == "pass" for verdicts in cells.values())
    held = sum(row.verdict == "pass" for row in rows)
    unclear = sum(row.verdict == "inconclusive" for row in rows)
    return f"{good}/{len(cells)} cells ({held}/{len(rows)} rows, {unclear} inconclusive)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, _MODELS)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.6, 0.4])
    given = parser.parse_args(argv)
    rows = [row for name in given.models for row in _rows(name, given)]
    table = print_table("onnx-mdp prune", _COLUMNS, rows)
    for row in rows:
        for flaw in row.flaws:
            print(f"{row.model} at {row.ratio:g}: {flaw}")
    overview = print_table("onnx-mdp prune", _OVERVIEW, rows)
    verdict = combined([row.verdict for row in rows])
    return publish(__file__, given, rows, table, verdict, summary(rows), overview)


if __name__ == "__main__":
    run_main(main)
