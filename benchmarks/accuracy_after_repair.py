"""The accuracy that a repair brings back, before any fine-tuning and without labels.

Claim: planned by ``refit`` and after ``lstsq`` on 64 unlabelled inputs, MobileNetV2 has a top-1 of at least
80 % at 0.8 of its predicted latency and ResNet-56 of at least 85 % at 0.65, and ``lstsq`` is never worse than
no repair.

Images and their split are those of `benchmarks.accuracy_before_finetuning`. Repairs are those of ``onnx-mdp
repair --repair``; several in one are applied in their order. Plans by ``refit`` are for ``lstsq`` alone.
All tables are measured first, so that only the first minutes need a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.accuracy_before_finetuning import CELL
from benchmarks.harness import (
    Verdict,
    arguments,
    combined,
    note,
    print_table,
    publish,
    run_main,
    side_by_side,
)
from benchmarks.measuring import table_from_nothing
from benchmarks.model_files import model_path
from benchmarks.plans import Planned, solved_plans
from benchmarks.samples import CALIBRATION, Samples, samples_for, top1
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.pipeline import analyze
from onnx_mdp.repairing.repair import parse_methods, repair
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.latency import LatencyTable

__all__ = ["Result", "main"]

_BARS = {("mobilenet_v2", 0.8): 0.80, ("resnet56", 0.65): 0.85}


@dataclass(frozen=True, slots=True)
class Result:
    """One model at one ratio after one repair; accuracies are top-1 shares of ``images``.

    ``unrepaired`` is the accuracy of the same plan without a repair, ``drifts`` those of the outputs before
    and after each method.
    """

    model: str
    criterion: str
    ratio: float
    repair: str
    samples: int
    images: int
    dense: float
    unrepaired: float
    accuracy: float
    drifts: tuple[float, ...]
    seconds: float
    complete: bool

    @property
    def bar(self) -> float | None:
        """The accuracy that is claimed for this cell."""
        claimed = self.criterion == "refit" and self.repair == "lstsq"
        return _BARS.get((self.model, self.ratio)) if claimed else None

    @property
    def verdict(self) -> Verdict:
        """Claims are about ``lstsq``, and need all images."""
        if self.repair != "lstsq":
            return "pass"
        if not self.complete:
            return "inconclusive"
        return "pass" if self.accuracy >= max(self.unrepaired, self.bar or 0.0) else "fail"


def _tables(given: argparse.Namespace) -> dict[str, tuple[Structure, LatencyTable]]:
    """The structure and the table of each model."""
    found = {}
    for name in given.models:
        note(f"{name}: table")
        structure = analyze(load_model(model_path(name)), {})
        found[name] = structure, table_from_nothing(structure, Runtime(threads=given.threads), given.seed)
    return found


def _results(
    name: str, structure: Structure, table: LatencyTable, given: argparse.Namespace
) -> Iterator[Result]:
    note(f"{name}: plans")
    # Plans do not change with the number of inputs that a repair takes.
    feeds = samples_for(name, 1).calibration
    planned = solved_plans(structure, table, feeds, given.criteria, given.ratios)
    data = samples_for(name, given.images, given.samples)
    dense = top1(model_bytes(load_model(model_path(name))), data, given.threads)
    for found in planned:
        yield from _repairs(name, structure, found, data, dense, given)


def _repairs(
    name: str,
    structure: Structure,
    found: Planned,
    data: Samples,
    dense: float,
    given: argparse.Namespace,
) -> Iterator[Result]:
    plan, ratio = found.plan, found.ratio
    slim = rewrite(structure, plan)
    unrepaired = top1(model_bytes(slim), data, given.threads)
    for text in ("none", *(r for r in given.repairs if found.criterion != "refit" or r == "lstsq")):
        note(f"{name} at {ratio:g} by {found.criterion}: {text}, {len(data.calibration)} inputs")
        start = time.perf_counter()
        repaired = repair(structure, plan, slim, data.calibration, parse_methods(text))
        seconds = time.perf_counter() - start
        yield Result(
            model=name,
            criterion=found.criterion,
            ratio=ratio,
            repair=text,
            samples=len(data.calibration),
            images=len(data.labels),
            dense=dense,
            unrepaired=unrepaired,
            accuracy=top1(model_bytes(repaired.model), data, given.threads),
            drifts=repaired.drifts,
            seconds=seconds,
            complete=given.images is None,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ("mobilenet_v2", "efficientnet_lite0", "resnet56", "resnet20"))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.65])
    parser.add_argument("--criteria", nargs="+", default=["drift", "refit"])
    parser.add_argument("--repairs", nargs="+", default=["bias", "bn", "lstsq", "bn,lstsq"])
    parser.add_argument("--samples", type=int, default=CALIBRATION, help="unlabelled inputs to repair with")
    parser.add_argument("--images", type=int, help="evaluate on the first of them only (default: all)")
    given = parser.parse_args(argv)
    results: list[Result] = []
    for name, (structure, table) in _tables(given).items():
        results.extend(_results(name, structure, table, given))
    columns = {
        "model": lambda r: r.model,
        "planned by": lambda r: r.criterion,
        "ratio": lambda r: f"{r.ratio:g}",
        "repair": lambda r: r.repair,
        "inputs": lambda r: str(r.samples),
        "dense": lambda r: f"{r.dense:.1%}",
        "accuracy": lambda r: f"{r.accuracy:.1%}",
        "bar": lambda r: "" if r.bar is None else f"{r.bar:.0%}",
        "drift": lambda r: " → ".join(f"{drift:.3g}" for drift in r.drifts),
        "s": lambda r: f"{r.seconds:.0f}",
        "verdict": lambda r: r.verdict,
    }
    printed = print_table("top-1 after repair", columns, results)
    told = [r for r in results if r.bar is not None] or [r for r in results if r.repair == "lstsq"]
    parts = (f"{r.model} at {r.ratio:g} by {r.criterion} {r.unrepaired:.1%} → {r.accuracy:.1%}" for r in told)
    summary = " · ".join(parts)
    overview = side_by_side(
        "top-1 by plan and repair",
        CELL,
        lambda r: f"{r.criterion}, {r.repair}",
        lambda r: f"{r.accuracy:.1%}",
        results,
    )
    verdict = combined([r.verdict for r in results])
    return publish(__file__, given, results, printed, verdict, summary, overview)


if __name__ == "__main__":
    run_main(main)
