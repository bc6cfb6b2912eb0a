"""`--rescale-attention`: scores divided by the root of the width that is left, in the masked model too."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from test_attention import CASES, prunable
from zoo import analyse, prune_checked, random_plan, run

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.plan import PruningPlan, plan_identity, removed_classes
from onnx_mdp.surgery.attention_scale import score_factors


def one_of_each_head(structure: Structure) -> PruningPlan:
    """The first unit of query and key in every head."""
    (width,) = (d for d in prunable(structure) if d.kind == "qk")
    keep = {width.name: tuple(row * width.count for row in range(width.rows))}
    return PruningPlan(keep=keep, rescale_attention=True)


@pytest.mark.parametrize("name", CASES)
def test_the_law_holds_with_rescaled_scores(name: str) -> None:
    model, structure = analyse(CASES[name].model())
    for seed in range(4):
        plan = random_plan(structure, np.random.default_rng(seed))
        _, evidence = prune_checked(model, structure, replace(plan, rescale_attention=True))
        assert evidence.worst <= 1e-5


@pytest.mark.parametrize(
    ("name", "op_type", "expected"),
    [
        ("separate projections", "Mul", 0.5 * 2),
        ("heads folded with the batch", "Mul", 0.5 * 2),
        ("scale computed from the width of a head", "Div", 1.0),
    ],
)
def test_a_constant_of_the_file_takes_the_factor(name: str, op_type: str, expected: float) -> None:
    """One of four units stays: scores that were divided by two are divided by one."""
    model, structure = analyse(CASES[name].model())
    pruned, _ = prune_checked(model, structure, one_of_each_head(structure))
    plain, _ = prune_checked(model, structure, replace(one_of_each_head(structure), rescale_attention=False))
    assert len(pruned.graph) == len(plain.graph)
    scales = [n.inputs[1].const_value.numpy() for n in pruned.graph if n.op_type == op_type]
    assert scales == [pytest.approx(expected)]


def test_an_operator_takes_the_factor_as_its_scale() -> None:
    model, structure = analyse(CASES["heads apart"].model())
    pruned, _ = prune_checked(model, structure, one_of_each_head(structure))
    (node,) = (n for n in pruned.graph if n.op_type == "Attention")
    assert node.attributes["scale"].as_float() == pytest.approx(1.0)


def test_where_there_is_no_constant_a_product_comes_before_the_scores() -> None:
    """`softmax(q kᵀ + table)`: the pruned one is that of twice the query, computed by hand."""
    model, structure = analyse(CASES["a bias for each head"].model())
    plan = one_of_each_head(structure)
    pruned, _ = prune_checked(model, structure, plan)
    assert [n.op_type for n in pruned.graph].count("Mul") == 1
    plain, _ = prune_checked(model, structure, replace(plan, rescale_attention=False))
    for name in ("wq", "bq"):
        value = plain.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = type(value.const_value)(2 * value.const_value.numpy(), name=name)  # type: ignore[call-arg]
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 5, 6)).astype(np.float32)}
    np.testing.assert_allclose(run(pruned, feeds)[0], run(plain, feeds)[0], rtol=1e-5, atol=1e-6)


def test_heads_that_go_and_widths_that_stay_need_no_factor() -> None:
    _, structure = analyse(CASES["separate projections"].model())
    heads, width, value = prunable(structure)

    def factors(keep: dict[str, tuple[int, ...]]) -> list[float]:
        plan = PruningPlan(keep=keep)
        return list(score_factors(structure, removed_classes(plan, structure)).values())

    assert factors({heads.name: (0, 2), value.name: (0, 4, 8)}) == []
    assert factors({heads.name: (0, 2), width.name: (0, 1, 4, 5, 8, 9)}) == [pytest.approx(math.sqrt(2))]


def test_a_plan_that_rescales_is_another_plan() -> None:
    plan = PruningPlan(keep={"a": (0,)})
    assert plan_identity(plan) != plan_identity(replace(plan, rescale_attention=True))
