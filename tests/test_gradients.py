"""Gradient scores: the derivative at a gate, on networks of both exporters, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from zoo import analyse

pytest.importorskip("torch")
import torch

from onnx_mdp.structure import Structure
from onnx_mdp.training.bridge import to_torch
from onnx_mdp.training.gradients import GateGradients

Exported = Callable[..., Path]
Vector = npt.NDArray[np.float64]
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
        assert seen == {"embedding", "heads", "qk", "value", "mlp"}


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
