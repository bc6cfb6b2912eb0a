"""What each part of the method is worth: plans and tables with one of them taken away.

Claim: at every ratio the whole method keeps at least as much importance as without block removal, with widths
in multiples of 8, 16 or 32, by the greedy solver, or by a latency that is linear in output channels; and a
table of 8 profiled variants, as usual, has a median error at most half a percent above that of one of 32.

All plans are made by one table and one importance (``drift``), to the same predicted latency, and measured
together, beside the unpruned model. The plan by linear latency asks
for what that model believes: where it is measured slower than asked, what it keeps is not comparable, and the
claim is silent. Tables of fewer and more variants are built from nothing and tried on the same measured
configurations.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.configurations import drawn_configurations, measured_configurations
from benchmarks.contenders import Contest
from benchmarks.harness import (
    Verdict,
    arguments,
    combined,
    judge,
    note,
    print_table,
    publish,
    run_main,
    side_by_side,
)
from benchmarks.measuring import measured_ratios
from benchmarks.rival_predictions import table_errors
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.importance.scoring import Importance
from onnx_mdp.plan import PruningPlan
from onnx_mdp.planning.formulation import to_ns
from onnx_mdp.planning.programs import Programs
from onnx_mdp.planning.solution_plan import plan_from_choice
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.tables.latency import VARIANTS, LatencyTable, build_table, predict_ms
from onnx_mdp.tables.lut_store import open_store
from onnx_mdp.tables.variants import full_variant

__all__ = ["Row", "main", "verdicts"]

_WHOLE, _LINEAR = "everything", "linear latency"
_VARIANTS = (4, 8, 16, 32)
_TRIED = 24  # configurations
_LEAST = 1e-6
_AS_WELL = 0.005


@dataclass(frozen=True, slots=True)
class Row:
    """One ablation: importance kept and measured ratio of its plan, or the errors of its table."""

    model: str
    what: str
    ratio: float | None = None
    importance: float | None = None
    measured: float | None = None
    median_error: float | None = None
    worst_error: float | None = None
    noise: float = 0.0
    verdict: Verdict = "pass"


def _plans(
    structure: Structure, importance: Importance, table: LatencyTable, ratio: float
) -> Iterator[tuple[str, PruningPlan | None, float]]:
    """What is taken away, the plan, and the importance that it keeps; no plan where none is so fast."""
    every = tuple(block.name for block in structure.blocks)
    cases = {
        _WHOLE: (WidthRules(), "exact"),
        **({"no blocks": (WidthRules(exclude=every), "exact")} if every else {}),
        **{f"multiples of {step}": (WidthRules(multiple=step), "exact") for step in (8, 16, 32)},
        "greedy solver": (WidthRules(), "greedy"),
        _LINEAR: (WidthRules(), "linear"),
    }
    budget = to_ns(ratio * predict_ms(table, structure, full_variant(structure)))
    for what, (rules, solver) in cases.items():
        answer = Programs(structure, importance, table, rules).solve(budget, solver)
        found = answer.solution
        plan, always = None, 0.0
        if found.choice is not None:
            plan = plan_from_choice(structure, answer.formulation, importance, found.choice)
        if rules.exclude:  # a block that cannot go is worth the same in every plan: the problem leaves it out
            always = sum(importance.blocks.values()) / importance.total
        yield what, plan, found.value + always


def _planned(contest: Contest, table: LatencyTable, ratio: float) -> Iterator[Row]:
    note(f"{contest.name}: plans at {ratio:g}")
    made = list(_plans(contest.structure, contest.importance, table, ratio))
    plans = [plan for _, plan, _ in made if plan is not None]
    ratios = measured_ratios(contest.base, contest.structure, plans, contest.runtime, seed=contest.seed)
    measured = iter(ratios.values)
    for what, plan, value in made:
        numbers = (None, None) if plan is None else (value, next(measured))
        yield Row(contest.name, what, ratio, *numbers, noise=ratios.noise)


def _tables(contest: Contest, counts: Sequence[int]) -> Iterator[Row]:
    """Tables of several numbers of profiled variants, on the same configurations."""
    structure, tables = contest.structure, {}
    for count in counts:
        note(f"{contest.name}: table of {count} variants")
        with (
            tempfile.TemporaryDirectory(prefix="onnx-mdp-") as folder,
            open_store(Path(folder) / "store.sqlite") as store,
        ):
            tables[count] = build_table(structure, contest.runtime, store, variants=count, seed=contest.seed)
    some = next(iter(tables.values()))
    variants = drawn_configurations(structure, some.choices, _TRIED, contest.seed)
    ratios = measured_configurations(structure, variants, contest.runtime, contest.seed)
    for count, table in tables.items():
        median, worst = table_errors(structure, table, variants, ratios.values)
        what = _of_variants(count)
        yield Row(contest.name, what, median_error=median, worst_error=worst, noise=ratios.noise)


def verdicts(rows: Sequence[Row]) -> Iterator[Row]:
    """The claim, in the rows that it is about: of plans the whole one's, of tables the usual one."""
    kept = {(row.ratio, row.what): row for row in rows if row.importance is not None}
    errors = {row.what: row.median_error for row in rows}
    for row in rows:
        if row.what == _WHOLE and row.importance is not None:
            others = [
                other.importance or 0.0
                for (ratio, what), other in kept.items()
                if ratio == row.ratio and not (what == _LINEAR and _slower(other))
            ]
            yield replace(row, verdict=judge(row.importance >= max(others) - _LEAST, row.noise))
        elif row.what == _of_variants(VARIANTS) and (most := _of_variants(max(_VARIANTS))) in errors:
            holds = row.median_error <= errors[most] + _AS_WELL
            yield replace(row, verdict=judge(holds, row.noise))
        else:
            yield row


def _of_variants(count: int) -> str:
    return f"{count} variants"


def _slower(row: Row) -> bool:
    return row.measured is None or row.ratio is None or row.measured > row.ratio * 1.02


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ("mobilenet_v2", "resnet56", "deit_tiny_torchscript"))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.6])
    parser.add_argument("--variants", nargs="*", type=int, default=list(_VARIANTS), help="of tables")
    given = parser.parse_args(argv)
    rows: list[Row] = []
    for name in given.models:
        rows += verdicts(list(_rows(name, given)))
    columns: Mapping[str, Callable[[Row], str]] = {
        "model": lambda r: r.model,
        "of latency": lambda r: _shown(r.ratio, "g"),
        "with": lambda r: r.what,
        "importance": lambda r: "" if r.ratio is None else _cell(r),
        "measured": lambda r: _shown(r.measured, ".3f"),
        "error": lambda r: "" if r.median_error is None else _cell(r),
        "F": lambda r: f"{r.noise:.1%}",
        "verdict": lambda r: r.verdict,
    }
    table = print_table("one part taken away", columns, rows)
    keys = {name: columns[name] for name in ("model", "of latency")}
    overview = side_by_side("importance, or error", keys, columns["with"], _cell, rows)
    whole = [row.verdict for row in rows if row.what == _WHOLE]
    summary = f"the whole method keeps the most in {whole.count('pass')} of {len(whole)} cells"
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary, overview)


def _rows(name: str, given: argparse.Namespace) -> Iterator[Row]:
    contest = Contest(name, given.threads, given.seed)
    for ratio in given.ratios:
        yield from _planned(contest, contest.table, ratio)
    if given.variants:
        yield from _tables(contest, given.variants)


def _cell(row: Row) -> str:
    if row.ratio is None:
        return f"{row.median_error:.1%} / {row.worst_error:.1%}"
    return "out of reach" if row.importance is None else f"{row.importance:.4f}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    run_main(main)
