"""Pruning before training, in rounds, and with units that may come back: accuracy at equal latency and steps.

Claim: at 4x of the predicted latency of the CIFAR-10 ResNet-20, the mode ``soft`` ends with a higher top-1
than ``one-shot`` after as many steps, and gains more there than at 2x.

Data: ``python ../shared/zoo/get_cifar10.py OUT.npz`` fetches the training images, ``--data OUT.npz`` names
them. One table, one order of batches, one recipe (labels, and the original model as teacher) for all modes;
one-shot ranks by ``drift`` on 64 test images that are not evaluated on. A step of the masked modes costs as
much as one of the unpruned model, a step of one-shot is counted alike. Accuracies are those of the slim files
in ONNX Runtime on ``--images`` test images that nothing was chosen by. The paper's figure 7 is the model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import Verdict, arguments, note, print_table, publish, run_main
from benchmarks.measuring import table_from_nothing
from benchmarks.model_files import model_path
from benchmarks.samples import samples_for, top1
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.scoring import score
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.pipeline import analyze
from onnx_mdp.planning.closed_loop import Request
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.tables.latency import predict_ms
from onnx_mdp.tables.variants import full_variant, variant_of_plan
from onnx_mdp.torch_backend import require_torch

__all__ = ["Result", "main"]

_PREPROCESS = "imagenet-nocrop"
_MODES = ("one-shot", "iterative", "soft")
_LEARN, _CHECK = 45_000, 1_000


@dataclass(frozen=True, slots=True)
class Result:
    """One run: ``speedup`` is that of the predicted latency, ``returned`` units over all decisions."""

    model: str
    mode: str
    seed: int
    speedup: float
    predicted: float
    dense: float
    accuracy: float
    decisions: int
    returned: int
    blocks: int
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """A comparison needs the latency that was asked for."""
        return "pass" if self.predicted >= 0.999 * self.speedup else "fail"


def _archives(data: Path, folder: Path) -> tuple[str, str]:
    """Images to learn from and images to choose the best weights by, both of the training set."""
    if not data.is_file():
        raise UsageError(f"{data} does not exist; make it with `python ../shared/zoo/get_cifar10.py {data}`")
    with np.load(data) as held:
        pixels, labels = held["train_x"], held["train_y"]
    parts = {"learn": slice(0, _LEARN), "check": slice(_LEARN, _LEARN + _CHECK)}
    for name, part in parts.items():
        np.savez(folder / f"{name}.npz", input=pixels[part], labels=labels[part])
    return str(folder / "learn.npz"), str(folder / "check.npz")


def _results(name: str, given: argparse.Namespace, folder: Path) -> Iterator[Result]:
    require_torch("training with masks")
    from onnx_mdp.training.data import DataOptions
    from onnx_mdp.training.distributed import process_group
    from onnx_mdp.training.finetuning import FinetuneRequest
    from onnx_mdp.training.masks import Schedule
    from onnx_mdp.training.recipes import recipe
    from onnx_mdp.training.soft_masking import Budgets, train_with_masks

    learn, check = _archives(given.data, folder)
    model = load_model(model_path(name))
    structure, samples = analyze(model, {}), samples_for(name, given.images)
    note(f"{name}: table")
    table = table_from_nothing(structure, Runtime(threads=given.threads), given.seed)
    dense = top1(model_bytes(model), samples, given.threads)
    first = score(structure, "drift", samples.calibration)
    full = predict_ms(table, structure, full_variant(structure))
    settings = {name: getattr(given, name) for name in ("steps", "batch", "lr", "precision")}
    chosen = recipe("default", settings)
    for seed in given.seeds:
        data = DataOptions(learn, check, preprocess=_PREPROCESS, augment="crop", batch=given.batch, seed=seed)
        for speedup in given.speedups:
            for mode in given.modes:
                note(f"{name}: {mode} at {speedup:g}x, seed {seed}, {given.steps} steps")
                with process_group("auto") as group:
                    found = train_with_masks(
                        structure,
                        model,
                        structure.shadow.inputs,
                        {key: np.dtype("float32") for key in structure.shadow.inputs},
                        FinetuneRequest(chosen, data),
                        Schedule(mode, given.redecide),
                        Budgets(structure, table, Request(target_ratio=1 / speedup)),
                        group,
                        lambda stage, done, total: None,
                        note,
                        first=lambda: first,
                    )
                yield Result(
                    model=name,
                    mode=mode,
                    seed=seed,
                    speedup=speedup,
                    predicted=full / predict_ms(table, structure, variant_of_plan(structure, found.plan)),
                    dense=dense,
                    accuracy=top1(model_bytes(found.training.model), samples, given.threads),
                    decisions=len(found.decisions),
                    returned=sum(decision.returned for decision in found.decisions),
                    blocks=len(found.plan.removed_blocks),
                    seconds=found.training.run.seconds,
                )


def _gains(results: Sequence[Result], mode: str) -> dict[float, float]:
    """The mean gain in top-1 over one-shot, by speed-up."""
    means: dict[tuple[float, str], list[float]] = {}
    for result in results:
        means.setdefault((result.speedup, result.mode), []).append(result.accuracy)
    return {
        speedup: float(np.mean(found) - np.mean(means[speedup, "one-shot"]))
        for (speedup, other), found in means.items()
        if other == mode and (speedup, "one-shot") in means
    }


def _verdict(results: Sequence[Result]) -> Verdict:
    gains = _gains(results, "soft")
    if not {2.0, 4.0} <= gains.keys():
        return "inconclusive"
    return "pass" if gains[4.0] > max(0.0, gains[2.0]) else "fail"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ("resnet20",))
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="what get_cifar10.py wrote")
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=list(_MODES))
    parser.add_argument("--speedups", nargs="+", type=float, default=[2.0, 4.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=600, help="of the optimizer (default: 600)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--redecide", type=int, default=25, help="steps between decisions (default: 25)")
    parser.add_argument("--images", type=int, help="evaluate on the first of them only (default: 9000)")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="onnx-mdp-") as folder:
        results = [r for name in given.models for r in _results(name, given, Path(folder))]
    columns = {
        "model": lambda r: r.model,
        "speed-up": lambda r: f"{r.speedup:g}x",
        "mode": lambda r: r.mode,
        "seed": lambda r: str(r.seed),
        "predicted": lambda r: f"{r.predicted:.2f}x",
        "dense": lambda r: f"{r.dense:.1%}",
        "top-1": lambda r: f"{r.accuracy:.1%}",
        "decisions": lambda r: str(r.decisions),
        "came back": lambda r: str(r.returned),
        "blocks gone": lambda r: str(r.blocks),
        "seconds": lambda r: f"{r.seconds:.0f}",
    }
    table = print_table("top-1 after as many steps", columns, results)
    parts = [
        f"{mode} {gain:+.1%} at {speedup:g}x"
        for mode in given.modes
        if mode != "one-shot"
        for speedup, gain in _gains(results, mode).items()
    ]
    return publish(__file__, given, results, table, _verdict(results), "over one-shot: " + " · ".join(parts))


if __name__ == "__main__":
    run_main(main)
