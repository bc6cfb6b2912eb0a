"""Importance: laws that any sensible score obeys, whatever the weights are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from zoo import analyse, run, text_model

from onnx_mdp import concurrency
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.gradient_scores import GRADIENT_CRITERIA
from onnx_mdp.importance.scoring import (
    CRITERIA,
    Importance,
    Scores,
    activation,
    magnitude,
    ranked_rows,
    ranking,
    rescaled,
    score,
)
from onnx_mdp.plan import PruningPlan
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.torch_backend import has_torch

NET = """
(float[2,3,8,8] x) => (float[2,5] y)
<float[16,3,3,3] w0, float[16] b0, float[12,16,3,3] w1, float[16,12,1,1] w2, float[20,16,1,1] w3,
 float[5,20] w4>
{
  a0 = Conv <pads: ints = [1,1,1,1]> (x, w0, b0)
  a = Relu (a0)
  b0_ = Conv <pads: ints = [1,1,1,1]> (a, w1)
  b = Relu (b0_)
  c = Conv (b, w2)
  d = Add (a, c)
  e0 = Conv (d, w3)
  e = Relu (e0)
  f = GlobalAveragePool (e)
  g = Flatten (f)
  y = Gemm <transB: int = 1> (g, w4)
}
"""
Array = npt.NDArray[np.float32]
Edit = Callable[[dict[str, Array]], None]
FEEDS = [
    {"x": np.random.default_rng([1, n]).standard_normal((2, 3, 8, 8)).astype(np.float32)} for n in range(4)
]
# Where each dimension is made and read: (weight, axis) pairs.
SITES = {
    "conv_0": (("w0", 0), ("b0", 0), ("w1", 1), ("w2", 0), ("w3", 1)),
    "conv_2": (("w1", 0), ("w2", 1)),
    "conv_6": (("w3", 0), ("w4", 1)),
}
NEEDS_TORCH = pytest.mark.skipif(not has_torch(), reason="needs torch: pip install -e .[torch]")
NAMES = [pytest.param(n, marks=NEEDS_TORCH if n in GRADIENT_CRITERIA else []) for n in CRITERIA]
CHEAP = ("magnitude", "activation")
# A refit takes a penalty from a grid and a number of steps by an error, which rounding moves.
TOLERANCES = {"refit": 1e-2}


def edited(edit: Edit = lambda weights: None, text: str = NET, seed: int = 0) -> onnx.ModelProto:
    """The net with its weights edited in place."""
    model = text_model(text, seed=seed)
    weights = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    edit(weights)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].astype(np.float32), tensor.name))
    return model


def scored(criterion: Any, model: onnx.ModelProto) -> dict[str, npt.NDArray[np.float64]]:
    """Scores by the name of the dimension."""
    structure = analyse(model)[1]
    importance = score(structure, criterion, FEEDS)
    return {structure.dimensions[i].name: units for i, units in importance.units.items()}


def is_close(
    one: Mapping[str, npt.NDArray[np.float64]], two: Mapping[str, npt.NDArray[np.float64]], rtol: float = 1e-4
) -> None:
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=rtol, atol=1e-9, err_msg=name)


def scale(name: str, factor: float, axis: int | None = None, unit: int = 0) -> Edit:
    """Multiply a weight, or the part of one unit along an axis."""

    def apply(weights: dict[str, Array]) -> None:
        place = (slice(None),) * (axis or 0) + (unit,) if axis is not None else ()
        weights[name][place] = weights[name][place] * factor

    return apply


def both(*edits: Edit) -> Edit:
    def apply(weights: dict[str, Array]) -> None:
        for edit in edits:
            edit(weights)

    return apply


def test_the_net_has_the_dimensions_that_the_tests_speak_of() -> None:
    structure = analyse(edited())[1]
    assert {
        structure.dimensions[i].name: {(m.tensor, m.axis) for m in structure.dimensions[i].members}
        for i in structure.prunable
    } == {name: set(sites) for name, sites in SITES.items()}
    assert len(structure.blocks) == 1


@pytest.mark.parametrize("criterion", NAMES)
def test_scores_are_finite_not_negative_and_one_for_each_unit(criterion: str) -> None:
    found = scored(criterion, edited())
    assert {name: len(units) for name, units in found.items()} == {"conv_0": 16, "conv_2": 12, "conv_6": 20}
    for units in found.values():
        assert np.isfinite(units).all()
        assert (units >= 0).all()
        assert units.max() > 0


@pytest.mark.parametrize("criterion", NAMES)
def test_scaling_a_layer_and_inversely_its_consumer_changes_nothing(criterion: str) -> None:
    scaled = edited(both(scale("w3", 7.0), scale("w4", 1 / 7.0)))
    np.testing.assert_allclose(run(scaled, FEEDS[0])[0], run(edited(), FEEDS[0])[0], rtol=1e-4, atol=1e-5)
    is_close(scored(criterion, scaled), scored(criterion, edited()), TOLERANCES.get(criterion, 1e-4))


def test_activation_does_not_change_when_one_unit_is_scaled_and_its_reader_inversely() -> None:
    scaled = edited(both(scale("w3", 5.0, 0, 4), scale("w4", 1 / 5.0, 1, 4)))
    before, after = (scored("activation", model)["conv_6"] for model in (edited(), scaled))
    np.testing.assert_allclose(after, before, rtol=1e-4)
    # The weights alone cannot know that.
    assert scored("magnitude", scaled)["conv_6"][4] > 2 * scored("magnitude", edited())["conv_6"][4]


@pytest.mark.parametrize("criterion", NAMES)
@pytest.mark.parametrize("dimension", SITES)
def test_permuted_channels_have_permuted_scores(criterion: str, dimension: str) -> None:
    size = analyse(edited())[1].dimensions[analyse(edited())[1].index(dimension)].size
    order = np.random.default_rng(3).permutation(size)

    def permute(weights: dict[str, Array]) -> None:
        for name, axis in SITES[dimension]:
            weights[name] = weights[name].take(order, axis)

    before, after = scored(criterion, edited()), scored(criterion, edited(permute))
    is_close({**before, dimension: before[dimension][order]}, after, TOLERANCES.get(criterion, 1e-3))


@pytest.mark.parametrize("criterion", ["activation", "drift"])
def test_a_unit_that_nobody_reads_is_the_first_to_go(criterion: str) -> None:
    def deafen(weights: dict[str, Array]) -> None:
        weights["w4"][:, 7] = 0
        weights["w3"][7] *= 100

    structure = analyse(edited(deafen))[1]
    index = structure.index("conv_6")
    importance = score(structure, criterion, FEEDS)
    assert ranking(importance, index)[-1] == 7
    if criterion == "activation":
        assert importance.units[index][7] == 0


@pytest.mark.parametrize("criterion", NAMES)
def test_a_unit_without_any_weight_is_the_first_to_go(criterion: str) -> None:
    structure = analyse(edited(both(scale("w3", 0.0, 0, 11), scale("w4", 0.0, 1, 11))))[1]
    assert ranking(score(structure, criterion, FEEDS), structure.index("conv_6"))[-1] == 11


@pytest.mark.parametrize("criterion", NAMES)
def test_a_unit_with_most_of_the_weight_is_the_last_to_go(criterion: str) -> None:
    structure = analyse(edited(both(scale("w3", 9.0, 0, 13), scale("w4", 9.0, 1, 13))))[1]
    assert ranking(score(structure, criterion, FEEDS), structure.index("conv_6"))[0] == 13


def test_magnitude_is_the_share_of_the_squared_weights() -> None:
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in edited().graph.initializer}

    def share(name: str, axis: int) -> npt.NDArray[np.float64]:
        squares = np.moveaxis(weights[name] ** 2, axis, 0).reshape(weights[name].shape[axis], -1).sum(1)
        return np.asarray(squares / squares.sum())

    found = scored("magnitude", edited())
    for name, sites in SITES.items():
        expected = sum(share(weight, axis) for weight, axis in sites if weights[weight].ndim > 1)
        np.testing.assert_allclose(found[name], expected, rtol=1e-9)


def test_activation_is_the_share_of_the_energy_that_the_reader_receives() -> None:
    model = edited()
    model.graph.output.append(onnx.ValueInfoProto(name="g"))
    received = np.mean([np.square(run(model, feed)[1], dtype=np.float64).mean(0) for feed in FEEDS], axis=0)
    weight = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "w4")
    energy = received * (weight.astype(np.float64) ** 2).sum(0)
    np.testing.assert_allclose(scored("activation", edited())["conv_6"], energy / energy.sum(), rtol=1e-4)


def test_magnitude_sees_through_a_batch_normalisation() -> None:
    text = NET.replace(
        "e0 = Conv (d, w3)", "n = Conv (d, w3)\n  e0 = BatchNormalization (n, ga, be, mu, var)"
    )
    text = text.replace(
        "float[5,20] w4", "float[5,20] w4, float[20] ga, float[20] be, float[20] mu, float[20] var"
    )
    normalised = edited(text=text)
    weights = {t.name: numpy_helper.to_array(t) for t in normalised.graph.initializer}
    gain = weights["ga"] / np.sqrt(weights["var"] + 1e-5)

    def fold(folded: dict[str, Array]) -> None:
        folded.update({name: weights[name].copy() for name in folded})
        folded["w3"] *= gain[:, None, None, None]

    one, two = scored("magnitude", normalised), scored("magnitude", edited(fold))
    np.testing.assert_allclose(one["conv_6"], two["conv_6"], rtol=1e-5)


def test_a_branch_that_adds_little_is_worth_little() -> None:
    quiet = edited(scale("w2", 1e-3))
    assert scored("activation", quiet)["conv_2"].sum() < 1e-4 * scored("activation", edited())["conv_2"].sum()


def block_worth(model: onnx.ModelProto) -> float:
    """What a block and its inner units are worth together."""
    structure = analyse(model)[1]
    importance = score(structure, "drift", FEEDS)
    (block,) = structure.blocks
    inner = [i for i in structure.prunable if structure.dimensions[i].block == block.name]
    return importance.blocks[block.name] + float(sum(importance.units[i].sum() for i in inner))


def test_a_block_is_worth_the_drift_of_the_outputs_without_it() -> None:
    model, structure = analyse(edited())
    slim = rewrite(structure, PruningPlan({}, (structure.blocks[0].name,)))
    before, after = (np.stack([run(m, feed)[0] for feed in FEEDS]).astype(np.float64) for m in (model, slim))
    drift = np.square(after - before).sum() / np.square(before - before.mean(0)).sum()
    assert block_worth(edited()) == pytest.approx(drift, rel=1e-3)
    assert block_worth(edited(scale("w2", 0.0))) == pytest.approx(0.0, abs=1e-9)


def test_drift_orders_units_as_activation_does() -> None:
    structure = analyse(edited())[1]
    one, two = (score(structure, name, FEEDS) for name in ("drift", "activation"))
    for index in structure.prunable:
        steps = one.units[index][ranking(two, index)]
        assert (np.diff(steps) <= 0).all()


@pytest.mark.parametrize("criterion", ["activation", "drift"])
def test_data_is_demanded_where_it_is_needed(criterion: str) -> None:
    structure = analyse(edited())[1]
    with pytest.raises(UsageError, match=r"--data"):
        score(structure, criterion)


def test_magnitude_reads_no_data() -> None:
    structure = analyse(edited())[1]
    assert np.array_equal(magnitude(structure).classes, magnitude(structure, FEEDS).classes)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'magic'.*activation, drift, hessian, magnitude"):
        score(analyse(edited())[1], "magic")


def by_number(structure: Structure, feeds: Sequence[Any], progress: Any) -> Scores:
    return Scores(np.arange(structure.graph.classes, dtype=np.float64))


def test_a_function_is_a_criterion() -> None:
    structure = analyse(edited())[1]
    importance = score(structure, by_number)
    assert importance.criterion == "by_number"
    for index in structure.prunable:
        assert importance.units[index].tolist() == [float(u) for u in structure.dimensions[index].units]
        assert ranking(importance, index)[0] == len(structure.dimensions[index].units) - 1
    assert score(structure, activation, FEEDS).units.keys() == importance.units.keys()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda n: np.zeros(n + 1),
        lambda n: np.zeros((n, 1)),
        lambda n: np.full(n, np.nan),
        lambda n: np.full(n, np.inf),
    ],
)
def test_a_wrong_answer_of_a_function_is_refused(wrong: Callable[[int], Any]) -> None:
    structure = analyse(edited())[1]
    with pytest.raises(UsageError, match="one finite number for each index class"):
        score(structure, lambda s, feeds, progress: Scores(wrong(s.graph.classes)))


def test_negative_scores_count_as_zero_and_ties_keep_the_earlier_unit() -> None:
    structure = analyse(edited())[1]
    importance = score(structure, lambda s, feeds, progress: Scores(np.full(s.graph.classes, -1.0)))
    assert importance.total == 0
    for index in structure.prunable:
        assert ranking(importance, index).tolist() == list(range(len(structure.dimensions[index].units)))


def test_ties_keep_the_earlier_unit_in_long_dimensions_too() -> None:
    values = np.random.default_rng(0).integers(0, 3, 400).astype(np.float64)
    expected = sorted(range(400), key=lambda unit: (-values[unit], unit))
    assert ranking(Importance("x", {0: values}), 0).tolist() == expected


def test_the_total_is_the_sum_over_units_and_blocks() -> None:
    assert Importance("x", {0: np.asarray([1.0, 2.0]), 3: np.asarray([0.5])}, {"b": -0.25}).total == 3.25


def test_units_keep_their_order_and_take_the_worth_of_another_importance() -> None:
    _, structure = analyse(edited())
    order, scale = score(structure, magnitude), score(structure, "drift", FEEDS)
    found = rescaled(structure, order, scale)
    assert (found.criterion, found.blocks) == (order.criterion, scale.blocks)
    assert found.units.keys() == scale.units.keys() == set(structure.prunable)
    for index, worth in found.units.items():
        ranked = worth[ranked_rows(structure, order, index)]
        assert (np.diff(ranked, axis=1) <= 0).all()
        np.testing.assert_array_equal(np.sort(worth), np.sort(scale.units[index]))


def test_units_that_others_stand_for_after_a_refit_are_worth_next_to_nothing() -> None:
    def eight_mix_four(weights: dict[str, Array]) -> None:
        mixed = np.random.default_rng(3).standard_normal((8, 4)).astype(np.float32) / 2
        weights["w1"][4:] = np.tensordot(mixed, weights["w1"][:4], 1)

    model = edited(eight_mix_four, text=NET.replace("b = Relu (b0_)", "b = Identity (b0_)"))
    structure = analyse(model)[1]
    feeds = [
        {"x": np.random.default_rng([2, n]).standard_normal((2, 3, 8, 8)).astype(np.float32)}
        for n in range(40)
    ]
    index = next(i for i in structure.prunable if structure.dimensions[i].name == "conv_2")
    # The cheapest seven of twelve: the five that are left can do all that they did.
    shares = {}
    for criterion in ("drift", "refit"):
        units = np.sort(score(structure, criterion, feeds).units[index])
        shares[criterion] = units[:7].sum() / units.sum()
    assert shares["refit"] < 0.02
    assert shares["drift"] > 2 * shares["refit"]


def test_a_block_is_worth_less_once_the_layers_behind_it_are_refitted() -> None:
    structure = analyse(edited())[1]
    feeds = [
        {"x": np.random.default_rng([4, n]).standard_normal((2, 3, 8, 8)).astype(np.float32)}
        for n in range(40)
    ]
    (block,) = structure.blocks
    inside = [i for i in structure.prunable if structure.dimensions[i].block == block.name]
    worth = {}
    for criterion in ("drift", "refit"):
        found = score(structure, criterion, feeds)
        worth[criterion] = found.blocks[block.name] + sum(found.units[i].sum() for i in inside)
    assert 0 < worth["refit"] < 0.7 * worth["drift"]


@pytest.mark.parametrize("criterion", ["drift", "refit"])
def test_scores_are_the_same_bits_on_any_number_of_processors(
    criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = analyse(edited())[1]
    found = []
    for count in (1, 4):
        monkeypatch.setattr(concurrency, "usable_cpus", lambda count=count: count)
        found.append(score(structure, criterion, [*FEEDS, *FEEDS[::-1]]))
    alone, shared = found
    assert alone.blocks == shared.blocks
    for index, worth in alone.units.items():
        np.testing.assert_array_equal(worth, shared.units[index])


def test_a_refit_needs_inputs_to_hold_out() -> None:
    structure = analyse(edited())[1]
    with pytest.raises(UsageError, match="4 calibration inputs or more, not 3"):
        score(structure, "refit", FEEDS[:3])
