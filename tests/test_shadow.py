"""Laws of the shadow: what is folded, what stays computed, and that the function stays the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from zoo import CNNS, run, text_model, zoo_path

from onnx_mdp.analysis.binding import bind_shapes, doubled_shapes, graph_inputs, with_batch
from onnx_mdp.analysis.shadow import Shadow, add_initializer, prepare
from onnx_mdp.errors import MeasurementError, UnsupportedModelError, UsageError
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.running.timing import random_feeds

FEED = {"x": np.random.default_rng(0).standard_normal((1, 3, 6, 6)).astype(np.float32)}


def shadow_of(proto: onnx.ModelProto, **shapes: tuple[int, ...]) -> Shadow:
    model = load_model(proto)
    return prepare(model, bind_shapes(model, shapes))


def operators(shadow: Shadow) -> list[str]:
    return [operation.op_type for operation in shadow.operations]


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n for n in CNNS if "agllnet" not in n and "rec" not in n])
def test_the_normalised_model_computes_the_same_bit_for_bit(name: str) -> None:
    model = load_model(zoo_path(name))
    shadow = prepare(model, bind_shapes(model, CNNS[name]))
    feed = random_feeds(open_session(model_bytes(model), Runtime()), shadow.inputs, 0)
    for a, b in zip(run(model, feed), run(shadow.model, feed), strict=True):
        assert np.array_equal(a, b)
    for operation in shadow.operations:
        assert all(o in shadow.shapes for o in operation.outputs if o)


def test_preparing_leaves_the_model_alone() -> None:
    model = load_model(text_model(SHAPE_CHAIN.replace("N", "1")))
    before = model_bytes(model)
    prepare(model, bind_shapes(model, {}))
    assert model_bytes(model) == before


SHAPE_CHAIN = """(float[N,3,6,6] x) => (float[N,108] y) <
        int64 zero = {0}, int64[1] first = {0}, int64[1] rest = {-1}> {
    s = Shape(x)
    n = Gather(s, zero)
    n1 = Unsqueeze(n, first)
    target = Concat<axis=0>(n1, rest)
    y = Reshape(x, target)
}"""


def test_a_static_shape_chain_is_folded() -> None:
    shadow = shadow_of(text_model(SHAPE_CHAIN.replace("N", "1")))
    assert operators(shadow) == ["Reshape"]
    assert shadow.constants["target"].tolist() == [1, -1]
    assert shadow.dynamic == {}


def test_a_chain_that_follows_a_symbolic_size_stays() -> None:
    shadow = shadow_of(text_model(SHAPE_CHAIN))
    assert operators(shadow) == ["Shape", "Gather", "Unsqueeze", "Concat", "Reshape"]
    assert shadow.constants["target"].tolist() == [1, -1]
    assert shadow.dynamic["target"].tolist() == [True, False]
    assert shadow.dynamic["s"].tolist() == [True, False, False, False]
    batch = np.zeros((5, 3, 6, 6), np.float32)
    assert run(shadow.model, {"x": batch})[0].shape == (5, 108)


ONE_HEIGHT = """(float[N,3,H,W] x) => (float[N,c,d] y) <
    float[8,3,1,1] k, float[1,1,6,1] rows, int64[1] first = {0}, int64[1] second = {2}, int64[1] rest = {-1}
> {
    t = Conv(x, k)
    u = Add(t, rows)
    p = ReduceMean<axes=[2], keepdims=0>(u)
    s = Shape(t)
    front = Slice(s, first, second)
    target = Concat<axis=0>(front, rest)
    y = Reshape(p, target)
}"""


def test_a_file_that_runs_at_one_height_says_by_its_arithmetic_what_follows_the_size() -> None:
    shadow = shadow_of(text_model(ONE_HEIGHT), x=(1, 3, 6, 6))
    assert shadow.dynamic["s"].tolist() == [True, False, True, True]
    assert shadow.dynamic["target"].tolist() == [True, False, False]


def test_a_static_part_of_a_symbolic_shape_is_folded() -> None:
    text = """(float[N,3,6,6] x) => (float[N,3,6,6] y) <int64 one = {1}> {
        s = Shape(x) c = Gather(s, one) f = Cast<to=1>(c) q = Sqrt(f) y = Div(x, q)
    }"""
    shadow = shadow_of(text_model(text))
    assert operators(shadow) == ["Div"]
    assert shadow.constants["q"] == pytest.approx(np.sqrt(3))


def test_weight_movement_is_folded_and_constants_become_weights() -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,6,6] y) <float[4,3] w> {
        i = Identity(w)
        shape = Constant<value = int64[4] {4, 3, 1, 1}>()
        k = Reshape(i, shape)
        y = Conv(x, k)
    }"""
    proto = text_model(text)
    shadow = shadow_of(proto)
    assert operators(shadow) == ["Conv"]
    assert set(shadow.model.graph.initializers) == {"k"}
    weight = numpy_helper.to_array(proto.graph.initializer[0])
    assert np.array_equal(shadow.constants["k"].reshape(4, 3), weight)
    assert np.array_equal(run(shadow.model, FEED)[0], run(proto, FEED)[0])


@pytest.mark.parametrize(
    ("body", "weights", "operator"),
    [
        ("p = MatMul(q, w)", "float[2,3] q, float[3,4] w", "MatMul"),
        ("p = Gemm(q, w, z)", "float[2,3] q, float[3,4] w, float[4] z", "Gemm"),
        ("p = LayerNormalization(q, w)", "float[2,4] q, float[4] w", "LayerNormalization"),
    ],
)
def test_products_of_constants_are_never_folded(body: str, weights: str, operator: str) -> None:
    text = f"(float[1,2,4] x) => (float[1,2,4] y) <{weights}> {{ {body} r = Relu(p) y = Add(x, r) }}"
    shadow = shadow_of(text_model(text))
    assert operators(shadow) == [operator, "Relu", "Add"]
    assert "r" not in shadow.constants


def test_a_small_value_is_not_expanded_into_a_large_weight() -> None:
    text = """(float[1,1,1024,1024] x) => (float[1,1,1024,1024] y) <
        float[1] w, int64[4] s = {1, 1, 1024, 1024}> {
        big = Expand(w, s) y = Add(x, big)
    }"""
    shadow = shadow_of(text_model(text))
    assert operators(shadow) == ["Expand", "Add"]
    assert sum(v.const_value.nbytes for v in shadow.model.graph.initializers.values() if v.const_value) < 100


def test_an_output_that_is_constant_stays_computed() -> None:
    text = "(float[1,3,6,6] x) => (float[1,3,6,6] y, int64[4] s) { y = Relu(x) s = Shape(x) }"
    shadow = shadow_of(text_model(text))
    assert operators(shadow) == ["Relu", "Shape"]
    assert run(shadow.model, FEED)[1].tolist() == [1, 3, 6, 6]


def test_weights_listed_as_inputs_are_weights() -> None:
    """Files of IR version 3 must list their initializers among the inputs."""
    proto = text_model("(float[1,3,6,6] x) => (float[1,4,6,6] y) <float[4,3,1,1] w> { y = Conv(x, w) }", 9)
    proto.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4, 3, 1, 1]))
    proto.ir_version = 3
    model = load_model(proto)
    assert [v.name for v in graph_inputs(model)] == ["x"]
    shadow = prepare(model, bind_shapes(model, {}))
    assert [v.name for v in shadow.model.graph.inputs] == ["x"]
    assert shadow.model.ir_version >= 4
    assert "w" in shadow.constants
    assert np.array_equal(run(shadow.model, FEED)[0], run(proto, FEED)[0])


# -- binding ------------------------------------------------------------------------------------------------


def model_with(shape: str) -> ir.Model:
    return load_model(text_model(f"(float[{shape}] x) => (float[{shape}] y) {{ y = Relu(x) }}"))


def test_only_the_batch_is_bound_without_asking() -> None:
    assert bind_shapes(model_with("N,3,6,6"), {}) == {"x": (1, 3, 6, 6)}
    assert bind_shapes(model_with("N,3,6,6"), {}, batch=4) == {"x": (4, 3, 6, 6)}
    assert bind_shapes(model_with("N,3,H,W"), {"x": (2, 3, 5, 7)}) == {"x": (2, 3, 5, 7)}
    assert bind_shapes(model_with("1,3,6,6"), {}, batch=4) == {"x": (1, 3, 6, 6)}


@pytest.mark.parametrize(
    ("shape", "given", "words"),
    [
        ("N,3,H,W", {}, "input 'x' .*--input-shape x:1,3,224,224"),
        ("N,3,6,6", {"z": (1, 3, 6, 6)}, "no input 'z'; its inputs are x"),
        ("N,3,6,6", {"x": (1, 4, 6, 6)}, "input 'x'"),
        ("N,3,6,6", {"x": (3, 6, 6)}, "input 'x'"),
        ("N,3,6,6", {"x": (1, 3, 6, 6, 1)}, "input 'x'"),
        ("N,3,H,6", {"x": (1, 3, 0, 6)}, "input 'x'"),
        ("N,3,H,6", {"x": (-1, 3, 6, 6)}, "input 'x'"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shape: str, given: dict[str, tuple[int, ...]], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        bind_shapes(model_with(shape), given)
    assert "\n" not in str(caught.value)


def test_an_input_without_a_shape_must_be_given_one() -> None:
    proto = text_model("(float[1,3,6,6] x) => (float[1,3,6,6] y) { y = Relu(x) }")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    model = load_model(proto)
    with pytest.raises(UsageError, match="no shape; give it with --input-shape x:"):
        bind_shapes(model, {})
    assert bind_shapes(model, {"x": (1, 3, 6, 6)}) == {"x": (1, 3, 6, 6)}


def test_only_symbolic_sizes_are_doubled() -> None:
    assert doubled_shapes(model_with("N,3,H,6"), {"x": (2, 3, 5, 6)}) == {"x": (4, 3, 10, 6)}


@pytest.mark.parametrize(
    ("inputs", "shapes", "few"),
    [
        ("float[N,3,6,6] x", {"x": (64, 3, 6, 6)}, {"x": (4, 3, 6, 6)}),
        ("float[N,3,6,6] x", {"x": (2, 3, 6, 6)}, {"x": (2, 3, 6, 6)}),
        ("float[64,3,6,6] x", {"x": (64, 3, 6, 6)}, {"x": (64, 3, 6, 6)}),
        ("float[N,3] x, float[N,5] z", {"x": (8, 3), "z": (8, 5)}, {"x": (4, 3), "z": (4, 5)}),
        ("float[N,3] x, float[M,3] z", {"x": (8, 3), "z": (8, 3)}, {"x": (8, 3), "z": (8, 3)}),
        ("float[N,3] x, float z", {"x": (8, 3), "z": ()}, {"x": (8, 3), "z": ()}),
    ],
)
def test_a_symbolic_batch_of_all_inputs_may_be_smaller(
    inputs: str, shapes: dict[str, tuple[int, ...]], few: dict[str, tuple[int, ...]]
) -> None:
    model = load_model(text_model(f"({inputs}) => (int64 y) {{ y = Size(x) }}"))
    assert with_batch(model, shapes, 4) == few


# -- refusals -----------------------------------------------------------------------------------------------


def test_a_shape_at_which_the_model_cannot_run_is_an_error_of_one_sentence() -> None:
    text = """(float[N,3,H,W] x) => (float[N,108] y) <int64[2] s = {-1, 108}> { y = Reshape(x, s) }"""
    with pytest.raises(MeasurementError, match="at these input shapes") as caught:
        shadow_of(text_model(text), x=(1, 3, 5, 5))
    assert "\n" not in str(caught.value)


def test_a_constant_that_is_added_takes_no_name_of_anything() -> None:
    """``val_20`` with a number may be ``val_203``, which the exporter gave to a tensor."""
    text = "(float[2] w3, float[2] x) => (float[2] y) <float[2] w> { w2 = Add(x, w) y = Add(w2, w3) }"
    model = load_model(text_model(text))
    names = [add_initializer(model, "w", np.zeros(2, np.float32)).name for _ in range(2)]
    assert names == ["w4", "w5"]
    onnx.checker.check_model(ir.to_proto(model))


def test_a_weight_that_is_not_a_number_is_refused() -> None:
    proto = text_model("(float[1,3,6,6] x) => (float[1,4,6,6] y) <float[4,3,1,1] w> { y = Conv(x, w) }")
    weights = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weights.flat[-1] = np.nan
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w"))
    with pytest.raises(UnsupportedModelError, match="weight 'w' holds NaN"):
        shadow_of(proto)
