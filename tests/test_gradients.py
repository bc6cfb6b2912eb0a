"""Gradient scores: the derivative at a gate, on networks of both exporters, and what is made of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from command_line import Outcome
from mutations import made_up_table
from test_quantisation import stored_model
from test_scoring import FEEDS, edited
from zoo import analyse

pytest.importorskip("torch")
import torch

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.importance import gradient_scores as gradient_module
from onnx_mdp.importance.gradient_scores import GradientOptions, gradient_scores
from onnx_mdp.importance.scoring import gradient_criterion, score
from onnx_mdp.numerics.integer_form import without_rounding
from onnx_mdp.running.computation import Computation
from onnx_mdp.tables.table_file import table_json
from onnx_mdp.training.bridge import to_torch
from onnx_mdp.training.gradients import GateGradients

Exported = Callable[..., Path]
Run = Callable[..., Outcome]
Vector = npt.NDArray[np.float64]
KINDS = {"embedding", "heads", "qk", "value", "mlp"}
EPSILON = 1e-8  # in float64: the kinks of ReLU are rarely met
CASES = [
    ("deit_micro", "torchscript"),
    ("deit_micro", "dynamo"),
    ("cifar_resnet8_pad_small", "torchscript"),
    pytest.param("cifar_resnet8_pad_small", "dynamo", marks=pytest.mark.slow),
    pytest.param("mobilenet_v2_small", "torchscript", marks=pytest.mark.slow),
    pytest.param("swin_micro", "torchscript", marks=pytest.mark.slow),
    pytest.param("swin_micro", "dynamo", marks=pytest.mark.slow),
]


def feeds_of(structure: Structure, count: int = 3) -> list[dict[str, npt.NDArray[np.float32]]]:
    return [
        {
            name: np.random.default_rng([seed, place]).standard_normal(shape).astype(np.float32)
            for place, (name, shape) in enumerate(structure.shadow.inputs.items())
        }
        for seed in range(count)
    ]


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_a_score_is_the_derivative_of_the_loss_by_the_mask_of_its_unit(
    name: str, exporter: str, exported: Exported
) -> None:
    _, structure = analyse(exported(name, exporter))
    engine = GateGradients(structure, double=True)
    feeds = feeds_of(structure)
    loss = engine.loss("fisher", feeds)
    units, blocks = engine.of(0, feeds[0], loss)
    ones, on = np.ones(structure.graph.classes), np.ones(len(structure.blocks))

    def slope(classes: list[int], block: int | None = None) -> float:
        values = []
        for sign in (1, -1):
            gates, branches = ones.copy(), on.copy()
            gates[classes] += sign * EPSILON
            if block is not None:
                branches[block] += sign * EPSILON
            values.append(engine.value(0, feeds[0], loss, gates, branches))
        return (values[0] - values[1]) / (2 * EPSILON)

    scale = float(np.abs(units).max())
    seen = set()
    for index in structure.prunable:
        dimension = structure.dimensions[index]
        unit = dimension.units[index % len(dimension.units)]
        held = np.flatnonzero(structure.graph.head == unit).tolist()
        values = [n for n in held if structure.graph.kinds.get(n) != "qk"]
        assert units[0, unit] == pytest.approx(slope(values or [unit]), abs=1e-5 * scale)
        seen.add(dimension.kind)
    for place in range(len(structure.blocks)):
        assert blocks[0, place] == pytest.approx(slope([], place), abs=1e-5 * abs(blocks).max())
    if name == "deit_micro":
        assert seen == KINDS


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_before_a_linear_layer_a_score_is_the_sum_of_weights_times_gradients(
    name: str, exporter: str, exported: Exported
) -> None:
    _, structure = analyse(exported(name, exporter))
    engine = GateGradients(structure, double=True)
    feeds = feeds_of(structure)
    loss = engine.loss("labels", feeds, [np.asarray([3])] * len(feeds))
    units, _ = engine.of(0, feeds[0], loss)
    wanted = by_weights(structure, loss, feeds[0])
    checked = 0
    for dimension in (structure.dimensions[i] for i in structure.prunable):
        if dimension.kind not in ("embedding", "heads"):  # an embedding has statistics too, heads no weights
            found = units[0, list(dimension.units)]
            np.testing.assert_allclose(found, wanted[list(dimension.units)], atol=1e-9 * np.abs(units).max())
            checked += 1
    assert checked >= 3


def by_weights(structure: Structure, loss: object, feed: dict[str, npt.NDArray[np.float32]]) -> Vector:
    """Σ w · ∂L/∂w of what reads a unit; of query and key, which no weights read, of what makes it."""
    module = to_torch(structure.shadow.model).double()
    inputs = {name: torch.from_numpy(array).double() for name, array in feed.items()}
    loss(0, inputs, module.run(inputs)).sum().backward()  # type: ignore[operator]
    weights = module.weights()
    found = np.zeros(structure.graph.classes)
    kinds = structure.graph.kinds
    for site in structure.graph.sites:
        name = structure.shadow.operations[site.operation].inputs[site.slot]
        if name not in weights or weights[name].grad is None:
            continue
        product = (weights[name] * weights[name].grad).detach().numpy()
        others = tuple(axis for axis in range(product.ndim) if axis != site.axis)
        parts = product.sum(axis=others)
        made = np.asarray([kinds.get(int(n)) == "qk" for n in site.labels])
        # Query and key have the same sum: the product is linear in either.
        np.add.at(
            found, site.labels, np.where(made, 0.5 * (site.role != "in") * parts, (site.role == "in") * parts)
        )
    return found


def means(structure: Structure, feeds: Any, options: GradientOptions = GradientOptions()) -> Vector:
    """The mean of |s| of each class, before it is scaled."""
    found: list[Vector] = []

    def finish(classes: Vector) -> tuple[Vector, Vector]:
        found.append(classes)
        return classes, np.zeros(len(structure.blocks))

    kept = gradient_scores(structure, "taylor", feeds, options, finish, lambda *_: None)[0]
    return found[0] if found else kept


@pytest.mark.parametrize("loss", ["projection", "fisher"])
def test_scores_are_the_same_twice_and_for_either_exporter(loss: str, exported: Exported) -> None:
    found = []
    for exporter in ("torchscript", "dynamo", "dynamo"):
        _, structure = analyse(exported("deit_micro", exporter))
        sums = means(structure, feeds_of(structure), GradientOptions(loss))
        found.append([sums[list(structure.dimensions[i].units)] for i in structure.prunable])
    assert len(found[0]) == 9
    for traced, first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(traced, first, rtol=1e-4, atol=1e-5 * first.max())
        assert np.isfinite(first).all()
        assert (first > 0).all()


def test_heads_widths_and_embedding_of_a_transformer_have_scores(exported: Exported) -> None:
    _, structure = analyse(exported("deit_micro"))
    importance = score(structure, "hessian", feeds_of(structure))
    assert {structure.dimensions[i].kind for i in importance.units} == {
        "embedding",
        "heads",
        "qk",
        "value",
        "mlp",
    }
    for units in importance.units.values():
        assert np.isfinite(units).all()
    assert importance.blocks.keys() == {block.name for block in structure.blocks}


def test_a_file_of_scores_resumes_where_it_was_interrupted(tmp_path: Path) -> None:
    _, structure = analyse(edited())
    options = GradientOptions(file=tmp_path / "scores.npz")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "gradients" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradient_criterion("taylor", options)(structure, FEEDS, interrupt)
    with np.load(tmp_path / "scores.npz") as kept:
        assert kept["counts"].tolist() == [2, 4]  # a feed is a batch of two
    seen: list[int] = []
    note = lambda stage, done, total: seen.append(done) if stage == "gradients" else None  # noqa: E731
    resumed = gradient_criterion("taylor", options)(structure, FEEDS, note)
    assert seen == [2, 3, 4]
    whole = gradient_criterion("taylor")(structure, FEEDS, lambda *_: None)
    np.testing.assert_allclose(resumed.classes, whole.classes)
    assert resumed.blocks == whole.blocks


def test_a_file_of_scores_spares_all_work_for_both_criteria(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, structure = analyse(edited())
    options = GradientOptions(file=tmp_path / "scores.npz")
    first = {
        n: gradient_criterion(n, options)(structure, FEEDS, lambda *_: None) for n in ("taylor", "hessian")
    }

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(gradient_module, "require_torch", refuse)
    for name, scores in first.items():
        again = gradient_criterion(name, options)(structure, FEEDS, refuse)
        np.testing.assert_array_equal(again.classes, scores.classes)
        assert again.blocks == scores.blocks


def test_a_file_of_other_scores_is_refused(tmp_path: Path) -> None:
    _, structure = analyse(edited())
    _, other = analyse(edited(seed=1))
    options = GradientOptions(file=tmp_path / "scores.npz")
    means(structure, FEEDS, options)
    labels = (np.asarray([0, 1]),) * len(FEEDS)
    for what, model, feeds, wanted in (
        ("another model", other, FEEDS, options),
        ("other calibration inputs", structure, FEEDS[:3], options),
        ("other calibration inputs or labels", structure, FEEDS, replace(options, labels=labels)),
        ("another loss", structure, FEEDS, replace(options, loss="fisher")),
        ("another loss or seed", structure, FEEDS, replace(options, seed=1)),
    ):
        with pytest.raises(UsageError, match=what):
            means(model, feeds, wanted)
    (tmp_path / "scores.npz").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="no file of scores"):
        means(structure, FEEDS, options)


def test_labels_and_a_loss_of_ones_own_are_taken() -> None:
    _, structure = analyse(edited())
    labels = (np.asarray([0, 4]),) * len(FEEDS)

    def cross_entropy(inputs: Any, outputs: Any) -> Any:
        return torch.nn.functional.cross_entropy(outputs["y"], torch.tensor([0, 4]), reduction="sum")

    engine = GateGradients(structure)
    one, _ = engine.of(0, FEEDS[0], engine.loss("labels", FEEDS, labels))
    two, _ = engine.of(0, FEEDS[0], engine.loss(cross_entropy, FEEDS))
    assert (one.shape[0], two.shape[0]) == (2, 1)
    np.testing.assert_allclose(one.sum(0), two[0], rtol=1e-3, atol=1e-4)
    for loss, why in (
        (lambda x, y: y["y"], "one number"),
        (lambda x, y: torch.zeros(()), "depends on nothing"),
    ):
        with pytest.raises(UsageError, match=why):
            engine.of(0, FEEDS[0], engine.loss(loss, FEEDS))
    with pytest.raises(UsageError, match="do not fit a model of 5 classes"):
        engine.of(0, FEEDS[0], engine.loss("labels", FEEDS, (np.asarray([0, 5]),)))
    with pytest.raises(UsageError, match="one label for each"):
        means(structure, FEEDS, GradientOptions(labels=labels[:1]))


def test_samples_of_a_batch_are_scored_one_by_one() -> None:
    """Per-sample: the sum over a batch would hide units whose gradients cancel."""
    _, structure = analyse(edited())
    engine = GateGradients(structure)
    labels = [np.asarray([0, 4])]
    signed, _ = engine.of(0, FEEDS[0], engine.loss("labels", FEEDS[:1], labels))
    turned = {"x": FEEDS[0]["x"][::-1].copy()}
    swapped, _ = engine.of(0, turned, engine.loss("labels", [turned], [labels[0][::-1].copy()]))
    np.testing.assert_allclose(signed, swapped[::-1], rtol=1e-3, atol=1e-5)
    assert np.abs(signed[0] - signed[1]).max() > 1e-3


def test_a_quantized_model_has_gradients_of_what_it_computes_in_real_numbers() -> None:
    _, structure = analyse(stored_model())
    feeds = feeds_of(structure)
    importance = score(structure, "taylor", feeds)
    (units,) = importance.units.values()
    assert (units > 0).all()
    engine = GateGradients(structure)
    signed, _ = engine.of(0, feeds[0], engine.loss(lambda inputs, outputs: outputs["y"].sum(), feeds))
    plain = Computation(without_rounding(structure.shadow.model, {"t": 4, "q": 4, "u": 4}), ["u"])
    (seen,) = plain.run(["u"], feeds[0])
    weight = structure.shadow.constants["c"]
    wanted = np.einsum("nchw,oc->c", seen, weight[:, :, 0, 0])
    dimension = structure.dimensions[structure.prunable[0]]
    np.testing.assert_allclose(signed[0, list(dimension.units)], wanted, rtol=1e-3, atol=1e-3)


def save_net(folder: Path) -> tuple[str, ...]:
    """A model, a table and labelled inputs; the line that solves it."""
    _, structure = analyse(edited())
    onnx.save(edited(), folder / "net.onnx")
    (folder / "table.json").write_text(table_json(structure, made_up_table(structure)))
    images = np.concatenate([feed["x"] for feed in FEEDS])
    np.savez(folder / "data.npz", x=images, labels=np.arange(len(images)) % 5)
    return "solve", "net.onnx", "table.json", "--target-ratio", "0.8", "--data", "data.npz"


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_solve_ranks_by_gradients_and_keeps_what_they_cost(run: Run, tmp_path: Path, criterion: str) -> None:
    line = [*save_net(tmp_path), "--criterion", criterion, "--scores", "scores.npz", "--samples"]
    done = run(*line, "4", "-o", "plan.json")
    assert done.code == 0, done.err
    assert "taking the gradient" in done.err
    assert json.loads((tmp_path / "plan.json").read_text())["provenance"]["criterion"] == criterion
    with np.load(tmp_path / "scores.npz") as kept:
        assert kept["counts"].tolist() == [2, 4]
        assert json.loads(str(kept["about"]))["identity"]["loss"] == "labels 0"
    assert "taking the gradient" not in run(*line, "4").err
    other = run(*line, "8")
    assert (other.code, "other calibration inputs" in other.err) == (2, True)


def test_a_loss_of_ones_own_is_named_on_the_command_line(run: Run, tmp_path: Path) -> None:
    plain = save_net(tmp_path)
    line = [*plain, "--criterion", "taylor", "--loss"]
    (tmp_path / "mine.py").write_text("def loss(inputs, outputs):\n    return outputs['y'].square().sum()\n")
    assert run(*line, "mine.py:loss").code == 0
    for wrong, why in (("mine.py:gone", "no function gone"), ("mse", "unknown loss 'mse'")):
        done = run(*line, wrong)
        assert (done.code, why in done.err) == (2, True), done.err
    for option in (["--loss", "fisher"], ["--scores", "s.npz"], ["--labels", "labels"]):
        done = run(*plain, *option)
        assert (done.code, "--criterion hessian or taylor" in done.err) == (2, True), done.err
    assert run(*line, "labels", "--labels", "missing").code == 2


def test_without_torch_a_sentence_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = save_net(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    done = run(*line, "--criterion", "taylor")
    assert done.code == 3
    assert "pip install 'onnx-mdp[torch]'" in done.err
