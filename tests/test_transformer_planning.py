"""Planning of transformers: extents, resources, costs and values are products of heads and widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from zoo import analyse, prune_checked, random_plan

from benchmarks.granularity import only
from onnx_mdp import pipeline
from onnx_mdp.analysis.binding import bind_shapes
from onnx_mdp.analysis.shadow import prepare
from onnx_mdp.analysis.structure import Structure, extent, macs
from onnx_mdp.importance.scoring import Importance, ranked_rows, ranking, score
from onnx_mdp.model_io import model_bytes, parameter_count
from onnx_mdp.pipeline import prune
from onnx_mdp.plan import kept_units, load_plan, plan_json
from onnx_mdp.planning import closed_loop
from onnx_mdp.planning.closed_loop import Request
from onnx_mdp.planning.formulation import Formulation, formulate
from onnx_mdp.planning.problem import Choice
from onnx_mdp.planning.resources import mac_products, parameter_products
from onnx_mdp.planning.solution_plan import plan_from_choice, variant_from_choice
from onnx_mdp.planning.width_rules import WidthRules, kept_blocks, tied_blocks
from onnx_mdp.reports.documents import analyze_document, plan_totals
from onnx_mdp.running.timing import Timing
from onnx_mdp.solvers import SolveLimits, solve
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.calibrating import Calibration
from onnx_mdp.tables.cost_terms import HEADS, SUMMED_HEADS, cost_terms, width
from onnx_mdp.tables.granularity import unit_choices
from onnx_mdp.tables.latency import LatencyTable, predict_ms, table_key
from onnx_mdp.tables.lut_store import open_store
from onnx_mdp.tables.variants import full_variant, plan_of_variant, random_variant, variant_of_plan

NAMES = ("deit_micro", "swin_micro", "pvt_micro", "detr_micro")
Exported = Callable[..., Path]


@pytest.fixture(params=NAMES)
def structure(request: pytest.FixtureRequest, exported: Exported) -> Structure:
    return analyse(exported(request.param))[1]


@pytest.fixture
def deit(exported: Exported) -> Structure:
    return analyse(exported("deit_micro"))[1]


def feeds(count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"image": rng.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(count)]


def made_up_table(structure: Structure, seed: int = 0) -> LatencyTable:
    """Every key has random coefficients; each dimension may take every width."""
    rng = np.random.default_rng(seed)
    terms = cost_terms(structure)
    keys = dict.fromkeys(term.key for term in terms)
    table = LatencyTable(
        context={"device": "made up", "provider": "none", "threads": 1},
        key=table_key(structure),
        granularity=4,
        terms=terms,
        coefficients={key: tuple(rng.uniform(0.001, 0.01, 6).tolist()) for key in keys},
        calibration=Calibration(1.0, 0.05, 1.0, 0.01, 0.02, 0.0),
        choices={i: unit_choices(structure.dimensions[i], 4, 4) for i in structure.prunable},
        measured=0,
        seconds=0.0,
    )
    base_ms = predict_ms(table, structure, full_variant(structure))
    return replace(table, calibration=replace(table.calibration, base_ms=base_ms))


def random_choice(formulation: Formulation, rng: np.random.Generator) -> Choice:
    """Options at random; the members of a block are absent together."""
    problem = formulation.problem
    inside = {m: b for b, block in enumerate(problem.blocks) for m in block.members}
    gone = {b for b in range(len(problem.blocks)) if rng.random() < 0.3}
    choice = []
    for place, variable in enumerate(problem.variables):
        options = len(variable.widths)
        if place not in inside:
            choice.append(int(rng.integers(options)))
        else:
            choice.append(0 if inside[place] in gone else int(rng.integers(1, options)))
    for total in problem.sums:
        reached = total.offset + sum(c * problem.variables[p].widths[choice[p]] for p, c in total.parts)
        choice[total.total] = problem.variables[total.total].widths.index(reached)
    return tuple(choice)


def test_extents_are_the_shapes_of_the_pruned_model(structure: Structure) -> None:
    for seed in range(3):
        plan = random_plan(structure, np.random.default_rng(seed), blocks=False, least=0.2)
        kept = variant_of_plan(structure, plan).kept
        model = rewrite(structure, plan)
        again = prepare(model, bind_shapes(model, {}))
        for name, shape in structure.shadow.shapes.items():
            if name in again.shapes and name in structure.graph.tensors:
                extents = [extent(structure, name, axis) for axis in range(len(shape))]
                assert tuple(width(e, kept) for e in extents) == again.shapes[name]


def test_products_count_what_a_plan_leaves(structure: Structure) -> None:
    for seed in range(3):
        plan = random_plan(structure, np.random.default_rng(seed), blocks=False, least=0.2)
        variant, totals = variant_of_plan(structure, plan), plan_totals(structure, plan)
        model = rewrite(structure, plan)
        assert totals.params[1] == parameter_count(model)
        assert totals.macs[1] == macs(prepare(model, structure.shadow.inputs))
        for products, total in (
            (parameter_products(structure), totals.params[1]),
            (mac_products(structure), totals.macs[1]),
        ):
            parts = [p.unit * np.prod([width(e, variant.kept) for e in p.extents]) for p in products]
            assert sum(parts) == total


def test_the_cost_of_a_choice_is_the_prediction_of_its_variant(structure: Structure) -> None:
    table = made_up_table(structure)
    importance = score(structure, "magnitude")
    formulation = formulate(structure, importance, table)
    rng = np.random.default_rng(0)
    for choice in (formulation.problem.widest(), *(random_choice(formulation, rng) for _ in range(20))):
        variant = variant_from_choice(structure, formulation, choice)
        cost_ns = formulation.problem.evaluate(choice)[1]
        assert abs(cost_ns - 1e6 * predict_ms(table, structure, variant)) <= len(table.terms)
        plan = plan_from_choice(structure, formulation, importance, choice)
        assert variant_of_plan(structure, plan) == variant


def kept_importance(structure: Structure, importance: Importance, plan: object) -> float:
    """The scores of every unit that stays; those of removed heads and blocks are gone."""
    total = sum(importance.blocks.values())
    for index, dimension in enumerate(structure.dimensions):
        gone = dimension.block in plan.removed_blocks  # type: ignore[attr-defined]
        if index in importance.units and not gone:
            total += importance.units[index][list(kept_units(plan, structure, index))].sum()  # type: ignore[arg-type]
    return float(total)


@pytest.mark.parametrize("criterion", ["magnitude", "activation"])
def test_the_value_of_a_choice_is_the_importance_that_its_plan_keeps(
    criterion: str, structure: Structure
) -> None:
    importance = score(structure, criterion, feeds())
    formulation = formulate(structure, importance, made_up_table(structure))
    assert formulation.problem.evaluate(formulation.problem.widest())[0] == pytest.approx(1.0)
    rng = np.random.default_rng(1)
    for _ in range(20):
        choice = random_choice(formulation, rng)
        plan = plan_from_choice(structure, formulation, importance, choice)
        kept = kept_importance(structure, importance, plan) / importance.total
        assert formulation.problem.evaluate(choice)[0] == pytest.approx(kept)


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_an_optimal_plan_is_within_its_budget_and_obeys_the_law(
    share: float, structure: Structure, exported: Exported
) -> None:
    table = made_up_table(structure)
    importance = score(structure, "magnitude")
    formulation = formulate(structure, importance, table)
    full_ns = 1e6 * predict_ms(table, structure, full_variant(structure))
    solution = solve(formulation.problem, round(share * full_ns), limits=SolveLimits(gap=0.0))
    assert solution.status == "optimal"
    assert solution.choice is not None
    plan = plan_from_choice(structure, formulation, importance, solution.choice)
    assert 1e6 * predict_ms(table, structure, variant_of_plan(structure, plan)) <= share * full_ns + len(
        table.terms
    )
    name = next(n for n in NAMES if analyse(exported(n))[1].shadow.source == structure.shadow.source)
    prune_checked(analyse(exported(name))[0], structure, plan)


def test_random_variants_are_plans_that_replay(deit: Structure, tmp_path: Path) -> None:
    choices = {i: unit_choices(deit.dimensions[i], 2, 16) for i in deit.prunable}
    for seed in range(5):
        variant = random_variant(deit, choices, np.random.default_rng(seed), drop=0.3)
        plan = plan_of_variant(deit, variant)
        assert variant_of_plan(deit, plan) == variant
        path = tmp_path / "plan.json"
        path.write_text(plan_json(plan))
        assert load_plan(path) == plan


def test_heads_are_offered_one_by_one_and_widths_by_half_a_block(deit: Structure) -> None:
    kinds = {deit.dimensions[i].kind: deit.dimensions[i] for i in deit.prunable}
    assert unit_choices(kinds["heads"], 16, 16) == (1, 2, 3)
    assert unit_choices(kinds["qk"], 8, 16) == (4, 8)
    assert unit_choices(kinds["embedding"], 8, 16) == (8, 16, 24)


def test_terms_of_attention_depend_on_embedding_heads_and_width(deit: Structure) -> None:
    index = {d.kind: i for i, d in reversed(list(enumerate(deit.dimensions)))}
    first = deit.dimensions[index["heads"]].producer
    operations = deit.shadow.operations
    terms = {t.operation: t for t in cost_terms(deit)}
    scores = terms[first]
    assert operations[first].op_type == "MatMul"
    assert f'"kind":"{SUMMED_HEADS}"' in scores.key
    assert any(f'"kind":"{HEADS}"' in term.key for term in terms.values())
    assert scores.reads.terms == (((index["qk"],), 1),)
    assert scores.makes.terms == (((index["heads"],), 1),)
    query = terms[deit.dimensions[index["qk"]].producer]
    assert query.reads.terms == (((index["embedding"],), 1),)
    assert query.makes.terms == (((index["heads"], index["qk"]), 1),)
    value = terms[deit.dimensions[index["value"]].producer]
    assert value.makes.terms == (((index["heads"], index["value"]), 1),)
    hidden = terms[deit.dimensions[index["mlp"]].producer]
    assert hidden.reads.terms == (((index["embedding"],), 1),)
    assert hidden.makes.terms == (((index["mlp"],), 1),)


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "drift"])
def test_every_unit_has_a_score_and_heads_are_ranked_by_what_they_hold(
    criterion: str, deit: Structure
) -> None:
    importance = score(deit, criterion, feeds())
    for index in deit.prunable:
        dimension = deit.dimensions[index]
        if dimension.kind != "heads":
            assert (importance.units[index] > 0).any()
            continue
        widths = [i for i, d in enumerate(deit.dimensions) if d.heads == index]
        inner = sum(importance.units[i].reshape(dimension.count, -1).sum(1) for i in widths)
        assert np.allclose(importance.inner[index], inner)
        worth = importance.units[index] + inner
        assert ranking(importance, index).tolist() == np.argsort(-worth, kind="stable").tolist()
    for index in (i for i in deit.prunable if deit.dimensions[i].rows > 1):
        rows = ranked_rows(deit, importance, index)
        scores = importance.units[index]
        assert np.array_equal(np.sort(rows, axis=1), np.arange(24).reshape(3, 8))
        assert (np.diff(scores[rows], axis=1) <= 0).all()


def test_the_document_counts_heads(deit: Structure) -> None:
    entries = {e["kind"]: e for e in analyze_document(deit)["dimensions"] if e["frozen"] is None}
    assert {kind: (e["size"], e["heads"]) for kind, e in entries.items()} == {
        "embedding": (24, 1),
        "heads": (3, 1),
        "qk": (8, 3),
        "value": (8, 3),
        "mlp": (96, 1),
    }


def test_the_joint_optimum_is_never_below_that_of_one_kind(deit: Structure) -> None:
    table, importance = made_up_table(deit), score(deit, "magnitude")
    full_ns = 1e6 * predict_ms(table, deit, full_variant(deit))
    limits = SolveLimits(gap=0.0)
    joint = solve(formulate(deit, importance, table).problem, round(0.7 * full_ns), limits=limits)
    values = []
    for kind in ("mlp", "heads", "qk and value", "embedding", "blocks"):
        formulation = formulate(deit, importance, table, only(deit, kind))
        single = solve(formulation.problem, round(0.7 * full_ns), limits=limits)
        if single.choice is None:
            continue
        values.append(single.value)
        assert single.value <= joint.value + 1e-9
        plan = plan_from_choice(deit, formulation, importance, single.choice)
        cut = {d.kind for d in deit.dimensions if d.name in plan.keep}
        assert cut <= set({"qk and value": ("qk", "value")}.get(kind, (kind,)))
        assert bool(plan.removed_blocks) == (kind == "blocks")
    assert len(values) > 1
    assert min(values) < joint.value - 0.01


@pytest.mark.parametrize("free", ["mlp", "value"])
def test_what_is_measured_is_the_file_that_is_written(
    free: str, exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The table knows split projections; the base is the file as it came, the candidate as it goes."""
    model, structure = analyse(exported("deit_micro"))
    measured: list[list[bytes]] = []

    def size_as_ms(models: list[bytes], *_: object, **__: object) -> Timing:
        measured.append(models)
        return Timing(tuple(len(data) / 1e5 for data in models), 0.0, 4, ((), ()))

    for module in (pipeline, closed_loop):
        monkeypatch.setattr(module, "measure_models", size_as_ms)
    monkeypatch.setattr(pipeline, "build_table", lambda *_, **__: made_up_table(structure))
    fixed = tuple(
        structure.dimensions[i].name for i in structure.prunable if structure.dimensions[i].kind != free
    )
    request = Request(target_ratio=0.9, rules=WidthRules(exclude=fixed))
    with open_store(tmp_path / "lut.sqlite") as store:
        result = prune(model, structure, request, store)
    assert result.model is not None
    assert {models[0] for models in measured} == {model_bytes(model)}
    result.model.metadata_props.clear()
    assert model_bytes(result.model) in [models[1] for models in measured[1:]]
    parts = [node.name for node in result.model.graph if "/part_" in str(node.name)]
    assert (parts == []) == (free == "mlp")


def test_tied_branches_go_together(deit: Structure) -> None:
    """Each layer of DeiT has one attention and one MLP branch; the optimum takes both or none."""
    rules = WidthRules(tie_blocks=True)
    layers = tied_blocks(deit, rules)
    kinds = {block.name: block.kind for block in deit.blocks}
    assert [[kinds[name] for name in layer] for layer in layers] == [["attention", "mlp"]] * 2
    importance, table = score(deit, "magnitude"), made_up_table(deit)
    free, tied = formulate(deit, importance, table), formulate(deit, importance, table, rules)
    values = []
    for share in (0.3, 0.5, 0.7):
        budget_ns = round(share * 1e6 * predict_ms(table, deit, full_variant(deit)))
        answers = [solve(f.problem, budget_ns, limits=SolveLimits(gap=0.0)) for f in (free, tied)]
        assert answers[0].value >= answers[1].value - 1e-9
        assert answers[1].choice is not None
        gone = set(plan_from_choice(deit, tied, importance, answers[1].choice).removed_blocks)
        assert all(gone & set(layer) in (set(), set(layer)) for layer in layers)
        values.append(len(gone))
    assert max(values) > 0
    excluded = WidthRules(exclude=(layers[0][1],), tie_blocks=True)
    assert kept_blocks(deit, excluded) == set(layers[0])
