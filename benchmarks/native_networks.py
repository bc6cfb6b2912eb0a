"""A large network pruned to the latency of a small one, beside the small one: the paper's figure 8.

Claim: without any training, labels or choice of hyperparameters, EfficientNet-Lite0 pruned to the measured
latency of MobileNetV2 is at least as accurate as MobileNetV2. What ResNet-56 pruned to the latency of
ResNet-20 keeps is shown beside it and claimed of nothing: that asks for training (`cifar_accuracy`).

The latency of the small network is measured beside the large one; then the dial of our plan by ``refit``,
with ``lstsq`` on 500 unlabelled images, is turned until its file takes the same time. Published weights of
the development zoo; top-1 on 500 ImageNet images of classes that nothing was calibrated on (mostly training
images, the same for both), or on 9,000 CIFAR-10 test images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contenders import FOR_REFIT, Contest
from benchmarks.harness import Verdict, arguments, combined, judge, note, print_table, publish, run_main
from benchmarks.model_files import model_path
from benchmarks.samples import samples_for, top1
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.tables.variants import measure_models

__all__ = ["PAIRS", "Row", "main"]

# The large network, the small one, and whether the claim is about it.
PAIRS = (("efficientnet_lite0", "mobilenet_v2", True), ("resnet56", "resnet20", False))
_MEASURE_S = 6.0
_CALIBRATION = 500  # images


@dataclass(frozen=True, slots=True)
class Row:
    """One pair; latencies are shares of the large network's, accuracies top-1 shares."""

    model: str
    native: str
    native_ratio: float
    pruned_ratio: float
    noise: float
    whole: float
    pruned: float
    native_accuracy: float
    claimed: bool

    @property
    def verdict(self) -> Verdict:
        """The pruned one, as fast as the native one, must be as accurate where that is claimed."""
        fast = self.pruned_ratio <= self.native_ratio * 1.02
        return judge(not self.claimed or (fast and self.pruned >= self.native_accuracy), self.noise)


def _row(large: str, small: str, claimed: bool, threads: int, seed: int) -> Row:
    note(f"{large} at the latency of {small}")
    contest, native = Contest(large, threads, seed, _CALIBRATION), model_path(small).read_bytes()
    runtime = Runtime(threads=threads)
    timing = measure_models([contest.base, native], contest.shapes, runtime, seed=seed, budget_s=_MEASURE_S)
    ratio = timing.ms[1] / timing.ms[0]
    fast = contest.fast(FOR_REFIT, 1 / ratio)
    images = samples_for(large)
    return Row(
        model=large,
        native=small,
        native_ratio=ratio,
        pruned_ratio=1 / fast.speedup,
        noise=max(timing.noise, fast.noise),
        whole=top1(contest.base, images),
        pruned=top1(fast.model, images),
        native_accuracy=top1(native, samples_for(small)),
        claimed=claimed,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, [large for large, _, _ in PAIRS])
    given = parser.parse_args(argv)
    rows = [
        _row(large, small, claimed, given.threads, given.seed)
        for large, small, claimed in PAIRS
        if large in given.models
    ]
    columns: Mapping[str, Callable[[Row], str]] = {
        "pruned": lambda r: r.model,
        "native": lambda r: r.native,
        "latency of native": lambda r: f"{r.native_ratio:.3f}",
        "of pruned": lambda r: f"{r.pruned_ratio:.3f}",
        "F": lambda r: f"{r.noise:.1%}",
        "top-1 unpruned": lambda r: f"{r.whole:.1%}",
        "pruned and refitted": lambda r: f"{r.pruned:.1%}",
        "top-1 of native": lambda r: f"{r.native_accuracy:.1%}",
        "verdict": lambda r: r.verdict,
    }
    table = print_table("pruned against natively small, at equal latency, untrained", columns, rows)
    parts = [f"{r.model} {r.pruned:.1%}, {r.native} {r.native_accuracy:.1%}" for r in rows]
    return publish(__file__, given, rows, table, combined([r.verdict for r in rows]), "; ".join(parts))


if __name__ == "__main__":
    run_main(main)
