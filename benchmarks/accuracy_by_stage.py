"""ImageNet accuracy after each stage, without labels, at equal measured latency: pruned, repaired, distilled.

Claim: at 0.9, 0.8 and 0.7 of the measured latency each stage raises the top-1 of the stage before, and units
ranked by ``taylor`` give a higher top-1 than units ranked by ``magnitude``.

Each model is pruned by the closed loop of ``onnx-mdp prune`` until it measures what was asked. ``lstsq``
refits its layers on 64 unlabelled images; then it is trained by the original's outputs alone, on crops of
500. Images are those of the zoo, mostly of the training set: look at differences. Those of even classes rank,
refit and distil, those of odd classes test, so no class that is tested was seen. All measuring of a model
comes before its training, so only its first minutes need a quiet machine.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.finetuned import finetuned
from benchmarks.harness import Verdict, arguments, combined, judge, note, print_table, publish, run_main
from benchmarks.model_files import model_path
from benchmarks.samples import Samples, samples_for, save_training_images, top1
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.gradient_scores import GRADIENT_CRITERIA
from onnx_mdp.importance.scoring import gradient_criterion
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.pipeline import PruneResult, analyze, prune
from onnx_mdp.planning.closed_loop import Request
from onnx_mdp.repairing.repair import repair
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.tables.lut_store import open_store
from onnx_mdp.torch_backend import require_torch

__all__ = ["Result", "main"]

_BATCH = 25


@dataclass(frozen=True, slots=True)
class Result:
    """One model pruned by one criterion to one measured ratio; accuracies are top-1 shares of ``images``.

    ``distilled`` is missing where the criterion was not trained; ``seconds`` are those of the training.
    """

    model: str
    criterion: str
    ratio: float
    measured: float
    noise: float
    images: int
    dense: float
    pruned: float
    repaired: float
    distilled: float | None
    seconds: float
    verdict: Verdict = "inconclusive"

    @property
    def stages(self) -> tuple[float, ...]:
        """Accuracies in the order of the stages."""
        return (self.pruned, self.repaired, *(() if self.distilled is None else (self.distilled,)))

    @property
    def rising(self) -> bool:
        """Whether each stage helps."""
        return all(after > before for before, after in zip(self.stages, self.stages[1:], strict=False))


def _results(name: str, given: argparse.Namespace, folder: Path) -> Iterator[Result]:
    require_torch("distillation")
    from onnx_mdp.training.data import DataOptions
    from onnx_mdp.training.finetuning import FinetuneRequest
    from onnx_mdp.training.recipes import recipe

    model, data = load_model(model_path(name)), samples_for(name, given.images)
    structure, base = analyze(model, {}), model_bytes(model)
    dense = top1(base, data, given.threads)
    pruned = list(_pruned(name, structure, data, given, folder))
    archive, preprocess = save_training_images(name, folder / f"{name}.npz")
    chosen = recipe("default", {"steps": given.steps, "batch": _BATCH, "lr": given.lr})
    options = DataOptions(str(archive), preprocess=preprocess, augment="crop", seed=given.seed)
    shapes = structure.shadow.inputs
    for criterion, ratio, found in pruned:
        assert found.plan is not None
        assert found.model is not None
        assert found.measured_ms is not None
        note(f"{name}, {criterion} at {ratio:g}: lstsq")
        refit = repair(structure, found.plan, found.model, data.calibration, ("lstsq",))
        refitted = model_bytes(refit.model)
        distilled, seconds = None, 0.0
        if criterion in given.trained:
            note(f"{name}, {criterion} at {ratio:g}: {given.steps} steps")
            trained, seconds = finetuned(refitted, base, shapes, FinetuneRequest(chosen, options))
            distilled = top1(trained, data, given.threads)
        yield Result(
            model=name,
            criterion=criterion,
            ratio=ratio,
            measured=found.measured_ms / found.base_ms,
            noise=found.noise,
            images=len(data.labels),
            dense=dense,
            pruned=top1(model_bytes(found.model), data, given.threads),
            repaired=top1(refitted, data, given.threads),
            distilled=distilled,
            seconds=seconds,
        )


def _pruned(
    name: str, structure: Structure, data: Samples, given: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, float, PruneResult]]:
    model = load_model(model_path(name))
    with open_store(folder / "store.sqlite") as store:
        for criterion in given.criteria:
            for ratio in given.ratios:
                note(f"{name}, {criterion} at {ratio:g}: prune")
                request = Request(
                    target_ratio=ratio,
                    runtime=Runtime(threads=given.threads),
                    criterion=gradient_criterion(criterion) if criterion in GRADIENT_CRITERIA else criterion,
                    seed=given.seed,
                )
                found = prune(model, structure, request, store, feeds=data.calibration)
                if found.plan is None:
                    raise UsageError(f"no plan of {name} reaches {ratio:g} of the latency")
                yield criterion, ratio, found


def _judged(results: Sequence[Result]) -> Iterator[Result]:
    """The claim is made of the trained criterion, row by row, against the others at the same ratio."""
    for one in results:
        others = [r for r in results if (r.model, r.ratio) == (one.model, one.ratio)]
        holds = one.criterion != "taylor" or all(
            one.pruned > r.pruned for r in others if r.criterion == "magnitude"
        )
        yield replace(one, verdict=judge(holds and one.rising, max(r.noise for r in others)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ("mobilenet_v2", "efficientnet_lite0"))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.7])
    parser.add_argument("--criteria", nargs="+", default=["taylor", "magnitude"], metavar="NAME")
    parser.add_argument("--trained", nargs="*", default=["taylor"], metavar="NAME", help="criteria to distil")
    parser.add_argument("--steps", type=int, default=400, help=f"of {_BATCH} images each (default: 400)")
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--images", type=int, help="evaluate on the first of them only (default: all)")
    given = parser.parse_args(argv)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="onnx-mdp-") as folder:
        for name in given.models:
            results += _results(name, given, Path(folder))
    results = list(_judged(results))
    columns: dict[str, Callable[[Result], str]] = {
        "model": lambda r: r.model,
        "criterion": lambda r: r.criterion,
        "asked": lambda r: f"{r.ratio:g}",
        "measured": lambda r: f"{r.measured:.3f}",
        "F": lambda r: f"{r.noise:.1%}",
        "original": lambda r: f"{r.dense:.1%}",
        "pruned": lambda r: f"{r.pruned:.1%}",
        "lstsq": lambda r: f"{r.repaired:.1%}",
        "distilled": lambda r: "" if r.distilled is None else f"{r.distilled:.1%}",
        "s": lambda r: f"{r.seconds:.0f}",
        "verdict": lambda r: r.verdict,
    }
    table = print_table(f"top-1 after each stage, {given.steps} steps of distillation", columns, results)
    ends = [f"{r.model} {r.dense:.1%} → {r.stages[-1]:.1%} at {r.ratio:g}" for r in results if r.distilled]
    return publish(__file__, given, results, table, combined([r.verdict for r in results]), " · ".join(ends))


if __name__ == "__main__":
    run_main(main)
