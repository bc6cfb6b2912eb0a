"""Solvers of the pruning problem side by side: seconds, value, proven bound, memory.

Claim: `exact` proves every one of its answers to a gap of at most 1e-6, never finds less than another solver,
and on 24 instances each takes at most (median CPU seconds of one core) 0.2 s on ResNet-50, 0.06 s on
MobileNetV2, 0.2 s on DeiT-Base, 0.6 s on ViT-L and 0.9 s on ResNet-152, below 250 MB of memory.

Instances have the structure of the networks, importances and roofline latencies of benchmarks/instances.py:
seeds times two devices times the ratios 0.3, 0.5 and 0.7 of the unpruned latency. The other solvers get one
seed and a time limit. The second table holds 20-budget fronts, the smallest latency at 80, 90 and 97 % of the
importance, and two to four budgets at once. Limits in seconds are those of a quiet machine; ``--quick``
checks gaps and agreement only, on all instances for `exact` and on small ones for the rest, in about 50 s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from benchmarks.harness import (
    Printed,
    Verdict,
    arguments,
    combined,
    note,
    print_table,
    publish,
    run_main,
    side_by_side,
)
from benchmarks.instances import INSTANCES
from benchmarks.metered import run_metered
from benchmarks.roofline import Device
from benchmarks.solver_tasks import RATIOS, Row, outcome_of, ratio_budget, task_rows, timed
from onnx_mdp.errors import MdpError
from onnx_mdp.solvers import SolveLimits, solve

__all__ = ["main"]

_LIMITS_S = {
    "resnet50 by 32": 0.2,
    "resnet50 by 16": 0.2,
    "resnet50 by 8": 0.2,
    "mobilenet_v2 by 8": 0.06,
    "deit_base": 0.2,
    "vit_large": 0.6,
    "resnet152 by 8": 0.9,
}
_DEVICES: tuple[Device, ...] = ("gpu", "cpu")
_OTHERS = ("highs", "mindtpy", "greedy", "linear")
_SAME = 1e-6  # of the value
_HARDEST = {"highs": "resnet50 by 8", "mindtpy": "resnet50 by 128"}  # larger ones exceed any patience


def _exact_rows(given: argparse.Namespace) -> Iterator[Row]:
    for name in given.models:
        note(f"{name}, exact …")
        seconds, gaps = [], []
        for device in _DEVICES:
            for seed in range(given.seeds):
                problem = INSTANCES[name](device, seed)
                for ratio in RATIOS:
                    budget_ns = ratio_budget(problem, ratio)
                    answer, spent = timed(partial(solve, problem, budget_ns))
                    seconds.append(spent)
                    gaps.append(answer.gap)
        median, limit = statistics.median(seconds), 0.0 if given.quick else _LIMITS_S.get(name, 0.0)
        peak = _peak_mb(name)
        verdict = outcome_of(max(gaps), 0.0, median, limit, peak)
        yield Row(
            "solve", name, "exact", len(gaps), median, max(seconds), max(gaps), 0.0, peak, limit, "", verdict
        )


def _peak_mb(name: str) -> float:
    """The peak of a fresh process that builds and solves the instance once."""
    return run_metered(sys.executable, "-m", "benchmarks.solver", "--one", name).peak_mb


def _other_rows(given: argparse.Namespace) -> Iterator[Row]:
    order = list(INSTANCES)
    for solver in given.solvers:
        for name in given.models:
            if order.index(name) > order.index(_HARDEST.get(solver, order[-1])):
                continue
            if given.quick and name != "resnet50 by 32":
                continue
            note(f"{name}, {solver} …")
            yield _other_row(name, solver, given)


def _other_row(name: str, solver: str, given: argparse.Namespace) -> Row:
    problem = INSTANCES[name]("gpu", 0)
    limits = SolveLimits(given.time_limit, 1e-4)
    seconds, gaps, below, trouble = [], [], [], ""
    for ratio in RATIOS:
        budget_ns = ratio_budget(problem, ratio)
        best = solve(problem, budget_ns)
        started = time.process_time()
        try:
            answer = solve(problem, budget_ns, solver, limits)
        except MdpError as error:
            trouble = str(error)[:60]
            continue
        seconds.append(time.process_time() - started)
        gaps.append(answer.gap)
        below.append((best.value - answer.value) / abs(best.value))
    sound: Verdict = "fail" if below and min(below) < -1e-9 else "pass"
    return Row(
        "solve",
        name,
        solver,
        len(seconds),
        statistics.median(seconds) if seconds else float("nan"),
        max(seconds, default=float("nan")),
        max(gaps, default=float("nan")),
        max(below, default=float("nan")),
        0.0,
        0.0,
        trouble,
        sound,
    )


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "task": lambda r: r.task,
    "instance": lambda r: r.instance,
    "solver": lambda r: r.solver,
    "runs": lambda r: str(r.runs),
    "median s": lambda r: f"{r.median_s:.3f}",
    "worst s": lambda r: f"{r.worst_s:.3f}",
    "limit s": lambda r: f"{r.limit_s:.2f}" if r.limit_s else "–",
    "proven gap": lambda r: f"{r.gap:.1e}",
    "below exact": lambda r: f"{r.below:.1e}",
    "peak MB": lambda r: f"{r.peak_mb:.0f}" if r.peak_mb else "–",
    "trouble": lambda r: r.trouble,
    "verdict": lambda r: r.verdict,
}


def _overview(rows: Sequence[Row]) -> Printed:
    """Median seconds of each solver and task on one line for each instance."""
    return side_by_side(
        "median seconds",
        {"instance": lambda r: r.instance},
        lambda r: r.solver if r.task == "solve" else r.task,
        lambda r: f"{r.median_s:.2f}" + (f" (-{r.below:.1%})" if r.below > _SAME else ""),
        rows,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, tuple(INSTANCES))
    parser.add_argument("--quick", action="store_true", help="one seed, no limits in seconds, HiGHS once")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--solvers", nargs="*", default=list(_OTHERS))
    parser.add_argument("--time-limit", type=float, default=120.0, help="of the other solvers, in seconds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.one:
        problem = INSTANCES[given.one]("gpu", 0)
        solve(problem, ratio_budget(problem, 0.5))
        return 0
    if given.quick:
        given.seeds, given.time_limit = 1, 10.0
        given.solvers = [s for s in given.solvers if s != "mindtpy"]
    rows = [*_exact_rows(given), *_other_rows(given), *task_rows(given)]
    table = print_table("solvers", _COLUMNS, rows)
    slow = [f"{r.task} {r.instance}" for r in rows if r.verdict == "fail"]
    exact = [r for r in rows if r.solver == "exact" and r.task == "solve"]
    summary = f"exact: worst gap {max(r.gap for r in exact):.0e}, " + ", ".join(
        f"{r.instance} {r.median_s:.2f} s" for r in exact
    )
    summary += f"; failing: {', '.join(slow)}" if slow else ""
    return publish(
        __file__, given, rows, table, combined([row.verdict for row in rows]), summary, _overview(rows)
    )


if __name__ == "__main__":
    run_main(main)
