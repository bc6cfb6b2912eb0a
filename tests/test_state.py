"""States: an input and an output that are one memory are pruned together, and over frames the law holds."""

# ruff: noqa: E501 - ONNX text is clearer in long lines than cut in the middle of a node
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Run, is_refused
from zoo import prune_checked, random_plan, text_model

from onnx_mdp.analysis.states import kept_feeds, kept_part
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError, VerificationError
from onnx_mdp.importance.output_drift import unit_steps
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze, apply_plan
from onnx_mdp.plan import PruningPlan, load_plan, plan_identity, plan_json, removed_classes
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import verify

# A convolution that adds what it made of the frame before.
RECURRENT = """(float[1,3,6,6] x, float[1,8,6,6] h) => (float[1,4,6,6] y, float[1,8,6,6] h_out) <
    float[8,3,1,1] a, float[8] b, float[8,8,1,1] r, float[4,8,1,1] c> {
    t = Conv(x, a, b)
    g = Conv(h, r)
    s = Add(t, g)
    h_out = Tanh(s)
    y = Conv(h_out, c)
}"""
# The same, and the frame before that one: the second state only hands the first on.
DELAYED = """(float[1,3,6,6] x, float[1,8,6,6] h, float[1,8,6,6] k) => (float[1,4,6,6] y, float[1,8,6,6] h_out, float[1,8,6,6] k_out) <
    float[8,3,1,1] a, float[8] b, float[4,24,1,1] c> {
    t = Conv(x, a, b)
    h_out = Tanh(t)
    k_out = Identity(h)
    j = Concat<axis=1>(h_out, h, k)
    y = Conv(j, c)
}"""
# Keys and values of earlier frames: two heads of four.
CACHED = """(float[1,3,12] x, float[1,2,5,4] k, float[1,2,5,4] v) => (float[1,3,6] y, float[1,2,5,4] k_out, float[1,2,5,4] v_out) <
    float[12,8] qw, float[12,8] kw, float[12,8] vw, float[8,6] ow, int64[4] heads = {1, 3, 2, 4}, int64[3] flat = {1, 3, 8},
    int64[1] three = {3}, int64[1] end = {9223372036854775807}, int64[1] two = {2}, float half = {0.5}> {
    q0 = MatMul(x, qw)
    q1 = Reshape(q0, heads)
    q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, kw)
    k1 = Reshape(k0, heads)
    k2 = Transpose<perm=[0,2,1,3]>(k1)
    v0 = MatMul(x, vw)
    v1 = Reshape(v0, heads)
    v2 = Transpose<perm=[0,2,1,3]>(v1)
    k3 = Concat<axis=2>(k, k2)
    v3 = Concat<axis=2>(v, v2)
    k_out = Slice(k3, three, end, two)
    v_out = Slice(v3, three, end, two)
    kt = Transpose<perm=[0,1,3,2]>(k3)
    s = MatMul(q, kt)
    d = Mul(s, half)
    p = Softmax<axis=-1>(d)
    o = MatMul(p, v3)
    o1 = Transpose<perm=[0,2,1,3]>(o)
    o2 = Reshape(o1, flat)
    y = MatMul(o2, ow)
}"""
PAIR = {"h": "h_out"}
QUEUE = {"memory": "memory_out", "points": "points_out", "speed": "speed_out"}


def analysed(text: str, states: Mapping[str, str]) -> tuple[ir.Model, Structure]:
    model = load_model(text_model(text))
    return model, analyze(model, {}, states=states)


def shapes(model: ir.Model) -> dict[str, str]:
    return {str(v.name): str(v.shape) for v in (*model.graph.inputs, *model.graph.outputs)}


def widths(structure: Structure) -> list[int]:
    return [len(structure.dimensions[i].units) for i in structure.prunable]


def test_without_the_option_a_state_is_frozen_as_any_input_and_output() -> None:
    model, structure = analysed(RECURRENT, {})
    assert structure.prunable == ()
    assert shapes(rewrite(structure, PruningPlan(keep={}))) == shapes(model)


@pytest.mark.parametrize(
    ("text", "states", "expected"),
    [
        (RECURRENT, PAIR, [8]),
        (DELAYED, {"h": "h_out", "k": "k_out"}, [8]),
        (DELAYED, PAIR, []),
        (CACHED, {"k": "k_out", "v": "v_out"}, [2, 8, 8]),
        (CACHED, {"v": "v_out"}, [8]),
    ],
    ids=["recurrent", "delayed", "half of a delay", "cache", "cached values"],
)
def test_the_law_holds_over_frames(text: str, states: Mapping[str, str], expected: list[int]) -> None:
    model, structure = analysed(text, states)
    assert widths(structure) == expected
    for seed in range(4):
        plan = random_plan(structure, np.random.default_rng(seed))
        pruned, _ = prune_checked(model, structure, plan)
        after = shapes(pruned)
        assert all(after[source] == after[target] for source, target in states.items())


def test_input_and_output_shrink_together_and_nothing_else_does() -> None:
    model, structure = analysed(RECURRENT, PAIR)
    (name,) = (structure.dimensions[i].name for i in structure.prunable)
    plan = PruningPlan(keep={name: (1, 4, 6)}, states=PAIR)
    pruned, _ = prune_checked(model, structure, plan)
    assert shapes(pruned) == {**shapes(model), "h": "[1,3,6,6]", "h_out": "[1,3,6,6]"}


def test_what_is_kept_of_a_cache_may_differ_from_head_to_head() -> None:
    _, structure = analysed(CACHED, {"k": "k_out", "v": "v_out"})
    (width,) = (d.name for d in structure.dimensions if d.kind == "qk")
    plan = PruningPlan(keep={width: (0, 1, 4, 7)})
    removed = removed_classes(plan, structure)
    value = np.arange(40, dtype=np.float32).reshape(1, 2, 5, 4)
    kept = kept_part(structure.graph, "k", value, removed)
    assert np.array_equal(kept[0, 0], value[0, 0][:, [0, 1]])
    assert np.array_equal(kept[0, 1], value[0, 1][:, [0, 3]])


@pytest.mark.parametrize("returned", ["Transpose<perm=[0,2,1,3]>(u)", "Add(u, z)"])
def test_a_memory_that_is_laid_out_otherwise_in_the_next_frame_is_frozen(returned: str) -> None:
    body = f"u = Tanh(s)\n y = Conv(u, c)\n z = Transpose<perm=[0,2,1,3]>(h)\n h_out = {returned}"
    text = RECURRENT.replace("h_out = Tanh(s)\n    y = Conv(h_out, c)", body).replace("6,6]", "8,8]")
    model, structure = analysed(text, PAIR)
    assert structure.prunable == ()
    prune_checked(model, structure, PruningPlan(keep={}))


def test_a_state_of_symbolic_width_is_frozen() -> None:
    text = RECURRENT.replace("float[1,8,6,6] h)", 'float[1,"c",6,6] h)').replace(
        "float[1,8,6,6] h_out", 'float[1,"c",6,6] h_out'
    )
    model = load_model(text_model(text))
    structure = analyze(model, {"h": (1, 8, 6, 6)}, states=PAIR)
    assert structure.prunable == ()


@pytest.mark.parametrize("kept", ["other units", "one frame late"])
def test_a_state_that_comes_back_wrong_is_caught(kept: str) -> None:
    model, structure = analysed(RECURRENT, PAIR)
    (name,) = (structure.dimensions[i].name for i in structure.prunable)
    plan = PruningPlan(keep={name: (1, 4, 6)})
    pruned = rewrite(structure, plan)
    assert verify(model, structure, pruned, plan).verified
    proto = ir.to_proto(pruned)
    for node in proto.graph.node:
        node.output[:] = ["true_h" if name == "h_out" else name for name in node.output]
        node.input[:] = ["true_h" if name == "h_out" else name for name in node.input]
    if kept == "other units":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([1, 0, 2]), "order"))
        last = onnx.helper.make_node("Gather", ["true_h", "order"], ["h_out"], axis=1)
    else:
        last = onnx.helper.make_node("Identity", ["h"], ["h_out"])
    proto.graph.node.append(last)
    assert not verify(model, structure, ir.from_proto(proto), plan).verified


def test_a_pruned_boundary_of_another_size_is_refused() -> None:
    model, structure = analysed(RECURRENT, PAIR)
    (name,) = (structure.dimensions[i].name for i in structure.prunable)
    pruned = rewrite(structure, PruningPlan(keep={name: (1, 4, 6)}))
    with pytest.raises(VerificationError, match="other inputs or outputs"):
        verify(model, structure, pruned, PruningPlan(keep={name: (1, 4)}))


def test_a_plan_records_its_states_and_replays_bit_for_bit(tmp_path: Path) -> None:
    model, structure = analysed(RECURRENT, PAIR)
    (name,) = (structure.dimensions[i].name for i in structure.prunable)
    plan = PruningPlan(keep={name: (0, 5)}, states=PAIR)
    (tmp_path / "plan.json").write_text(plan_json(plan))
    again = load_plan(tmp_path / "plan.json")
    assert again == plan
    assert plan_identity(plan) != plan_identity(replace(plan, states={}))
    pruned = [apply_plan(model, structure, p)[0] for p in (plan, again)]
    assert ir.to_proto(pruned[0]) == ir.to_proto(pruned[1])
    with pytest.raises(UsageError, match="--state h=h_out"):
        rewrite(analyze(model, {}), replace(plan, keep={}))


def test_drift_is_measured_on_what_is_kept_of_a_state() -> None:
    _, structure = analysed(RECURRENT, PAIR)
    rng = np.random.default_rng(0)
    feeds = [
        {n: rng.standard_normal(s).astype(np.float32) for n, s in structure.shadow.inputs.items()}
        for _ in range(3)
    ]
    (index,) = structure.prunable
    steps = unit_steps(structure, {index: np.arange(8)[None]}, feeds, lambda *_: None)
    assert (steps[index] >= 0).all()
    assert steps[index].sum() > 0


@pytest.mark.parametrize("exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_a_detector_with_its_queue(exporter: str, exported: Callable[..., Path]) -> None:
    model = load_model(exported("streampetr_micro", exporter))
    structure = analyze(model, {}, states=QUEUE)
    share = len(structure.prunable) / len(structure.dimensions)
    assert share > 0.9, [d.frozen for d in structure.dimensions if d.frozen]
    for seed in range(2):
        plan = random_plan(structure, np.random.default_rng(seed), blocks=seed == 1)
        pruned, evidence = prune_checked(model, structure, plan)
        after = shapes(pruned)
        assert after["memory"] == after["memory_out"] != shapes(model)["memory"]
        assert evidence.inputs_tried == 4


@pytest.mark.parametrize(
    ("state", "fragments"),
    [
        ("k=h_out", ("'k'", "x, h")),
        ("h=z", ("'z'", "y, h_out")),
        ("x=h_out", ("one memory", "[1, 3, 6, 6]", "[1, 8, 6, 6]")),
        ("h", ("INPUT=OUTPUT",)),
        ("=h_out", ("INPUT=OUTPUT",)),
    ],
)
def test_a_state_that_is_none_is_one_sentence(run: Run, state: str, fragments: tuple[str, ...]) -> None:
    onnx.save(text_model(RECURRENT), "model.onnx")
    for command in (["analyze"], ["profile"], ["prune", "--target-ratio", 0.7]):
        is_refused(run(command[0], "model.onnx", *command[1:], "--state", state), 2, *fragments)


def test_states_named_twice(run: Run) -> None:
    onnx.save(text_model(RECURRENT), "model.onnx")
    is_refused(run("analyze", "model.onnx", "--state", "h=h_out", "--state", "h=y"), 2, "each input once")
    onnx.save(text_model(DELAYED), "delayed.onnx")
    twice = run("analyze", "delayed.onnx", "--state", "h=h_out", "--state", "k=h_out")
    is_refused(twice, 2, "'h_out' twice")


def test_the_command_line_prunes_a_state_and_replays_it(run: Run) -> None:
    onnx.save(text_model(RECURRENT.replace("8", "32")), "model.onnx")
    document = run("analyze", "model.onnx", "--state", "h=h_out", "--json").document
    assert document["states"] == {"h": "h_out"}
    assert "h → h_out" in run("analyze", "model.onnx", "--state", "h=h_out").out
    state = ("--state", "h=h_out")
    done = run("prune", "model.onnx", "--target-ms", 100, "--max-params", 700, *state, "-o", "slim.onnx")
    assert done.code == 0, done
    slim = load_model(Path("slim.onnx"))
    assert shapes(slim)["h"] == shapes(slim)["h_out"] != "[1,32,6,6]"
    assert json.loads(Path("slim.plan.json").read_text())["states"] == {"h": "h_out"}
    assert run("apply", "model.onnx", "slim.plan.json", "-o", "again.onnx").code == 0
    assert Path("again.onnx").read_bytes() == Path("slim.onnx").read_bytes()
    assert run("verify", "model.onnx", "slim.onnx", "slim.plan.json", "--max-ms", 100).code == 0
    assert run("profile", "model.onnx", *state, "-o", "table.json").code == 0
    solved = run("solve", "model.onnx", "table.json", *state, "--min-importance", 0.5, "-o", "plan.json")
    assert solved.code == 0, solved
    assert json.loads(Path("plan.json").read_text())["states"] == {"h": "h_out"}
    is_refused(run("solve", "model.onnx", "table.json", "--min-importance", 0.5), 2)
    assert run("pareto", "model.onnx", "table.json", *state, "--targets", "0.8,0.9").code in (0, 4)


def test_feeds_of_a_pruned_model_lose_only_states() -> None:
    _, structure = analysed(RECURRENT, PAIR)
    (name,) = (structure.dimensions[i].name for i in structure.prunable)
    removed = removed_classes(PruningPlan(keep={name: (2,)}), structure)
    feeds = {n: np.ones(s, np.float32) for n, s in structure.shadow.inputs.items()}
    assert {n: v.shape for n, v in kept_feeds(structure, feeds, removed).items()} == {
        "x": (1, 3, 6, 6),
        "h": (1, 1, 6, 6),
    }
