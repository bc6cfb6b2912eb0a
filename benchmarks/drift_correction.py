"""Three ways to measure pruned models beside the original: how well their ratios repeat.

Claim: ratios of interleaved, drift-corrected samples repeat at least as well, to a tenth of a percent, as
those of interleaved medians, and these as those of models that are measured one after the other.

Each way times the unpruned model and the same random variants as often, again and again, in turns. The
spread of a variant is half of the range of its ratio, over all turns, relative to its median. On a quiet
machine with a fixed clock all three are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.configurations import opened_variants
from benchmarks.harness import Verdict, arguments, combined, note, print_table, publish, run_main
from onnx_mdp.running.runtime import InferenceSession, Runtime
from onnx_mdp.running.timing import Feeds, Samples, drift_correct, run_times, warm_up_runs

__all__ = ["Row", "judged", "main", "spreads"]

_AFTER, _MEDIANS, _CORRECTED = "one after the other", "interleaved, medians", "interleaved, drift-corrected"
_VARIANTS = 6
_SAMPLES = 20
_ALIKE = 1e-3
_STEP = 8

Pairs = Sequence[tuple[InferenceSession, Feeds]]
Wide = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """Median and worst spread of the ratios of one way, over the variants of a model."""

    model: str
    way: str
    turns: int
    median: float
    worst: float
    verdict: Verdict = "pass"


def _one_after_the_other(pairs: Pairs) -> Wide:
    return np.array([np.median(_warm(*pair, _SAMPLES)[0]) for pair in pairs])


def _warm(session: InferenceSession, feeds: Feeds, count: int) -> tuple[Wide, Wide]:
    """Wall and CPU milliseconds of ``count`` runs, after as many as bring the weights back to the caches."""
    untimed = warm_up_runs(float(run_times(session, feeds, 1)[0][0]))
    wall, cpu = run_times(session, feeds, untimed - 1 + count)
    return wall[-count:], cpu[-count:]


def _interleaved(pairs: Pairs, rng: np.random.Generator) -> Samples:
    order: list[int] = []
    times: list[tuple[float, float]] = []
    for _ in range(_SAMPLES):
        for model in rng.permutation(len(pairs)).tolist():
            wall, cpu = _warm(*pairs[model], 1)
            order.append(model)
            times.append((wall[0], cpu[0]))
    wall_ms, cpu_ms = np.array(times).T
    return Samples(np.array(order, dtype=np.int64), wall_ms, cpu_ms)


def _measured(name: str, turns: int, runtime: Runtime, seed: int) -> dict[str, Wide]:
    """Milliseconds ``[turns, 1 + variants]`` by way, the unpruned model first."""
    rng = np.random.default_rng(seed)
    pairs = opened_variants(name, _VARIANTS, runtime, _STEP, seed)
    _one_after_the_other(pairs)
    found: dict[str, list[Wide]] = {_AFTER: [], _MEDIANS: [], _CORRECTED: []}
    for turn in range(turns):
        note(f"{name}: turn {turn + 1} of {turns}")
        found[_AFTER].append(_one_after_the_other(pairs))
        samples = _interleaved(pairs, rng)
        wall = [np.median(samples.wall_ms[samples.model == number]) for number in range(len(pairs))]
        found[_MEDIANS].append(np.array(wall))
        filtering = runtime.threads == 1 and runtime.on_cpu
        found[_CORRECTED].append(np.array(drift_correct(samples, filter_preempted=filtering).ms))
    return {way: np.stack(ms) for way, ms in found.items()}


def spreads(ms: Wide) -> Wide:
    """Of milliseconds ``[turns, 1 + variants]``: half of the range of each ratio, relative to its median.

    >>> spreads(np.array([[10.0, 5.0], [12.0, 6.0], [10.0, 5.5]])).round(3).tolist()
    [0.05]
    """
    ratios = ms[:, 1:] / ms[:, :1]
    return np.asarray((ratios.max(0) - ratios.min(0)) / 2 / np.median(ratios, 0))


def judged(rows: Sequence[Row]) -> Iterator[Row]:
    """The claim, in the two rows of a model that say more than the row before."""
    before: Row | None = None
    for row in rows:
        holds = before is None or row.median <= before.median + _ALIKE
        yield replace(row, verdict="pass" if holds else "fail")
        before = row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ("mobilenet_v2", "resnet18_torchscript"))
    parser.add_argument("--turns", type=int, default=8, help="of all three ways (default: 8)")
    given = parser.parse_args(argv)
    rows: list[Row] = []
    for name in given.models:
        measured = _measured(name, given.turns, Runtime(threads=given.threads), given.seed)
        found = {way: spreads(ms) for way, ms in measured.items()}
        rows += judged(
            [Row(name, way, given.turns, float(np.median(s)), float(s.max())) for way, s in found.items()]
        )
    columns: Mapping[str, Callable[[Row], str]] = {
        "model": lambda r: r.model,
        "measured": lambda r: r.way,
        "turns": lambda r: str(r.turns),
        "median spread": lambda r: f"{r.median:.2%}",
        "worst spread": lambda r: f"{r.worst:.2%}",
        "verdict": lambda r: r.verdict,
    }
    table = print_table("how well ratios repeat", columns, rows)
    by_model = (" / ".join(f"{r.median:.1%}" for r in rows if r.model == name) for name in given.models)
    summary = f"spread after each other / interleaved / corrected: {' · '.join(by_model)}"
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
