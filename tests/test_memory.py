"""Weights that are read from memory again: the share of them, the fit, and the plans that hold for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo import analyse, zoo_structure

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MeasurementError, UsageError
from onnx_mdp.importance.scoring import score
from onnx_mdp.planning.formulation import formulate, to_ns
from onnx_mdp.planning.problem import PruningProblem, Solution
from onnx_mdp.planning.programs import Programs
from onnx_mdp.planning.solution_plan import variant_from_choice
from onnx_mdp.reports.time_shares import operation_ms
from onnx_mdp.running.runtime import runtime
from onnx_mdp.solvers import cheapest, solve
from onnx_mdp.tables import calibrating
from onnx_mdp.tables.calibrating import Calibration, Subject, calibrate_in_place, own_coefficients
from onnx_mdp.tables.cost_terms import CostTerm, cost_terms, width
from onnx_mdp.tables.granularity import unit_choices
from onnx_mdp.tables.latency import (
    LatencyTable,
    predict_ms,
    table_key,
    term_ms,
    touched,
    valid_for,
)
from onnx_mdp.tables.lut_records import Run, Sample
from onnx_mdp.tables.memory import Megabytes, Memory, megabytes, total
from onnx_mdp.tables.memory_fit import fit_memory, sum_ms
from onnx_mdp.tables.staircases import Staircases, height
from onnx_mdp.tables.table_file import load_table, table_json
from onnx_mdp.tables.variants import Variant, full_variant, random_variant, variant_of_run

DEMO = Path(__file__).resolve().parents[1] / "onnx_mdp" / "demo_model" / "shapes_resnet.onnx"
STEP = 8
PRICE = 2.0  # ms of a megabyte: the demo network has a sixth of one


@pytest.fixture(scope="module", params=["demo", "cifar10/resnet20.onnx", "imagenet/mobilenet_v2_tv.onnx"])
def structure(request: pytest.FixtureRequest) -> Structure:
    return analyse(DEMO)[1] if request.param == "demo" else zoo_structure(request.param)[1]


@pytest.fixture(scope="module")
def table(structure: Structure) -> LatencyTable:
    """Weights cost a third of the unpruned latency, and half of them stay in the cache."""
    terms, base = cost_terms(structure), full_variant(structure)
    draft = LatencyTable(
        context={"device": "made up"},
        key=table_key(structure),
        granularity=STEP,
        terms=terms,
        coefficients={term.key: (0.01, 0.002, 0.003, 0.004, 0.0, 0.0) for term in terms},
        calibration=Calibration(1.1, 0.05, 1.0, 0.01, 0.02, 0.0),
        choices={i: unit_choices(structure.dimensions[i], STEP, 8) for i in structure.prunable},
        measured=0,
        seconds=0.0,
    )
    held = touched(draft, structure, base)
    cache = (held.maps + held.weights) / math.log(2) ** (1 / 3)
    price = predict_ms(draft, structure, base) / held.weights
    calibration = replace(draft.calibration, cache_mb=cache, ms_per_mb=price)
    calibration = replace(
        calibration, base_ms=predict_ms(replace(draft, calibration=calibration), structure, base)
    )
    return valid_for(replace(draft, calibration=calibration), structure, base)


def random_variants(structure: Structure, table: LatencyTable, count: int) -> list[Variant]:
    rng = np.random.default_rng(0)
    return [random_variant(structure, table.choices, rng) for _ in range(count)]


def held(
    structure: Structure, table: LatencyTable, variant: Variant
) -> list[tuple[CostTerm, tuple[str, int, int]]]:
    """The terms of a variant, and what a profile would call them."""
    gone = {i for b in structure.blocks if b.name in variant.removed_blocks for i in (*b.operations, b.joint)}
    there, kept = [t for t in table.terms if t.operation not in gone], variant.kept
    return [(t, (t.key, width(t.reads, kept), width(t.makes, kept))) for t in there]


def layers(structure: Structure, table: LatencyTable, variant: Variant) -> list[tuple[str, int, int]]:
    return [layer for _, layer in held(structure, table, variant)]


def measured_run(
    structure: Structure, table: LatencyTable, memory: Memory, number: int, variant: Variant
) -> Run:
    """What a profile shows where the table and the memory are exact."""
    there = layers(structure, table, variant)
    price = memory.ms_per_mb * memory.share(total(there, STEP))
    samples = []
    for layer in there:
        ms = height(table.coefficients, *layer, STEP)
        assert ms is not None
        samples.append(Sample(*layer, ms + price * megabytes(*layer, STEP).weights, 1))
    spent = sum(sample.ms for sample in samples)
    return Run(number, 0, spent, spent, len(samples), 1.0, tuple(samples))


def test_the_share_that_is_read_again_grows_from_nothing_to_all() -> None:
    memory = Memory(cache_mb=20.0, ms_per_mb=0.1)
    shares = [memory.share(Megabytes(mb / 3, mb * 2 / 3)) for mb in np.linspace(0.0, 80.0, 41)]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert memory.share(Megabytes(15.0, 5.0)) == pytest.approx(1 - 1 / math.e)
    assert memory.share(Megabytes(1.0, 1.0)) < 0.002
    assert shares[-1] > 0.99
    assert Memory().share(Megabytes(1e6, 1e6)) == 0.0, "it costs nothing"


def test_megabytes_are_those_of_the_tensors() -> None:
    conv = '{"add":false,"in":[1,-1,32,32],"kind":"groups 1","op":"Conv","out":[1,-1,16,16],"weight":[3,3]}'
    maps, weights = megabytes(conv, 16, 24, STEP)
    assert maps == pytest.approx(4e-6 * (16 * 32 * 32 + 24 * 16 * 16))
    assert weights == pytest.approx(4e-6 * 16 * 24 * 9)
    assert megabytes(conv, 15, 23, STEP) == megabytes(conv, 16, 24, STEP), "channels are stored in blocks"
    assert megabytes(conv, 3, 24, STEP).weights == pytest.approx(4e-6 * 3 * 24 * 9), "an image's are not"
    assert total([(conv, 16, 24), (conv, 16, 24)], STEP) == pytest.approx((2 * maps, 2 * weights))


@pytest.mark.parametrize("cached", [0.0, 0.5, 0.7])
def test_the_fit_finds_the_memory_that_made_the_times(
    structure: Structure, table: LatencyTable, cached: float
) -> None:
    touches = touched(table, structure, full_variant(structure))
    price = 0.3 * table.base_ms / touches.weights
    variants = [full_variant(structure), *random_variants(structure, table, 15)]
    wholes = [layers(structure, table, variant) for variant in variants]
    made_by = Memory(cached * (touches.maps + touches.weights), price) if cached else Memory()
    runs = [measured_run(structure, table, made_by, n, variant) for n, variant in enumerate(variants)]
    staircases = Staircases(runs, STEP)
    measured = np.asarray([sum_ms(table.coefficients, made_by, whole, STEP) for whole in wholes])
    found = fit_memory(staircases, wholes, measured, STEP)

    def worst(memory: Memory) -> float:
        fits = staircases.fit(memory)
        return float(np.abs([sum_ms(fits, memory, w, STEP) for w in wholes] / measured - 1).max())

    assert bool(found.ms_per_mb) == bool(cached)
    assert worst(found) < (0.5 * worst(Memory()) if cached else 0.001)


@pytest.mark.parametrize("slow", [(1, 1.4), (3, 1.4), (0, 1.4), (1, 0.7)], ids=str)
def test_a_machine_that_was_slow_in_one_profile_leaves_the_table_as_it_is(
    structure: Structure, table: LatencyTable, monkeypatch: pytest.MonkeyPatch, slow: tuple[int, float]
) -> None:
    """Whole models, measured beside each other, say how slow it was, even in the smallest variant."""
    number, factor = slow
    least = Variant({**full_variant(structure).kept, **{i: c[0] for i, c in table.choices.items()}})
    variants = [full_variant(structure), least, *random_variants(structure, table, 6)]
    runs = [
        replace(
            measured_run(structure, table, Memory(), n, variant),
            payload={"kept": {str(i): units for i, units in variant.kept.items()}},
        )
        for n, variant in enumerate(variants)
    ]
    runs[number] = slowed(runs[number], factor)

    def true_ms(variant: Variant) -> float:
        return sum_ms(table.coefficients, Memory(), layers(structure, table, variant), STEP)

    def beside(_: Subject, them: Sequence[Variant]) -> tuple[float, list[float], float]:
        base = true_ms(full_variant(structure))
        return base, [true_ms(variant) / base for variant in them], 0.0

    monkeypatch.setattr(calibrating, "_beside_the_unpruned", beside)
    subject = Subject(structure, table.terms, table.choices, STEP, runtime(), 0, lambda *_: None)
    calibration = calibrate_in_place(subject, runs, ())
    assert calibration.shares == pytest.approx([true_ms(v) / true_ms(variants[0]) for v in variants])
    staircases = Staircases(runs, STEP, calibration.shares)
    coefficients = own_coefficients(staircases, table.terms, calibration.memory)
    for variant in (*variants, *random_variants(structure, table, 12)):
        ms = sum_ms(coefficients, calibration.memory, layers(structure, table, variant), STEP)
        assert calibration.scale * ms + calibration.offset_ms == pytest.approx(true_ms(variant), rel=0.01)
    drift = Staircases(runs, STEP).drift()
    assert number != 1 or abs(drift[1] / factor - 1) > 0.2, "without shares that of the smallest is unknown"


def slowed(run: Run, factor: float) -> Run:
    samples = tuple(replace(sample, ms=factor * sample.ms) for sample in run.samples)
    return replace(run, samples=samples, plain_ms=factor * run.plain_ms, sum_ms=factor * run.sum_ms)


@pytest.mark.parametrize(
    "payload", [{}, {"kept": 3}, {"kept": {}}, {"kept": {"0": 0}}, {"kept": {"0": 10**9}}, {"kept": {"x": 1}}]
)
def test_a_run_of_another_model_is_refused(structure: Structure, payload: dict[str, Any]) -> None:
    with pytest.raises(MeasurementError, match="choose another store"):
        variant_of_run(structure, Run(2, 0, 1.0, 1.0, 1, 1.0, (), payload))


def test_the_terms_of_a_variant_sum_to_its_prediction(structure: Structure, table: LatencyTable) -> None:
    for variant in [full_variant(structure), *random_variants(structure, table, 5)]:
        there, whole = valid_for(table, structure, variant), predict_ms(table, structure, variant)
        spent = sum(term_ms(there, term, a, b) for term, (_, a, b) in held(structure, table, variant))
        assert table.calibration.offset_ms + spent == pytest.approx(whole)
        shown = sum(operation_ms(structure, table, variant).values())
        assert table.calibration.offset_ms + shown == pytest.approx(whole)


@pytest.mark.parametrize("ratio", [0.8, 0.5, 0.3])
def test_a_plan_is_the_best_for_the_share_that_it_reads_itself(
    structure: Structure, table: LatencyTable, ratio: float
) -> None:
    importance = score(structure, "magnitude")
    programs = Programs(structure, importance, table)
    budget_ns = to_ns(ratio * table.base_ms)
    found = programs.solve(budget_ns)
    assert found.solution.choice is not None
    variant = variant_from_choice(structure, found.formulation, found.solution.choice)
    reads = table.calibration.memory.share(touched(table, structure, variant))
    assert predict_ms(table, structure, variant) <= 1e-6 * found.solution.cost_ns + 1e-4
    assert found.solution.cost_ns <= budget_ns
    # It is priced at what it reads, as far as plans go: here weights cost half of the latency.
    priced = formulate(structure, importance, valid_for(table, structure, variant)).problem
    assert priced.evaluate(found.solution.choice)[1] == pytest.approx(found.solution.cost_ns, rel=0.02)
    # No plan that reads as much, and fits, is worth more.
    for other in random_variants(structure, table, 40):
        if table.calibration.memory.share(touched(table, structure, other)) >= reads:
            worth = _value(programs, other)
            assert (
                predict_ms(table, structure, other) > budget_ns * 1e-6 or worth <= found.solution.value + 1e-9
            )
    naive = solve(programs.unpruned.problem, budget_ns)
    assert naive.choice is None or found.solution.value >= naive.value - 1e-9


def _value(programs: Programs, variant: Variant) -> float:
    problem = programs.unpruned.problem
    choice = []
    for place, options in enumerate(problem.variables):
        kept = [variant.kept[i] for i, p in programs.unpruned.variable.items() if p == place]
        gone = any(programs.unpruned.switch.get(n) == place for n in variant.removed_blocks)
        choice.append(0 if gone or not kept else options.widths.index(kept[0]))
    return problem.evaluate(_with_sums(problem, choice))[0]


def _with_sums(problem: PruningProblem, choice: list[int]) -> tuple[int, ...]:
    for block in problem.blocks:
        if any(choice[m] == 0 and problem.variables[m].widths[0] == 0 for m in block.members):
            for member in block.members:
                choice[member] = 0
    for law in problem.sums:
        width_ = law.offset + sum(c * problem.variables[p].widths[choice[p]] for p, c in law.parts)
        choice[law.total] = problem.variables[law.total].widths.index(width_)
    return tuple(choice)


def test_what_only_a_slim_model_reaches_is_found(structure: Structure, table: LatencyTable) -> None:
    programs = Programs(structure, score(structure, "magnitude"), table)
    dear = solve(programs.unpruned.problem, 0)
    assert dear.fastest_ns is not None
    none = programs.solve(1)
    assert none.solution.choice is None
    assert none.solution.fastest_ns is not None
    assert none.solution.fastest_ns < dear.fastest_ns
    between = (none.solution.fastest_ns + dear.fastest_ns) // 2
    assert solve(programs.unpruned.problem, between).choice is None
    assert programs.solve(between).solution.choice is not None
    fastest = programs.solve(none.solution.fastest_ns + 1000)
    assert fastest.solution.choice is not None


def test_a_front_and_the_cheapest_plan_hold_for_what_they_read(
    structure: Structure, table: LatencyTable
) -> None:
    programs = Programs(structure, score(structure, "magnitude"), table)
    budgets = [to_ns(ratio * table.base_ms) for ratio in (0.8, 0.5)]
    front = programs.solve_front(budgets)
    assert [a.solution.value for a in front] == [programs.solve(b).solution.value for b in budgets]

    def least(problem: PruningProblem) -> Solution:
        return cheapest(problem, front[1].solution.value)

    answer = programs.answer(least, lambda s: -s.cost_ns, 60.0)
    assert answer.solution.cost_ns <= front[1].solution.cost_ns
    plain = replace(table, calibration=replace(table.calibration, ms_per_mb=0.0))
    alone = Programs(structure, programs.importance, valid_for(plain, structure, full_variant(structure)))
    together = alone.solve_front(budgets)
    assert [a.solution.value for a in together] == [solve(alone.unpruned.problem, b).value for b in budgets]
    assert all(answer.formulation is alone.unpruned for answer in together)


def test_no_further_problem_is_begun_when_the_time_is_over(structure: Structure, table: LatencyTable) -> None:
    programs = Programs(structure, score(structure, "magnitude"), table)
    budget_ns, asked = to_ns(0.4 * table.base_ms), 0

    def slow(problem: PruningProblem) -> Solution:
        nonlocal asked
        asked += 1
        return replace(solve(problem, budget_ns), seconds=2.0)

    for seconds, most in ((1.0, 1), (3.0, 2), (1e9, 8)):
        asked = 0
        answer = programs.answer(slow, lambda s: s.value, seconds)
        assert asked <= most
        assert answer.solution.seconds == 2.0 * asked
        assert answer.solution.cost_ns <= budget_ns


def test_a_table_file_keeps_the_memory(structure: Structure, table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(table_json(structure, table), encoding="utf-8")
    again = load_table(path, structure)
    assert again.calibration == table.calibration
    assert again.reread == table.reread == pytest.approx(0.5, abs=1e-6)
    for variant in random_variants(structure, table, 3):
        assert predict_ms(again, structure, variant) == predict_ms(table, structure, variant)
    path.write_text(path.read_text().replace('"schema_version": 3', '"schema_version": 2'))
    with pytest.raises(UsageError, match="older onnx-mdp"):
        load_table(path, structure)


@pytest.mark.parametrize(("name", "value"), [("cache_mb", 0), ("cache_mb", -1), ("ms_per_mb", -0.1)])
def test_a_memory_that_cannot_be_is_refused(
    structure: Structure, table: LatencyTable, tmp_path: Path, name: str, value: float
) -> None:
    wrong = replace(table, calibration=replace(table.calibration, **{name: float(value)}))
    path = tmp_path / "table.json"
    path.write_text(table_json(structure, wrong), encoding="utf-8")
    with pytest.raises(UsageError, match=name):
        load_table(path, structure)
