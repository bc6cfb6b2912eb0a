"""Laws of fusing again: equal widths give the original nodes, unequal ones stay split, and both are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from zoo import analyse, informative, operands, prune_checked, random_plan, run, text_model

from onnx_mdp.analysis.structure import Dimension, Structure
from onnx_mdp.plan import PruningPlan, kept_count
from onnx_mdp.surgery import fusion
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import verify

Exported = Callable[..., Path]

MODELS = ("deit_micro", "deit_distilled_micro", "swin_micro", "pvt_micro")
EXPORTS = [
    pytest.param(
        name,
        exporter,
        dynamic,
        id=f"{name}-{exporter}-{'dynamic' if dynamic else 'static'}",
        marks=[] if exporter == "torchscript" or name == "deit_micro" else [pytest.mark.slow],
    )
    for name in MODELS
    for exporter in ("torchscript", "dynamo")
    for dynamic in (False, True)
]


def described(model: ir.Model) -> dict[str, tuple[object, ...]]:
    """Every node by the name of its first output."""
    return {
        str(n.outputs[0].name): (
            n.op_type,
            n.name,
            [None if v is None else v.name for v in n.inputs],
            [v.name for v in n.outputs],
            {k: str(a.value) for k, a in n.attributes.items()},
        )
        for n in model.graph
    }


def parts_of(model: ir.Model) -> list[str]:
    return [str(node.name) for node in model.graph if "/part_" in str(node.name)]


def pairs(structure: Structure) -> list[tuple[Dimension, Dimension]]:
    """The query/key and value widths of each attention that was fused, in graph order."""
    widths = [structure.dimensions[i] for i in structure.prunable]
    keys = [d for d in widths if d.kind == "qk"]
    return list(zip(keys, [d for d in widths if d.kind == "value"], strict=True))


def equal_widths(structure: Structure, seed: int) -> PruningPlan:
    """A random plan that keeps as many units of query, key and value in each layer, others in each head."""
    rng = np.random.default_rng(seed)
    plan = random_plan(structure, rng, blocks=False, least=0.3, fewest=2)
    keep = dict(plan.keep)
    for dimensions in pairs(structure):
        count = int(rng.integers(2, dimensions[0].count + 1))
        for d in dimensions:
            rows = [rng.choice(d.count, count, replace=False) + row * d.count for row in range(d.rows)]
            keep[d.name] = tuple(sorted(np.concatenate(rows).tolist()))
    return PruningPlan(keep=keep)


@pytest.mark.parametrize(("name", "exporter", "dynamic"), EXPORTS)
def test_an_attention_that_is_not_pruned_keeps_its_nodes(
    name: str, exporter: str, dynamic: bool, exported: Exported
) -> None:
    model, structure = analyse(exported(name, exporter, dynamic_batch=dynamic))
    assert structure.shadow.split
    same = rewrite(structure, PruningPlan(keep={}))
    assert described(same) == described(structure.shadow.unsplit)
    assert set(described(same)) <= set(described(model))
    assert set(same.graph.initializers) == set(structure.shadow.unsplit.graph.initializers)
    for key, value in structure.shadow.unsplit.graph.initializers.items():
        held = same.graph.initializers[key].const_value
        assert held is not None
        assert value.const_value is not None
        assert held.tobytes() == value.const_value.tobytes()
    images = np.random.default_rng(0).standard_normal((3 if dynamic else 1, 3, 32, 32)).astype(np.float32)
    assert np.array_equal(*(run(m, {"image": images})[0] for m in (model, same)))


@pytest.mark.parametrize(("name", "exporter", "dynamic"), EXPORTS)
def test_equal_widths_are_fused_whatever_stays(
    name: str, exporter: str, dynamic: bool, exported: Exported
) -> None:
    model, structure = analyse(exported(name, exporter, dynamic_batch=dynamic))
    wanted = described(structure.shadow.unsplit)
    for seed in range(4):
        plan = equal_widths(structure, seed)
        pruned, evidence = prune_checked(model, structure, plan)
        assert evidence.worst <= 1e-5
        assert evidence.inputs_tried == (5 if dynamic else 4)
        assert parts_of(pruned) == []
        found = described(pruned)
        assert {found[key][0] for key in set(found) - set(wanted)} <= {"Where"}
        assert set(wanted) <= set(found)
        assert all(found[key][:2] == wanted[key][:2] for key in wanted)
        _, again = analyse(pruned)
        kept = [kept_count(plan, structure, i) for i in range(len(structure.dimensions))]
        assert [d.count for d in again.dimensions] == kept
        assert len(again.shadow.split) == len(structure.shadow.split)
    assert informative(pruned, structure)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_unequal_widths_stay_split_layer_by_layer(exporter: str, dynamic: bool, exported: Exported) -> None:
    model, structure = analyse(exported("deit_micro", exporter, dynamic_batch=dynamic))
    plan = equal_widths(structure, 1)
    first = pairs(structure)[0][1]
    keep = dict(plan.keep)
    per_head = len(keep[first.name]) // first.rows
    count = per_head + 1 if per_head < first.count else per_head - 1
    keep[first.name] = tuple(row * first.count + unit for row in range(first.rows) for unit in range(count))
    pruned, evidence = prune_checked(model, structure, PruningPlan(keep=keep))
    assert evidence.worst <= 1e-5
    names = structure.shadow.split
    found = set(described(pruned))
    assert names[0].linear not in found
    assert names[1].linear in found
    assert all(name.split("/part_")[1][0] in "012" for name in parts_of(pruned))
    assert len(parts_of(pruned)) >= 9


@pytest.mark.parametrize("name", MODELS)
def test_the_split_form_is_the_same_function(name: str, exported: Exported) -> None:
    _, structure = analyse(exported(name))
    plan = equal_widths(structure, 2)
    image = {"image": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)}
    fused, split = rewrite(structure, plan), rewrite(structure, plan, split=True)
    assert parts_of(fused) == []
    assert parts_of(split) != []
    (a,), (b,) = run(fused, image), run(split, image)
    assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max()


def test_a_removed_block_leaves_nothing_to_fuse(exported: Exported) -> None:
    model, structure = analyse(exported("deit_micro"))
    attentions = tuple(block.name for block in structure.blocks if block.kind == "attention")
    pruned, _ = prune_checked(model, structure, PruningPlan(keep={}, removed_blocks=attentions[:1]))
    assert structure.shadow.split[0].linear not in described(pruned)
    assert structure.shadow.split[1].linear in described(pruned)


def test_a_fused_model_can_be_pruned_again(exported: Exported) -> None:
    """Each prune patches the computed shape once more; names stay unique."""
    model, structure = analyse(exported("deit_micro", "torchscript", dynamic_batch=True))
    for seed in (3, 4, 5):
        pruned, _ = prune_checked(model, structure, equal_widths(structure, seed))
        assert parts_of(pruned) == []
        names = [node.name for node in pruned.graph]
        assert len(set(names)) == len(names)
        model, structure = analyse(pruned)
    assert sum("/pruned_1" in str(name) for name in names) >= 6


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_parts_that_are_joined_in_the_wrong_order_are_noticed(
    exporter: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, structure = analyse(exported("deit_micro", exporter))
    plan = equal_widths(structure, 5)
    right = rewrite(structure, plan)
    joined = fusion._joined
    monkeypatch.setattr(
        fusion, "_joined", lambda original, axis, slot, split: joined(original, axis, slot, list(split)[::-1])
    )
    wrong = rewrite(structure, plan)
    assert operands(wrong) != operands(right)
    assert verify(model, structure, right, plan).verified
    assert not verify(model, structure, wrong, plan).verified


WEIGHTS = (
    "float[12,36] w, float[36] b, int64[5] shape = {1,5,3,3,4}, int64[3] merge = {1,5,12}, float[12,6] out"
)
SPLIT = "t = Reshape(%s, shape) u = Transpose<perm=[2,0,3,1,4]>(t)\n"
GATHERS = "q = Gather<axis=0>(u, i0) k0 = Gather<axis=0>(u, i1) v = Gather<axis=0>(u, i2)\n"
REST = """k = Transpose<perm=[0,1,3,2]>(k0) s0 = MatMul(q, k) s = Softmax<axis=-1>(s0) m0 = MatMul(s, v)
    m1 = Transpose<perm=[0,2,1,3]>(m0) m = Reshape(m1, merge) y = MatMul(m, out)"""
INDICES = "int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}"
LINEAR = {
    "no bias": "p = MatMul(x, w)\n",
    "a bias before": "p0 = MatMul(x, w) p = Add(b, p0)\n",
    "a bias for all parts": "p0 = MatMul(x, w) p = Add(p0, one)\n",
}


@pytest.mark.parametrize("linear", LINEAR)
def test_every_form_of_the_layer_is_fused(linear: str) -> None:
    body = LINEAR[linear] + SPLIT % "p" + GATHERS + REST
    text = f"(float[1,5,12] x) => (float[1,5,6] y) <{WEIGHTS}, {INDICES}, float[1] one> {{ {body} }}"
    model, structure = analyse(text_model(text))
    assert described(rewrite(structure, PruningPlan(keep={}))) == described(model)
    for seed in range(4):
        pruned, evidence = prune_checked(model, structure, equal_widths(structure, seed))
        assert evidence.worst <= 1e-5
        assert list(described(pruned)) == list(described(model))


def test_a_transposed_gemm_is_fused() -> None:
    body = "x0 = Reshape(x, flat) p = Gemm<transB=1>(x0, wt, b)\n" + SPLIT % "p" + GATHERS + REST
    weights = f"{WEIGHTS}, {INDICES}, float[36,12] wt, int64[2] flat = {{5,12}}"
    model, structure = analyse(text_model(f"(float[1,5,12] x) => (float[1,5,6] y) <{weights}> {{ {body} }}"))
    assert len(structure.shadow.split) == 1
    for seed in range(4):
        pruned, evidence = prune_checked(model, structure, equal_widths(structure, seed))
        assert evidence.worst <= 1e-5
        assert parts_of(pruned) == []


def test_a_part_that_nobody_reads_stays_away() -> None:
    rest = REST.replace("MatMul(s, v)", "MatMul(s, q)")
    body = LINEAR["a bias before"] + SPLIT % "p" + GATHERS.split(" v =")[0] + "\n" + rest
    model, structure = analyse(
        text_model(f"(float[1,5,12] x) => (float[1,5,6] y) <{WEIGHTS}, {INDICES}> {{ {body} }}")
    )
    assert len(structure.shadow.split) == 1
    pruned, evidence = prune_checked(model, structure, PruningPlan(keep={}))
    assert evidence.worst <= 1e-6
    assert len(parts_of(pruned)) == 8
