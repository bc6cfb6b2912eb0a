"""What the solver benchmark asks besides single solves: fronts, least latencies, several budgets at once."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.harness import Verdict, note
from benchmarks.instances import INSTANCES, with_budgets
from benchmarks.roofline import Device
from onnx_mdp.planning.problem import PruningProblem, Solution
from onnx_mdp.solvers import SolveLimits, cheapest, solve
from onnx_mdp.solvers.fronts import solve_front

__all__ = ["RATIOS", "Row", "outcome_of", "ratio_budget", "task_rows", "timed"]

RATIOS = (0.3, 0.5, 0.7)
_GAP = 1e-6
_MEMORY_MB = 250.0
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
    one; ``limit_s`` is 0 where nothing is claimed, ``peak_mb`` where no process of its own was measured.
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


def timed(run: Callable[[], Solution]) -> tuple[Solution, float]:
    """An answer and the CPU seconds that it took."""
    started = time.process_time()
    answer = run()
    return answer, time.process_time() - started


def task_rows(given: argparse.Namespace) -> Iterator[Row]:
    """Fronts, least latencies and several budgets of the instances asked for."""
    small = [n for n in given.models if n in ("resnet50 by 32", "mobilenet_v2 by 8")]
    for name in small if given.quick else given.models:
        note(f"{name}, fronts and smallest latencies …")
        problem = INSTANCES[name]("gpu", 0)
        whole = problem.evaluate(problem.widest())
        once = [timed(partial(solve, problem, ratio_budget(problem, r)))[1] for r in RATIOS]
        budgets = [ratio_budget(problem, r) for r in np.linspace(0.15, 0.95, _FRONT)]
        started = time.process_time()
        answers = [a for a in solve_front(problem, budgets) if a.choice is not None]
        spent = time.process_time() - started
        yield _task_row("20 budgets", name, answers, [spent], 10 * statistics.median(once), given)
        alone = [timed(partial(solve, problem, budget_ns)) for budget_ns in budgets]
        reached = [a for a, _ in alone if a.choice is not None]
        yield _task_row("same, one by one", name, reached, [sum(s for _, s in alone)], 0.0, given)
        found = [timed(partial(cheapest, problem, s * whole[0])) for s in _SHARES]
        yield _task_row("least latency", name, [a for a, _ in found], [s for _, s in found], 0.5, given)
    for name in small if given.quick else [*small, *(n for n in given.models if n == "resnet50 by 8")]:
        for devices in _BUDGETS:
            note(f"{name}, {' + '.join(devices)} …")
            answers, seconds = [], []
            for tight in (0.97, 0.9):
                problem, budget_ns = _tight(name, devices, tight)
                limits = SolveLimits(seconds=3.0, gap=1e-4)
                answer, spent = timed(partial(solve, problem, budget_ns, limits=limits))
                answers.append(answer)
                seconds.append(spent)
            gap = max(a.gap for a in answers)
            proven = all(a.gap <= 1e-4 or a.status == "feasible" for a in answers)
            verdict: Verdict = "pass" if given.quick or proven else "fail"
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
