"""The accuracy that pruning leaves before any fine-tuning, with and without calibration data.

Claim: with the criterion ``drift`` and 64 unlabelled calibration inputs, MobileNetV2 keeps a top-1 of at
least 80 % at 0.8 of its predicted latency and ResNet-56 of at least 85 % at 0.65 (on the samples below), and
no pruned model measures slower than the dense one.

Plans come from the table alone, without measuring and solving again, so the measured ratio beside the
predicted one is that of a first shot. ImageNet models are calibrated on 64 images of even classes and
evaluated on the 500 of odd classes (mostly training images: look at differences); CIFAR models on 64 of the
first 1000 test images and the other 9000. ``magnitude`` reads only the weights; ``taylor`` and ``hessian``
take gradients of a random projection of the outputs, with ``--labels`` of the loss of the labels. As
``taylor-alone`` and ``hessian-alone`` they are not scaled by measured drift.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.harness import (
    Verdict,
    arguments,
    combined,
    judge,
    note,
    print_table,
    publish,
    run_main,
    side_by_side,
)
from benchmarks.measuring import measured_ratios, table_from_nothing
from benchmarks.model_files import model_path
from benchmarks.plans import solved_plans
from benchmarks.samples import Samples, samples_for, top1
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.importance.gradient_scores import GRADIENT_CRITERIA, GradientOptions, gradient_scores
from onnx_mdp.importance.scoring import Criterion, Feeds, Progress, Scores, gradient_criterion
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.pipeline import analyze
from onnx_mdp.planning.closed_loop import tolerance
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.surgery.rewriting import rewrite

__all__ = ["CELL", "Result", "main"]

_CRITERIA = ("magnitude", "activation", "drift", "taylor", "hessian")
_BARS = {("mobilenet_v2", 0.8): 0.80, ("resnet56", 0.65): 0.85}


# What a line of a short table is about.
CELL: Mapping[str, Callable[[Any], str]] = {
    "model": lambda r: r.model,
    "ratio": lambda r: f"{r.ratio:g}",
    "dense": lambda r: f"{r.dense:.1%}",
}


@dataclass(frozen=True, slots=True)
class Result:
    """One model pruned by one criterion to one ratio; accuracies are top-1 shares of ``images``."""

    model: str
    criterion: str
    ratio: float
    images: int
    dense: float
    accuracy: float
    predicted: float
    measured: float
    noise: float
    importance: float
    removed_blocks: tuple[str, ...]
    complete: bool

    @property
    def bar(self) -> float | None:
        """The accuracy that is claimed for this cell."""
        return _BARS.get((self.model, self.ratio)) if self.criterion == "drift" else None

    @property
    def verdict(self) -> Verdict:
        """A bar needs all images; a latency needs a quiet machine."""
        if self.bar is not None and self.complete and self.accuracy < self.bar:
            return "fail"
        if self.bar is not None and not self.complete:
            return "inconclusive"
        return judge(self.measured <= 1 + tolerance(self.noise), self.noise)


def _results(name: str, given: argparse.Namespace) -> Iterator[Result]:
    note(f"{name}: table and plans")
    model = load_model(model_path(name))
    structure, data = analyze(model, {}), samples_for(name, given.images)
    runtime = Runtime(threads=given.threads)
    table = table_from_nothing(structure, runtime, given.seed)
    criteria = [_criterion(criterion, data, given) for criterion in given.criteria]
    planned = tuple(solved_plans(structure, table, data.calibration, criteria, given.ratios))
    note(f"{name}: latencies of {len(planned)} plans")
    plans = [p.plan for p in planned]
    ratios = measured_ratios(model_bytes(model), structure, plans, runtime, seed=given.seed)
    dense = _accuracy(model, data, name, "dense", given.threads)
    for p, measured in zip(planned, ratios.values, strict=True):
        what = f"{p.criterion} at {p.ratio:g}"
        yield Result(
            model=name,
            criterion=p.criterion,
            ratio=p.ratio,
            images=len(data.labels),
            dense=dense,
            accuracy=_accuracy(rewrite(structure, p.plan), data, name, what, given.threads),
            predicted=p.predicted,
            measured=measured,
            noise=ratios.noise,
            importance=p.importance,
            removed_blocks=p.plan.removed_blocks,
            complete=given.images is None,
        )


def _criterion(name: str, data: Samples, given: argparse.Namespace) -> str | Criterion:
    known, _, alone = name.partition("-")
    if known not in GRADIENT_CRITERIA:
        return name
    labels = tuple(data.calibration_labels[:, None]) if given.labels else None
    options = GradientOptions(labels=labels, seed=given.seed)
    return _alone(known, options) if alone else gradient_criterion(known, options)


def _alone(name: str, options: GradientOptions) -> Criterion:
    """The means of |s| or s², as they are; a block is worth what its units are."""

    def criterion(structure: Structure, feeds: Feeds, progress: Progress) -> Scores:
        none = np.zeros(len(structure.blocks))
        return Scores(
            gradient_scores(structure, name, feeds, options, lambda means: (means, none), progress)[0]
        )

    criterion.__name__ = f"{name}-alone"
    return criterion


def _accuracy(model: ir.Model, data: Samples, name: str, what: str, threads: int) -> float:
    note(f"{name}: {what}, {len(data.labels)} images")
    return top1(model_bytes(model), data, threads)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ("mobilenet_v2", "efficientnet_lite0", "resnet56", "resnet20"))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.65])
    parser.add_argument("--images", type=int, help="evaluate on the first of them only (default: all)")
    parser.add_argument("--criteria", nargs="+", default=list(_CRITERIA), metavar="NAME")
    parser.add_argument("--labels", action="store_true", help="rank by gradients of the loss of the labels")
    given = parser.parse_args(argv)
    results = [result for name in given.models for result in _results(name, given)]
    columns = {
        **CELL,
        "criterion": lambda r: r.criterion,
        "accuracy": lambda r: f"{r.accuracy:.1%}",
        "bar": lambda r: "" if r.bar is None else f"{r.bar:.0%}",
        "predicted": lambda r: f"{r.predicted:.3f}",
        "measured": lambda r: f"{r.measured:.3f}",
        "F": lambda r: f"{r.noise:.1%}",
        "blocks gone": lambda r: str(len(r.removed_blocks)),
        "verdict": lambda r: r.verdict,
    }
    table = print_table("top-1 before fine-tuning", columns, results)
    parts = [f"{r.model} {r.accuracy:.1%} at {r.ratio:g} (bar {r.bar:.0%})" for r in results if r.bar]
    summary = " · ".join([*parts, f"largest measured ratio {max(r.measured for r in results):.3f}"])
    verdict = combined([result.verdict for result in results])
    overview = side_by_side(
        "top-1 by criterion", CELL, lambda r: r.criterion, lambda r: f"{r.accuracy:.1%}", results
    )
    return publish(__file__, given, results, table, verdict, summary, overview)


if __name__ == "__main__":
    run_main(main)
