"""ImageNet accuracy after each stage, without labels, at equal measured latency: pruned, repaired, distilled.

Claim: at 0.9, 0.8 and 0.7 of the measured latency each stage raises the top-1 of the stage before, whether
units were ranked by ``taylor`` or by ``refit``, and those ranked by ``taylor`` give a higher top-1, as
pruned, than those ranked by ``magnitude``.

Each model is pruned by the closed loop of ``onnx-mdp prune`` until it measures what was asked, its units
ranked on 64 unlabelled images. ``lstsq`` refits its layers on 500 of them; then plans of ``refit``, which
are made for that repair, are trained to give the original's logits, on crops of these. Images are those of
the zoo, mostly of the training set: look at differences. Those of even classes rank, refit and distil, those
of odd classes test, so no class that is tested was seen. Beside the top-1 of so few images stands the KL
divergence from the original, which tells smaller steps apart. All measuring of a model comes before its
training, so only its first minutes need a quiet machine; with ``--kept``, another machine goes on from there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path

from benchmarks.harness import (
    Printed,
    Verdict,
    arguments,
    combined,
    judge,
    print_table,
    publish,
    run_main,
    side_by_side,
)
from benchmarks.kept_models import Kept
from benchmarks.samples import divergence, hits, logits, samples_for
from benchmarks.staged_networks import StagedNetwork

__all__ = ["Result", "main"]


@dataclass(frozen=True, slots=True)
class Result:
    """One model pruned by one criterion to one measured ratio; accuracies are top-1 shares of ``images``.

    ``distilled`` is missing where the criterion was not trained; ``seconds`` are those of the training.
    ``divergences`` from the original, in nats, are those of each stage.
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
    divergences: Mapping[str, float]
    verdict: Verdict = "inconclusive"

    @property
    def stages(self) -> dict[str, float]:
        """Accuracies in the order of the stages."""
        held = {"pruned": self.pruned, "lstsq": self.repaired, "distilled": self.distilled}
        return {stage: accuracy for stage, accuracy in held.items() if accuracy is not None}

    @property
    def rising(self) -> bool:
        """Whether each stage helps."""
        return all(after > before for before, after in pairwise(self.stages.values()))


def _results(name: str, given: argparse.Namespace, kept: Kept, folder: Path) -> Iterator[Result]:
    network, data = StagedNetwork(name, given, kept, folder), samples_for(name, given.images)
    chosen = list(product(given.criteria, given.ratios))
    for criterion, ratio in chosen:
        network.pruned(criterion, ratio)
    wanted = logits(network.base, data, given.threads)
    for criterion, ratio in chosen:
        slim, numbers = network.pruned(criterion, ratio)
        models, seconds = {"pruned": slim, "lstsq": network.refitted(criterion, ratio)}, 0.0
        if criterion in given.trained:
            models["distilled"], seconds = network.distilled(criterion, ratio)
        scores = {stage: logits(model, data, given.threads) for stage, model in models.items()}
        accuracies = {stage: hits(found, data) for stage, found in scores.items()}
        yield Result(
            model=name,
            criterion=criterion,
            ratio=ratio,
            measured=numbers["measured"],
            noise=numbers["noise"],
            images=len(data.labels),
            dense=hits(wanted, data),
            pruned=accuracies["pruned"],
            repaired=accuracies["lstsq"],
            distilled=accuracies.get("distilled"),
            seconds=seconds,
            divergences={stage: divergence(wanted, found) for stage, found in scores.items()},
        )


def _judged(results: Sequence[Result]) -> Iterator[Result]:
    """The claim is made of ``taylor`` and ``refit``, row by row, and of the one against ``magnitude``."""
    for one in results:
        others = [r for r in results if (r.model, r.ratio) == (one.model, one.ratio)]
        holds = one.criterion == "magnitude" or one.rising
        if one.criterion == "taylor":
            holds = holds and all(one.pruned > r.pruned for r in others if r.criterion == "magnitude")
        yield replace(one, verdict=judge(holds, max(r.noise for r in others)))


def _overview(results: Sequence[Result]) -> Printed:
    cells = [(result, stage, accuracy) for result in results for stage, accuracy in result.stages.items()]
    return side_by_side(
        "top-1 by plan and stage, and KL divergence from the original",
        {
            "model": lambda c: c[0].model,
            "asked": lambda c: f"{c[0].ratio:g}",
            "original": lambda c: f"{c[0].dense:.1%}",
        },
        lambda c: f"{c[0].criterion}, {c[1]}",
        lambda c: f"{c[2]:.1%} ({c[0].divergences[c[1]]:.2f})",
        cells,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ("mobilenet_v2", "efficientnet_lite0"))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.7])
    parser.add_argument("--criteria", nargs="+", default=["taylor", "refit", "magnitude"], metavar="NAME")
    parser.add_argument("--trained", nargs="*", default=["refit"], metavar="NAME", help="to distil")
    parser.add_argument("--steps", type=int, default=300, help="of the distillation (default: 300)")
    parser.add_argument("--batch", type=int, default=25, help="images of a step (default: 25)")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument(
        "--kept", type=Path, metavar="DIR", help="of pruned and trained models, to go on from"
    )
    parser.add_argument("--images", type=int, help="evaluate on the first of them only (default: all)")
    given = parser.parse_args(argv)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="onnx-mdp-") as folder:
        kept = Kept(given.kept or Path(folder) / "kept")
        for name in given.models:
            results += _results(name, given, kept, Path(folder))
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
    ends = [f"{r.model} {r.dense:.1%} → {r.distilled:.1%} at {r.ratio:g}" for r in results if r.distilled]
    verdict = combined([r.verdict for r in results])
    return publish(__file__, given, results, table, verdict, " · ".join(ends), _overview(results))


if __name__ == "__main__":
    run_main(main)
