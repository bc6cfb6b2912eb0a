"""Laws of the kernels: every operator with a rule has one, and it computes what ONNX Runtime does.

The models are the cases of the rules and of the forms, in every opset; ONNX's own tests of its operators; and
all modes of Resize.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from test_forms import FORMS
from test_rules import ALL, in_form, model_of
from test_rules import FORMS as VERSIONS
from test_rules import WITHOUT_KERNEL as NOT_IN_RUNTIME
from zoo import text_model

from onnx_mdp import to_torch
from onnx_mdp.errors import MeasurementError, UnsupportedModelError
from onnx_mdp.model_io import load_model
from onnx_mdp.rules import RULES

torch = pytest.importorskip("torch")

from test_training_bridge import TOLERANCE, error  # noqa: E402 - it needs torch

from onnx_mdp.training.kernels import KERNELS  # noqa: E402 - it needs torch

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# A quantized model is refused whole: its float original is what can be trained.
QUANTIZED = {"ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear"}
FOREIGN = {"an operator of another domain", "a standard name in another domain"}
CASES = [
    name for name, case in ALL.items() if not any(op in case.text for op in QUANTIZED) and name not in FOREIGN
]


def test_every_operator_with_a_rule_has_a_kernel() -> None:
    assert set(RULES) - set(KERNELS) == QUANTIZED


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_what_the_runtime_does(name: str) -> None:
    model = load_model(model_of(name))
    assert error(model, to_torch(model), ALL[name].shapes) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in FORMS if "MaxUnpool" not in name])
def test_every_form_computes_what_the_runtime_does(name: str) -> None:
    opset, _, text = FORMS[name]
    model = load_model(text_model(text, opset))
    assert error(model, to_torch(model)) <= TOLERANCE


@pytest.mark.slow
def test_every_version_of_an_operator_computes_what_the_runtime_does() -> None:
    tried = 0
    for name, version in VERSIONS:
        model = None if name in QUANTIZED or (name, version) in NOT_IN_RUNTIME else in_form(name, version)
        if model is not None:
            loaded = load_model(model)
            assert error(loaded, to_torch(loaded), ALL[name].shapes) <= TOLERANCE, (name, version)
            tried += 1
    assert tried > 0.85 * len(VERSIONS)


# ONNX's tests of operators, but for what torch has no numbers for (text, integers without sign beyond eight
# bits, floats of eight and fewer) and for
NODE_EXCEPTIONS = {
    "test_col2im_5d": "three spatial axes",
    "test_maxpool_with_argmax_2d_precomputed_strides": "places in column order",
    "test_reduce_max_empty_set": "no elements",
    "test_reduce_max_empty_set_bool": "no elements",
    "test_reduce_min_empty_set": "no elements",
    "test_resize_downsample_scales_cubic_align_corners": "ONNX Runtime rounds the size first, and so do we",
    "test_resize_downsample_scales_linear_align_corners": "ONNX Runtime rounds the size first, and so do we",
}
NUMBERS = {np.dtype(name) for name in "bool float16 float32 float64 int8 int16 int32 int64 uint8".split()}
LEFT_OUT = ("quantize", "test_sequence", "test_training_dropout", "integer", "_expanded", "test_split_to_seq")


def node_tests() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the code that computes what is expected
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    for case in cases:
        names = {node.op_type for node in case.model.graph.node}
        known = names <= set(KERNELS) and not any(part in case.name for part in LEFT_OUT)
        if known and case.model.opset_import[0].version >= 7:
            yield case


def is_number(array: Any) -> bool:
    return isinstance(array, np.ndarray | np.generic) and array.dtype in NUMBERS


@pytest.mark.slow
def test_kernels_pass_the_tests_of_onnx() -> None:
    failed, passed = set(), 0
    for case in node_tests():
        for inputs, outputs in case.data_sets:
            if all(map(is_number, (*inputs, *outputs))):
                passed += 1
                if not agrees(case.model, inputs, outputs):
                    failed.add(case.name)
    assert failed == set(NODE_EXCEPTIONS)
    assert passed > 900


def agrees(model: onnx.ModelProto, inputs: list[Any], outputs: list[Any]) -> bool:
    feeds = {v.name: torch.from_numpy(np.array(a)) for v, a in zip(model.graph.input, inputs, strict=True)}
    try:
        found = to_torch(model).run(feeds)
    except (IndexError, UnsupportedModelError):
        return False
    pairs = [(found[v.name].numpy(), np.asarray(a)) for v, a in zip(model.graph.output, outputs, strict=True)]
    return all(
        a.shape == b.shape and a.dtype == b.dtype and np.allclose(a, b, 2e-3, 1e-5, equal_nan=True)
        for a, b in pairs
    )


MODES = ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel", "tf_crop_and_resize")
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
SIZES = ("2.0,2.0", "0.6,0.6", "1.7,2.4", "14,5", "1,1", "21,9")


def resize(opset: int, attributes: Mapping[str, Any], size: str) -> onnx.ModelProto:
    """A Resize from 7 × 9 by scales or, where these are whole numbers, to sizes."""
    given = ",".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in attributes.items())
    if "." in size:
        operands, operand = "x, roi, z", f"float[4] z = {{1,1,{size}}}"
    else:
        operands, operand = "x, roi, none, z", f"float[0] none, int64[4] z = {{1,2,{size}}}"
    return text_model(
        "(float[1,2,7,9] x) => (float[1,2,H,W] y) "
        f"<float[8] roi = {{0,0,0.1,-0.2,1,1,0.8,1.3}}, {operand}> {{ y = Resize<{given}>({operands}) }}",
        opset,
    )


@pytest.mark.slow
def test_resize_computes_what_the_runtime_does_in_every_mode() -> None:
    tried = 0
    for opset, coordinates, size in itertools.product((11, 13, 18), MODES, SIZES):
        smooth = [
            {"mode": mode, "exclude_outside": outside, **({"antialias": 1} if antialias else {})}
            for mode in ("linear", "cubic")
            for outside in ((0, 1) if mode == "cubic" else (0,))
            for antialias in ((0, 1) if opset >= 18 else (0,))
        ]
        for form in (*smooth, *({"mode": "nearest", "nearest_mode": rounding} for rounding in NEAREST)):
            attributes = {"coordinate_transformation_mode": coordinates, **form}
            if (coordinates, size, form.get("nearest_mode")) == (
                "asymmetric",
                "1.7,2.4",
                "round_prefer_ceil",
            ):
                continue  # 2.5 to the last bit, which either may round up
            model = load_model(resize(opset, attributes, size))
            try:
                assert error(model, to_torch(model)) <= 2 * TOLERANCE, (opset, attributes, size)
            except MeasurementError:
                continue  # a mode that ONNX Runtime does not have
            tried += 1
    assert tried > 500
