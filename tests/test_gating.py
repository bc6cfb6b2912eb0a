"""The gated model: with gates of 0 and 1 it is the masked original, wherever units end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from test_rules import ALL, ATTENTION, CONTRACTION, NORMALISATION, UNIT_STATISTICS, model_of
from zoo import analyse, random_plan, zoo_structure

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.numerics.integer_form import without_rounding
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.running.computation import Computation
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery.gating import gated_model
from onnx_mdp.surgery.masking import masked_model

Exported = Callable[..., Path]
ZOO = ("cifar10/resnet20.onnx", "detect/ultraface_rfb320.onnx", "cifar10/vit_p4_d128_dynamo.onnx")
NETS = [pytest.param(n, marks=pytest.mark.slow) for n in ("mobilenet_v2_small", "swin_micro")]
# Elsewhere units only pass.
ENDS = {**NORMALISATION, **CONTRACTION, **UNIT_STATISTICS, **ATTENTION, "option-A shortcut": None}
CASES = [pytest.param(n, marks=[] if n in ENDS else pytest.mark.slow) for n in ALL]


def assert_masked(model: ir.Model, structure: Structure, *seeds: int) -> None:
    gated = gated_model(structure)
    runs = Computation(gated.model)
    ranks = {name: len(shape) for name, shape in structure.shadow.shapes.items()}
    for seed in seeds:
        plan = random_plan(structure, np.random.default_rng(seed)) if seed else PruningPlan(keep={})
        masked = Computation(without_rounding(masked_model(model, structure, plan), ranks))
        feeds = random_feeds(masked.inputs, structure.shadow.inputs, seed)
        gates = gated.feeds(~removed_classes(plan, structure), plan.removed_blocks)
        names = [name for name in masked.tensors if name in structure.shadow.outputs]
        pairs = zip(masked.run(names, feeds), runs.run(names, feeds | gates), strict=True)
        for expected, actual in pairs:
            scale = np.abs(np.nan_to_num(expected, posinf=0, neginf=0)).max(initial=1e-3)
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", CASES)
def test_gates_of_zero_and_one_are_masks_in_every_rule(name: str) -> None:
    assert_masked(*analyse(model_of(name), ALL[name].shapes), 0, 1)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.zoo
def test_gates_of_zero_and_one_are_masks_on_the_zoo(name: str) -> None:
    assert_masked(*zoo_structure(name), 0, 1)


@pytest.mark.parametrize("name", ["deit_micro", *NETS])
def test_gates_of_zero_and_one_are_masks_on_exports(name: str, exported: Exported) -> None:
    assert_masked(*analyse(exported(name)), 0, 1, 2)


@pytest.mark.parametrize("name", ["deit_micro", pytest.param("mobilenet_v2_small", marks=pytest.mark.slow)])
def test_a_unit_that_passes_a_layer_and_one_that_meets_another_have_one_gate(
    name: str, exported: Exported
) -> None:
    _, structure = analyse(exported(name))
    where = [set(labels[labels > 0].tolist()) for labels in gated_model(structure).units.values()]
    for dimension in (structure.dimensions[i] for i in structure.prunable):
        if dimension.block is not None and dimension.kind != "heads":
            assert sum(not gate.isdisjoint(dimension.units) for gate in where) == 1, dimension.name
