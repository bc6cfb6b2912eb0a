"""How many runs a model needs after another one ran, until it is as fast as in a loop of its own.

Claim: after the runs that the tool leaves untimed, the next takes at most 2 % longer than those of a loop.

The unpruned model and two random variants are visited in a new order each turn, each for twenty runs in a
row. The time of a place in the row is the median over the turns; that of the loop, of the last eight places.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.configurations import opened_variants
from benchmarks.harness import Verdict, arguments, combined, note, print_table, publish, run_main
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.running.timing import run_times, warm_up_runs

__all__ = ["Row", "main", "row_of"]

_MODELS = ("mobilenet_v2", "deit_tiny_torchscript", "resnet18_torchscript", "resnet50_torchscript")
_VARIANTS = 2
_IN_A_ROW, _LAST = 20, 8
_SHOWN = (1, 2, 3, 4, 6)
_MOST = 0.02
_STEP = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One network: milliseconds in a loop, and how much longer the runs after another network take."""

    model: str
    share: float
    ms: float
    excess: tuple[float, ...]
    untimed: int
    left: float
    verdict: Verdict


def row_of(model: str, times: Sequence[float], share: float = 1.0) -> Row:
    """The row of a network that takes ``times`` milliseconds in the places of a row.

    >>> row_of("m", [3.0, 2.2, *[2.0] * 18]).excess[:3]
    (0.5, 0.1, 0.0)
    """
    loop = float(np.median(times[-_LAST:]))
    excess = tuple(round(float(ms) / loop - 1, 6) for ms in times)
    untimed = warm_up_runs(loop)
    left = float(np.mean(excess[untimed : untimed + 3]))
    return Row(model, share, loop, excess, untimed, left, "pass" if left <= _MOST else "fail")


def _rows(name: str, given: argparse.Namespace) -> list[Row]:
    note(f"{name}: {given.turns} turns")
    rng = np.random.default_rng(given.seed)
    pairs = opened_variants(name, _VARIANTS, Runtime(threads=given.threads), _STEP, given.seed)
    times: list[list[npt.NDArray[np.float64]]] = [[] for _ in pairs]
    for _ in range(given.turns):
        for place in rng.permutation(len(pairs)).tolist():
            times[place].append(run_times(*pairs[place], _IN_A_ROW)[0])
    rows = [row_of(name, np.median(each, axis=0).tolist()) for each in times]
    return [replace(row, share=row.ms / rows[0].ms) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, _MODELS)
    parser.add_argument("--turns", type=int, default=15, help="visits of each network (default: 15)")
    given = parser.parse_args(argv)
    rows = [row for name in given.models for row in _rows(name, given)]
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda r: r.model,
        "of base": lambda r: f"{r.share:.2f}",
        "in a loop, ms": lambda r: f"{r.ms:.2f}",
    }
    columns |= {f"run {place}": lambda r, place=place: f"{r.excess[place - 1]:+.1%}" for place in _SHOWN}
    columns |= {
        "untimed": lambda r: str(r.untimed),
        "then": lambda r: f"{r.left:+.1%}",
        "verdict": lambda r: r.verdict,
    }
    shown: Mapping[str, Callable[[Row], str]] = columns
    table = print_table("runs after another network, longer than in a loop", shown, rows)
    second, left = max(row.excess[1] for row in rows), max(row.left for row in rows)
    summary = f"the second run takes up to {second:.0%} longer, those that are timed {left:.1%}"
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
