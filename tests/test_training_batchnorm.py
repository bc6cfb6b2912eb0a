"""Laws of re-inserted BatchNorm: the identity when inserted, the same function when folded after training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from zoo import SmallModel, small_model, text_model, zoo_path

from onnx_mdp.errors import UsageError
from onnx_mdp.model_io import load_model

torch = pytest.importorskip("torch")

from test_training_bridge import error, in_runtime, small, tensors, trained  # noqa: E402 - it needs torch

from onnx_mdp.training.batchnorm import (  # noqa: E402 - it needs torch
    fold_batchnorm,
    insert_batchnorm,
    normalised_layers,
)
from onnx_mdp.training.bridge import to_torch  # noqa: E402 - it needs torch

pytestmark = pytest.mark.usefixtures("one_torch_thread")
CLOSE = 1e-5  # of the largest value of an output
MODELS = [
    (SmallModel("mobilenet_v2_small", "torchscript", 17), 52),
    (SmallModel("mobilenet_v2_small", "dynamo", 20), 52),
    (SmallModel("resnet18_small", "torchscript", 9), 20),
    (SmallModel("resnet18_small", "dynamo", 18), 20),
]


def calibration(model: ir.Model) -> list[Any]:
    return [in_runtime(model, seed=seed)[0] for seed in range(4)]


def apart(module: Any, other: Any, feeds: Any) -> float:
    """The largest difference of two modules in double precision, relative to the largest value.

    Networks that ten steps on one input have brought off balance amplify the rounding of single precision.
    """
    doubles = {n: t.double() if t.is_floating_point() else t for n, t in tensors(feeds).items()}
    with torch.no_grad():
        a, b = (copy.deepcopy(m).double().run(doubles) for m in (module, other))
    return max(float((a[name] - b[name]).abs().max() / a[name].abs().max()) for name in a)


def check_round_trip(model: ir.Model, layers: int) -> None:
    normed = insert_batchnorm(model, calibration(model))
    assert sum("inserted_norm" in str(node.name) for node in normed.graph) == layers
    module, feeds = to_torch(normed), in_runtime(model)[0]
    assert error(model, module) <= CLOSE
    trained(module, feeds, 10)
    assert apart(to_torch(model), module, feeds) > 1e-3
    folded = fold_batchnorm(model, module)
    assert apart(to_torch(folded), module, feeds) <= CLOSE
    assert [n.name for n in folded.graph] == [n.name for n in model.graph]
    assert set(folded.graph.initializers) >= set(model.graph.initializers)


@pytest.mark.slow
@pytest.mark.parametrize(("made", "layers"), MODELS, ids=str)
def test_inserted_norms_change_nothing_and_fold_into_the_same_graph(
    made: SmallModel, layers: int, tmp_path: Path
) -> None:
    check_round_trip(load_model(small_model(made, tmp_path)), layers)


@pytest.mark.zoo
def test_a_resnet_with_published_weights() -> None:
    check_round_trip(load_model(zoo_path("cifar10/resnet20.onnx")), 19)


LAYERS = """(float[2,4,6,6] x) => (float[2,6,11,11] y)
    <float[6,2,3,3] w, float[6,2,2,2] t, float[6,6,1,1] o> {
    c = Conv<group=2>(x, w) r = Relu(c) d = ConvTranspose<group=3, strides=[3,3]>(r, t)
    s = Sigmoid(d) y = Conv(s, o)
}"""


def test_a_layer_without_bias_gets_one_and_grouped_layers_fold_by_group() -> None:
    model = load_model(text_model(LAYERS))
    check_round_trip(model, 2)
    folded = fold_batchnorm(model, to_torch(insert_batchnorm(model, calibration(model))))
    assert set(folded.graph.initializers) == {"w", "t", "o", "w__bias", "t__bias"}


def test_statistics_are_those_of_the_calibration_inputs() -> None:
    model = load_model(text_model(LAYERS))
    feeds = calibration(model)
    normed = insert_batchnorm(model, feeds)
    module = to_torch(model)
    found = torch.cat([module.run({"x": torch.from_numpy(f["x"])}, also=["c"])["c"] for f in feeds])
    mean = normed.graph.initializers["c/inserted_norm/mean"].const_value.numpy()
    var = normed.graph.initializers["c/inserted_norm/var"].const_value.numpy()
    np.testing.assert_allclose(mean, found.mean((0, 2, 3)).detach(), atol=1e-5)
    np.testing.assert_allclose(var, found.var((0, 2, 3), correction=0).detach(), rtol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "n = InstanceNormalization(c, s, s) r = Relu(n) y = Conv(r, v)",
        "t = Transpose<perm=[0,2,3,1]>(c) m = ReduceMean<axes=[3]>(t) d = Sub(t, m) y = MatMul(d, q)",
        "r = Relu(c) d = Conv(r, w) e = Relu(d) y = Conv(e, v)",
        "y = Relu(c)",
    ],
    ids=["normalised already", "normalised in written-out form", "a shared weight", "a prediction"],
)
def test_a_layer_that_takes_no_norm_gets_none(text: str) -> None:
    weights = "float[4,4,3,3] w, float[4,4,1,1] v, float[4] s, float[4,4] q"
    graph = f"(float[1,4,5,5] x) => (float[1,N,H,W] y) <{weights}> {{ c = Conv(x, w) {text} }}"
    model = load_model(text_model(graph))
    assert not {"c"} & {str(node.outputs[0].name) for node in normalised_layers(model)}


def test_nothing_to_insert_and_nothing_to_measure_are_errors() -> None:
    with pytest.raises(UsageError, match="no convolution of the model takes a BatchNorm"):
        insert_batchnorm(small(), [])
    with pytest.raises(UsageError, match="there are none"):
        insert_batchnorm(text_model(LAYERS), [])
