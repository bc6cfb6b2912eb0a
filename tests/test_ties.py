"""Choices among nearly equal scores neither fail a right model nor excuse a wrong one."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from zoo import text_model

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.plan import PruningPlan
from onnx_mdp.surgery.comparison import Trial, compare
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.ties import choices
from onnx_mdp.surgery.verification import Evidence, verify

# Fifty of 200 rows by a score that rounding tells apart; each stands for a payload of its own.
QUERIES = """(float[1,200,16] x, float[1,200,3] p) => (float[1,50,3] y, float[1,50,1] best) <
    float[16,64] a, float[64] b, float[64] c, int64[1] last = {-1}, int64[1] k = {50},
    int64[3] s = {1, 50, 3}> {
    t = MatMul(x, a)
    g = Add(t, b)
    u = Tanh(g)
    v = Mul(u, c)
    scores = ReduceSum(v, last)
    best, places = TopK<axis=1>(scores, k)
    table = Expand(places, s)
    y = GatherElements<axis=1>(p, table)
}"""


def case() -> tuple[ir.Model, Structure, PruningPlan, list[dict[str, np.ndarray]]]:
    """The model, a plan, and inputs whose rows are nearly the same."""
    model = load_model(text_model(QUERIES))
    structure = analyze(model, {})
    (name,) = (structure.dimensions[i].name for i in structure.prunable)
    plan = PruningPlan(keep={name: tuple(range(0, 64, 3))})
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1, 1, 16)) + 3e-7 * rng.standard_normal((1, 200, 16))
    feed = {"x": rows, "p": rng.standard_normal((1, 200, 3))}
    return model, structure, plan, [{n: v.astype(np.float32) for n, v in feed.items()}]


def judged(edit: str = "") -> Evidence:
    """The verification of the pruned model, after an edit of one node."""
    model, structure, plan, feeds = case()
    proto = ir.to_proto(rewrite(structure, plan))
    operator, _, what = edit.partition(": ")
    for node in [n for n in proto.graph.node if n.op_type == operator]:
        if what == "reversed":
            node.attribute.append(onnx.helper.make_attribute("largest", 0))
        elif what == "scaled":
            name = node.output[0]
            node.output[0] = f"{name}__true"
            factor = onnx.numpy_helper.from_array(np.asarray(1.001, np.float32), f"{name}__factor")
            proto.graph.initializer.append(factor)
            at = list(proto.graph.node).index(node)
            proto.graph.node.insert(
                at + 1, onnx.helper.make_node("Mul", [node.output[0], factor.name], [name])
            )
    return verify(model, structure, ir.from_proto(proto), plan, feeds=feeds)


def test_scores_within_rounding_may_be_ordered_otherwise() -> None:
    evidence = judged()
    assert evidence.followed, "no two scores changed places: this case tests nothing"
    assert evidence.verified, evidence


@pytest.mark.parametrize(
    "edit", ["TopK: reversed", "ReduceSum: scaled", "GatherElements: scaled", "Tanh: scaled"]
)
def test_a_wrong_model_is_not_excused(edit: str) -> None:
    assert not judged(edit).verified


def test_a_model_without_near_ties_is_compared_as_it_is() -> None:
    model, structure, plan, _ = case()
    evidence = verify(model, structure, rewrite(structure, plan), plan)
    assert evidence.verified
    assert not evidence.followed


def test_the_reference_may_be_run_again_following_itself() -> None:
    _, structure, plan, feeds = case()
    pruned = rewrite(structure, plan)
    other = rewrite(structure, PruningPlan(keep={next(iter(plan.keep)): tuple(range(0, 64, 2))}))
    found = compare(pruned, other, ["y", "best"], [Trial(feeds[0])], 1e-5)
    assert found.followed
    assert found.worst.ratio > 1e-3
    again = compare(found.reference, found.reference, found.names, [Trial(found.fed[0])], 1e-5)
    assert again.worst.ratio == 0


def test_an_unsorted_choice_is_not_followed() -> None:
    assert choices(load_model(text_model(QUERIES)))
    assert not choices(load_model(text_model(QUERIES.replace("TopK<axis=1>", "TopK<axis=1, sorted=0>"))))
