"""Planning without measuring: table files, width rules, other limits, `solve`, `pareto`, explanations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run, is_refused
from zoo import CNNS, analyse, random_plan, zoo_path, zoo_structure

from onnx_mdp.analysis import shadow
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.cli.plan_commands import parse_targets
from onnx_mdp.errors import MissingBackendError, UsageError
from onnx_mdp.importance.scoring import default_criterion, score
from onnx_mdp.model_io import load_model
from onnx_mdp.plan import load_plan
from onnx_mdp.planning.explain import explain
from onnx_mdp.planning.formulation import Caps, Formulation, formulate, to_ns
from onnx_mdp.planning.resources import Product, mac_products, memory_moments, parameter_products
from onnx_mdp.planning.solution_plan import plan_from_choice
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.reports.documents import plan_totals
from onnx_mdp.solvers import SolveLimits, cheapest, solve
from onnx_mdp.tables.calibrating import Calibration
from onnx_mdp.tables.cost_terms import cost_terms, width
from onnx_mdp.tables.granularity import unit_choices
from onnx_mdp.tables.latency import LatencyTable, predict_ms, table_key
from onnx_mdp.tables.table_file import load_table, table_json
from onnx_mdp.tables.variants import Variant, full_variant, variant_of_plan

DEMO = Path(__file__).resolve().parents[1] / "onnx_mdp" / "demo_model" / "shapes_resnet.onnx"
EXACT = SolveLimits(gap=0.0)


def made_up_table(structure: Structure, device: str = "made up") -> LatencyTable:
    """Every layer takes 10 µs and a time in proportion to what it reads and makes."""
    terms = cost_terms(structure)
    draft = LatencyTable(
        context={"device": device, "provider": "none", "threads": 1},
        key=table_key(structure),
        granularity=8,
        terms=terms,
        coefficients={term.key: (0.01, 0.002, 0.003, 0.004, 0.0, 0.0) for term in terms},
        calibration=Calibration(1.0, 0.05, 0.0, 0.01, 0.02, 0.0),
        choices={i: unit_choices(structure.dimensions[i], 8, 16) for i in structure.prunable},
        measured=0,
        seconds=0.0,
    )
    base = predict_ms(draft, structure, full_variant(structure))
    calibration = Calibration(1.0, 0.05, base, 0.01, 0.02, 0.0)
    return LatencyTable(**{n: getattr(draft, n) for n in draft.__slots__} | {"calibration": calibration})


@pytest.fixture(scope="module")
def structure() -> Structure:
    return analyse(DEMO)[1]


@pytest.fixture(scope="module")
def table(structure: Structure) -> LatencyTable:
    return made_up_table(structure)


def problem_of(structure: Structure, table: LatencyTable, *rest: Any) -> Formulation:
    return formulate(structure, score(structure, "magnitude"), table, *rest)


@pytest.fixture
def demo(run: Run, structure: Structure, table: LatencyTable) -> Run:
    """Run a command beside the demo network and its table."""
    Path("net.onnx").write_bytes(DEMO.read_bytes())
    Path("table.json").write_text(table_json(structure, table))
    return run


# --- table files ---------------------------------------------------------------------------------------


def test_a_table_file_is_the_table(structure: Structure, table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(table_json(structure, table))
    assert load_table(path, structure) == table


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"key": "0"}, "another model"),
        ({"schema_version": 9}, "newer onnx-mdp"),
        ({"granularity": 0}, "not a latency table"),
        ({"schema_version": 1}, "older onnx-mdp"),
        ({"coefficients": {"k": [0, 0, 0, 0]}}, "not a latency table"),
        ({"coefficients": {"k": [0, 0, 0, 0, 0, -1.0]}}, "greater than or equal to 0"),
        ({"extra": 1}, "not a latency table"),
        ({"choices": {}}, "does not offer widths"),
    ],
)
def test_a_wrong_table_file_is_refused(
    demo: Run, change: dict[str, Any], fragment: str, structure: Structure
) -> None:
    path = Path("table.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    is_refused(demo("solve", "net.onnx", "table.json", "--target-ratio", 0.5), 2, fragment)


@pytest.mark.parametrize("text", ["", "{", '{"coefficients": {"k": [NaN, 0, 0, 0, 0, 0]}}', "\x00"])
def test_a_broken_table_file_is_refused(demo: Run, text: str) -> None:
    Path("table.json").write_text(text)
    is_refused(demo("pareto", "net.onnx", "table.json"), 2, "table.json")


# --- width rules ---------------------------------------------------------------------------------------


def widths_of(formulation: Formulation) -> dict[str, tuple[int, ...]]:
    return {v.name: v.widths for v in formulation.problem.variables}


def test_rules_leave_only_what_they_allow(structure: Structure, table: LatencyTable) -> None:
    block = structure.blocks[0].name
    inside = next(d.name for d in structure.dimensions if d.block == block)
    other = next(d for i, d in enumerate(structure.dimensions) if i in structure.prunable and not d.block)
    free = widths_of(problem_of(structure, table))
    assert free[inside][0] == 0
    excluded = widths_of(problem_of(structure, table, WidthRules(exclude=(block, other.name))))
    assert excluded[other.name] == (len(other.units),)
    assert excluded[inside] == free[inside][1:]
    fixed = widths_of(problem_of(structure, table, WidthRules(fixed=((other.name, other.channels * 5),))))
    assert fixed[other.name] == (5,)
    least = widths_of(problem_of(structure, table, WidthRules(least=(("*", 0.5),))))
    for dimension in (structure.dimensions[i] for i in structure.prunable):
        present = [w for w in least[dimension.name] if w]
        assert min(present) >= len(dimension.units) / 2
    multiple = widths_of(problem_of(structure, table, WidthRules(multiple=16)))
    for dimension in (structure.dimensions[i] for i in structure.prunable):
        rest = [w * dimension.channels % 16 for w in multiple[dimension.name][:-1]]
        assert not any(rest)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--exclude", "nothing*"), "--exclude 'nothing*' matches no"),
        (("--min-width", "nothing*=8"), "--min-width 'nothing*' matches no"),
        (("--width", "nothing*=8"), "--width 'nothing*' matches no"),
        (("--width", "*=100000"), "cannot have 100000 channels"),
        (("--min-width", "*=100000"), "cannot keep 100000 channels"),
        (("--min-width", "*"), "not NAME=NUMBER"),
        (("--width", "*=many"), "not NAME=NUMBER"),
        (("--also", "table.json=-1"), "not NAME=NUMBER"),
        (("--also", "other.json=1"), "other.json cannot be read"),
        (("--solver", "cplex"), "unknown solver"),
        (("--criterion", "drift"), "needs calibration inputs"),
        (("--tie-blocks",), "no attention block"),
        (("--rescale-attention",), "no product of query and key"),
    ],
)
def test_wrong_planning_options_are_refused(demo: Run, options: tuple[str, ...], fragment: str) -> None:
    is_refused(demo("solve", "net.onnx", "table.json", "--target-ratio", 0.5, *options), 2, fragment)
    assert not Path("plan.json").exists()


# --- parameters, operations, memory --------------------------------------------------------------------


def amount(products: tuple[Product, ...], variant: Variant, structure: Structure) -> float:
    """A sum of products, evaluated without any table."""
    gone = {
        index
        for block in structure.blocks
        if block.name in variant.removed_blocks
        for index in (*block.operations, block.joint)
    }
    return sum(
        p.unit * float(np.prod([width(e, variant.kept) for e in p.extents]))
        for p in products
        if p.operation not in gone
    )


@pytest.mark.zoo
@pytest.mark.parametrize("name", CNNS)
def test_products_count_what_a_plan_leaves(name: str) -> None:
    _, zoo = zoo_structure(name)
    rng = np.random.default_rng(1)
    for _ in range(2):
        plan = random_plan(zoo, rng)
        variant, totals = variant_of_plan(zoo, plan), plan_totals(zoo, plan)
        assert amount(parameter_products(zoo), variant, zoo) == totals.params[1]
        assert amount(mac_products(zoo), variant, zoo) == totals.macs[1]


@pytest.mark.parametrize("kind", ["params", "macs", "memory"])
def test_a_cap_binds_and_is_kept(structure: Structure, table: LatencyTable, kind: str) -> None:
    free = problem_of(structure, table)
    budget_ns = to_ns(0.7 * table.base_ms)
    whole = solve(free.problem, budget_ns, limits=EXACT)

    def used(choice: tuple[int, ...]) -> float:
        plan = plan_from_choice(structure, free, score(structure, "magnitude"), choice)
        variant, totals = variant_of_plan(structure, plan), plan_totals(structure, plan)
        if kind == "memory":
            return max(amount(moment, variant, structure) for moment in memory_moments(structure))
        return totals.params[1] if kind == "params" else totals.macs[1]

    assert whole.choice is not None
    limit = 0.8 * used(whole.choice)
    capped = problem_of(structure, table, WidthRules(), Caps(**{kind: limit}))
    answer = solve(capped.problem, budget_ns, limits=EXACT)
    assert answer.choice is not None
    assert used(answer.choice) == pytest.approx(capped.problem.budgets[0].amount(answer.choice))
    assert used(answer.choice) <= limit * (1 + 1e-9)
    assert answer.value < whole.value
    milp = solve(capped.problem, budget_ns, "highs", SolveLimits(gap=1e-9))
    assert milp.value == pytest.approx(answer.value, rel=1e-6)


def test_a_second_table_is_kept_too(structure: Structure, table: LatencyTable) -> None:
    other = made_up_table(structure, "another device")
    both = problem_of(structure, table, WidthRules(), Caps(latencies=((other, 0.5 * other.base_ms),)))
    answer = solve(both.problem, to_ns(0.9 * table.base_ms), limits=EXACT)
    alone = solve(problem_of(structure, table).problem, to_ns(0.5 * table.base_ms), limits=EXACT)
    assert answer.value == pytest.approx(alone.value, rel=1e-9)
    assert answer.cost_ns * 1e-6 <= 0.5 * other.base_ms


# --- solve and pareto ----------------------------------------------------------------------------------


def test_solve_writes_a_plan_that_apply_replays(demo: Run) -> None:
    outcome = demo(
        "solve", "net.onnx", "table.json", "--target-ratio", 0.6, "-o", "plan.json", "--json", "--quiet"
    )
    assert outcome.code == 0
    document = outcome.document
    assert document["status"] == "optimal"
    assert document["predicted_ms"] <= 0.6 * document["base_ms"]
    assert document["gap"] <= 1e-6
    assert document["explanation"].keys() == {"price_per_ms", "next_cuts", "limits", "removed_blocks"}
    assert load_plan(Path("plan.json")).predicted_ms == document["predicted_ms"]
    replayed = demo("apply", "net.onnx", "plan.json", "-o", "slim.onnx", "--json")
    assert replayed.code == 0
    assert replayed.document["verified"] is True
    assert len(Path("slim.onnx").read_bytes()) < len(Path("net.onnx").read_bytes())


def test_solve_for_importance_is_the_fastest_plan(
    demo: Run, structure: Structure, table: LatencyTable
) -> None:
    outcome = demo("solve", "net.onnx", "table.json", "--min-importance", 0.9, "--json", "--quiet")
    assert outcome.code == 0
    assert outcome.document["importance_share"] >= 0.9
    fastest = cheapest(problem_of(structure, table).problem, 0.9, "highs", SolveLimits(gap=1e-9))
    assert outcome.document["predicted_ms"] == pytest.approx(fastest.cost_ns * 1e-6, rel=1e-6)


@pytest.mark.parametrize(
    "goal", [(), ("--target-ms", 0), ("--target-ms", 1, "--target-ratio", 0.5), ("--target-ratio", "nan")]
)
def test_solve_takes_one_goal(demo: Run, goal: tuple[object, ...]) -> None:
    is_refused(demo("solve", "net.onnx", "table.json", *goal), 2, "exactly one of")


def test_solve_says_what_is_out_of_reach(demo: Run) -> None:
    for options, fragment in (
        (("--target-ratio", 1e-6), "smallest reachable"),
        (("--target-ratio", 0.5, "--max-params", 1), "no plan meets the other limits"),
    ):
        outcome = demo("solve", "net.onnx", "table.json", *options, "-o", "plan.json")
        assert outcome.code == 4
        assert fragment in outcome.out
        assert not Path("plan.json").exists()


def test_solve_prints_why(demo: Run) -> None:
    outcome = demo("solve", "net.onnx", "table.json", "--target-ratio", 0.3)
    assert outcome.code == 0
    for fragment in ("One more millisecond buys", "cheapest next cuts", "why blocks go", "SOLVED"):
        assert fragment in outcome.out


def test_pareto_is_monotone_and_drawn(demo: Run) -> None:
    arguments = ("pareto", "net.onnx", "table.json", "--targets", "0.05:0.95:10")
    outcome = demo(*arguments, "-o", "front.svg", "--json", "--quiet")
    assert outcome.code == 0
    points = outcome.document["points"]
    shares = [p["importance_share"] for p in points if p["importance_share"] is not None]
    assert len(points) == 10
    assert shares == sorted(shares)
    assert points[0]["status"] == "infeasible"
    assert points[0]["fastest_ms"] > points[0]["target_ms"]
    assert all(p["gap"] <= 1e-6 for p in points if p["gap"] is not None)
    assert "The best plan at every latency" in Path("front.svg").read_text()
    is_refused(demo(*arguments, "-o", "front.svg"), 2, "front.svg exists", "--overwrite")
    table = demo("pareto", "net.onnx", "table.json", "--targets", "0.9,0.5")
    assert "2 of 2 targets can be met" in table.out


@pytest.mark.parametrize("text", ["", "a", "0.5:0.9", "0.5:0.9:1", "0.1:0.9:x", "0,1", "-1", "inf"])
def test_wrong_targets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--targets"):
        parse_targets(text)


# Those with dynamic sizes inside may need a run; these do not.
INFERABLE = ("imagenet/mobilenet_v2_tv.onnx", "imagenet/squeezenet1.1.onnx")


@pytest.mark.zoo
@pytest.mark.parametrize("name", CNNS)
def test_inferred_shapes_give_the_same_structure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ONNX Runtime: the same dimensions under the same table key, or a clear refusal."""
    _, observed = zoo_structure(name)
    monkeypatch.setattr(shadow, "has_onnxruntime", lambda: False)
    try:
        _, inferred = analyse(zoo_path(name), CNNS[name])
    except MissingBackendError:
        assert name not in INFERABLE
        return
    assert table_key(inferred) == table_key(observed)
    assert inferred.dimensions == observed.dimensions
    assert inferred.blocks == observed.blocks


def test_planning_does_not_need_onnx_runtime(demo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert demo("solve", "net.onnx", "table.json", "--target-ratio", 0.5, "--quiet").code == 0
    assert demo("pareto", "net.onnx", "table.json", "--targets", "0.5,0.7", "--quiet").code == 0


# --- explanations --------------------------------------------------------------------------------------


def test_an_explanation_is_what_solving_again_says(structure: Structure, table: LatencyTable) -> None:
    caps = Caps(params=0.5 * load_params())
    formulation = problem_of(structure, table, WidthRules(), caps)
    budget_ns = to_ns(0.4 * table.base_ms)
    solution = solve(formulation.problem, budget_ns, limits=EXACT)
    why = explain(formulation, budget_ns, solution, limits=EXACT)
    prices = [cut.importance / cut.saved_ms for cut in why.next_cuts]
    assert prices == sorted(prices)
    assert 1 <= len(prices) <= 5
    assert why.price > 0
    assert [use.name for use in why.limits] == ["latency", "parameters"]
    assert why.limits[0].gain > 0
    without = problem_of(structure, table)
    gain = solve(without.problem, budget_ns, limits=EXACT).value - solution.value
    assert why.limits[1].gain == pytest.approx(gain, abs=1e-9)
    for reason in why.blocks:
        kept = problem_of(structure, table, WidthRules(exclude=(reason.name,)), caps)
        best = solve(kept.problem, budget_ns, limits=EXACT)
        if best.choice is None:
            assert reason.loss is None
        else:
            assert reason.loss == pytest.approx(solution.value - best.value, abs=1e-9)


def load_params() -> int:
    return sum(v.const_value.size for v in load_model(DEMO).graph.initializers.values() if v.const_value)


def test_the_criterion_follows_the_data_and_the_repair() -> None:
    assert default_criterion(0) == default_criterion(0, ("lstsq",)) == "magnitude"
    assert default_criterion(1) == default_criterion(64, ("bn",)) == "drift"
    assert default_criterion(3, ("lstsq",)) == "drift", "a refit holds inputs out"
    assert default_criterion(4, ("lstsq",)) == default_criterion(64, ("bn", "lstsq")) == "refit"
