"""Laws of runs that share the weights: the same outputs as any session, and no copy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from zoo import text_model

from onnx_mdp.errors import MeasurementError
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.running.computation import Computation, weightless, with_weights
from onnx_mdp.running.runtime import Runtime, open_session


def small_and_large() -> onnx.ModelProto:
    return text_model(
        """(float[N,64] x) => (float[N,2] y) <float[64,64] large, float[64] small, float[64,2] last> {
            t = MatMul(x, large)
            u = Add(t, small)
            y = MatMul(u, last)
        }"""
    )


def weight_listed_as_input() -> onnx.ModelProto:
    model = small_and_large()
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )
    return model


def weight_that_is_an_output() -> onnx.ModelProto:
    model = small_and_large()
    model.graph.output.append(helper.make_tensor_value_info("large", 1, [64, 64]))
    return model


def weight_in_a_branch() -> onnx.ModelProto:
    return text_model(
        """(float[N,64] x, bool c) => (float[N,64] y) <float[64,64] large> {
            y = If(c) <
                then_branch = a () => (float[N,64] p) { p = MatMul(x, large) },
                else_branch = b () => (float[N,64] q) { q = Identity(x) }
            >
        }"""
    )


MODELS = [small_and_large, weight_listed_as_input, weight_that_is_an_output, weight_in_a_branch]


def feeds(computation: Computation) -> dict[str, Any]:
    drawn = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    values = {"x": drawn, "c": np.asarray(True)}
    return {arg.name: values[arg.name] for arg in computation.inputs if arg.name in values}


@pytest.mark.parametrize("make", MODELS)
def test_a_computation_gives_what_a_session_gives(make: Any) -> None:
    model = load_model(make())
    computation = Computation(model)
    session = open_session(model_bytes(model), Runtime(), optimize=False)
    assert computation.outputs == tuple(o.name for o in session.get_outputs())
    fed = feeds(computation)
    for a, b in zip(computation.run(computation.outputs, fed), session.run(None, fed), strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max()


def test_inner_tensors_can_be_outputs() -> None:
    model = load_model(small_and_large())
    computation = Computation(model, ["t", "y"])
    fed = feeds(computation)
    weight = model.graph.initializers["large"].const_value
    assert weight is not None
    (inner,) = computation.run(["t"], fed)
    assert np.abs(inner - fed["x"] @ weight.numpy()).max() <= 1e-5 * np.abs(inner).max()


def test_shapes_are_measured_without_the_values() -> None:
    model = load_model(small_and_large())
    computation = Computation(model, measured=["t", "u", "y"])
    assert computation.shapes(feeds(computation)) == {"t": (3, 64), "u": (3, 64), "y": (3, 2)}


def test_nothing_is_computed_that_no_output_needs() -> None:
    model = text_model(
        """(float[N,64] x) => (float[N,64] y, float[1,2] z) <int64[2] shape = {1, 2}> {
            y = Relu(x)
            z = Reshape(x, shape)
        }"""
    )
    computation = Computation(load_model(model), ["y"], alone=True)
    assert computation.outputs == ("y",)
    (found,) = computation.run(["y"], {"x": np.ones((3, 64), np.float32)})
    assert found.shape == (3, 64)


def test_what_a_branch_reads_is_computed() -> None:
    model = text_model(
        """(float[N,64] x, bool c) => (float[N,64] z) {
            y = Relu(x)
            s = Neg(x)
            t = If(c) <
                then_branch = a () => (float[N,64] p) { p = Add(y, y) },
                else_branch = b () => (float[N,64] q) { q = Identity(y) }
            >
            z = Exp(t)
        }"""
    )
    given = {"x": np.ones((3, 64), np.float32), "c": np.asarray(True)}
    (found,) = Computation(load_model(model), ["t"], alone=True).run(["t"], given)
    assert (found == 2).all()


def test_a_sequence_is_no_tensor() -> None:
    model = text_model(
        """(float[N,64] x) => (float[N,64] y) {
            s = SequenceConstruct(x, x)
            y = ConcatFromSequence <axis = 0> (s)
        }"""
    )
    assert Computation(load_model(model), ["s"]).tensors == ("y",)


PEAK = """
import resource, sys
import numpy as np, onnx, onnx.helper as h, onnx_ir as ir
from onnx_mdp.running.computation import Computation

array = np.ones((7000, 7000), np.float32)  # 196 MB
value = [h.make_tensor_value_info(n, 1, [1, 7000]) for n in "xy"]
graph = h.make_graph([h.make_node("MatMul", ["x", "w"], ["y"])], "g", value[:1], value[1:])
model = ir.from_proto(h.make_model(graph, ir_version=8, opset_imports=[h.make_opsetid("", 17)]))
weight = ir.Value(name="w", const_value=ir.tensor(array, name="w"))
model.graph.register_initializer(weight)
next(iter(model.graph)).replace_input_with(1, weight)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(y,) = Computation(model).run(["y"], {"x": np.ones((1, 7000), np.float32)})
assert (y == 7000).all()
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(more / (1e6 if sys.platform == "darwin" else 1e3))
"""


LONG = """
import resource, sys
import numpy as np, onnx.parser, onnx_ir as ir
from onnx_mdp.running.computation import Computation

names = [f"t{i}" for i in range(1, 31)]
text = "agraph (float[N] t0) => (float[N] t30) { " + " ".join(
    f"{name} = Relu(t{i})" for i, name in enumerate(names)) + " }"
model = ir.from_proto(onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>' + text))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
computation = Computation(model, measured=names)
shapes = computation.shapes({"t0": np.ones(5_000_000, np.float32)})  # 20 MB each
assert shapes == dict.fromkeys(names, (5_000_000,))
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(more / (1e6 if sys.platform == "darwin" else 1e3))
"""


@pytest.mark.parametrize("script", [PEAK, LONG])
def test_a_run_holds_no_copy_of_weights_and_no_activation_for_long(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150


def test_the_weights_are_not_copied() -> None:
    model = load_model(small_and_large())
    held = model.graph.initializers["large"].const_value
    assert held is not None
    assert np.shares_memory(Computation(model)._weights["large"], held.numpy())
    proto, weights = weightless(model)
    assert [t.name for t in proto.graph.initializer] == ["small", "last"]
    assert weights["large"] is held
    assert model.graph.initializers["large"].const_value is held, "the model itself stays as it is"


@pytest.mark.parametrize("make", MODELS)
def test_weights_that_were_taken_out_can_be_put_back(make: Any) -> None:
    model = load_model(make())
    again = with_weights(*weightless(model))
    for name, value in model.graph.initializers.items():
        restored = again.graph.initializers[name].const_value
        assert value.const_value is not None
        assert restored is not None
        assert np.array_equal(restored.numpy(), value.const_value.numpy())
    fed = feeds(Computation(model))
    pair = [open_session(model_bytes(m), Runtime(), optimize=False).run(None, fed) for m in (model, again)]
    for a, b in zip(*pair, strict=True):
        assert np.array_equal(a, b)


def test_a_model_that_does_not_load_is_an_error() -> None:
    proto = small_and_large()
    proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(MeasurementError):
        Computation(ir.from_proto(proto))


@pytest.mark.parametrize("holder", ["initializer", "attribute", "branch"])
def test_a_loaded_file_holds_arrays_and_no_protobuf(holder: str, tmp_path: Any) -> None:
    """A tensor of a protobuf is copied at each look, and one of them keeps the whole file in memory."""
    array = np.arange(6, dtype=np.float32)
    tensor = numpy_helper.from_array(array, "w")
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    value = [helper.make_tensor_value_info(n, 1, [6]) for n in ("x", "y", "z")]
    nodes, inputs = [constant, add], value[:1]
    if holder == "initializer":
        nodes = [add]
    if holder == "branch":
        branch = helper.make_graph(nodes, "branch", [], [value[1]])
        inputs = [value[0], helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])]
        nodes = [helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)]
    stored = [tensor] if holder == "initializer" else []
    outputs = [value[2] if holder == "branch" else value[1]]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(proto, tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    found = [v.const_value for v in model.graph.initializers.values()]
    found += [n.attributes["value"].as_tensor() for n in model.graph.all_nodes() if n.op_type == "Constant"]
    assert len(found) == (2 if holder == "branch" else 1)
    for held in found:
        assert held is not None
        assert isinstance(held, ir.Tensor)
        assert held.numpy() is held.numpy()
        assert np.array_equal(held.numpy(), array)
