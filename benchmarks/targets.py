"""How near the closed loop comes to its target, by model, latency and execution provider.

Claim: in at least 90 % of the cells, four models at 0.8, 0.6 and 0.4 of their latency on two providers, the
measured latency is within max(2 %, 2F) of the target; it is above the target by more in none; and no cell
takes more than four measurements.

Each cell is ``onnx-mdp prune --dry-run`` in a process of its own. F is the split-half error of the
measurement that the tool reports. The first ratio of a model on a provider builds its table, the others
find it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import (
    NOISE_LIMIT,
    Verdict,
    arguments,
    note,
    print_table,
    publish,
    run_main,
)
from benchmarks.metered import run_metered
from benchmarks.model_files import model_path
from onnx_mdp.errors import MeasurementError
from onnx_mdp.planning.closed_loop import tolerance
from onnx_mdp.running.providers import SHORT_NAMES
from onnx_mdp.running.runtime import import_onnxruntime

__all__ = ["Cell", "combined_cells", "main"]

_MODELS = ("resnet50_torchscript", "resnet18_torchscript", "mobilenet_v2", "deit_tiny_torchscript")
_PROVIDERS = ("cpu", "openvino")
_SHARE = 0.9
_MOST = 4


@dataclass(frozen=True, slots=True)
class Cell:
    """One model at one ratio on one provider: how far from the target it ended, after how many tries."""

    model: str
    provider: str
    ratio: float
    target_ms: float
    distance: float
    noise: float
    measurements: int
    wall_s: float

    @property
    def within(self) -> bool:
        """Whether target and measurement agree as far as the noise lets anyone tell."""
        return abs(self.distance) <= tolerance(self.noise)

    @property
    def verdict(self) -> Verdict:
        """Noise excuses a cell that misses, not one that takes too many measurements."""
        if self.distance > tolerance(self.noise) or self.measurements > _MOST or not self.within:
            return "fail" if self.noise <= NOISE_LIMIT else "inconclusive"
        return "pass"


def combined_cells(cells: Sequence[Cell]) -> Verdict:
    """Up to a tenth of the cells may be too fast, and none too slow or too late."""
    wrong = [c for c in cells if c.distance > tolerance(c.noise) or c.measurements > _MOST]
    if any(c.noise <= NOISE_LIMIT for c in wrong):
        return "fail"
    quiet = [cell for cell in cells if cell.noise <= NOISE_LIMIT]
    if wrong or len(quiet) < _SHARE * len(cells):
        return "inconclusive"
    return "pass" if sum(cell.within for cell in cells) >= _SHARE * len(cells) else "fail"


def _cells(name: str, provider: str, given: argparse.Namespace) -> Iterator[Cell]:
    original = model_path(name)
    with tempfile.TemporaryDirectory(prefix="onnx-mdp-targets-") as folder:
        for ratio in given.ratios:
            note(f"{name} at {ratio:g} on {provider} …")
            yield _cell(name, original, provider, ratio, Path(folder) / "store.sqlite", given)


def _cell(
    name: str, original: Path, provider: str, ratio: float, store: Path, given: argparse.Namespace
) -> Cell:
    command = [sys.executable, "-m", "onnx_mdp", "prune", str(original), "--target-ratio", f"{ratio:g}"]
    command += ["--dry-run", "--ep", provider, "--store", str(store), "--threads", str(given.threads)]
    done = run_metered(*command, "--seed", str(given.seed), "--json", "--quiet")
    found = json.loads(done.stdout) if done.stdout.strip() else {}
    if found.get("measured_ms") is None:
        raise MeasurementError(f"pruning {name} on {provider} exits with {done.code}: {done.complaint}")
    return Cell(
        model=name,
        provider=provider,
        ratio=ratio,
        target_ms=found["target_ms"],
        distance=found["measured_ms"] / found["target_ms"] - 1,
        noise=found["noise"],
        measurements=found["iterations"],
        wall_s=done.seconds,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, _MODELS)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.6, 0.4])
    there = [
        name for name in _PROVIDERS if SHORT_NAMES[name] in import_onnxruntime().get_available_providers()
    ]
    told = (
        f"execution providers (default, of {', '.join(_PROVIDERS)} those that are here: {', '.join(there)})"
    )
    parser.add_argument("--ep", nargs="+", default=there, help=told)
    given = parser.parse_args(argv)
    cells = [cell for name in given.models for provider in given.ep for cell in _cells(name, provider, given)]
    columns = {
        "model": lambda c: c.model,
        "provider": lambda c: c.provider,
        "ratio": lambda c: f"{c.ratio:g}",
        "target ms": lambda c: f"{c.target_ms:.2f}",
        "measured": lambda c: f"{c.distance:+.1%}",
        "F": lambda c: f"{c.noise:.1%}",
        "measurements": lambda c: str(c.measurements),
        "wall s": lambda c: f"{c.wall_s:.0f}",
        "verdict": lambda c: c.verdict,
    }
    table = print_table("closed loop, measured against target", columns, cells)
    within = sum(cell.within for cell in cells)
    summary = (
        f"{within} of {len(cells)} cells within max(2 %, 2F), worst {max(c.distance for c in cells):+.1%}"
    )
    return publish(__file__, given, cells, table, combined_cells(cells), summary)


if __name__ == "__main__":
    run_main(main)
