"""Laws of files from elsewhere: what they declare is refused in one sentence, or bounded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Run, is_refused
from onnx import TensorProto, helper, numpy_helper
from zoo import run as run_model

from onnx_mdp import untrusted
from onnx_mdp.errors import MdpError, MeasurementError, UnreadableModelError
from onnx_mdp.model_io import content_hash, load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.running import computation

NASTY = "../../\x1b]0;hi\x07\x1b[31m\n<svg onload='alert(1)'>&/\u202e"


def value(
    name: str, shape: Sequence[int] | None = None, kind: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def integers(name: str, numbers: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def node(op_type: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


WEIGHT = numpy_helper.from_array(
    np.random.default_rng(0).standard_normal((8, 3, 1, 1)).astype(np.float32), "w"
)
CONV = node("Conv", "x w", "c")


def model(
    nodes: Sequence[onnx.NodeProto],
    *weights: onnx.TensorProto,
    functions: Sequence[onnx.FunctionProto] = (),
    shape: Sequence[int] = (1, 3, 8, 8),
) -> onnx.ModelProto:
    """A model from x to y; every one holds the weight of a convolution from 3 to 8 channels."""
    stored = [WEIGHT, *weights] if all(w.name != "w" for w in weights) else list(weights)
    graph = helper.make_graph(list(nodes), "g", [value("x", shape)], [value("y")], stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions))


def function(name: str, *calls: str) -> onnx.FunctionProto:
    """A function that calls others one after the other."""
    nodes = [
        helper.make_node(
            call, ["a" if i == 0 else f"m{i}"], [f"m{i + 1}"], domain="" if call == "Relu" else "local"
        )
        for i, call in enumerate(calls)
    ]
    nodes[-1].output[0] = "b"
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["b"], nodes, opsets)


def doubling(count: int) -> list[onnx.FunctionProto]:
    """Functions each of which calls the one before it twice."""
    pairs = (function(f"f{i}", f"f{i - 1}", f"f{i - 1}") for i in range(1, count))
    return [function("f0", "Relu"), *pairs]


def calling(name: str, *functions: onnx.FunctionProto) -> onnx.ModelProto:
    return model([CONV, helper.make_node(name, ["c"], ["y"], domain="local")], functions=functions)


def weight(dims: Sequence[int], data: bytes = bytes(96), kind: int = TensorProto.FLOAT) -> onnx.TensorProto:
    """A tensor that declares one thing and holds another."""
    tensor = TensorProto(name="w", data_type=kind, raw_data=data)
    tensor.dims.extend(dims)
    return tensor


def with_weight(dims: Sequence[int], **held: Any) -> onnx.ModelProto:
    return model([node("Conv", "x w", "y")], weight(dims, **held))


def otherwise(name: str) -> onnx.GraphProto:
    return helper.make_graph([node("Relu", "c", name)], "else", [], [value(name)])


def nested(depth: int) -> onnx.ModelProto:
    """Subgraphs in subgraphs."""
    graph = helper.make_graph([node("Relu", "c", "inner")], "innermost", [], [value("inner")])
    for level in range(depth):
        name = f"o{level}"
        chosen = node("If", "t", name, then_branch=graph, else_branch=otherwise(f"e{level}"))
        graph = helper.make_graph([chosen], f"level {level}", [], [value(name)])
    condition = numpy_helper.from_array(np.array(True), "t")
    return model([CONV, node("If", "t", "y", then_branch=graph, else_branch=otherwise("e"))], condition)


def grown(op_type: str, inputs: str, *operands: onnx.TensorProto, **attributes: Any) -> onnx.ModelProto:
    """A convolution whose output an operator with constant operands makes larger."""
    return model([CONV, node(op_type, inputs, "y", **attributes)], *operands)


def endless_loop() -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Identity", "going", "still"), node("Add", "v v", "sum")],
        "body",
        [value("i", [], TensorProto.INT64), value("going", [], TensorProto.BOOL), value("v")],
        [value("still", [], TensorProto.BOOL), value("sum")],
    )
    condition = numpy_helper.from_array(np.array(True), "t")
    return model([CONV, node("Loop", "n t c", "y", body=body)], integers("n", 2**60), condition)


def handed_out() -> onnx.ModelProto:
    empty = helper.make_graph([], "empty", [], [value("c")])
    condition = numpy_helper.from_array(np.array(True), "t")
    return model([CONV, node("If", "t", "y", then_branch=empty, else_branch=otherwise("e"))], condition)


def untyped() -> onnx.ModelProto:
    found = model([node("Conv", "x w", "y", group=1)])
    found.graph.node[0].attribute[0].type = onnx.AttributeProto.UNDEFINED
    return found


def opset(domain: str) -> onnx.ModelProto:
    found = model([node("Conv", "x w", "y")])
    del found.opset_import[:]
    found.opset_import.append(helper.make_opsetid(domain, 1))
    return found


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "negative dims": (lambda: with_weight([-8, 3, 1, 1]), "dimensions -8×3×1×1"),
    "two negative dims": (lambda: with_weight([-8, -3, 1, 1]), "which no weight has"),
    "dims of 2^62": (lambda: with_weight([2**62, 3, 1, 1]), "which no weight has"),
    "dims that overflow to the right size": (
        lambda: with_weight([2**33 * 3, 2**31, 8, 1]),
        "which no weight has",
    ),
    "none of 2^62": (lambda: with_weight([0, 2**62, 1, 1], data=b""), "which no weight has"),
    "five thousand dims": (lambda: with_weight([1] * 5000 + [8, 3, 1, 1]), "is not a readable"),
    "data that is absent": (
        lambda: with_weight([8, 3, 1000, 1000], data=b""),
        "declares 96000000 bytes .* holds 0",
    ),
    "too little data": (lambda: with_weight([8, 3, 2, 1]), "declares 192 bytes .* holds 96"),
    "too much data": (lambda: with_weight([8, 2, 1, 1]), "declares 64 bytes .* holds 96"),
    "an unknown type": (lambda: with_weight([8, 3, 1, 1], kind=99), "is not a readable"),
    "raw strings": (lambda: with_weight([8, 3, 1, 1], kind=TensorProto.STRING), "another number of strings"),
    "an attribute without a type": (untyped, "attribute 'group' of Conv '' has no type"),
    "no version": (lambda: opset("local"), "which version of ONNX's operators"),
    "a cycle": (
        lambda: model([node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")]),
        "has a cycle",
    ),
    "a node that reads itself": (lambda: model([node("Add", "x y", "y")]), "has a cycle"),
    "a value that nothing makes": (
        lambda: model([node("Conv", "nope w", "y")]),
        "reads 'nope', which nothing makes",
    ),
    "an output that nothing makes": (lambda: model([CONV]), "nothing makes its output 'y'"),
    "a subgraph that hands out what it is given": (handed_out, "nothing makes its output 'c'"),
    "a function that calls itself": (lambda: calling("f", function("f", "f")), "'f' calls itself"),
    "functions that call each other": (
        lambda: calling("f", function("f", "g"), function("g", "f")),
        "calls itself",
    ),
    "functions that unfold": (
        lambda: calling("f39", *doubling(40)),
        "unfolds into more than 1000000 nodes",
    ),
    "an input of exabytes": (
        lambda: model([node("Conv", "x w", "y")], shape=[1, 3, 2**31, 2**31]),
        "input 'x' .* GB",
    ),
    "an input of 2^124": (
        lambda: model([node("Conv", "x w", "y")], shape=[1, 3, 2**62, 2**62]),
        "input 'x' .* GB",
    ),
    "Tile": (lambda: grown("Tile", "c s", integers("s", [10**5, 1, 1000, 1000])), "'y' .* 204800.0 GB"),
    "Resize": (
        lambda: model(
            [CONV, helper.make_node("Resize", ["c", "", "", "s"], ["y"])], integers("s", [1, 8, 10**6, 10**6])
        ),
        "32000.0 GB",
    ),
    "Pad": (lambda: grown("Pad", "c s", integers("s", [0] * 6 + [2**30] * 2)), "'y' .* GB"),
    "Expand": (lambda: grown("Expand", "c s", integers("s", [10**5, 8, 8, 8, 8, 8, 8])), "GB|Incompatible"),
    "padding of a convolution": (lambda: model([node("Conv", "x w", "y", pads=[2**15] * 4)]), "'y' .* GB"),
    "ConstantOfShape": (
        lambda: model(
            [
                CONV,
                node("ConstantOfShape", "s", "k"),
                node("ReduceSum", "k", "r", keepdims=0),
                node("Add", "c r", "y"),
            ],
            integers("s", [10**5, 10**6]),
        ),
        "'k' .* 400.0 GB",
    ),
    "Range": (
        lambda: model(
            [
                CONV,
                node("Range", "a b d", "k"),
                node("ReduceSum", "k", "r", keepdims=0),
                node("Cast", "r", "f", to=1),
                node("Add", "c f", "y"),
            ],
            integers("a", 0),
            integers("b", 2**40),
            integers("d", 1),
        ),
        "'k' .* GB",
    ),
}


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    make, fragment = REFUSED[name]
    with pytest.raises(MdpError, match=fragment) as caught:
        analyze(load_model(saved(make(), tmp_path)), {})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2 or "cannot" in str(caught.value)


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = saved(model([node("Conv", "x w", "y", name="caf\u00e9")]), tmp_path)
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xff\xff"))
    with pytest.raises(UnreadableModelError, match="a name in it is not UTF-8"):
        load_model(path)


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    nodes = [CONV, node("Relu", "c", "y")]
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    expected = run_model(load_model(saved(model(nodes), tmp_path)), feeds)
    found = run_model(load_model(saved(model(nodes[::-1]), tmp_path)), feeds)
    assert np.array_equal(expected[0], found[0])


@pytest.mark.parametrize("depth", [5, 25])
def test_nested_subgraphs_are_read(depth: int, tmp_path: Path) -> None:
    assert analyze(load_model(saved(nested(depth), tmp_path)), {}).dimensions


def test_subgraphs_nested_beyond_protobufs_limit_are_refused(tmp_path: Path) -> None:
    """Protobuf neither reads nor writes more than a hundred messages in each other; others may."""
    deepest = nested(5).graph.node[1].attribute[0].g
    data = deepest.SerializeToString()
    for _ in range(2000):
        inner = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH).SerializeToString()
        data = _field(1, _field(5, inner + _field(6, data)))
    path = tmp_path / "model.onnx"
    path.write_bytes(model([CONV, node("Relu", "c", "y")]).SerializeToString() + _field(7, data))
    with pytest.raises(UnreadableModelError, match="is not a readable ONNX model"):
        load_model(path)


def _field(number: int, data: bytes) -> bytes:
    size, length = [], len(data)
    while length > 127:
        size.append(length % 128 + 128)
        length //= 128
    return bytes([number * 8 + 2, *size, length]) + data


def test_a_run_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computation, "_MOST_SECONDS", 0.3)
    with pytest.raises(MeasurementError, match="took more than"):
        analyze(load_model(saved(endless_loop(), tmp_path)), {})


def test_weights_beyond_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tensors that share one region of one file are larger than the file."""
    path = tmp_path / "model.onnx"
    proto = model([CONV, node("Relu", "c", "y")])
    for number in range(1000):
        tensor = TensorProto(
            name=f"t{number}", data_type=1, dims=[1024, 256], data_location=TensorProto.EXTERNAL
        )
        tensor.external_data.add(key="location", value="weights.bin")
        proto.graph.initializer.append(tensor)
    (tmp_path / "weights.bin").write_bytes(bytes(2**20))
    path.write_bytes(proto.SerializeToString())
    monkeypatch.setattr(untrusted, "available_bytes", lambda: 10**9)
    with pytest.raises(UnreadableModelError, match=r"declares 1\.0 GB of weights, and 1\.0 GB of memory"):
        load_model(path)


def test_a_model_with_strings_has_a_hash(tmp_path: Path) -> None:
    labels = numpy_helper.from_array(np.array(["cat", "dog"], object), "labels")
    other = numpy_helper.from_array(np.array(["cat", "cow"], object), "labels")
    first, second = (load_model(model([CONV, node("Relu", "c", "y")], t)) for t in (labels, other))
    assert content_hash(first) != content_hash(second)


def test_names_reach_neither_the_terminal_nor_a_path_nor_the_markup(run: Run, tmp_path: Path) -> None:
    second = numpy_helper.from_array(np.ones((8, 8, 1, 1), np.float32), "v")
    wide = numpy_helper.from_array(np.ones((8, 3, 1, 1), np.float32), NASTY)
    nodes = [
        helper.make_node("Conv", ["x", NASTY], [f"c{NASTY}"], name=NASTY),
        helper.make_node("Relu", [f"c{NASTY}"], [f"r{NASTY}"], name=f"r{NASTY}"),
        helper.make_node("Conv", [f"r{NASTY}", "v"], ["y"], name=f"d{NASTY}"),
    ]
    saved(model(nodes, second, wide), tmp_path)
    outcome = run("analyze", "model.onnx")
    assert outcome.code == 0
    shown = outcome.out + outcome.err
    assert not any(c in shown for c in "\x1b\x07\u202e")
    document = run("analyze", "model.onnx", "--json")
    assert not any(c in document.out for c in "\x1b\x07")
    assert NASTY in json.loads(document.out)["dimensions"][0]["name"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_a_refusal_with_a_nasty_name(run: Run, tmp_path: Path) -> None:
    saved(model([helper.make_node("Conv", [NASTY, "w"], ["y"])]), tmp_path)
    outcome = run("analyze", "model.onnx")
    is_refused(outcome, 2, "which nothing makes")
    assert not any(c in outcome.err for c in "\x1b\x07\u202e")
