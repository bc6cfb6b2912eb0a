"""What a network saves, and loses, where a related one was profiled on the device before.

Claim: after the first model of each pair, at least 80 % of the shape keys of the second are known, and the
median error of its table is at most 1 % above that of a table from variants of its own alone.

Both tables predict the same heterogeneous configurations of the second model, which are measured beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.configurations import drawn_configurations, measured_configurations
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
from benchmarks.measuring import table_from_nothing
from benchmarks.model_files import model_path
from benchmarks.rival_predictions import table_errors
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.tables.latency import LatencyTable, build_table
from onnx_mdp.tables.lut_store import open_store

__all__ = ["Relation", "main"]


@dataclass(frozen=True, slots=True)
class Relation:
    """One pair: the share of known keys, and seconds, variants and (median, worst) error of both tables."""

    first: str
    then: str
    shared: float
    seconds: tuple[float, float]
    profiled: tuple[int, int]
    errors: tuple[tuple[float, float], tuple[float, float]]
    noise: float
    verdict: Verdict


def _related_table(first: Structure, then: Structure, runtime: Runtime, seed: int) -> LatencyTable:
    with (
        tempfile.TemporaryDirectory(prefix="onnx-mdp-") as folder,
        open_store(Path(folder) / "store.sqlite") as store,
    ):
        build_table(first, runtime, store, seed=seed)
        return build_table(then, runtime, store, seed=seed)


def _relation(first: str, then: str, given: argparse.Namespace) -> Relation:
    runtime = Runtime(threads=given.threads)
    one, two = (analyze(load_model(model_path(name)), {}) for name in (first, then))
    note(f"{then} after {first}")
    related = _related_table(one, two, runtime, given.seed)
    note(f"{then} alone")
    alone = table_from_nothing(two, runtime, given.seed)
    variants = drawn_configurations(two, alone.choices, given.configs, given.seed)
    ratios = measured_configurations(two, variants, runtime, given.seed)
    errors = (
        table_errors(two, related, variants, ratios.values),
        table_errors(two, alone, variants, ratios.values),
    )
    holds = related.shared >= 0.8 and errors[0][0] <= errors[1][0] + 0.01
    return Relation(
        first,
        then,
        related.shared,
        (related.seconds, alone.seconds),
        (related.measured, alone.measured),
        errors,
        ratios.noise,
        judge(holds, ratios.noise),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark on the models given, two by two, and return the exit code."""
    parser = arguments(__doc__, ("resnet50_torchscript", "resnet101_torchscript"))
    parser.add_argument("--configs", type=int, default=24, help="configurations a pair (default: 24)")
    given = parser.parse_args(argv)
    if len(given.models) % 2:
        parser.error("--models takes pairs: the one that is profiled first, and the one that follows")
    pairs = zip(given.models[::2], given.models[1::2], strict=True)
    rows = [_relation(first, then, given) for first, then in pairs]
    columns = {
        "pair": lambda r: f"{r.then} after {r.first}",
        "keys known": lambda r: f"{r.shared:.0%}",
        "variants": lambda r: f"{r.profiled[0]} / {r.profiled[1]}",
        "seconds": lambda r: f"{r.seconds[0]:.0f} / {r.seconds[1]:.0f}",
        "error": lambda r: f"{r.errors[0][0]:.1%}, {r.errors[0][1]:.1%}",
        "error alone": lambda r: f"{r.errors[1][0]:.1%}, {r.errors[1][1]:.1%}",
        "F": lambda r: f"{r.noise:.1%}",
        "verdict": lambda r: r.verdict,
    }
    table = print_table("related networks: after the first / alone; errors median, worst", columns, rows)
    summary = " · ".join(f"{r.then}: {r.shared:.0%} of the keys known" for r in rows)
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
