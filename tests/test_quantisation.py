"""Laws of quantized models: stored integers, scales and zero points are cut together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from test_precision import in_halves
from zoo import analyse, cut_wrongly, informative, prune_checked, random_plan, run, text_model

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.model_io import load_model
from onnx_mdp.numerics.integer_form import is_quantized, without_rounding
from onnx_mdp.numerics.qdq_form import in_qdq_form
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.computation import Computation
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import verify

# A layer whose weight and bias are stored as integers, each output with a scale of its own.
STORED = """(float[1,3,6,6] x) => (float[1,4,6,6] y) <
    int8[8,3,1,1] qa, float[8] vars, int8[8] za = {0, 1, 2, 3, 4, 5, 6, 7},
    int32[8] qb = {9, 8, 7, 6, 5, 4, 3, 2}, float[8] varb,
    float s = {0.05}, uint8 z = {128}, float[4,8,1,1] c> {
    wa = DequantizeLinear<axis=0>(qa, vars, za)
    ba = DequantizeLinear<axis=0>(qb, varb)
    t = Conv(x, wa, ba)
    q = QuantizeLinear(t, s, z)
    u = DequantizeLinear(q, s, z)
    y = Conv(u, c)
}"""


class Images(CalibrationDataReader):
    """Random inputs, as ONNX Runtime's quantizer asks for them."""

    def __init__(self, path: Path) -> None:
        """Prepare four feeds."""
        value = onnx.load_model(path).graph.input[0]
        shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        rng = np.random.default_rng(0)
        self.feeds: Iterator[dict[str, Any]] = iter(
            [{value.name: rng.standard_normal(shape).astype(np.float32)} for _ in range(4)]
        )

    def get_next(self) -> dict[str, Any] | None:
        """The next one."""
        return next(self.feeds, None)


@pytest.fixture(scope="session")
def quantized(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model of the catalog with weights and activations in int8, as ONNX Runtime quantizes it."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(name: str, per_channel: bool, form: QuantFormat = QuantFormat.QDQ) -> Path:
        path = folder / f"{name}_{per_channel}_{form}.onnx"
        if not path.is_file():
            source = exported(name)
            kinds = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
            quantize_static(source, path, Images(source), form, per_channel=per_channel, **kinds)
        return path

    return make


def stored_model(opset: int = 17) -> onnx.ModelProto:
    return text_model(STORED.replace("int8[8,3,1,1] qa,", f"int8[8,3,1,1] qa = {numbers('8,3,1,1')},"), opset)


def numbers(shape: str, low: int = -127, high: int = 128) -> str:
    """Integers of this shape, as ONNX text."""
    drawn = np.random.default_rng(2).integers(low, high, int(np.prod([int(n) for n in shape.split(",")])))
    return f"{{{', '.join(map(str, drawn))}}}"


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value}


def real(model: ir.Model, structure: Structure) -> ir.Model:
    return without_rounding(model, {name: len(shape) for name, shape in structure.shadow.shapes.items()})


def test_integers_scales_and_zero_points_are_cut_together() -> None:
    model, structure = analyse(stored_model())
    (dimension,) = (structure.dimensions[i] for i in structure.prunable)
    assert {(m.tensor, m.axis) for m in dimension.members} == {
        ("qa", 0), ("vars", 0), ("za", 0), ("qb", 0), ("varb", 0), ("c", 1),
    }  # fmt: skip
    pruned, evidence = prune_checked(model, structure, PruningPlan(keep={dimension.name: (1, 4, 6)}))
    before, after, rows = weights(model), weights(pruned), [1, 4, 6]
    assert evidence.worst <= 9e-7
    assert evidence.judged == "compared without rounding to integers; with it they agree"
    for name in ("qa", "vars", "za", "qb", "varb"):
        assert after[name].dtype == before[name].dtype
        assert np.array_equal(after[name], before[name][rows])
    assert np.array_equal(after["c"], before["c"][:, rows])
    assert [n.op_type for n in pruned.graph] == [n.op_type for n in model.graph]


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_a_wrong_cut_of_a_stored_tensor_is_noticed(slot: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, structure = analyse(stored_model())
    plan = PruningPlan(keep={"conv_2": (1, 4, 6)})
    wrong = cut_wrongly(monkeypatch, structure, plan, (0, slot, 0))
    assert not verify(model, structure, wrong, plan).verified


def test_layers_that_share_a_stored_weight_are_cut_apart() -> None:
    text = """(float[1,8] x) => (float[1,4] y) <
        int8[8,8] q = """ + numbers("8,8") + """, float s = {0.02}, float[8,4] c, float[8,4] d> {
        w = DequantizeLinear(q, s)
        a = MatMul(x, w)
        b = MatMul(a, w)
        e = MatMul(a, c)
        f = MatMul(b, d)
        y = Add(e, f)
    }"""  # fmt: skip
    model, structure = analyse(text_model(text))
    pruned, _ = prune_checked(model, structure, PruningPlan(keep={"matmul_1": (0, 5), "matmul_2": (3,)}))
    cut = sorted(a.shape for a in weights(pruned).values() if a.dtype == np.int8)
    assert cut == [(2, 1), (8, 2)]


FORMS = {
    "fake-quantized float weights": (
        "float[6,8] q, int8[8] z = {0, 1, 2, 3, 4, 5, 6, 7}",
        "p = QuantizeLinear<axis=1>(q, vars, z) w = DequantizeLinear<axis=1>(p, vars, z)",
    ),
    "int4": (
        "int4[6,8] q, int4[8] z = {0, 1, 2, 3, 4, 5, 6, 7}",
        "w = DequantizeLinear<axis=1>(q, vars, z)",
    ),
    "transposed": (
        "uint8[8,6] q, uint8[8] z = {0, 1, 2, 3, 4, 5, 6, 7}",
        "p = DequantizeLinear<axis=0>(q, vars, z) w = Transpose(p)",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_store_a_weight_is_cut_in_the_file(form: str) -> None:
    constants, nodes = FORMS[form]
    for kind, low, high in (("int4[6,8] q", -8, 8), ("uint8[8,6] q", 0, 256)):
        constants = constants.replace(kind, f"{kind} = {numbers('6,8', low, high)}")
    text = f"""(float[2,6] x) => (float[2,4] y) <{constants}, float[8] vars, float[8,4] c> {{
        {nodes}
        t = MatMul(x, w)
        y = MatMul(t, c)
    }}"""
    model, structure = analyse(text_model(text, 21))
    (name,) = (structure.dimensions[i].name for i in structure.prunable)
    pruned, evidence = prune_checked(model, structure, PruningPlan(keep={name: (2, 3, 7)}))
    assert evidence.worst <= 9e-7
    before, after, axis = weights(model), weights(pruned), 0 if form == "transposed" else 1
    assert np.array_equal(after["q"], np.take(before["q"], [2, 3, 7], axis))
    assert np.array_equal(after["z"], before["z"][[2, 3, 7]])
    assert np.array_equal(after["vars"], before["vars"][[2, 3, 7]])
    assert after["q"].dtype == before["q"].dtype


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_scales_in_half_precision(half: str) -> None:
    """Without their rounding the integers are real numbers, and half precision is float32."""
    model, structure = analyse(in_halves(stored_model(opset=19), half))
    pruned, evidence = prune_checked(model, structure, PruningPlan(keep={"conv_2": (1, 4, 6)}))
    assert evidence.worst <= 9e-7
    types = {n: str(v.dtype) for n, v in pruned.graph.initializers.items()}
    assert (types["qa"], types["vars"], types["c"]) == ("INT8", half.upper(), half.upper())


def test_rescaled_scores_need_float32() -> None:
    structure = analyse(stored_model())[1]
    with pytest.raises(UsageError, match="float32"):
        rewrite(structure, PruningPlan(keep={}, rescale_attention=True))


@pytest.mark.parametrize(
    ("axis", "prunable"), [(0, {"matmul_0": 8}), (1, {})], ids=["blocks of inputs", "blocks of outputs"]
)
def test_a_scale_for_a_block_of_indices_freezes_the_axis_of_the_blocks(
    axis: int, prunable: dict[str, int]
) -> None:
    scales = "float[2,8] vars" if axis == 0 else "float[4,4] vars"
    text = f"""(float[1,4] x) => (float[1,3] y) <int8[4,8] q = {numbers("4,8")}, {scales}, float[8,3] c> {{
        w = DequantizeLinear<axis={axis}, block_size=2>(q, vars)
        t = MatMul(x, w)
        y = MatMul(t, c)
    }}"""
    model, structure = analyse(text_model(text, 21))
    found = {structure.dimensions[i].name.replace("matmul_1", "matmul_0"): 8 for i in structure.prunable}
    assert found == prunable
    if not prunable:
        assert any("scale for each block" in str(d.frozen) for d in structure.dimensions)
    prune_checked(model, structure, random_plan(structure, np.random.default_rng(0)))


LONG = ("mobilenet_v2_small", "deit_micro", "swin_micro", "detr_micro")
NETS = ["cifar_resnet8_small", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]


@pytest.mark.parametrize("form", list(QuantFormat), ids=lambda form: form.name)
@pytest.mark.parametrize("per_channel", [False, True], ids=["one scale", "a scale for each channel"])
@pytest.mark.parametrize("name", NETS)
def test_pruned_equals_masked_on_quantized_exports(
    name: str,
    per_channel: bool,
    form: QuantFormat,
    exported: Callable[..., Path],
    quantized: Callable[..., Path],
) -> None:
    whole = analyse(exported(name))[1]
    model, structure = analyse(quantized(name, per_channel, form))
    assert structure.graph.unsupported == {}
    # In QOperator form a branch may read a tensor before it is rounded, and the shortcut after that.
    apart = form is QuantFormat.QOperator and name == "swin_micro"
    assert len(structure.blocks) == len(whole.blocks) - apart
    if not whole.shadow.split:
        assert len(structure.prunable) == len(whole.prunable)
    informed = False
    for seed in (1, 2):
        # Without any cross-attention a detector's outputs are constant, which proves nothing.
        plan = random_plan(structure, np.random.default_rng(seed), least=0.3, blocks=name != "detr_micro")
        pruned, evidence = prune_checked(model, structure, plan)
        assert evidence.worst <= 2e-6
        informed |= informative(real(pruned, structure), structure)
        size, before = (sum(a.nbytes for a in weights(m).values()) for m in (pruned, model))
        assert size < before
    assert informed


def test_an_empty_plan_keeps_the_integers(quantized: Callable[..., Path]) -> None:
    model, structure = analyse(quantized("cifar_resnet8_small", True))
    same = weights(rewrite(structure, PruningPlan(keep={})))
    for name, array in weights(model).items():
        assert same[name].tobytes() == array.tobytes()


def test_without_rounding_a_model_computes_nearly_the_same() -> None:
    """Rounding moves at most half a step of the only activation, seen through the layer after it."""
    model, structure = analyse(stored_model())
    plain = real(model, structure)
    assert is_quantized(model)
    assert not is_quantized(plain)
    assert real(plain, structure) is plain
    feeds = random_feeds(Computation(model).inputs, structure.shadow.inputs, 0)
    (rounded,), (unrounded,) = run(model, feeds), run(plain, feeds)
    bound = 0.025 * np.abs(weights(model)["c"]).sum(1).max()
    difference = np.abs(rounded - unrounded).max()
    assert 0 < difference <= bound * 1.001


POINTS = "uint8 k = {120}, uint8 l = {131}, uint8 m = {97}"
FINE = f"float r = {{0.03}}, float s = {{0.05}}, float v = {{0.02}}, {POINTS}"
COARSE = f"float r = {{0.03}}, float s = {{0.05}}, float v = {{0.3}}, {POINTS}"
CHANNELS = "float[4] each = {0.05, 0.04, 0.03, 0.06}, int8[4] none = {0, 0, 0, 0}"
BIAS = "int32[4] e = {9, -80, 7, 60}"
CONV = f"uint8[4,4,1,1] w = {numbers('4,4,1,1', 0, 256)}"
SIGNED = f"int8[4,4,1,1] w = {numbers('4,4,1,1')}"
MATRIX = f"uint8[5,6] w = {numbers('5,6', 0, 256)}"
WIDE = f"uint8[20,4] w = {numbers('20,4', 0, 256)}"
# Operator, shape of the result, constants, and nodes.
INTEGERS = {
    "QLinearConv": ("1,4,4,5", f"{CONV}, {BIAS}, {COARSE}", "y = QLinearConv(a, r, k, w, s, l, v, m, e)"),
    "QLinearConv by channel": (
        "1,4,4,5",
        f"{SIGNED}, {CHANNELS}, {BIAS}, {COARSE}",
        "y = QLinearConv(a, r, k, w, each, none, v, m, e)",
    ),
    "QLinearMatMul": ("1,4,4,6", f"{MATRIX}, {COARSE}", "y = QLinearMatMul(a, r, k, w, s, l, v, m)"),
    "QGemm": (
        "4,4",
        f"{WIDE}, {BIAS}, {COARSE}",
        "c = Flatten<axis=2>(a) y = com.microsoft.QGemm(c, r, k, w, s, l, e, v, m)",
    ),
    "QLinearAdd": ("1,4,4,5", FINE, "y = com.microsoft.QLinearAdd(a, r, k, b, s, l, v, m)"),
    "QLinearMul": ("1,4,4,5", COARSE, "y = com.microsoft.QLinearMul(a, r, k, b, s, l, v, m)"),
    "QLinearConcat": (
        "1,8,4,5",
        FINE,
        "y = com.microsoft.QLinearConcat<axis=1>(v, m, a, r, k, b, s, l)",
    ),
    "QLinearAveragePool": (
        "1,4,3,4",
        FINE,
        "y = com.microsoft.QLinearAveragePool<kernel_shape=[2,2]>(a, r, k, v, m)",
    ),
    "QLinearGlobalAveragePool": (
        "1,4,1,1",
        FINE,
        "y = com.microsoft.QLinearGlobalAveragePool(a, r, k, v, m)",
    ),
    "QLinearSigmoid": ("1,4,4,5", FINE, "y = com.microsoft.QLinearSigmoid(a, r, k, v, m)"),
    "QLinearLeakyRelu": ("1,4,4,5", FINE, "y = com.microsoft.QLinearLeakyRelu<alpha=0.1>(a, r, k, v, m)"),
    "QLinearSoftmax": (
        "1,4,4,5",
        FINE,
        "y = com.microsoft.QLinearSoftmax<axis=-1, opset=13>(a, r, k, v, m)",
    ),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_a_layer_in_integers_is_what_it_is_written_out_as(name: str) -> None:
    """Up to one step, for the runtime rounds in places of its own."""
    shape, constants, nodes = INTEGERS[name]
    text = f"(uint8[1,4,4,5] a, uint8[1,4,4,5] b) => (uint8[{shape}] y) <{constants}> {{ {nodes} }}"
    model = load_model(text_model(text, domains={"com.microsoft": 1}))
    written = in_qdq_form(model)
    assert not [n for n in written.graph if n.op_type.startswith("QL") or n.op_type == "QGemm"]
    rng = np.random.default_rng(0)
    feeds = {x: rng.integers(0, 256, (1, 4, 4, 5), np.uint8) for x in ("a", "b")}
    (expected,), (actual,) = run(model, feeds), run(written, feeds)
    assert expected.dtype == actual.dtype
    assert np.abs(expected.astype(int) - actual.astype(int)).max() <= 1
    assert len(np.unique(expected)) > 2


def test_a_model_quantized_at_run_time_is_frozen_with_the_remedy(tmp_path: Path) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4] y) <float[8,3,1,1] a, float[288,4] b> {
        t = Conv(x, a)
        u = Relu(t)
        v = Flatten(u)
        y = MatMul(v, b)
    }"""
    onnx.save_model(text_model(text), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx")
    _, structure = analyse(tmp_path / "dynamic.onnx")
    assert structure.prunable == ()
    assert {"prune the float model" in str(d.frozen) for d in structure.dimensions} == {True}
