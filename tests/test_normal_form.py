"""What exporters and runtimes hide in functions, branches, sparse tensors and fused operators is plain to us."""

# ruff: noqa: E501 - ONNX text is clearer in long lines than cut in the middle of a node
from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper
from zoo import analyse, informative, prune_checked, random_plan, text_model

from onnx_mdp.errors import UnreadableModelError, UnsupportedModelError
from onnx_mdp.model_io import content_hash, load_model
from onnx_mdp.pipeline import analyze

HEADER = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1, "local": 1]>'


def net(body: str, weights: str = "", functions: str = "", channels: int = 8) -> onnx.ModelProto:
    """``body`` makes ``u`` out of ``t``, between two convolutions; with local functions."""
    text = f"""(float[1,3,6,6] x) => (float[1,4,6,6] y) <
            float[8,3,1,1] a, float[8] b, float[4,{channels},1,1] c{weights and ", "}{weights}> {{
        t = Conv(x, a, b)
        {body}
        y = Conv(u, c)
    }}"""
    plain = text_model(
        text.replace(body, "u = Identity(t)") if functions else text, domains={"com.microsoft": 1}
    )
    if not functions:
        return plain
    model = onnx.parser.parse_model(f"{HEADER}\nmodel {text}{functions}")
    del model.graph.value_info[:]
    model.graph.initializer.extend(t for t in plain.graph.initializer)
    kept = {t.name: t for t in model.graph.initializer}
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept.values())
    onnx.checker.check_model(model)
    return model


def function(body: str, opset: int = 17) -> str:
    return f'\n<domain: "local", opset_import: ["": {opset}, "local": 1]>\n{body}'


def branch(condition: str) -> str:
    return f"""u = If({condition}) <
        then_branch = one () => (float[1,8,6,6] p) {{ r = Relu(t) p = Add(r, t) }},
        else_branch = two () => (float[1,8,6,6] q) {{ r = Sigmoid(t) q = Add(r, t) }}
    >"""


FUSED = {
    "FusedConv": (
        'u = com.microsoft.FusedConv<activation="Relu">(t, e, f)',
        "float[8,8,1,1] e, float[8] f",
        (8, 8),
        ["Conv", "Relu"],
    ),
    "FusedConv with parameters": (
        'u = com.microsoft.FusedConv<activation="LeakyRelu", activation_params=[0.1]>(t, e, f)',
        "float[8,8,1,1] e, float[8] f",
        (8, 8),
        ["Conv", "LeakyRelu"],
    ),
    "FusedConv with bounds": (
        'u = com.microsoft.FusedConv<activation="Clip", activation_params=[0.0, 6.0]>(t, e, f)',
        "float[8,8,1,1] e, float[8] f",
        (8, 8),
        ["Conv", "Clip"],
    ),
    "FusedConv with a sum": (
        'u = com.microsoft.FusedConv<activation="Relu">(t, e, f, t)',
        "float[8,8,1,1] e, float[8] f",
        (8,),
        ["Conv", "Add", "Relu"],
    ),
    "FusedMatMul": (
        "h = Reshape(t, s) m = com.microsoft.FusedMatMul<transA=1, alpha=0.5>(h, e) n = Transpose<perm=[0,2,1]>(m) u = Reshape(n, back)",
        "float[8,8] e, int64[3] s = {1, 8, 36}, int64[4] back = {1, 8, 6, 6}",
        (8, 8),
        ["Reshape", "Transpose", "MatMul", "Mul", "Transpose", "Reshape"],
    ),
    "FusedGemm": (
        'p = GlobalAveragePool(t) f0 = Flatten(p) g = com.microsoft.FusedGemm<activation="Sigmoid", transB=1>(f0, e, f)\n'
        "r = Reshape(g, back) u = Mul(t, r)",
        "float[8,8] e, float[8] f, int64[4] back = {1, 8, 1, 1}",
        (8,),
        ["GlobalAveragePool", "Flatten", "Gemm", "Sigmoid", "Reshape", "Mul"],
    ),
}
FUNCTIONS = {
    "a function": net("u = local.block(t)", "", function("block (q) => (r) { s = Relu(q) r = Mul(s, q) }")),
    "a function in a function": net(
        "u = local.block(t, e)",
        "float[8,8,1,1] e",
        function("block (q, w) => (r) { s = Conv(q, w) i = local.inner(s) r = Add(q, i) }")
        + function("inner (q) => (r) { r = Relu(q) }"),
    ),
    "a function called twice": net(
        "v = local.block(t) u = local.block(v)",
        "",
        function("block (q) => (r) { s = Sigmoid(q) r = Mul(s, q) }"),
    ),
}
SHAPE = "s = Shape(t) n = Gather(s, o) z = Equal(n, k)\n"
BRANCHES = {
    "a branch by a constant": net("z = Constant<value = bool {1}>()\n" + branch("z")),
    "a branch by an initializer": net(branch("z"), "bool z = {0}"),
    "a branch by a shape": net(SHAPE + branch("z"), "int64 o = {2}, int64 k = {6}"),
    "a branch that gives an outer value": net(
        "u = If(z) <then_branch = one () => (float[1,8,6,6] p) { p = Identity(t) }, else_branch = two () => (float[1,8,6,6] q) { q = Relu(t) }>",
        "bool z = {1}",
    ),
    "a branch in a branch": net(
        "u = If(z) <then_branch = one () => (float[1,8,6,6] p) { s = Relu(t)\n"
        + branch("z")
        .replace("u = If", "p = If")
        .replace("(float[1,8,6,6] p)", "(float[1,8,6,6] v)")
        .replace("p = Add", "v = Add")
        + " }, else_branch = two () => (float[1,8,6,6] q) { q = Tanh(t) }>",
        "bool z = {1}",
    ),
}


def law(model: onnx.ModelProto, widths: tuple[int, ...]) -> list[str]:
    """The law for two plans; the operators that were analysed."""
    loaded, structure = analyse(model)
    assert tuple(len(structure.dimensions[i].units) for i in structure.prunable) == widths
    assert structure.graph.unsupported == {}
    for seed in range(2):
        pruned, evidence = prune_checked(
            loaded, structure, random_plan(structure, np.random.default_rng(seed))
        )
        assert evidence.worst <= 1e-5
    assert informative(pruned, structure)
    return [node.op_type for node in structure.shadow.model.graph]


@pytest.mark.parametrize("name", FUSED)
def test_what_a_runtime_fused_becomes_plain(name: str) -> None:
    body, weights, widths, operators = FUSED[name]
    assert law(net(body, weights), widths) == ["Conv", *operators, "Conv"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_inlined(name: str) -> None:
    assert "block" not in law(FUNCTIONS[name], (8,))


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_that_are_always_taken_are_inlined(name: str) -> None:
    assert "If" not in law(BRANCHES[name], (8,))


def sparse(attribute: bool) -> onnx.ModelProto:
    model = net("u = Mul(t, k)", "float[1,8,1,1] k")
    stored = next(t for t in model.graph.initializer if t.name == "k")
    model.graph.initializer.remove(stored)
    values = numpy_helper.from_array(np.asarray([1.5, 2.5, -1.0], np.float32), "k")
    places = numpy_helper.from_array(
        np.asarray([0, 3, 5] if attribute else [[0, 0, 0, 0], [0, 3, 0, 0], [0, 5, 0, 0]])
    )
    tensor = helper.make_sparse_tensor(values, places, [1, 8, 1, 1])
    if attribute:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], sparse_value=tensor))
    else:
        model.graph.sparse_initializer.append(tensor)
    return model


@pytest.mark.parametrize("attribute", [True, False])
def test_sparse_tensors_are_filled(attribute: bool) -> None:
    model = sparse(attribute)
    _, structure = analyse(model)
    assert structure.shadow.constants["k"].reshape(-1).tolist() == [1.5, 0, 0, 2.5, 0, -1.0, 0, 0]
    law(model, (8,))
    assert model.graph.sparse_initializer or attribute  # the caller's model is left alone


@pytest.mark.parametrize("imported", ["", "ai.onnx"])
@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_the_standard_domain_may_be_spelled_out(domain: str, imported: str) -> None:
    model = net("u = Softmax(t)")
    model.opset_import[0].domain = imported
    model.opset_import[0].version = 11  # the form that flattens
    for node in model.graph.node:
        node.domain = domain
    law(model, ())


def test_every_form_of_a_constant_is_read() -> None:
    law(
        net(
            "k = Constant<value_float = 0.5>() f = Constant<value_floats = [0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8]>()\n"
            'i = Constant<value_int = 0>() s = Constant<value_ints = [1,8,1,1]>() n = Constant<value_string = "n">()\n'
            "r = Reshape(f, s) p = Mul(t, k) u = Add(p, r)"
        ),
        (8,),
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "r = RandomNormalLike(t) u = Add(t, r)",
            "RandomNormalLike 'randomnormallike_1' draws random numbers",
        ),
        ("s = Sigmoid(t) u = Bernoulli(s)", "draws random numbers"),
        ("u = Dropout(t, k, z)", "Dropout .* draws random numbers"),
    ],
)
def test_random_numbers_are_refused(body: str, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        analyse(net(body, "float k = {0.5}, bool z = {1}"))


@pytest.mark.parametrize(("opset", "words"), [(6, "runs opset 7 or later"), (99, "knows opsets up to")])
def test_opsets_that_nothing_runs_are_refused(opset: int, words: str) -> None:
    model = net("u = Relu(t)")
    model.opset_import[0].version = opset
    with pytest.raises(UnsupportedModelError, match=words):
        analyse(model)


@pytest.mark.parametrize(
    ("body", "opset", "words"),
    [
        ("block (q) => (r) { r = local.block(q) }", 17, "call each other in a circle"),
        ("block (q) => (r) { r = Softmax(q) }", 11, "of opset 11 and the model of opset 17"),
    ],
)
def test_functions_that_cannot_be_inlined_are_refused(body: str, opset: int, words: str) -> None:
    model = net("u = local.block(t)", "", function("block (q) => (r) { r = Relu(q) }"))
    other = onnx.parser.parse_model(
        f"{HEADER}\nmodel (float[1] x) => (float[1] y) {{ y = Relu(x) }}{function(body, opset)}"
    )
    model.functions[0].CopyFrom(other.functions[0])
    with pytest.raises(UnsupportedModelError, match=words):
        analyse(model)


@pytest.mark.parametrize("name", ["u", "a", "x"])
def test_double_names_are_refused(name: str) -> None:
    model = net("u = Relu(t)")
    model.graph.node.insert(2, helper.make_node("Sigmoid", ["t"], [name]))
    with pytest.raises(UnreadableModelError, match=f"two values named '{name}'"):
        load_model(model)


def test_the_hash_sees_functions_and_bodies() -> None:
    models = [
        net("u = local.block(t)", "", function("block (q) => (r) { r = Relu(q) }")),
        net("u = local.block(t)", "", function("block (q) => (r) { r = Sigmoid(q) }")),
        net(branch("z"), "bool z = {0}"),
        net(branch("z").replace("Relu", "Tanh"), "bool z = {0}"),
    ]
    weighed = [net(branch("z"), "bool z = {0}") for _ in range(2)]
    for number, model in enumerate(weighed):
        tensor = numpy_helper.from_array(np.full(2000, number, np.float32), "w")
        model.graph.node[1].attribute[0].g.initializer.append(tensor)
    hashes = [content_hash(load_model(model)) for model in models + weighed]
    assert len(set(hashes)) == len(hashes)
    assert content_hash(load_model(models[0])) == hashes[0]


@pytest.mark.parametrize(("inputs", "outputs"), [("x", "y"), ("x", "y z"), ("x x", "y"), ("x", "y z u")])
def test_a_call_may_leave_out_the_last_outputs_and_have_no_more_than_there_are(
    inputs: str, outputs: str
) -> None:
    nodes = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Neg", ["a"], ["c"])]
    two = helper.make_function("local", "two", ["a"], ["b", "c"], nodes, [helper.make_opsetid("", 17)])
    call = helper.make_node("two", inputs.split(), outputs.split(), domain="local")
    ends = [helper.make_tensor_value_info(name, 1, [1, 3]) for name in "xy"]
    graph = helper.make_graph([call], "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    proto = helper.make_model(graph, functions=[two], opset_imports=opsets, ir_version=8)
    if inputs == "x" and len(outputs.split()) <= 2:
        assert analyze(load_model(proto), {}).shadow.operations[0].op_type == "Relu"
    else:
        with pytest.raises(UnsupportedModelError, match="more inputs or outputs than it has"):
            analyze(load_model(proto), {})
