"""Laws of half precision: the file is cut as it is stored, and equals the masked original in float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Run, is_refused
from onnx import helper, numpy_helper
from zoo import analyse, cut_wrongly, prune_checked, random_plan, text_model

from onnx_mdp.errors import UsageError
from onnx_mdp.model_io import load_model
from onnx_mdp.numerics.precision import has_halves, in_float32, is_float
from onnx_mdp.plan import PruningPlan, plan_json
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import verify
from onnx_mdp.tables.granularity import computed_in

FLOAT = onnx.TensorProto.FLOAT
HALVES = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def narrow(tensor: onnx.TensorProto, half: str) -> None:
    """Store a float32 tensor in half precision, in place."""
    if tensor.data_type == FLOAT:
        array = numpy_helper.to_array(tensor).astype(TYPES[half])
        tensor.CopyFrom(helper.make_tensor(tensor.name, HALVES[half], array.shape, array.tobytes(), raw=True))


def in_halves(model: onnx.ModelProto, half: str) -> onnx.ModelProto:
    """All of a model in half precision: weights, inputs, outputs, constants and Casts."""
    proto = onnx.ModelProto.FromString(model.SerializeToString())
    scales = {node.input[2] for node in proto.graph.node if node.op_type == "Resize" and len(node.input) > 2}
    for tensor in proto.graph.initializer:
        if tensor.name not in scales:
            narrow(tensor, half)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = HALVES[half]
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and node.output[0] not in scales:
                narrow(attribute.t, half)
            if attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = HALVES[half]
    del proto.graph.value_info[:]
    return proto


def with_casts(model: onnx.ModelProto, half: str) -> onnx.ModelProto:
    """Every second layer in half precision, between Casts, as converters with lists of operators do."""
    proto = onnx.ModelProto.FromString(model.SerializeToString())
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    layers = [n for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")][::2]
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        nodes.append(node)
        if node not in layers:
            continue
        nodes.pop()
        for slot, name in enumerate(node.input):
            if name in stored:
                narrow(stored[name], half)
            elif name:
                nodes.append(helper.make_node("Cast", [name], [f"{node.output[0]}_{slot}"], to=HALVES[half]))
                node.input[slot] = f"{node.output[0]}_{slot}"
        result, node.output[0] = node.output[0], f"{node.output[0]}_half"
        nodes += [node, helper.make_node("Cast", [node.output[0]], [result], to=FLOAT)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    for number, copy in enumerate(copies):
        copy.name = copy.name or f"cast_{number}"
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(copies)
    return proto


CONVERSIONS: dict[str, Callable[[onnx.ModelProto, str], onnx.ModelProto]] = {
    "all": in_halves,
    "mixed": with_casts,
}
NETS = ("cifar_resnet8_pad_small", "mobilenet_v2_small", "deit_micro")
QUICK = (
    ("cifar_resnet8_pad_small", "mixed", "bfloat16"),
    ("deit_micro", "all", "float16"),
)


def chain(half: str, width: int = 8) -> onnx.ModelProto:
    text = f"""(float[1,3,8,8] x) => (float[1,4,8,8] y) <
        float[{width},3,3,3] a, float[{width}] b, float[4,{width},1,1] c, float[4] d> {{
        t = Conv<pads=[1,1,1,1]>(x, a, b)
        u = Relu(t)
        y = Conv(u, c, d)
    }}"""
    return in_halves(text_model(text), half)


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value}


def float_types(model: ir.Model) -> set[np.dtype]:
    return {array.dtype for array in weights(model).values() if is_float(array.dtype)}


@pytest.mark.parametrize("half", HALVES)
def test_the_stored_bits_are_cut_and_nothing_else_changes(half: str) -> None:
    model, structure = analyse(chain(half))
    plan = PruningPlan(keep={"conv_0": (0, 2, 5)})
    pruned, evidence = prune_checked(model, structure, plan)
    before, after, rows = weights(model), weights(pruned), [0, 2, 5]
    assert {array.dtype for array in after.values()} == {TYPES[half]}
    for name, expected in {
        "a": before["a"][rows],
        "b": before["b"][rows],
        "c": before["c"][:, rows],
        "d": before["d"],
    }.items():
        assert after[name].tobytes() == np.ascontiguousarray(expected).tobytes()
    assert evidence.worst <= 9e-7
    assert [str(v.dtype) for v in (*pruned.graph.inputs, *pruned.graph.outputs)] == [half.upper()] * 2


@pytest.mark.parametrize(
    ("name", "kind", "half"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in itertools.product(NETS, CONVERSIONS, HALVES)
    ],
)
def test_pruned_equals_masked_in_half_precision(
    name: str, kind: str, half: str, exported: Callable[..., Path]
) -> None:
    whole = analyse(exported(name))[1]
    model, structure = analyse(CONVERSIONS[kind](onnx.load_model(exported(name)), half))
    assert structure.graph.unsupported == {}
    assert [d.frozen is None for d in structure.dimensions] == [d.frozen is None for d in whole.dimensions]
    plan = random_plan(structure, np.random.default_rng(1), least=0.3)
    pruned, evidence = prune_checked(model, structure, plan)
    assert evidence.worst <= 2e-6
    assert float_types(pruned) == float_types(model)
    assert evidence.judged is not None
    assert evidence.judged.startswith("compared in float32")
    if half == "float16":
        assert evidence.judged.endswith("runs in half precision")


@pytest.mark.parametrize("half", HALVES)
def test_a_wrong_cut_of_halves_is_noticed(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, structure = analyse(chain(half))
    plan = PruningPlan(keep={"conv_0": (0, 2, 5)})
    wrong = cut_wrongly(monkeypatch, structure, plan, (0, 1, 0))
    assert not verify(model, structure, wrong, plan).verified


@pytest.mark.parametrize("half", HALVES)
def test_a_scale_from_the_width_stays_as_the_file_rounds_it(half: str) -> None:
    """``1/sqrt(10)`` is no half number: the twin rounds it as the file does, and pruning leaves it."""
    text = """(float[1,6,12] x) => (float[1,6,6] y) <float[12,10] a, float[12,10] b, int64[1] last = {2}> {
        q = MatMul(x, a)
        k = MatMul(x, b)
        t = Transpose<perm=[0,2,1]>(k)
        shape = Shape(q)
        width = Gather(shape, last)
        float_width = Cast<to=1>(width)
        root = Sqrt(float_width)
        scaled = Div(q, root)
        y = MatMul(scaled, t)
    }"""
    model, structure = analyse(in_halves(text_model(text), half))
    plan = PruningPlan(keep={structure.dimensions[structure.prunable[0]].name: (0, 1, 4, 7)})
    pruned, evidence = prune_checked(model, structure, plan)
    assert evidence.worst <= 9e-7
    (root,) = (a for n, a in weights(pruned).items() if n.startswith("root"))
    assert root.dtype == TYPES[half]
    assert root.reshape(()) == TYPES[half].type(10**0.5)
    with pytest.raises(UsageError, match="float32 only"):
        rewrite(structure, PruningPlan(keep={}, rescale_attention=True))


def test_the_twin_has_nothing_in_half_precision_left() -> None:
    for convert in CONVERSIONS.values():
        plain = text_model("(float[2,3] x) => (float[2,4] y) <float[3,4] w> { y = MatMul(x, w) }")
        model = load_model(convert(plain, "float16"))
        twin = in_float32(model)
        assert has_halves(model)
        assert not has_halves(twin)
        onnx.checker.check_model(ir.to_proto(twin), full_check=True)
        assert in_float32(twin) is twin


def test_float16_is_pruned_from_the_command_line(run: Run, tmp_path: Path) -> None:
    onnx.save_model(chain("float16", 64), tmp_path / "model.onnx")
    images = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float16)
    np.savez(tmp_path / "data.npz", x=images)
    limits = ("--max-params", 1500, "--target-ratio", 2)
    outcome = run("prune", "model.onnx", *limits, "--data", "data.npz")
    assert outcome.code == 0, outcome.err
    assert "compared in float32, and the file runs in half precision" in outcome.err
    assert "verified" in outcome.out
    assert has_halves(load_model(tmp_path / "model.pruned.onnx"))


def test_bfloat16_is_applied_without_kernels_for_it_but_not_measured(run: Run, tmp_path: Path) -> None:
    onnx.save_model(chain("bfloat16"), tmp_path / "model.onnx")
    (tmp_path / "plan.json").write_text(plan_json(PruningPlan(keep={"conv_0": (0, 2, 5)})))
    outcome = run("apply", "model.onnx", "plan.json", "-o", "slim.onnx", "--json")
    assert outcome.code == 0, outcome.err
    assert "no kernels" in outcome.document["judged"]
    is_refused(run("prune", "model.onnx", "--target-ratio", 0.5), 1, "no kernels for bfloat16", "--ep")


STORED = {
    "half, read in float32": (
        "float",
        "w = Cast<to=1>(a) v = Transpose<perm=[1,0]>(w) b1 = Cast<to=1>(b) c1 = Cast<to=1>(c)",
        np.float16,
    ),
    "float32, read in half": (
        "float16",
        "w = Cast<to=10>(a) v = Transpose<perm=[1,0]>(w) b1 = Cast<to=10>(b) c1 = Cast<to=10>(c)",
        np.float32,
    ),
}


@pytest.mark.parametrize("form", STORED)
def test_weights_behind_casts_are_cut_where_they_are_stored(form: str) -> None:
    kind, casts, stored = STORED[form]
    text = f"""({kind}[2,6] x) => ({kind}[2,4] y) <float[8,6] a, float[8] b, float[8,4] c> {{
        {casts}
        t = MatMul(x, v)
        r = Add(t, b1)
        s = Relu(r)
        y = MatMul(s, c1)
    }}"""
    proto = text_model(text)
    if stored == np.float16:
        for tensor in proto.graph.initializer:
            narrow(tensor, "float16")
    model, structure = analyse(proto)
    pruned, _ = prune_checked(model, structure, PruningPlan(keep={structure.dimensions[0].name: (1, 6)}))
    before, after = weights(model), weights(pruned)
    assert {array.dtype for array in after.values()} == {np.dtype(stored)}
    for name, cut in {"a": before["a"][[1, 6]], "b": before["b"][[1, 6]], "c": before["c"][[1, 6]]}.items():
        assert np.array_equal(after[name], cut)
    assert [n.op_type for n in pruned.graph] == [n.op_type for n in model.graph]
    assert computed_in(structure) == ("float16" if kind == "float16" else "float32")


@pytest.mark.parametrize("half", HALVES)
def test_the_type_that_layers_compute_in(half: str) -> None:
    assert computed_in(analyse(chain(half))[1]) == ("float16" if half == "float16" else "float32")
    single = text_model("(float[1,4] x) => (float[1,4] y) <float[4,4] w> { y = MatMul(x, w) }")
    assert computed_in(analyse(single)[1]) == "float32"
