"""The latency table: what was put into synthetic runs comes out, and every reader of a table agrees."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from test_placement import needs
from zoo import analyse, random_plan, text_model, zoo_structure

import onnx_mdp
from onnx_mdp.analysis.structure import Dimension, Extent, Structure
from onnx_mdp.errors import MeasurementError
from onnx_mdp.importance.scoring import score
from onnx_mdp.model_io import load_model
from onnx_mdp.planning.formulation import formulate
from onnx_mdp.planning.problem import Choice, PruningProblem
from onnx_mdp.planning.solution_plan import plan_from_choice, variant_from_choice
from onnx_mdp.running.runtime import InferenceSession, context, open_session, runtime
from onnx_mdp.running.timing import Feeds, Timing, run_times
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables import granularity as granularity_module
from onnx_mdp.tables import latency, profiling, staircases
from onnx_mdp.tables.calibrating import Calibration
from onnx_mdp.tables.cost_terms import HEADS, SUMMED_HEADS, CostTerm, anchors, cost_terms, width
from onnx_mdp.tables.granularity import granularity, step_of, unit_choices
from onnx_mdp.tables.latency import LatencyTable, build_table, predict_ms, table_key, term_ms
from onnx_mdp.tables.lut_records import SMALLEST
from onnx_mdp.tables.lut_store import LutStore, Run, Sample, open_store
from onnx_mdp.tables.profiling import profile_variant
from onnx_mdp.tables.staircases import Staircases, affine, regime
from onnx_mdp.tables.variants import (
    Variant,
    full_variant,
    plan_of_variant,
    random_variant,
    spread_variant,
    variant_of_plan,
)

# A dimension of one unit, concats inside and outside of a block, a block with inner dimensions and one
# without, a strided and a depthwise convolution, two pools, a resize and a linear layer.
NET = """
(float[1,3,16,16] x) => (float[1,10] y)
<float[24,3,3,3] w0, float[24] b0, float[40,3,1,1] w1, float[1,3,1,1] w1s, float[32,65,3,3] w2,
 float[32,1,3,3] w3,
 float[16,32,1,1] w4, float[24,32,3,3] w5, float[32,40,1,1] w6, float[32,32,1,1] w7,
 float[48,32,3,3] w8, float[10,48] w9, float[10] b9, float[4] up = {1., 1., 2., 2.}>
{
  a0 = Conv <pads: ints = [1,1,1,1]> (x, w0, b0)
  a = Relu (a0)
  b = Conv (x, w1)
  s = Conv (x, w1s)
  c = Concat <axis: int = 1> (a, b, s)
  d = Conv <pads: ints = [1,1,1,1]> (c, w2)
  dd = Conv <pads: ints = [1,1,1,1], group: int = 32> (d, w3)
  e = Relu (dd)
  f = Conv (e, w4)
  g0 = Conv <pads: ints = [1,1,1,1]> (e, w5)
  g = Relu (g0)
  h = Concat <axis: int = 1> (f, g)
  i = Conv (h, w6)
  j = Add (e, i)
  k = Conv (j, w7)
  l = Add (j, k)
  m = MaxPool <kernel_shape: ints = [2,2], strides: ints = [2,2]> (l)
  n = Resize <mode: string = "nearest"> (m, , up)
  o = Conv <pads: ints = [1,1,1,1], strides: ints = [2,2]> (n, w8)
  p = Relu (o)
  q = GlobalAveragePool (p)
  r = Flatten (q)
  y = Gemm <transB: int = 1> (r, w9, b9)
}
"""


@functools.cache
def net() -> tuple[ir.Model, Structure]:
    return analyse(text_model(NET))


# --- the fit ----------------------------------------------------------------------------------------

STEP = 8
SIDES = [1, -1, 28, 28]
KEYS = tuple(
    json.dumps(described, separators=(",", ":"))
    for described in (
        *({"op": "Conv", "n": n, "in": SIDES, "out": SIDES, "weight": [7, 7]} for n in range(5)),
        {"op": "MaxPool", "kind": "moves", "in": SIDES, "out": [1, -1, 14, 14]},
    )
)
TRUE: Mapping[str, tuple[float, ...]] = {
    KEYS[0]: (0.01, 0.0, 0.02, 0.0, 0.0, 0.0),  # a stem, which reads 3 channels
    KEYS[1]: (0.005, 0.003, 0.002, 0.004, 0.0, 0.0),
    KEYS[2]: (0.0, 0.0, 0.0, 0.01, 0.0, 0.0),
    KEYS[3]: (0.03, 0.001, 0.004, 0.002, 0.0, 0.005),
    KEYS[4]: (0.0, 0.0, 0.01, 0.001, 0.1, 0.0),
    KEYS[5]: (0.002, 0.0, 0.003, 0.0, 0.0, 0.0),
}
LAYERS = tuple((key, layer) for key in KEYS for layer in range(1 if key == KEYS[0] else 3))


def true_ms(key: str, a: float, b: float, coefficients: Mapping[str, Sequence[float]] = TRUE) -> float:
    u, v = np.ceil(a / STEP), np.ceil(b / STEP)
    maps, weights = 4e-6 * 28 * 28 * (a + b), 4e-6 * 7 * 7 * a * b  # the pool has coefficients for neither
    beyond = max(0.0, maps - 1.0), max(0.0, weights - 1.0) ** 2
    return float(np.dot(coefficients[key], (1.0, u, v, u * v, *beyond)))


def widths(rng: np.random.Generator) -> dict[tuple[str, int], tuple[int, int]]:
    """Reads and makes of every layer of a random variant; a stem reads 3, a pool is described as 1."""
    fixed = {KEYS[0]: 3, KEYS[5]: 1}
    return {
        (key, n): (fixed.get(key, 8 * int(rng.integers(1, 33))), 8 * int(rng.integers(1, 33)))
        for key, n in LAYERS
    }


def synthetic_runs(
    rng: np.random.Generator,
    *,
    noise: float = 0.0,
    drift: float = 0.0,
    inflation_ms: float = 0.0,
    scale: float = 1.0,
) -> list[Run]:
    levels = np.exp(drift * rng.standard_normal(16))
    levels /= np.median(levels)
    runs = []
    for number, level in enumerate(levels):
        samples, plain = [], 0.0
        for (key, _), (a, b) in widths(rng).items():
            count = int(rng.integers(1, 4))
            ms = scale * true_ms(key, a, b) * level
            plain += ms
            observed = ms * np.exp(noise * rng.standard_normal()) + inflation_ms * count
            samples.append(Sample(key, a, b, float(observed), count))
        nodes = sum(s.count for s in samples)
        # Random widths, as the variants behind the unpruned and the smallest have.
        place = SMALLEST + 1 + number
        runs.append(Run(place, 0, plain, plain + inflation_ms * nodes, nodes, 1.0, tuple(samples)))
    return runs


def table_of(coefficients: Mapping[str, Sequence[float]], step: int = STEP) -> LatencyTable:
    identity = Calibration(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    fitted = {key: tuple(values) for key, values in coefficients.items()}
    return LatencyTable({}, "", step, (), fitted, identity, {}, 0, 0.0)


def term_of(key: str) -> CostTerm:
    return CostTerm(0, key, Extent(1, ()), Extent(1, ()))


def prediction_errors(coefficients: Mapping[str, Sequence[float]], rng: np.random.Generator) -> np.ndarray:
    """Relative errors of whole-model predictions on 50 fresh variants."""
    table = table_of(coefficients)
    pairs = [
        (
            sum(term_ms(table, term_of(key), a, b) for (key, _), (a, b) in variant.items()),
            sum(true_ms(key, a, b) for (key, _), (a, b) in variant.items()),
        )
        for variant in (widths(rng) for _ in range(50))
    ]
    return np.asarray([predicted / true - 1 for predicted, true in pairs])


def test_clean_runs_give_the_coefficients_back() -> None:
    coefficients = Staircases(synthetic_runs(np.random.default_rng(0)), STEP).fit()
    for key in KEYS[1:5]:
        assert np.allclose(coefficients[key], TRUE[key], atol=1e-6), key
    assert np.abs(prediction_errors(coefficients, np.random.default_rng(1))).max() < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_noise_drift_and_profiler_inflation_are_removed(seed: int) -> None:
    rng = np.random.default_rng([11, seed])
    runs = synthetic_runs(rng, noise=0.02, drift=0.08, inflation_ms=0.004)
    errors = prediction_errors(Staircases(runs, STEP).fit(), rng)
    assert np.abs(errors).max() < 0.02


def test_what_the_smallest_variant_takes_is_no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers are faster than the same ones elsewhere, and small models are to be predicted so."""
    least = {layer: (min(a, 8), 8) for layer, (a, _) in widths(np.random.default_rng(0)).items()}
    samples = tuple(Sample(key, a, b, 0.9 * true_ms(key, a, b), 1) for (key, _), (a, b) in least.items())
    total = sum(sample.ms for sample in samples)
    smallest = Run(SMALLEST, 0, total, total, len(samples), 1.0, samples)
    runs = [*synthetic_runs(np.random.default_rng(3), drift=0.08), smallest]
    shares, drifts = [], []
    for limit in (staircases._SMALLEST_DRIFT, np.inf):
        monkeypatch.setattr(staircases, "_SMALLEST_DRIFT", limit)
        fitted = Staircases(runs, STEP)
        shares.append(sum(true_ms(s.key, s.a, s.b, fitted.fit()) for s in samples) / (total / 0.9))
        drifts.append(fitted.drift())
    assert shares[0] < shares[1] - 0.015
    np.testing.assert_allclose(drifts[0][:-1], drifts[1][:-1], rtol=0.03, err_msg="that of others counts")
    assert np.ptp(drifts[0][:-1]) > 0.2


def test_the_profiler_does_not_count_as_work() -> None:
    small = {key: tuple(0.01 * c for c in coefficients) for key, coefficients in TRUE.items()}
    runs = synthetic_runs(np.random.default_rng(8), inflation_ms=0.004, scale=0.01)
    found = Staircases(runs, STEP).fit()
    for key in KEYS[1:5]:
        fitted, true = (true_ms(key, 128, 128, table) for table in (found, small))
        assert fitted == pytest.approx(true, rel=0.03), key


def test_each_run_is_relieved_of_what_the_profiler_added_to_it() -> None:
    small = {key: tuple(0.01 * c for c in coefficients) for key, coefficients in TRUE.items()}
    parts = [synthetic_runs(np.random.default_rng(8), inflation_ms=ms, scale=0.01) for ms in (0.002, 0.004)]
    runs = [one if one.variant % 2 else other for one, other in zip(*parts, strict=True)]
    found = Staircases(runs, STEP).fit()
    for key in KEYS[1:5]:
        fitted, true = (true_ms(key, 128, 128, table) for table in (found, small))
        assert fitted == pytest.approx(true, rel=0.03), key


def test_a_single_head_is_told_apart() -> None:
    for kind in (HEADS, SUMMED_HEADS):
        key = f'{{"kind":"{kind}","op":"Transpose"}}'
        assert regime(key, 64, 1, STEP) != regime(key, 64, 2, STEP) == key
    assert regime('{"kind":"moves","op":"Transpose"}', 64, 1, STEP) == '{"kind":"moves","op":"Transpose"}'


def test_without_the_drift_correction_the_same_runs_are_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = synthetic_runs(np.random.default_rng(3), noise=0.02, drift=0.15)
    corrected = prediction_errors(Staircases(runs, STEP).fit(), np.random.default_rng(4)).std()
    monkeypatch.setattr(staircases, "_drift", lambda rows, fits, count: np.ones(count))
    assert corrected < prediction_errors(Staircases(runs, STEP).fit(), np.random.default_rng(4)).std()


def test_a_few_preempted_samples_do_little_harm() -> None:
    rng = np.random.default_rng(5)
    runs = synthetic_runs(rng, noise=0.01)
    spoilt = [
        Run(
            **{
                **{name: getattr(run, name) for name in Run.__slots__},
                "samples": tuple(
                    Sample(s.key, s.a, s.b, s.ms * (3 if rng.random() < 0.03 else 1), s.count)
                    for s in run.samples
                ),
            }
        )
        for run in runs
    ]
    assert np.abs(prediction_errors(Staircases(spoilt, STEP).fit(), rng)).max() < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_a_table_is_monotone_in_both_widths_whatever_was_measured(seed: int) -> None:
    rng = np.random.default_rng([6, seed])
    runs = [
        Run(n, 0, 1.0, 1.0, 9, 1.0, tuple(Sample(k, *ab, float(rng.exponential()), 1) for (k, _), ab in w))
        for n, w in enumerate(widths(rng).items() for _ in range(16))
    ]
    table = table_of(Staircases(runs, STEP).fit())
    grid = range(STEP, 257, STEP)
    for key in KEYS[1:5]:
        ms = np.asarray([[term_ms(table, term_of(key), a, b) for b in grid] for a in grid])
        assert (np.diff(ms, axis=0) >= 0).all()
        assert (np.diff(ms, axis=1) >= 0).all()
        assert (ms >= 0).all()


@pytest.mark.parametrize(
    "key", ["", "pool", "[]", '{"in":3}', '{"in":["x"]}', '{"weight":[1e999]}', "[" * 10**5]
)
def test_keys_of_another_kind_of_store_are_one_sentence(key: str) -> None:
    run = Run(0, 0, 1.0, 1.0, 1, 1.0, (Sample(key, 8, 8, 1.0, 1),))
    with pytest.raises(MeasurementError, match="choose another store"):
        Staircases([run], STEP).fit()


def test_widths_between_two_steps_cost_as_much_as_the_next() -> None:
    table = table_of({KEYS[5]: (0.0, 1.0, 10.0, 100.0, 1e3, 1e3)})
    assert term_ms(table, term_of(KEYS[5]), 9, 17) == term_ms(table, term_of(KEYS[5]), 16, 24) == 632.0


def test_an_operation_never_seen_costs_nothing() -> None:
    assert term_ms(table_of({}), term_of(KEYS[5]), 8, 8) == 0.0


def test_the_affine_map_is_exact_on_affine_data_and_leaves_every_plan_a_cost() -> None:
    predicted = np.asarray([1.0, 2.0, 3.0, 5.0, 8.0])
    for offset in (0.2, 0.0):
        assert affine(predicted, 1.3 * predicted + offset) == pytest.approx((1.3, offset), abs=1e-6)
    scale, offset = affine(predicted, 1.3 * predicted - 0.2)
    assert 1.1 < scale < 1.3
    assert offset == 0.0


# --- one table, read by prediction and by the problem -------------------------------------------------


def random_table(structure: Structure, rng: np.random.Generator, *, limit: int = 5) -> LatencyTable:
    """A table of random coefficients over the real terms of a model."""
    terms = cost_terms(structure)
    return LatencyTable(
        context={},
        key="",
        granularity=STEP,
        terms=terms,
        coefficients={t.key: tuple(rng.uniform(0, 1e-3, 6).tolist()) for t in terms},
        calibration=Calibration(1.2, 0.05, 1.0, 0.0, 0.0, 0.0),
        choices={i: unit_choices(structure.dimensions[i], STEP, limit) for i in structure.prunable},
        measured=0,
        seconds=0.0,
    )


def random_choice(problem: PruningProblem, rng: np.random.Generator) -> Choice:
    """A random consistent choice."""
    options = [
        int(rng.integers(1 if v.widths[0] == 0 and len(v.widths) > 1 else 0, len(v.widths)))
        for v in problem.variables
    ]
    for block in problem.blocks:
        if rng.random() < 0.4:
            for member in block.members:
                options[member] = 0
    for law in problem.sums:
        total = law.offset + sum(c * problem.variables[p].widths[options[p]] for p, c in law.parts)
        options[law.total] = problem.variables[law.total].widths.index(total)
    assert problem.is_consistent(options)
    return tuple(options)


def structures() -> Iterator[Structure]:
    yield net()[1]
    yield zoo_structure("cifar10/resnet20.onnx")[1]
    yield zoo_structure("imagenet/squeezenet1.1.onnx")[1]


@pytest.mark.parametrize("which", range(3), ids=["net", "resnet20", "squeezenet"])
def test_the_cost_of_a_choice_is_the_prediction_of_its_variant(which: int) -> None:
    structure = next(s for n, s in enumerate(structures()) if n == which)
    rng = np.random.default_rng(which)
    table = random_table(structure, rng)
    importance = score(structure, "magnitude")
    formulation = formulate(structure, importance, table)
    problem = formulation.problem
    rounding_ns = 0.5 * (len(table.terms) + 1) + 1e-3
    removed: set[str] = set()
    for choice in (problem.widest(), *(random_choice(problem, rng) for _ in range(40))):
        variant = variant_from_choice(structure, formulation, choice)
        removed |= variant.removed_blocks
        cost_ns = problem.evaluate(choice)[1]
        assert abs(cost_ns - 1e6 * predict_ms(table, structure, variant)) <= rounding_ns
        plan = plan_from_choice(structure, formulation, importance, choice)
        assert variant_of_plan(structure, plan) == variant
    assert variant_from_choice(structure, formulation, problem.widest()) == full_variant(structure)
    assert removed == {block.name for block in structure.blocks}


def test_the_net_exercises_sums_and_both_kinds_of_blocks() -> None:
    formulation = formulate(
        net()[1], score(net()[1], "magnitude"), random_table(net()[1], np.random.default_rng(0))
    )
    assert len(formulation.problem.sums) == 2
    assert sorted(len(block.members) for block in formulation.problem.blocks) == [1, 2]


def test_the_value_of_a_choice_is_the_importance_that_its_plan_keeps() -> None:
    structure = net()[1]
    rng = np.random.default_rng(1)
    importance = score(structure, "magnitude")
    formulation = formulate(structure, importance, random_table(structure, rng))
    assert formulation.problem.evaluate(formulation.problem.widest())[0] == pytest.approx(1.0)
    for _ in range(20):
        choice = random_choice(formulation.problem, rng)
        plan = plan_from_choice(structure, formulation, importance, choice)
        kept = sum(
            importance.units[i][list(plan.keep.get(d.name, range(len(d.units))))].sum()
            for i, d in enumerate(structure.dimensions)
            if i in importance.units and d.block not in plan.removed_blocks
        )
        assert formulation.problem.evaluate(choice)[0] == pytest.approx(kept / importance.total)


def test_the_prediction_is_the_offset_and_the_sum_of_the_terms() -> None:
    structure = net()[1]
    table = random_table(structure, np.random.default_rng(2))
    kept = full_variant(structure).kept
    parts = [term_ms(table, t, width(t.reads, kept), width(t.makes, kept)) for t in table.terms]
    assert all(part > 0 for part in parts)
    expected = table.calibration.offset_ms + sum(parts)
    assert predict_ms(table, structure, full_variant(structure)) == pytest.approx(expected, rel=1e-12)


def test_a_removed_block_costs_what_its_operations_cost() -> None:
    structure = net()[1]
    table = random_table(structure, np.random.default_rng(3))
    full = full_variant(structure)
    for block in structure.blocks:
        inside = {*block.operations, block.joint}
        saved = sum(
            term_ms(table, t, width(t.reads, full.kept), width(t.makes, full.kept))
            for t in table.terms
            if t.operation in inside
        )
        without = predict_ms(table, structure, Variant(full.kept, frozenset({block.name})))
        assert without == pytest.approx(predict_ms(table, structure, full) - saved)


def test_term_widths_are_the_shapes_of_the_rewritten_weights() -> None:
    _, structure = net()
    rng = np.random.default_rng(4)
    terms = {structure.shadow.operations[t.operation].outputs[0]: t for t in cost_terms(structure)}
    seen = 0
    for _ in range(8):
        plan = random_plan(structure, rng, blocks=False)
        kept = variant_of_plan(structure, plan).kept
        for node in rewrite(structure, plan).graph:
            if node.op_type in ("Conv", "Gemm"):
                term, weight = terms[str(node.outputs[0].name)], node.inputs[1]
                assert weight is not None
                assert weight.shape is not None
                makes, reads = weight.shape[0], weight.shape[1]
                assert (width(term.makes, kept), width(term.reads, kept)) == (makes, reads), node.name
                seen += 1
    assert seen == 8 * 11


def test_anchors_are_themselves_anchored_and_come_first() -> None:
    charged = anchors(net()[1])
    assert all(charged[anchor] == anchor <= index for index, anchor in enumerate(charged))
    assert {t.operation for t in cost_terms(net()[1])} == set(charged)


# --- variants ---------------------------------------------------------------------------------------


def test_random_variants_take_offered_widths_and_come_back_from_their_plans() -> None:
    structure = net()[1]
    rng = np.random.default_rng(7)
    choices = {i: unit_choices(structure.dimensions[i], 4, 6) for i in structure.prunable}
    drawn = [random_variant(structure, choices, rng, drop=0.3) for _ in range(30)]
    drawn += [spread_variant(structure, choices, rng, level, 0.3) for level in rng.uniform(0.05, 1.0, 30)]
    for variant in drawn:
        assert all(variant.kept[i] in options for i, options in choices.items())
        assert variant_of_plan(structure, plan_of_variant(structure, variant)) == variant
    assert plan_of_variant(structure, full_variant(structure)).empty


def test_the_smallest_variant_takes_the_first_choice_everywhere() -> None:
    structure = net()[1]
    choices = {i: unit_choices(structure.dimensions[i], 4, 6) for i in structure.prunable}
    variant = random_variant(structure, choices, np.random.default_rng(0), low=0.0, high=1e-9)
    assert {i: variant.kept[i] for i in choices} == {i: options[0] for i, options in choices.items()}


def test_a_table_is_valid_for_other_weights_but_not_for_other_shapes() -> None:
    def key(text: str, seed: int) -> str:
        return table_key(analyse(text_model(text, seed=seed))[1])

    assert key(NET, 0) == key(NET, 1)
    assert key(NET, 0) != key(NET.replace("[1,3,16,16] x", "[1,3,32,32] x"), 0)
    assert key(NET, 0) != key(NET.replace("a = Relu", "a = Sigmoid"), 0)


# --- granularity ------------------------------------------------------------------------------------


def test_granularity_is_that_of_the_saved_layout(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.sqlite") as store:
        block = granularity(runtime(), store)
    assert block in (4, 8, 16, 32)
    text = """
    (float[1,32,56,56] x) => (float[1,OUT,56,56] y) <float[OUT,32,3,3] w>
    { y = Conv <pads: ints = [1,1,1,1]> (x, w) }
    """
    for outputs in (1, block, block + 1, 33):
        path = tmp_path / f"{outputs}.onnx"
        model = text_model(text.replace("OUT", str(outputs))).SerializeToString()
        open_session(model, runtime(), optimized_model_path=path)
        saved = onnx.load(path)
        if not any(node.domain == "com.microsoft.nchwc" for node in saved.graph.node):
            pytest.skip("this processor has no blocked layout")
        (rows,) = {t.dims[0] for t in saved.graph.initializer if len(t.dims) == 4}
        assert rows == -(-outputs // block) * block


@pytest.mark.parametrize("block", [4, 8, 16, 32])
@pytest.mark.parametrize("overhead", [0.0, 0.3])
def test_the_step_is_the_block_of_a_staircase(block: int, overhead: float) -> None:
    rng = np.random.default_rng(block)
    for _ in range(20):
        stairs = {w: -(-w // block) * block / 192 for w in granularity_module._WIDTHS}
        noise = 0.01 if block > 4 else 0.002  # steps of 4 channels are 2 % high
        ms = {w: (overhead + t) * rng.normal(1.0, noise) for w, t in stairs.items()}
        assert step_of(ms) == block


def test_a_device_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(granularity_module, "_read", lambda runtime: None)
    found = iter([(32, {"how": "measured"})])
    monkeypatch.setattr(granularity_module, "_measured", lambda runtime, dtype: next(found))
    for _ in range(2):
        with open_store(tmp_path / "store.sqlite") as store:
            assert granularity(runtime(), store) == 32


def test_half_precision_has_a_step_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(granularity_module, "_read", lambda runtime: None)
    steps = {"float32": (16, {}), "float16": (8, {})}
    monkeypatch.setattr(granularity_module, "_measured", lambda runtime, dtype: steps[dtype])
    with open_store(tmp_path / "store.sqlite") as store:
        for _ in range(2):
            assert granularity(runtime(), store, "float16") == 8
            assert granularity(runtime(), store) == 16


def test_work_that_does_not_show_is_made_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a kernel takes as long for any width, until there is enough work."""
    rounds = iter((0.0, 0.0, 0.01, 1.0))

    def measured(sessions: Sequence[object], *_: object, **__: object) -> Timing:
        work = next(rounds)
        widths = granularity_module._WIDTHS
        ms = tuple(1.0 + work * -(-width // 32) for width in widths)
        return Timing(ms, 0.0, 4, (ms, ms))

    monkeypatch.setattr(granularity_module, "open_placed", lambda *_: object())
    monkeypatch.setattr(granularity_module, "random_feeds", lambda *_: {})
    monkeypatch.setattr(granularity_module, "measure", measured)
    step, record = granularity_module._measured(runtime(), "float32")
    assert (step, record["how"]) == (32, "measured")
    assert next(rounds, None) is None


@pytest.mark.openvino
def test_the_step_of_openvino_is_measured(tmp_path: Path) -> None:
    needs("OpenVINOExecutionProvider")
    with open_store(tmp_path / "store.sqlite") as store:
        where = runtime("openvino")
        assert granularity(where, store) in (8, 16, 32)
        record = store.get_calibration(context(where), "granularity")
    assert record is not None
    assert record["how"] == "measured"
    assert float(record["ms"]["192"]) > float(record["ms"]["97"])


def dimension(units: int, channels: int) -> Dimension:
    return Dimension("d", "channel", tuple(range(1, units + 1)), channels, (), 0)


@pytest.mark.parametrize("step", [4, 8, 16, 32])
def test_unit_choices(step: int) -> None:
    for units, channels, limit in itertools.product(
        (1, 2, 7, 8, 9, 16, 24, 31, 64, 100, 1000), (1, 2, 3, 8), (2, 5, 16)
    ):
        are_good_choices(unit_choices(dimension(units, channels), step, limit), units, channels, step, limit)


def are_good_choices(choices: tuple[int, ...], units: int, channels: int, step: int, limit: int) -> None:
    assert choices[-1] == units
    assert len(choices) <= limit
    assert list(choices) == sorted(set(choices))
    assert all(count >= 1 and count * channels % step == 0 for count in choices[:-1])
    aligned = [count for count in range(1, units) if count * channels % step == 0]
    if len(aligned) < limit:
        assert list(choices[:-1]) == aligned
    elif limit > 2:
        assert (choices[0], choices[-2]) == (aligned[0], aligned[-1])
    if units * channels <= step:
        assert choices == (units,)


# --- measured tables --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LutStore]:
    with open_store(tmp_path_factory.mktemp("lut") / "lut.sqlite") as opened:
        yield opened


VARIANTS = 5


@pytest.fixture(scope="module")
def measured(store: LutStore) -> LatencyTable:
    return build_table(net()[1], runtime(), store, variants=VARIANTS)


def test_a_measured_table_predicts_the_base_and_shrinks_with_the_model(measured: LatencyTable) -> None:
    structure = net()[1]
    base = predict_ms(measured, structure, full_variant(structure))
    assert measured.measured == VARIANTS
    # Loose, because five variants are few and the machine may be busy: the loop closes what is left.
    assert base == pytest.approx(measured.base_ms, rel=0.4)
    smallest = Variant({**full_variant(structure).kept, **{i: c[0] for i, c in measured.choices.items()}})
    assert predict_ms(measured, structure, smallest) < base


def test_what_was_measured_is_not_measured_again(
    measured: LatencyTable, store: LutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "_profile", None)
    monkeypatch.setattr(latency, "calibrate_in_place", None)
    again = build_table(net()[1], runtime(), store, variants=VARIANTS)
    assert again.measured == 0
    assert again.coefficients == measured.coefficients
    assert again.calibration == measured.calibration


def test_a_calibration_belongs_to_its_seed(
    measured: LatencyTable, store: LutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Calibration(7.0, 7.0, 7.0, 7.0, 7.0, 7.0)
    monkeypatch.setattr(latency, "calibrate_in_place", lambda *_: other)
    assert build_table(net()[1], runtime(), store, variants=2, seed=1).calibration == other
    again = build_table(net()[1], runtime(), store, variants=VARIANTS)
    assert again.calibration == measured.calibration


@pytest.mark.parametrize(
    "spoilt",
    [
        {"shares": [0.0]},
        {"shares": [-1]},
        {"shares": 3},
        {"shares": ["x"]},
        {"shares": [None]},
        {"scale": "x"},
    ],
    ids=str,
)
def test_a_calibration_without_sense_is_none(spoilt: dict[str, object]) -> None:
    good = asdict(Calibration(1.0, 0.0, 1.0, 0.0, 0.0, 0.0, shares=(1.0, 0.5)))
    assert latency._saved(good) == Calibration(1.0, 0.0, 1.0, 0.0, 0.0, 0.0, shares=(1.0, 0.5))
    assert latency._saved({**good, **spoilt}) is None
    del good["shares"]
    assert latency._saved(good) == Calibration(1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    assert latency._saved(None) is None


def profiled(variant: Variant) -> tuple[Run, Structure]:
    structure = net()[1]
    model = rewrite(structure, plan_of_variant(structure, variant))
    terms = cost_terms(structure)
    run = profile_variant(structure, terms, model, variant.kept, runtime(), variant=0, seed=0, runs=6)
    return run, structure


def test_a_neighbour_in_all_timed_runs_leaves_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def disturbed(session: InferenceSession, feeds: Feeds, count: int) -> tuple[np.ndarray, np.ndarray]:
        wall, _ = run_times(session, feeds, count)
        return wall, np.where(np.arange(count) < 3, wall, 0.5 * wall)  # only runs that warm up are quiet

    monkeypatch.setattr(profiling, "run_times", disturbed)
    structure = net()[1]
    whole = full_variant(structure)
    model = rewrite(structure, plan_of_variant(structure, whole), split=True)
    terms = cost_terms(structure)
    run = profile_variant(structure, terms, model, whole.kept, runtime(), variant=0, seed=0, runs=6)
    assert 0 < run.plain_ms < 1e3
    assert 0 < run.sum_ms < 1e3
    assert all(0 <= sample.ms < 1e3 for sample in run.samples)


def test_every_layer_is_charged_and_no_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    as_read = profiling._events
    monkeypatch.setattr(
        profiling, "_events", lambda log: [replace(e, ms=np.full(e.ms.shape, 0.01)) for e in as_read(log)]
    )
    structure = net()[1]
    choices = {i: unit_choices(structure.dimensions[i], STEP, 16) for i in structure.prunable}
    for variant in (
        full_variant(structure),
        random_variant(structure, choices, np.random.default_rng(0), drop=0.5),
    ):
        run, _ = profiled(variant)
        gone = {
            i for b in structure.blocks if b.name in variant.removed_blocks for i in (*b.operations, b.joint)
        }
        operations = structure.shadow.operations
        timed = [t for t in cost_terms(structure) if t.operation not in gone]
        layers = [t.key for t in timed if operations[t.operation].op_type in ("Conv", "Gemm")]
        seen = [s.key for s in run.samples if s.key in layers]
        assert sorted(seen) == sorted(layers)
        assert sum(sample.ms for sample in run.samples) == pytest.approx(run.sum_ms)
        assert run.nodes == sum(sample.count for sample in run.samples)


def test_too_little_charged_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_TAG", re.compile(r"never"))
    with pytest.raises(MeasurementError, match="could be charged"):
        profiled(full_variant(net()[1]))


def test_the_demo_model_is_charged_to_98_percent() -> None:
    path = Path(onnx_mdp.__file__).parent / "demo_model" / "shapes_resnet.onnx"
    _, structure = analyse(load_model(path))
    model = rewrite(structure, plan_of_variant(structure, full_variant(structure)))
    run = profile_variant(
        structure,
        cost_terms(structure),
        model,
        full_variant(structure).kept,
        runtime(),
        variant=0,
        seed=0,
        runs=6,
    )
    assert run.samples
