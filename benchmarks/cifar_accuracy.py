"""CIFAR-10 accuracy after fine-tuning, at equal measured speed: ours, what else one would do, Torch-Pruning.

Claim: at 3 times the measured speed of the original and after the same fine-tuning, our plans, refitted by
``lstsq``, are more accurate than every other pruner's, by at least half a point over Torch-Pruning; at twice
the speed they are at most half a point below the original. Below another by less than the standard error of a
difference on the test images, one is neither shown nor refuted.

Every pruner of benchmarks/pruners.py is turned until its file, measured beside the original, is as
fast as asked. Then all are trained alike by `onnx_mdp.training`: labels and the original as teacher,
BatchNorm inserted and folded away again, SGD, random crops and flips, the same seed and number of steps, on
45,000 training images (``--whole``: on all, as the original was); the last weights are tested on the 10,000
test images. (Not those that are best on the other 5,000 training images: the original learned from these,
which flatters weights that resemble it.)
All measuring comes before all training, so only the first minutes need a quiet machine; with ``--kept``,
another machine goes on from there, or several processes that each are given one method, and a training that
was interrupted is resumed. The training
images come from ``get_cifar10.py`` of the zoo: ``python ../shared/zoo/get_cifar10.py cifar10.npz``, then
``--data cifar10.npz``.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.cifar_images import BATCH, Cifar
from benchmarks.cifar_networks import METHODS, OURS, REFITTED, CifarNetwork
from benchmarks.contenders import FOR_REFIT
from benchmarks.harness import Verdict, arguments, combined, judge, note, print_table, publish, run_main
from benchmarks.kept_models import Kept

__all__ = ["Result", "main"]

_JUDGED = (REFITTED, FOR_REFIT)  # what was refitted, by a plan for any repair or for this one
_MARGIN = 0.005
_IMAGES = 10_000


@dataclass(frozen=True, slots=True)
class Result:
    """One network pruned one way; accuracies are top-1 shares of the 10,000 test images.

    ``size`` is the file's, as a share of the original's. The claim is judged in the rows of ``_JUDGED``.
    """

    model: str
    asked: float
    method: str
    speedup: float
    noise: float
    size: float
    dense: float
    before: float
    after: float
    seconds: float
    verdict: Verdict


def _results(network: CifarNetwork, given: argparse.Namespace, images: Cifar) -> Iterator[Result]:
    for speedup in given.speedups:
        for method in given.methods:
            network.fast(method, speedup)
    dense = images.accuracy(network.base)
    for asked in given.speedups:
        found: dict[str, Result] = {}
        for method in given.methods:
            fast = network.fast(method, asked)
            trained, seconds = network.trained(method, asked)
            after = images.accuracy(trained)
            note(f"{network.name}, {method} at {asked:g} times the speed: {after:.2%} after {seconds:.0f} s")
            found[method] = Result(
                model=network.name,
                asked=asked,
                method=method,
                speedup=fast.speedup,
                noise=fast.noise,
                size=len(fast.model) / len(network.base),
                dense=dense,
                before=images.accuracy(fast.model),
                after=after,
                seconds=seconds,
                verdict="pass",
            )
        yield from (replace(r, verdict=_verdict(r, found)) for r in found.values())


def _verdict(one: Result, found: Mapping[str, Result]) -> Verdict:
    """What the claim asks of ours; of the others nothing."""
    if one.method not in _JUDGED:
        return "pass"
    others = {method: other.after for method, other in found.items() if method not in OURS}
    best, holds = max(others.values(), default=0.0), True
    if one.asked >= 3:
        holds = one.after >= others.get("torch_pruning", 0.0) + _MARGIN
    elif one.asked <= 2:
        holds = one.after >= one.dense - _MARGIN
    if holds and best - math.sqrt(2 * best * (1 - best) / _IMAGES) <= one.after < best:
        return "inconclusive"
    return judge(holds and one.after >= best, max(other.noise for other in found.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ("resnet20", "resnet56"))
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.npz", help="all of CIFAR-10")
    parser.add_argument("--speedups", nargs="+", type=float, default=[2.0, 3.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=1500, help="(default: 1500)")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images of a step (default: {BATCH})")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--whole", action="store_true", help="train on all 50,000 images")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--kept", type=Path, metavar="DIR", help="of pruned and trained models, to go on from"
    )
    given = parser.parse_args(argv)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="onnx-mdp-") as folder:
        kept = Kept(given.kept or Path(folder) / "kept")
        images = Cifar(given.data, given.kept or Path(folder), given.seed)
        for name in given.models:
            results += _results(CifarNetwork(name, given, images, kept), given, images)
    columns: dict[str, Callable[[Result], str]] = {
        "model": lambda r: r.model,
        "asked": lambda r: f"{r.asked:g}x",
        "pruner": lambda r: r.method,
        "measured": lambda r: f"{r.speedup:.2f}x",
        "F": lambda r: f"{r.noise:.1%}",
        "size": lambda r: f"{r.size:.0%}",
        "original": lambda r: f"{r.dense:.2%}",
        "pruned": lambda r: f"{r.before:.2%}",
        "fine-tuned": lambda r: f"{r.after:.2%}",
        "seconds": lambda r: f"{r.seconds:.0f}",
        "verdict": lambda r: r.verdict,
    }
    table = print_table(f"CIFAR-10 after {given.steps} steps", columns, results)
    ours = [r for r in results if r.method in _JUDGED]
    summary = ", ".join(
        f"{r.model} {r.after:.1%} at {r.asked:g}x by {r.method} (original {r.dense:.1%})" for r in ours
    )
    return publish(__file__, given, results, table, combined([r.verdict for r in results]), summary)


if __name__ == "__main__":
    run_main(main)
