"""Laws of runs at fixed sizes: they compute the same to the bit, and `torch.compile` traces all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from command_line import Run, is_refused
from test_finetuning import NORMED, small
from test_training_bridge import MODELS, in_runtime, tensors
from zoo import CNNS, SmallModel, small_model, text_model, zoo_path

from onnx_mdp import to_torch
from onnx_mdp.model_io import load_model

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Shape arithmetic, and kernels that read numbers: sizes, bounds, exponents, axes, padding.
READ = """
(float[n,4,6,6] x) => (float[n,m] y, float[n,4,9,9] z)
<float[4,4,3,3] w, int64[1] zero = {0}, int64[1] one = {1}, int64[1] rest = {-1}, int64 first = {0},
 int64[8] pads = {0,0,1,1,0,0,2,0}, float low = {-1.0}, float high = {1.5},
 float[4] powers = {2.0,1.0,2.0,1.0},
 int64[2] axes = {2,3}, int64[2] steps = {2,-1}, int64[2] starts = {0,5}, int64[2] ends = {6,-7},
 float[4] scales = {1.0,1.0,1.5,1.5}, float[0] roi>
{
  a = Conv <pads: ints = [1, 1, 1, 1]> (x, w)
  b = Clip (a, low, high)
  c = Pad <mode: string = "reflect"> (b, pads)
  d = Slice (c, starts, ends, axes, steps)
  s = Shape (d)
  n0 = Gather (s, first)
  n1 = Unsqueeze (n0, zero)
  to = Concat <axis: int = 0> (n1, rest)
  e = Reshape (d, to)
  count = Range (first, n0, n0)
  places = Cast <to: int = 1> (count)
  y = Add (e, places)
  t = Transpose <perm: ints = [0, 2, 3, 1]> (b)
  u = Pow (t, powers)
  v = Transpose <perm: ints = [0, 3, 1, 2]> (u)
  z = Resize <mode: string = "nearest", nearest_mode: string = "floor"> (v, roi, scales)
}
"""
ZOO = (
    "cifar10/resnet20.onnx",
    "cifar10/vit_p4_d128_dynamo.onnx",
    "detect/fastestdet.onnx",
    "detect/yunet_n_dynamic.onnx",
    "imagenet/tf_efficientnet_lite0_dynamo.onnx",
    "ocr/ppocrv4_rec.onnx",
    "seg/deeplab_v3_mnv2_tf2onnx.onnx",
)


def is_traced_whole(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """No break in the trace, and the same outputs."""
    model = load_model(path)
    module = to_torch(model)
    feeds = tensors(in_runtime(model, shapes)[0])
    wanted = module.run(feeds)
    module.fix_sizes(feeds)
    torch._dynamo.reset()
    found = torch.compile(module.run, backend="aot_eager", fullgraph=True, dynamic=False)(feeds)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("made", MODELS)
def test_fixed_sizes_change_no_bit(made: SmallModel, tmp_path: Path) -> None:
    model = load_model(small_model(made, tmp_path))
    module = to_torch(model)
    feeds = tensors(in_runtime(model)[0])
    wanted = module.run(feeds)
    module.fix_sizes(feeds)
    found = module.run(feeds)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_files_of_the_zoo_are_traced_whole(name: str) -> None:
    is_traced_whole(zoo_path(name), CNNS.get(name))


def test_what_kernels_read_as_numbers_is_traced(tmp_path: Path) -> None:
    is_traced_whole(small(READ, tmp_path / "m.onnx"))


def test_inputs_of_other_sizes_run_as_before() -> None:
    model = text_model(READ)
    fixed, plain = to_torch(model), to_torch(model)
    fixed.fix_sizes({"x": torch.zeros(3, 4, 6, 6)})
    for rows in (1, 3, 5):
        x = torch.from_numpy(np.random.default_rng(rows).standard_normal((rows, 4, 6, 6), np.float32))
        assert all(torch.equal(a, b) for a, b in zip(fixed(x), plain(x), strict=True))


def test_fixing_sizes_moves_no_statistics_and_keeps_the_mode() -> None:
    module = to_torch(text_model(NORMED)).train()
    before = {name: tensor.clone() for name, tensor in module.statistics().items()}
    module.fix_sizes({"x": torch.randn(4, 3, 8, 8)})
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.statistics().items())


def finetune(run: Run, tmp_path: Path, *more: str) -> object:
    model, teacher = small(NORMED, tmp_path / "m.onnx"), small(NORMED, tmp_path / "t.onnx", seed=1)
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).standard_normal((40, 3, 8, 8), np.float32))
    how = ("--data", tmp_path / "d.npz", "--teacher", teacher, "--steps", 12, "--batch-size", 8, "--lr", 1e-2)
    return run("finetune", model, *how, "-o", "o.onnx", "--overwrite", "--json", *more)


def compiled_by(backend: object, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Let ``torch.compile`` take this backend; what it is given."""
    given: list[object] = []
    real = torch.compile

    def compile_with(function: object, **options: object) -> object:
        given.append(function)
        return real(function, backend=backend, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_with)
    return given


def test_training_compiled_is_training(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = finetune(run, tmp_path)
    graphs: list[object] = []

    def counting(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    given = compiled_by(counting, monkeypatch)
    compiled = finetune(run, tmp_path, "--compile")
    assert (plain.code, compiled.code) == (0, 0), compiled.err
    assert len(given) == len(graphs) == 2  # the student and its teacher, each in one piece
    assert compiled.document["after"]["loss"] == pytest.approx(plain.document["after"]["loss"], rel=1e-3)
    assert compiled.document["after"]["loss"] < compiled.document["before"]["loss"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, for its own scripts
def test_training_compiled_by_the_default_backend(run: Run, tmp_path: Path) -> None:
    plain, compiled = finetune(run, tmp_path), finetune(run, tmp_path, "--compile")
    assert (plain.code, compiled.code) == (0, 0), compiled.err
    assert compiled.document["after"]["loss"] == pytest.approx(plain.document["after"]["loss"], rel=1e-2)


def test_a_model_that_does_not_compile_is_a_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: object, inputs: object) -> object:
        raise RuntimeError("no C++ compiler")

    compiled_by(broken, monkeypatch)
    is_refused(
        finetune(run, tmp_path, "--compile"), 1, "torch cannot compile this model here; leave --compile"
    )
    assert not (tmp_path / "o.onnx").exists()
