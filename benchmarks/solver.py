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
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.harness import Verdict, arguments, combined, note, print_table, publish, run_main
from benchmarks.instances import INSTANCES, Device, with_budgets
from benchmarks.metered import run_metered
from onnx_mdp.errors import MdpError
from onnx_mdp.problem import PruningProblem, Solution
from onnx_mdp.solvers import SolveLimits, cheapest, solve
from onnx_mdp.solvers.fronts import solve_front

__all__ = ["Row", "main", "outcome_of", "ratio_budget"]

_LIMITS_S = {
    "resnet50 by 32": 0.2,
    "resnet50 by 16": 0.2,
    "resnet50 by 8": 0.2,
    "mobilenet_v2 by 8": 0.06,
    "deit_base": 0.2,
    "vit_large": 0.6,
    "resnet152 by 8": 0.9,
}
_GAP = 1e-6
_MEMORY_MB = 250.0
_RATIOS = (0.3, 0.5, 0.7)
_DEVICES: tuple[Device, ...] = ("gpu", "cpu")
_OTHERS = ("highs", "mindtpy", "greedy", "linear")
_HARDEST = {"highs": "resnet50 by 8", "mindtpy": "resnet50 by 32"}  # larger ones exceed any patience
_FRONT = 20
_SHARES = (0.8, 0.9, 0.97)
_BUDGETS: tuple[tuple[Device, ...], ...] = (
    ("gpu", "cpu"),
    ("gpu", "cpu", "params"),
    ("gpu", "cpu", "params", "macs"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What one solver did on one network: medians and worst of its runs.

    ``below`` is the largest relative distance of its value to that of `exact`, ``gap`` the largest proven
    one; ``limit_s`` is 0 where nothing is claimed.
    """

    task: str
    instance: str
    solver: str
    runs: int
    median_s: float
    worst_s: float
    gap: float
    below: float
    peak_mb: float
    limit_s: float
    trouble: str
    verdict: Verdict


def outcome_of(gap: float, below: float, median_s: float, limit_s: float, peak_mb: float) -> Verdict:
    """Whether a row of `exact` holds; without a limit only its gap counts.

    >>> outcome_of(1e-7, 0.0, 0.1, 0.2, 99.0), outcome_of(1e-3, 0.0, 0.1, 0.2, 99.0)
    ('pass', 'fail')
    """
    sound = gap <= _GAP and below <= 1e-9
    quick = not limit_s or (median_s <= limit_s and peak_mb <= _MEMORY_MB)
    return "pass" if sound and quick else "fail"


def ratio_budget(problem: PruningProblem, ratio: float) -> int:
    """The budget that is a share of the unpruned latency, in nanoseconds."""
    return int(ratio * problem.evaluate(problem.widest())[1])


def _timed(run: Callable[[], Solution]) -> tuple[Solution, float]:
    started = time.process_time()
    answer = run()
    return answer, time.process_time() - started


def _exact_rows(given: argparse.Namespace) -> Iterator[Row]:
    for name in given.models:
        note(f"{name}, exact …")
        seconds, gaps = [], []
        for device in _DEVICES:
            for seed in range(given.seeds):
                problem = INSTANCES[name](device, seed)
                for ratio in _RATIOS:
                    budget_ns = ratio_budget(problem, ratio)
                    answer, spent = _timed(partial(solve, problem, budget_ns))
                    seconds.append(spent)
                    gaps.append(answer.gap)
        median, limit = statistics.median(seconds), 0.0 if given.quick else _LIMITS_S[name]
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
            if given.quick and name != order[0]:
                continue
            note(f"{name}, {solver} …")
            yield _other_row(name, solver, given)


def _other_row(name: str, solver: str, given: argparse.Namespace) -> Row:
    problem = INSTANCES[name]("gpu", 0)
    limits = SolveLimits(given.time_limit, 1e-4)
    seconds, gaps, below, trouble = [], [], [], ""
    for ratio in _RATIOS:
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
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        0.0,
        trouble,
        sound,
    )


def _task_rows(given: argparse.Namespace) -> Iterator[Row]:
    small = [n for n in given.models if n in ("resnet50 by 32", "mobilenet_v2 by 8")]
    for name in small if given.quick else given.models:
        note(f"{name}, fronts and smallest latencies …")
        problem = INSTANCES[name]("gpu", 0)
        whole = problem.evaluate(problem.widest())
        once = [_timed(partial(solve, problem, ratio_budget(problem, r)))[1] for r in _RATIOS]
        budgets = [ratio_budget(problem, r) for r in np.linspace(0.15, 0.95, _FRONT)]
        started = time.process_time()
        answers = [a for a in solve_front(problem, budgets) if a.choice is not None]
        spent = time.process_time() - started
        yield _task_row("20 budgets", name, answers, [spent], 10 * statistics.median(once), given)
        found = [_timed(partial(cheapest, problem, s * whole[0])) for s in _SHARES]
        yield _task_row("least latency", name, [a for a, _ in found], [s for _, s in found], 0.5, given)
    for name in small if given.quick else [*small, *(n for n in given.models if n == "resnet50 by 8")]:
        for devices in _BUDGETS:
            note(f"{name}, {' + '.join(devices)} …")
            answers, seconds = [], []
            for tight in (0.97, 0.9):
                problem, budget_ns = _tight(name, devices, tight)
                limits = SolveLimits(seconds=3.0, gap=1e-4)
                answer, spent = _timed(partial(solve, problem, budget_ns, limits=limits))
                answers.append(answer)
                seconds.append(spent)
            gap = max(a.gap for a in answers)
            verdict: Verdict = "pass" if given.quick or gap <= 1e-4 or max(seconds) > 3.0 else "fail"
            task = f"{len(devices)} budgets at once"
            yield Row(
                task,
                name,
                "exact",
                2,
                statistics.median(seconds),
                max(seconds),
                gap,
                0.0,
                0.0,
                3.0,
                "",
                verdict,
            )


def _task_row(
    task: str,
    name: str,
    answers: Sequence[Solution],
    seconds: Sequence[float],
    limit: float,
    given: argparse.Namespace,
) -> Row:
    gap, median = max(a.gap for a in answers), statistics.median(seconds)
    verdict = outcome_of(gap, 0.0, median, 0.0 if given.quick else limit, 0.0)
    return Row(task, name, "exact", len(answers), median, max(seconds), gap, 0.0, 0.0, limit, "", verdict)


def _tight(name: str, devices: tuple[Device, ...], tight: float) -> tuple[PruningProblem, int]:
    """Half the latency, and of everything else a little less than the best plan for that would use."""
    free = with_budgets(INSTANCES[name], devices, (10.0,) * (len(devices) - 1), 0)
    budget_ns = ratio_budget(free, 0.5)
    answer = solve(free, budget_ns)
    assert answer.choice is not None
    used = tuple(tight * b.amount(answer.choice) * 10 / b.limit for b in free.budgets)
    return with_budgets(INSTANCES[name], devices, used, 0), budget_ns


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
    rows = [*_exact_rows(given), *_other_rows(given), *_task_rows(given)]
    print_table("solvers", _COLUMNS, rows)
    slow = [f"{r.task} {r.instance}" for r in rows if r.verdict == "fail"]
    exact = [r for r in rows if r.solver == "exact" and r.task == "solve"]
    summary = f"exact: worst gap {max(r.gap for r in exact):.0e}, " + ", ".join(
        f"{r.instance} {r.median_s:.2f} s" for r in exact
    )
    summary += f"; failing: {', '.join(slow)}" if slow else ""
    return publish(__file__, given, rows, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
