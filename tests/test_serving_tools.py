"""What `export` writes is read by the tools that it is for; `.ci/run` installs them, else this is skipped."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Run, is_refused
from onnx import TensorProto, helper, numpy_helper
from test_export import DEMO
from test_model_gate import ROOT, pruned

from onnx_mdp.large_models import save_model
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import stamp
from onnx_mdp.plan import PruningPlan, plan_identity, plan_json
from onnx_mdp.running.runtime import Runtime, open_session, runtime
from onnx_mdp.serving.triton import configuration, served

__all__ = ["pruned"]  # a fixture

HOSTILE = 'x"\n} model_warmup { name: "é\\\0'
TYPES = "BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 FLOAT16 FLOAT DOUBLE STRING".split()


def parsed(text: str) -> Any:
    """The configuration as Triton's own schema reads it; skips without ``tritonclient``."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse(text, schema.ModelConfig())


def identities(types: dict[str, int], shape: list[int]) -> onnx.ModelProto:
    """A model that returns its inputs, named and typed so."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_"]) for name in types]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, kind in types.items()]
    outputs = [helper.make_tensor_value_info(f"{name}_", kind, shape) for name, kind in types.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def test_tritons_schema_reads_the_whole_configuration() -> None:
    found = parsed(configuration(served(load_model(DEMO), "shapes", runtime("tensorrt", 2), max_batch=4)))
    assert (found.name, found.backend, found.max_batch_size) == ("shapes", "onnxruntime", 4)
    assert [list(i.dims) for i in (*found.input, *found.output)] == [[3, 64, 64], [10]]
    assert [w.batch_size for w in found.model_warmup] == [1, 4]
    assert list(found.model_warmup[0].inputs["image"].dims) == [3, 64, 64]
    assert found.parameters["intra_op_thread_count"].string_value == "2"
    (accelerator,) = found.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, accelerator.parameters["precision_mode"]) == ("tensorrt", "FP32")


@pytest.mark.parametrize("shape", [[], [2]])
def test_tritons_schema_knows_every_type_that_is_written(shape: list[int]) -> None:
    model = identities({name: getattr(TensorProto, name) for name in TYPES}, shape)
    found = parsed(configuration(served(load_model(model), "m", runtime())))
    assert [(i.name, list(i.dims)) for i in found.input] == [(name, shape or [1]) for name in TYPES]
    assert len({i.data_type for i in found.input}) == len(TYPES)
    assert all(i.HasField("reshape") == (not shape) for i in (*found.input, *found.output))


def test_tritons_schema_reads_every_name_as_it_is() -> None:
    found = parsed(configuration(served(load_model(identities({HOSTILE: 1}, [1])), "m", runtime())))
    assert [i.name for i in found.input] == list(found.model_warmup[0].inputs) == [HOSTILE]
    assert len(found.model_warmup) == 1


def damaged(path: Path) -> Path:
    """The demo model with one number changed."""
    model = onnx.load(DEMO)
    weight = next(t for t in model.graph.initializer if t.name.endswith("weight") or len(t.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] += 0.1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    return path


def test_polygraphy_passes_the_model_and_fails_a_damaged_one(run: Run) -> None:
    pytest.importorskip("polygraphy")
    assert run("export", "polygraphy", DEMO, "-o", "golden", "--samples", 2).code == 0
    files = "--onnxrt --load-inputs golden/inputs.json --load-outputs golden/outputs.json".split()

    def checked(path: Path) -> subprocess.CompletedProcess[str]:
        program = str(Path(sys.executable).parent / "polygraphy")
        return subprocess.run([program, "run", str(path), *files], capture_output=True, text=True)

    good, bad = checked(DEMO), checked(damaged(Path("damaged.onnx")))
    assert (good.returncode, bad.returncode) == (0, 1), good.stdout + good.stderr + bad.stderr
    assert "Passed: 2/2 iterations" in good.stdout
    assert "Passed: 0/2 iterations" in bad.stdout + bad.stderr


@pytest.mark.filterwarnings("ignore")  # of MLflow's own modules
def test_mlflow_loads_what_was_exported_and_predicts_what_onnx_runtime_does(run: Run) -> None:
    pytest.importorskip("mlflow")
    from mlflow import onnx as flavour
    from mlflow import pyfunc

    plan = PruningPlan(keep={}, predicted_ms=1.5, provenance={"criterion": "drift"})
    save_model(stamp(load_model(DEMO), plan), Path("slim.onnx"))
    Path("slim.plan.json").write_text(plan_json(plan))
    Path("result.json").write_text('{"schema_version": 1, "measured_ms": 1.25, "target_ms": 2.0}')
    history = ("--plan", "slim.plan.json", "--result", "result.json")
    outcome = run("export", "mlflow", "slim.onnx", "-o", "m", "--threads", 2, "--json", "--quiet", *history)
    assert outcome.code == 0, outcome
    loaded = pyfunc.load_model("m")
    feeds = {"image": np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)}
    wanted = open_session(Path("slim.onnx"), Runtime(threads=2)).run(None, feeds)[0]
    assert np.array_equal(loaded.predict(feeds)["logits"], wanted)
    told = loaded.metadata.metadata
    assert told == outcome.document["metadata"]
    assert (told["onnx_mdp.plan"], told["onnx_mdp.plan.criterion"]) == (plan_identity(plan), "drift")
    assert (told["onnx_mdp.target_ms"], told["onnx_mdp.measured_ms"]) == (2.0, 1.25)
    (image,) = loaded.metadata.get_input_schema().inputs
    assert (image.name, image.shape, image.type) == ("image", (-1, 3, 64, 64), np.dtype(np.float32))
    assert loaded.metadata.load_input_example("m")["image"].shape == (1, 3, 64, 64)
    assert flavour.load_model("m").graph.output[0].name == "logits"
    is_refused(run("export", "mlflow", "slim.onnx", "-o", "m"), 2, "exists")
    np.savez("images.npz", image=feeds["image"])
    elsewhere = ("--ep", "qnn", "--data", "images.npz")
    is_refused(run("export", "mlflow", "slim.onnx", "-o", "n", *elsewhere), 3, "QNNExecutionProvider")
    assert run("export", "mlflow", "slim.onnx", "-o", "m", "--overwrite").code == 0
    is_refused(run("export", "mlflow", DEMO, "-o", "n", *history), 2, "not made by this plan")
    Path("result.json").write_text('{"schema_version": 1, "predicted_ms": 9.0}')
    is_refused(run("export", "mlflow", "slim.onnx", "-o", "n", *history), 2, "another prune")
    assert sorted(p.name for p in Path().iterdir() if p.name.startswith((".", "n"))) == []


@pytest.mark.slow  # it installs the package
def test_the_hook_of_the_page_stops_a_commit_of_a_damaged_model(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pre_commit")
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "hooks"))
    page = (ROOT / "onnx_mdp" / "docs" / "ci.md").read_text(encoding="utf-8")
    (hook,) = re.findall(r"```yaml\n(repos:\n.*?)```", page, re.DOTALL)
    folder = tmp_path / "repository"
    shutil.copytree(pruned, folder)
    # From this checkout; and the latency of a busy machine is not what is tested.
    text = hook.replace("onnx-mdp[cpu]", f"{ROOT}[cpu]").replace("--max-ms 5", "--max-ms 1e6")
    (folder / ".pre-commit-config.yaml").write_text(text)

    def done(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=folder, capture_output=True, text=True)

    for words in (["init"], ["add", "."]):
        assert done("git", *words).returncode == 0
    program = str(Path(sys.executable).parent / "pre-commit")
    good = done(program, "run")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "Passed" in good.stdout
    shutil.copy(pruned / "damaged.onnx", folder / "slim.onnx")
    done("git", "add", "slim.onnx")
    bad = done(program, "run")
    assert bad.returncode == 1
    assert "FAIL  differs from the masked original" in bad.stdout
