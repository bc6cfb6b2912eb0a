"""Laws of the bridge to torch: what a module computes, which weights it trains, what comes back."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from test_precision import in_halves
from zoo import SMALL_MODELS, SmallModel, analyse, random_plan, small_model, text_model

from onnx_mdp import model_io, to_torch, write_back
from onnx_mdp.analysis.binding import bind_shapes
from onnx_mdp.errors import UnsupportedModelError, UsageError
from onnx_mdp.large_models import save_model
from onnx_mdp.model_io import content_hash, load_model, model_bytes
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery.rewriting import rewrite

torch = pytest.importorskip("torch")

from onnx_mdp.training.kernels import elementwise  # noqa: E402 - it needs torch

pytestmark = pytest.mark.usefixtures("one_torch_thread")
TOLERANCE = 1e-5  # of the largest value of an output
QUICK = {"paddle_mobilenet-imitation-11", "torch_one_detector-imitation-9", "tf_attention-imitation-13"}
QUICK |= {"keras_cnn-imitation-9", "shufflenet_v2_small-torchscript-9", "deit_micro-torchscript-14"}
MODELS = [
    pytest.param(made, id=str(made), marks=() if str(made) in QUICK else pytest.mark.slow)
    for made in SMALL_MODELS
]
# Weights whose gradient is nothing: DETR's first self-attention is over queries that are all zero, and the
# gate of the imitation saturates on noise.
UNREACHED = {"detr_micro": 5, "paddle_mobilenet": 4}
Feeds = Mapping[str, Any]


def in_runtime(
    model: ir.Model, shapes: Mapping[str, Any] | None = None, seed: int = 0
) -> tuple[Feeds, dict[str, Any]]:
    """Random inputs of these shapes, and the outputs of ONNX Runtime for them."""
    session = open_session(model_bytes(model), Runtime(), optimize=False)
    feeds = random_feeds(session, bind_shapes(model, shapes or {}), seed)
    names = [output.name for output in session.get_outputs()]
    return feeds, dict(zip(names, session.run(names, feeds), strict=True))


def tensors(feeds: Feeds) -> dict[str, Any]:
    return {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}


def error(model: ir.Model, module: Any, shapes: Mapping[str, Any] | None = None) -> float:
    """The largest difference between torch and ONNX Runtime, relative to the largest value of its output."""
    feeds, wanted = in_runtime(model, shapes)
    with torch.no_grad():
        found = module.run(tensors(feeds))
    assert list(found) == list(wanted)
    errors = [0.0]
    for name, array in wanted.items():
        assert found[name].shape == array.shape
        if array.size:
            scale = max(float(np.abs(array).max()), 1e-9)
            errors.append(float(np.abs(found[name].numpy().astype(float) - array).max()) / scale)
    return max(errors)


def close(model: ir.Model, module: Any) -> bool:
    """Whether torch and ONNX Runtime agree, to four times what its optimised and plain runs differ by."""
    found = error(model, module)
    return found <= TOLERANCE or found <= 4 * runtime_noise(model)


def runtime_noise(model: ir.Model) -> float:
    feeds, plain = in_runtime(model)
    optimised = open_session(model_bytes(model), Runtime()).run(list(plain), feeds)
    pairs = zip(plain.values(), optimised, strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)) for a, b in pairs if a.size)


def without_values(model: ir.Model) -> list[Any]:
    """Everything that a file holds but the numbers of its tensors."""
    nodes = [
        (n.name, n.domain, n.op_type, [v and v.name for v in n.inputs], [v.name for v in n.outputs],
         [(k, str(a.value)) for k, a in n.attributes.items() if a.type != ir.AttributeType.TENSOR])
        for n in model.graph
    ]  # fmt: skip
    stored = [(n, v.dtype, str(v.shape)) for n, v in model.graph.initializers.items()]
    ends = [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
    return [nodes, stored, ends, dict(model.opset_imports), dict(model.metadata_props), model.ir_version]


def loss(module: Any, feeds: Feeds, seed: int = 0) -> Any:
    """The same random projection of the float outputs for every module with these outputs."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [y for y in module.run(tensors(feeds)).values() if y.is_floating_point()]
    return sum((torch.randn(y.shape, generator=generator) * y).mean() for y in outputs)


def trained(module: Any, feeds: Feeds, steps: int) -> set[str]:
    """Train in place; the weights that a gradient reached at least once."""
    reached: set[str] = set()
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    module.train()
    for seed in range(steps):
        optimizer.zero_grad()
        loss(module, feeds, seed).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        reached |= {n for n, w in module.weights().items() if w.grad is not None and bool(w.grad.any())}
        optimizer.step()
    module.eval()
    return reached


@pytest.mark.parametrize("made", MODELS)
def test_torch_computes_what_the_runtime_does_and_what_it_learns_comes_back(
    made: SmallModel, tmp_path: Path
) -> None:
    model = load_model(small_model(made, tmp_path))
    module = to_torch(model)
    assert close(model, module)
    feeds, _ = in_runtime(model)
    before = {name: weight.detach().clone() for name, weight in module.weights().items()}
    unreached = set(module.weights()) - trained(module, feeds, 10)
    assert len(unreached) <= UNREACHED.get(made.architecture, 0)
    written = write_back(model, module)
    assert close(written, module)
    assert without_values(written) == without_values(model)
    changed = {n for n, weight in module.weights().items() if not torch.equal(weight, before[n])}
    assert changed
    for name, value in model.graph.initializers.items():
        if name not in changed and name not in module.statistics():
            assert written.graph.initializers[name].const_value.tobytes() == value.const_value.tobytes()


@pytest.mark.parametrize("made", MODELS)
def test_a_pruned_model_comes_back_as_well(made: SmallModel, tmp_path: Path) -> None:
    _, structure = analyse(small_model(made, tmp_path))
    pruned = rewrite(structure, random_plan(structure, np.random.default_rng(0), least=0.3))
    module = to_torch(pruned)
    assert close(pruned, module)
    trained(module, in_runtime(pruned)[0], 2)
    assert close(write_back(pruned, module), module)


def test_nothing_trained_gives_the_same_model(tmp_path: Path) -> None:
    model = load_model(small_model(SmallModel("resnet18_small", "torchscript", 17), tmp_path))
    assert content_hash(write_back(model, to_torch(model))) == content_hash(model)


SMALL = """(float[N,3,8,8] x) => (float[N,4] y) <float[4,3,3,3] w_a, float[4] bias, float[4] scale,
    float[4] shift, float[4] mean, float[4] var, float[4,4] shared, float eps = {0.5}> {
    c = Conv<auto_pad="SAME_UPPER">(x, w_a, bias) n = BatchNormalization(c, scale, shift, mean, var)
    r = Relu(n) p = GlobalAveragePool(r) f = Flatten(p) same = Identity(shared) g = MatMul(f, shared)
    h = MatMul(g, same) y = Add(h, eps)
}"""


def small(weight: str = "4,3,3,3") -> ir.Model:
    model = load_model(text_model(SMALL.replace("4,3,3,3", weight)))
    model.graph.initializers["w_a"].name = "w.a"
    return model


def test_weights_are_known_by_their_names_in_the_file() -> None:
    module = to_torch(small())
    assert set(module.weights()) == {"w.a", "bias", "scale", "shift", "shared"}
    assert set(module.statistics()) == {"mean", "var"}
    keys = {"weight:w%2Ea", *(f"weight:{n}" for n in ("bias", "scale", "shift", "shared"))}
    assert set(module.state_dict()) == keys | {"statistic:mean", "statistic:var"}


def test_a_shared_weight_stays_one() -> None:
    module = to_torch(small())
    x = torch.randn(2, 3, 8, 8)
    features = module.run({"x": x}, also=["f"])["f"]
    shared = module.weights()["shared"]
    torch.testing.assert_close(module(x), features @ shared @ shared + 0.5)


def test_a_gate_multiplies_a_tensor_where_it_is_made() -> None:
    module = to_torch(small())
    x, gate = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 0.0, 2.0, 0.5]).reshape(1, 4, 1, 1)
    whole = module.run({"x": x}, also=["r", "p"])
    gated = module.run({"x": x}, {"r": gate}, also=["r", "p"])
    torch.testing.assert_close(gated["r"], whole["r"] * gate)
    torch.testing.assert_close(gated["p"], whole["p"] * gate)


def test_training_moves_the_statistics_and_evaluation_does_not() -> None:
    module = to_torch(small())
    before = {name: tensor.clone() for name, tensor in module.statistics().items()}
    module(torch.randn(2, 3, 8, 8))
    assert all(torch.equal(module.statistics()[name], tensor) for name, tensor in before.items())
    module.train()
    module(torch.randn(2, 3, 8, 8))
    assert not any(torch.equal(module.statistics()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("y = Unique(x)", "Unique 'unique_0' has no form in torch here"),
        (
            "a = Cast<to=12>(x) b = Add(a, a) y = Cast<to=1>(b)",
            "Add 'add_1' has operands of types (uint32, uint32), which has no form",
        ),
        (
            "s = Constant<value=float {0.5}>() z = Constant<value=uint8 {3}>() q = QuantizeLinear(x, s, z) "
            "y = DequantizeLinear(q, s, z)",
            "quantized",
        ),
    ],
)
def test_a_model_that_torch_cannot_train_is_refused_by_the_operator(text: str, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(said)):
        to_torch(text_model(f"(float[4] x) => (float[M] y) {{ {text} }}"))(torch.zeros(4))


def test_a_module_of_another_model_is_refused() -> None:
    module = to_torch(small())
    renamed = small()
    renamed.graph.initializers["shared"].name = "other"
    with pytest.raises(UsageError, match="no weight 'shared'"):
        write_back(renamed, module)
    with pytest.raises(UsageError, match="has the shape"):
        write_back(small("4,3,1,1"), module)


def test_inputs_are_checked() -> None:
    module = to_torch(small())
    with pytest.raises(UsageError, match="takes 1 inputs"):
        module()
    with pytest.raises(UsageError, match="'x' of the model is not fed"):
        module.run({})
    with pytest.raises(UsageError, match="makes a tensor 'nothing'"):
        module.run({"x": torch.zeros(1, 3, 8, 8)}, {"nothing": torch.ones(1)})


def test_a_module_learns_in_bfloat16_under_autocast(tmp_path: Path) -> None:
    model = load_model(small_model(SmallModel("cifar_resnet8_small", "torchscript", 15), tmp_path))
    module, feeds = to_torch(model), in_runtime(model)[0]
    module.train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module.run(tensors(feeds))
    assert {y.dtype for y in outputs.values()} == {torch.bfloat16}
    sum(y.float().square().mean() for y in outputs.values()).backward()
    assert all(bool(w.grad.any()) and w.grad.dtype == torch.float32 for w in module.weights().values())


@pytest.mark.parametrize(
    "name",
    [
        "shufflenet_v2_small-torchscript-9",
        "deit_micro-torchscript-14",
        pytest.param("streampetr_micro-torchscript-17", marks=pytest.mark.slow),
        pytest.param("yolov8n_small-torchscript-12", marks=pytest.mark.slow),
    ],
)
def test_on_another_device_sizes_stay_on_the_cpu_and_nothing_else_does(name: str, tmp_path: Path) -> None:
    """A meta tensor has a shape, no numbers, and refuses to meet tensors of another device."""
    made = next(model for model in SMALL_MODELS if str(model) == name)
    model = load_model(small_model(made, tmp_path))
    feeds, wanted = in_runtime(model)
    found = to_torch(model).to("meta").run({key: x.to("meta") for key, x in tensors(feeds).items()})
    assert all(y.device.type == "meta" and y.shape == wanted[key].shape for key, y in found.items())


def test_a_module_computes_in_double_precision() -> None:
    module, x = to_torch(small()), torch.randn(2, 3, 8, 8)
    single = module(x)
    double = module.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_a_copy_is_independent_and_a_state_moves_between_modules() -> None:
    module = to_torch(small())
    other = copy.deepcopy(module)
    with torch.no_grad():
        module.weights()["bias"] += 1
    assert not torch.equal(module.weights()["bias"], other.weights()["bias"])
    other.load_state_dict(module.state_dict())
    assert torch.equal(module.weights()["bias"], other.weights()["bias"])


def test_activations_are_dropped_after_their_last_reader() -> None:
    chain = " ".join(f"t{k + 1} = Relu(t{k})" for k in range(20))
    module = to_torch(text_model(f"(float[1000,1000] t0) => (float[1000,1000] t20) {{ {chain} }}"))
    alive: list[int] = []
    made: list[Any] = []
    relu = torch.relu

    def counted(x: Any) -> Any:
        made.append(weakref.ref(y := relu(x)))
        alive.append(sum(ref() is not None for ref in made))
        return y

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setitem(elementwise._UNARY, "Relu", counted)
        module(torch.randn(1000, 1000))
    assert max(alive) == 2


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_is_trained_in_float32_and_stored_as_it_was(half: str) -> None:
    model = load_model(in_halves(text_model(SMALL), half))
    module = to_torch(model)
    assert {w.dtype for w in module.weights().values()} == {torch.float32}
    assert content_hash(write_back(model, module)) == content_hash(model)
    trained(module, {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)}, 2)
    written = write_back(model, module)
    assert without_values(written) == without_values(model)
    assert content_hash(written) != content_hash(model)


def test_a_model_above_the_limit_of_protobuf_comes_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_io, "_MOST_BYTES", 10_000)
    model = load_model(text_model("(float[1,64] x) => (float[1,64] y) <float[64,64] w> { y = MatMul(x, w) }"))
    save_model(model, tmp_path / "large.onnx")
    assert len(list(tmp_path.glob("large.onnx.*.data"))) == 1
    module = to_torch(tmp_path / "large.onnx")
    with torch.no_grad():
        module.weights()["w"] += 1
    save_model(write_back(tmp_path / "large.onnx", module), tmp_path / "trained.onnx")
    w = load_model(tmp_path / "trained.onnx").graph.initializers["w"].const_value
    np.testing.assert_array_equal(w.numpy(), module.weights()["w"].detach().numpy())


@pytest.mark.slow
def test_torch_compiles_a_network(tmp_path: Path) -> None:
    model = load_model(small_model(SmallModel("cifar_resnet8_small", "torchscript", 15), tmp_path))
    module, feeds = to_torch(model), tensors(in_runtime(model)[0])
    x = feeds[module.input_names[0]]
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
