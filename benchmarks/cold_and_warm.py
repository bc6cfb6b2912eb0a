"""What a prune of ResNet-50 costs: the first time, and when its table is already measured.

Claim: on one thread and in fresh processes, pruning ResNet-50 to 0.6 of its latency takes at most 180 s with
an empty store and at most 15 s with a filled one, and never more than 2 GB of memory.

Both times are those of the whole command, with starting Python, verifying and writing. A limit in seconds is
inconclusive where the machine was too noisy (F above 2 %); the limit in bytes never is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import (
    NOISE_LIMIT,
    Verdict,
    arguments,
    combined,
    note,
    print_table,
    publish,
    run_main,
)
from benchmarks.metered import run_metered
from benchmarks.model_files import model_path
from onnx_mdp.errors import MeasurementError

__all__ = ["Run", "main"]

_LIMITS_S = {"cold": 180.0, "warm": 15.0}
_LIMIT_MB = 2000.0


@dataclass(frozen=True, slots=True)
class Run:
    """One prune in a fresh process: its seconds by stage and in all, and its peak memory (10⁶ bytes)."""

    model: str
    store: str
    status: str
    noise: float
    stages_s: Mapping[str, float]
    wall_s: float
    peak_mb: float

    @property
    def verdict(self) -> Verdict:
        """Memory first: only what is measured in seconds can be inconclusive."""
        if self.peak_mb > _LIMIT_MB or self.status not in ("met", "missed"):
            return "fail"
        if self.wall_s <= _LIMITS_S[self.store] and self.status == "met":
            return "pass"
        return "fail" if self.noise <= NOISE_LIMIT else "inconclusive"


def _runs(name: str, given: argparse.Namespace) -> Iterator[Run]:
    original = model_path(name)
    with tempfile.TemporaryDirectory(prefix="onnx-mdp-cold-") as folder:
        for store in _LIMITS_S:
            note(f"{name}, {store} …")
            yield _run(name, original, Path(folder), store, given)


def _run(name: str, original: Path, folder: Path, store: str, given: argparse.Namespace) -> Run:
    command = [sys.executable, "-m", "onnx_mdp", "prune", str(original), "--target-ratio", f"{given.ratio:g}"]
    command += ["--output", str(folder / f"{store}.onnx"), "--store", str(folder / "store.sqlite")]
    command += ["--threads", str(given.threads), "--seed", str(given.seed)]
    done = run_metered(*command, "--json", "--quiet")
    if not done.stdout.strip():
        raise MeasurementError(f"pruning {name} exits with {done.code}: {done.complaint}")
    found = json.loads(done.stdout)
    return Run(
        model=name,
        store=store,
        status=found["status"],
        noise=found["noise"],
        stages_s=found["seconds"],
        wall_s=done.seconds,
        peak_mb=done.peak_mb,
    )


def _stage(stage: str) -> Callable[[Run], str]:
    return lambda run: f"{run.stages_s.get(stage, 0.0):.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ["resnet50_torchscript"])
    parser.add_argument("--ratio", type=float, default=0.6, help="of the unpruned latency (default: 0.6)")
    given = parser.parse_args(argv)
    runs = [run for name in given.models for run in _runs(name, given)]
    stages = dict.fromkeys(stage for run in runs for stage in run.stages_s)
    columns: dict[str, Callable[[Run], str]] = {
        "model": lambda r: r.model,
        "store": lambda r: r.store,
        "status": lambda r: r.status,
        "F": lambda r: f"{r.noise:.1%}",
        **{f"{stage} s": _stage(stage) for stage in stages},
        "wall s": lambda r: f"{r.wall_s:.1f}",
        "limit s": lambda r: f"{_LIMITS_S[r.store]:.0f}",
        "peak MB": lambda r: f"{r.peak_mb:.0f}",
        "verdict": lambda r: r.verdict,
    }
    table = print_table("onnx-mdp prune in fresh processes", columns, runs)
    summary = " · ".join(f"{r.model} {r.store} {r.wall_s:.0f} s, {r.peak_mb:.0f} MB" for r in runs)
    return publish(__file__, given, runs, table, combined([run.verdict for run in runs]), summary)


if __name__ == "__main__":
    run_main(main)
