"""What `export` writes is what the tools it is for read: the same names, types, sizes and numbers."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Run, is_refused

from onnx_mdp import model_io
from onnx_mdp.model_io import content_hash, load_model
from onnx_mdp.running.runtime import Runtime, open_session, runtime
from onnx_mdp.serving.triton import configuration, served

DEMO = Path(str(files("onnx_mdp") / "demo_model" / "shapes_resnet.onnx"))


def model_of(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')


def config_of(text: str, name: str = "m", **options: int) -> str:
    return configuration(served(load_model(model_of(text)), name, runtime(), **options))


def test_a_repository_holds_the_model_and_what_its_graph_says(run: Run) -> None:
    outcome = run("export", "triton", DEMO, "-o", "repository", "--name", "shapes", "--max-batch", 8)
    assert outcome.code == 0, outcome
    folder = Path("repository/shapes")
    assert content_hash(load_model(folder / "1" / "model.onnx")) == content_hash(load_model(DEMO))
    config = (folder / "config.pbtxt").read_text()
    assert "max_batch_size: 8\n" in config
    assert 'input { name: "image" data_type: TYPE_FP32 dims: [ 3, 64, 64 ] }' in config
    assert 'output { name: "logits" data_type: TYPE_FP32 dims: [ 10 ] }' in config
    assert re.findall(r"batch_size: (\d+)\n", config) == ["8", "1", "8"]


def test_the_batch_stays_among_the_sizes_where_requests_are_not_joined() -> None:
    config = config_of("(float[n,3] x) => (float[n,3] y) { y = Relu (x) }")
    assert "max_batch_size: 0\n" in config
    assert 'input { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] }' in config
    assert "dynamic_batching" not in config


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        ("(float[1,3] x) => (float[1,3] y) { y = Relu (x) }", "needs an open first dimension"),
        ("(float[n,3] x) => (float y) { y = ReduceSum <keepdims: int = 0> (x) }", "open first dimension"),
        (
            "(float[n,3] x, float[m,3] z) => (float[k,3] y) { y = Concat <axis: int = 0> (x, z) }",
            "begin with",
        ),
        ("(float[n,3] x) => (float[n,3] y) { y = Softmax <axis: int = 0> (x) }", "each gives alone"),
        (
            "(int64[n,8] x) => (int64[n,8] y) { a = Constant <value_int = 0> () y = CumSum (x, a) }",
            "each gives alone",
        ),
        (
            "(float[n,3] x) => (float[k] y) { s = Constant <value_ints = [3]> () y = Reshape (x, s) }",
            "of two samples together: ONNX Runtime cannot run",
        ),
    ],
)
def test_what_is_no_batch_is_not_joined(run: Run, graph: str, reason: str) -> None:
    onnx.save(model_of(graph), "m.onnx")
    outcome = run("export", "triton", "m.onnx", "-o", "repository", "--max-batch", 4)
    is_refused(outcome, 2, "--max-batch", reason)
    assert not Path("repository").exists()


def test_a_scalar_is_one_value_of_no_dimension() -> None:
    config = config_of("(float x) => (float y) { y = Relu (x) }")
    assert 'input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }' in config


def test_a_name_cannot_leave_its_quotes() -> None:
    proto = model_of("(float[1,3] x) => (float[1,3] y) { y = Relu (x) }")
    proto.graph.input[0].name = proto.graph.node[0].input[0] = 'x"\n}\nbackend: "python'
    config = configuration(served(load_model(proto), "m", runtime()))
    assert config.count("\nbackend:") == 1
    assert r'name: "x\042\012}\012backend: \042python"' in config


@pytest.mark.parametrize("name", ["../m", "a/b", ".", "", "a\nb", "-x", "a" * 200])
def test_a_name_that_is_no_folder_is_refused(run: Run, name: str) -> None:
    is_refused(run("export", "triton", DEMO, "-o", "repository", f"--name={name}"), 2, "--name")
    assert not Path("repository").exists()


@pytest.mark.parametrize(
    ("ep", "kind", "line"),
    [
        ("cpu", "KIND_CPU", None),
        ("cuda", "KIND_GPU", None),
        ("openvino", "KIND_CPU", 'cpu_execution_accelerator { name: "openvino" }'),
        ("tensorrt", "KIND_GPU", 'parameters { key: "precision_mode" value: "FP32" }'),
    ],
)
def test_a_provider_becomes_a_kind_of_instance_and_an_accelerator(
    ep: str, kind: str, line: str | None
) -> None:
    model = load_model(DEMO)
    config = configuration(served(model, "m", runtime(ep, 3)))
    assert f"instance_group {{ count: 1 kind: {kind} }}" in config
    assert ("execution_accelerators" in config) == (line is not None)
    assert line is None or line in config
    assert 'key: "intra_op_thread_count" value { string_value: "3" }' in config


def test_what_triton_has_not_is_refused(run: Run) -> None:
    is_refused(run("export", "triton", DEMO, "-o", "r", "--ep", "qnn"), 2, "QNNExecutionProvider", "--ep cpu")
    onnx.save(model_of("(bfloat16[2] x) => (bfloat16[2] y) { y = Identity (x) }"), "b.onnx")
    is_refused(run("export", "triton", "b.onnx", "-o", "r"), 2, "BFLOAT16")
    onnx.save(model_of("(float[1,s] x) => (float[1,s] y) { y = Relu (x) }"), "s.onnx")
    is_refused(run("export", "triton", "s.onnx", "-o", "r"), 2, "--input-shape x:1,224")
    assert not Path("r").exists()
    assert run("export", "triton", "s.onnx", "-o", "r", "--input-shape", "x:1,7").code == 0
    assert "dims: 1 dims: 7 zero_data: true" in Path("r/s/config.pbtxt").read_text()


def test_a_model_is_replaced_only_when_told(run: Run) -> None:
    assert run("export", "triton", DEMO, "-o", "r").code == 0
    is_refused(run("export", "triton", DEMO, "-o", "r"), 2, "exists", "--overwrite")
    assert run("export", "triton", DEMO, "-o", "r", "--ep", "cuda", "--overwrite").code == 0
    assert "KIND_GPU" in Path("r/shapes_resnet/config.pbtxt").read_text()
    Path("file").write_text("")
    is_refused(run("export", "triton", DEMO, "-o", "file"), 2, "file")


def test_weights_of_a_large_model_lie_beside_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_io, "_MOST_BYTES", 2**16)
    assert run("export", "triton", DEMO, "-o", "r").code == 0
    folder = Path("r/shapes_resnet/1")
    assert [path.suffix for path in sorted(folder.iterdir())] == [".onnx", ".data"]
    assert content_hash(load_model(folder / "model.onnx")) == content_hash(load_model(DEMO))


def arrays(entries: dict[str, dict[str, str]]) -> dict[str, np.ndarray]:
    return {name: np.load(io.BytesIO(base64.b64decode(e["array"]))) for name, e in entries.items()}


def test_golden_outputs_are_what_the_model_gives_for_the_golden_inputs(run: Run) -> None:
    outcome = run("export", "polygraphy", DEMO, "-o", "golden", "--samples", 2, "--json", "--quiet")
    assert outcome.code == 0, outcome
    assert (outcome.document["runs"], outcome.document["outputs"]) == (2, ["logits"])
    fed = json.loads(Path("golden/inputs.json").read_text())
    ((_, iterations),) = json.loads(Path("golden/outputs.json").read_text())["lst"]
    session = open_session(DEMO, Runtime())
    for feeds, iteration in zip(fed, iterations, strict=True):
        found = arrays({name: entry["values"] for name, entry in iteration["outputs"].items()})
        assert np.array_equal(found["logits"], session.run(["logits"], arrays(feeds))[0])
    assert not np.array_equal(arrays(fed[0])["image"], arrays(fed[1])["image"])
    is_refused(run("export", "polygraphy", DEMO, "-o", "golden"), 2, "exists", "--overwrite")


def test_golden_inputs_come_from_data_where_there_is_some(run: Run) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 64, 64), np.float32)
    np.savez("data.npz", image=images)
    assert run("export", "polygraphy", DEMO, "-o", "golden", "--data", "data.npz", "--samples", 3).code == 0
    fed = json.loads(Path("golden/inputs.json").read_text())
    assert np.array_equal(np.concatenate([arrays(feeds)["image"] for feeds in fed]), images)


def test_an_output_that_equals_nothing_is_no_golden_one(run: Run) -> None:
    onnx.save(model_of("(float[1,3] x) => (float[1,3] y) { z = Sub (x, x) y = Div (z, z) }"), "m.onnx")
    is_refused(run("export", "polygraphy", "m.onnx", "-o", "golden"), 2, "'y'", "not finite", "other inputs")
    assert not Path("golden").exists()


def test_mlflow_is_named_by_its_extra_where_it_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    is_refused(run("export", "mlflow", DEMO, "-o", "m"), 3, "pip install 'onnx-mdp[mlflow]'")
    assert not Path("m").exists()


def test_a_folder_that_is_no_mlflow_model_is_not_replaced(run: Run) -> None:
    Path("mine").mkdir()
    is_refused(run("export", "mlflow", DEMO, "-o", "mine"), 2, "mine exists")
    is_refused(run("export", "mlflow", DEMO, "-o", "mine", "--overwrite"), 2, "no MLflow model")
    assert Path("mine").is_dir()
