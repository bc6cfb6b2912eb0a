"""The commands that plan without measuring: a table in, a plan or a front of plans out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.cli.options import (
    Options,
    PlanOptions,
    calibration,
    command_line,
    load_structure,
    width_rules,
)
from onnx_mdp.errors import UnsupportedModelError, UsageError
from onnx_mdp.files import check_output, write_text
from onnx_mdp.importance.scoring import Importance, score
from onnx_mdp.plan import plan_json
from onnx_mdp.planning.explain import explain
from onnx_mdp.planning.formulation import to_ns
from onnx_mdp.planning.programs import Programs
from onnx_mdp.planning.solution_plan import plan_from_solution
from onnx_mdp.reports.plan_report import (
    explanation_document,
    explanation_table,
    front_document,
    front_points,
    front_svg,
    front_table,
)
from onnx_mdp.reports.report import plan_table
from onnx_mdp.solvers import cheapest
from onnx_mdp.tables.latency import LatencyTable
from onnx_mdp.tables.table_file import load_table

__all__ = ["FrontOptions", "SolveOptions", "parse_targets", "run_pareto", "run_solve"]

_MOST_TARGETS = 1000


@dataclass(frozen=True, slots=True)
class SolveOptions:
    """What `solve` takes besides: one goal, and where to write the plan."""

    target_ms: float | None = None
    target_ratio: float | None = None
    min_importance: float | None = None
    output: Path | None = None
    overwrite: bool = False
    plan: PlanOptions = field(default_factory=PlanOptions)


@dataclass(frozen=True, slots=True)
class FrontOptions:
    """What `pareto` takes besides: the targets, ratios unless ``milliseconds``, and where to draw them."""

    targets: str = "0.3:0.9:13"
    milliseconds: bool = False
    output: Path | None = None
    overwrite: bool = False
    plan: PlanOptions = field(default_factory=PlanOptions)


@dataclass(frozen=True, slots=True)
class _Case:
    """A model, its table, and the problems that both make."""

    structure: Structure
    table: LatencyTable
    importance: Importance
    programs: Programs


def run_solve(path: Path, table_path: Path, options: Options, wanted: SolveOptions) -> int:
    """Choose all widths and blocks for one goal; print the plan, why it is so, and write it."""
    goals = [g for g in (wanted.target_ms, wanted.target_ratio, wanted.min_importance) if g is not None]
    if len(goals) != 1 or not 0 < goals[0] < math.inf:
        raise UsageError(
            "give exactly one of --target-ms, --target-ratio and --min-importance, larger than 0"
        )
    if wanted.output is not None:
        check_output(wanted.output, overwrite=wanted.overwrite)
    case = _case(path, table_path, options, wanted.plan)
    solver, limits, least = wanted.plan.solver, wanted.plan.limits, wanted.min_importance
    if least is not None:
        answer = case.programs.answer(
            lambda p: cheapest(p, least, solver, limits), lambda s: -s.cost_ns, limits.seconds
        )
        budget_ns = answer.solution.cost_ns
    else:
        target_ms = wanted.target_ms or (wanted.target_ratio or 0.0) * case.table.base_ms
        budget_ns = to_ns(target_ms)
        answer = case.programs.solve(budget_ns, solver, limits)
    solution = answer.solution
    if solution.note is not None:
        options.screen.warn(solution.note)
    if solution.choice is None:
        fastest = None if solution.fastest_ns is None else solution.fastest_ns * 1e-6
        document = {"schema_version": 1, "status": "infeasible", "fastest_ms": fastest}
        why = "no plan meets the other limits" if fastest is None else f"smallest reachable {fastest:.3f} ms"
        options.screen.result(f"INFEASIBLE  {why}; nothing was written", document)
        return 4
    plan = plan_from_solution(
        case.structure,
        answer.formulation,
        case.importance,
        case.table,
        solution,
        rescale_attention=wanted.plan.rescales(case.structure),
        seed=options.seed,
        command=command_line(),
    )
    why_so = explain(answer.formulation, budget_ns, solution)
    if wanted.output is not None:
        write_text(plan_json(plan), wanted.output, overwrite=wanted.overwrite)
    if not options.screen.as_json:
        options.screen.table(plan_table(case.structure, plan))
        options.screen.table(explanation_table(why_so))
    where = "" if wanted.output is None else f" → {wanted.output}"
    line = (
        f"SOLVED  predicted {solution.cost_ns * 1e-6:.3f} ms of {case.table.base_ms:.3f} · "
        f"importance {solution.value:.2%} · {solution.status}, gap {solution.gap:.1e} · "
        f"{solution.solver}, {solution.seconds:.2f} s{where}"
    )
    document = {
        "schema_version": 1,
        "status": solution.status,
        "predicted_ms": solution.cost_ns * 1e-6,
        "base_ms": case.table.base_ms,
        "importance_share": solution.value,
        "bound": solution.bound,
        "gap": solution.gap,
        "solver": solution.solver,
        "seconds": solution.seconds,
        "removed_blocks": list(plan.removed_blocks),
        "explanation": explanation_document(why_so),
        "plan": None if wanted.output is None else str(wanted.output),
    }
    options.screen.result(line, document)
    return 0


def run_pareto(path: Path, table_path: Path, options: Options, wanted: FrontOptions) -> int:
    """Solve for several latencies in one call; print the front, and draw it."""
    targets, output = parse_targets(wanted.targets), wanted.output
    if output is not None:
        check_output(output, overwrite=wanted.overwrite)
    case = _case(path, table_path, options, wanted.plan)
    base_ms = case.table.base_ms
    targets_ms = [target if wanted.milliseconds else target * base_ms for target in targets]
    budgets_ns = [to_ns(ms) for ms in targets_ms]
    front = case.programs.solve_front(budgets_ns, wanted.plan.solver, wanted.plan.limits)
    answers = [answer.solution for answer in front]
    if output is not None:
        write_text(front_svg(base_ms, front_points(answers)), output, overwrite=wanted.overwrite)
    if not options.screen.as_json:
        options.screen.table(front_table(targets_ms, base_ms, answers))
    found = sum(answer.choice is not None for answer in answers)
    seconds = sum(answer.seconds for answer in answers)
    where = "" if output is None else f" → {output}"
    options.screen.result(
        f"{found} of {len(answers)} targets can be met · solved in {seconds:.2f} s{where}",
        {
            "schema_version": 1,
            "base_ms": base_ms,
            "points": front_document(targets_ms, answers),
            "seconds": seconds,
            "output": None if output is None else str(output),
        },
    )
    return 0 if found else 4


def parse_targets(text: str) -> tuple[float, ...]:
    """Read ``0.8,0.6,0.4`` or ``0.3:0.9:20`` (from, to, how many).

    >>> parse_targets("0.8,0.6"), parse_targets("1:3:3")
    ((0.8, 0.6), (1.0, 2.0, 3.0))

    Raises:
        UsageError: neither of the two, or a number that is not larger than 0.
    """
    try:
        if ":" in text:
            first, last, count = text.split(":")
            if not 2 <= int(count) <= _MOST_TARGETS:
                raise UsageError(f"--targets takes 2 to {_MOST_TARGETS} values")
            numbers = tuple(np.linspace(float(first), float(last), int(count)).tolist())
        else:
            numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--targets {text!r} is neither 0.8,0.6,0.4 nor 0.3:0.9:20") from None
    if not all(0 < number < math.inf for number in numbers):
        raise UsageError("--targets must be numbers larger than 0")
    return numbers


def _case(path: Path, table_path: Path, options: Options, plan: PlanOptions) -> _Case:
    plan.check()
    model, structure = load_structure(path, options)
    if not structure.prunable and not structure.blocks:
        raise UnsupportedModelError("the model has no prunable dimension; `onnx-mdp analyze` says why")
    table = load_table(table_path, structure)
    rules = width_rules(model, structure, plan, options)
    data = calibration(structure, model, plan, options)
    with options.screen.progress() as progress:
        criterion = plan.scorer(data, options.seed)
        importance = score(structure, criterion, data.feeds if data else (), progress)
    programs = Programs(structure, importance, table, rules, plan.caps(structure))
    return _Case(structure, table, importance, programs)
