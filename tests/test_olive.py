"""Pruning as a pass of Olive: the files that `export olive` writes, and real workflows that run from them.

Workflows run where olive-ai is installed: ``pip install -e '.[cpu,olive]'``, and ``pytest -m olive``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Outcome, is_refused
from onnx.numpy_helper import to_array

import onnx_mdp
from onnx_mdp.shapes_data import shapes

DEMO = Path(onnx_mdp.__file__).parent / "demo_model" / "shapes_resnet.onnx"
OURS = "onnx_mdp.integrations.olive_pass.OnnxMDPPruning"
Run = Callable[..., Outcome]

pytestmark = pytest.mark.filterwarnings("default")  # of Olive and what it loads
has_olive = importlib.util.find_spec("olive") is not None


def needs_olive(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs Olive, which takes seconds to load."""
    skipped = pytest.mark.skipif(not has_olive, reason="olive-ai is not installed")(test)
    return pytest.mark.olive(pytest.mark.slow(skipped))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A package config that is not Olive's own."""
    path = tmp_path / "base.json"
    path.write_text(json.dumps({"passes": {"Mine": {"module_path": "my.Mine"}}, "extra_dependencies": {}}))
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Labelled inputs of the demo model."""
    values, labels = shapes(48, 5)
    np.savez(tmp_path / "inputs.npz", input=values, labels=labels)
    return tmp_path / "inputs.npz"


def document(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_our_pass_joins_the_passes_of_a_package_config(run: Run, base: Path) -> None:
    outcome = run("export", "olive", "-o", "out", "--config", base, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["written"] == [str(Path("out/olive_package.json"))]
    merged = document(Path("out/olive_package.json"))
    ours = merged["passes"].pop("OnnxMDPPruning")
    assert merged == document(base)
    assert ours["module_path"] == OURS


def test_a_workflow_prunes_then_quantizes_on_a_named_provider(run: Run, base: Path, inputs: Path) -> None:
    arguments = ("--config", base, "--target-ratio", "0.7", "--threads", "2")
    outcome = run("export", "olive", DEMO, "-o", "out", *arguments, "--data", inputs, "--samples", "8")
    assert outcome.code == 0, outcome.err
    workflow = document(Path("out/olive_run.json"))
    prune, fuse, quantize = workflow["passes"].values()
    assert [p["type"] for p in (prune, fuse, quantize)] == [
        "OnnxMDPPruning",
        "OnnxPeepholeOptimizer",
        "OnnxStaticQuantization",
    ]
    assert (prune["target_ratio"], prune["threads"], prune["repair"]) == (0.7, 2, ["lstsq"])
    assert prune["data_config"] == quantize["data_config"] == workflow["data_configs"][0]["name"]
    (accelerator,) = workflow["systems"][workflow["target"]]["accelerators"]
    assert accelerator == {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    assert Path("out/olive_inputs.py").is_file()


def test_without_data_nothing_is_quantized(run: Run, base: Path) -> None:
    arguments = ("--config", base, "--target-ms", "1", "--transformer", "vit")
    outcome = run("export", "olive", DEMO, "-o", "out", *arguments)
    assert outcome.code == 0
    assert "nothing is quantized" in outcome.err
    workflow = document(Path("out/olive_run.json"))
    assert list(workflow["passes"]) == ["prune", "fuse"]
    assert workflow["passes"]["fuse"]["model_type"] == "vit"
    assert not Path("out/olive_inputs.py").exists()


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((DEMO,), ("exactly one of --target-ms and --target-ratio",)),
        ((DEMO, "--target-ms", "1", "--target-ratio", "0.5"), ("exactly one",)),
        ((DEMO, "--target-ms", "-1"), ("larger than 0",)),
        ((DEMO, "--target-ms", "1", "--ep", "coreml"), ("Olive has no CoreMLExecutionProvider",)),
        ((DEMO, "--target-ms", "1", "--ep-library", "a.so"), ("Olive registers a library itself",)),
        (("--target-ms", "1"), ("name the model too",)),
    ],
)
def test_what_makes_no_workflow_is_refused(
    run: Run, base: Path, arguments: tuple[object, ...], fragments: tuple[str, ...]
) -> None:
    is_refused(run("export", "olive", "-o", "out", "--config", base, *arguments), 2, *fragments)
    assert not Path("out").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"passes": []}', "[" * 100_000])
def test_a_file_that_is_no_package_config_is_refused(run: Run, base: Path, text: str) -> None:
    base.write_text(text)
    is_refused(run("export", "olive", "-o", "out", "--config", base), 2, "no package config of Olive")


def test_outputs_are_not_replaced_unasked(run: Run, base: Path) -> None:
    assert run("export", "olive", "-o", "out", "--config", base).code == 0
    is_refused(run("export", "olive", "-o", "out", "--config", base), 2, "--overwrite")
    assert run("export", "olive", "-o", "out", "--config", base, "--overwrite").code == 0


@pytest.mark.skipif(has_olive, reason="olive-ai is installed")
def test_without_olive_the_command_names_the_extra(run: Run) -> None:
    is_refused(run("export", "olive", "-o", "out"), 3, "pip install 'onnx-mdp[olive]'")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all runs, so that the demo model is profiled once."""
    return tmp_path_factory.mktemp("store") / "lut.sqlite"


def olive(
    command: Run, store: Path, inputs: Path | None, changes: Mapping[str, Any], *more: object
) -> tuple[int, str]:
    """Export a workflow for ``model.onnx`` in this folder, change passes and options of it, and run it."""
    named = () if inputs is None else ("--data", inputs, "--samples", "16")
    arguments = ("--target-ratio", "0.8", "--store", store, *named, *more)
    assert command("export", "olive", "model.onnx", "-o", "out", "--overwrite", *arguments).code == 0
    workflow = document(Path("out/olive_run.json"))
    workflow["passes"]["prune"] |= changes.get("prune", {})
    workflow |= {name: value for name, value in changes.items() if name != "prune"}
    Path("out/olive_run.json").write_text(json.dumps(workflow))
    line = ["olive", "run", "--config", "out/olive_run.json", "--package-config", "out/olive_package.json"]
    quiet = os.environ | {"CI": "1", "HF_HUB_OFFLINE": "1"}  # no telemetry
    done = subprocess.run(
        [sys.executable, "-m", *line], env=quiet, capture_output=True, text=True, check=False, timeout=600
    )
    return done.returncode, done.stdout + done.stderr


def outputs(path: Path, name: str) -> int:
    """The outputs of a convolution."""
    graph = onnx.load(path).graph
    (weight,) = (node.input[1] for node in graph.node if node.name == name)
    return int(next(tensor.dims[0] for tensor in graph.initializer if tensor.name == weight))


def convolutions(path: Path) -> int:
    """The units of all convolutions of a file, quantized or not."""
    graph = onnx.load(path).graph
    sizes = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 4}
    return sum(sizes.values())


@needs_olive
@pytest.mark.parametrize("name", ["demo", "mobilenet_v2"])
def test_what_follows_gets_the_pruned_model(
    run: Run, exported: Callable[..., Path], store: Path, inputs: Path, name: str
) -> None:
    # The working directory holds the original, of the name that Olive gives its outputs.
    if name == "demo":
        shutil.copy(DEMO, "model.onnx")
    else:
        shutil.copy(exported(name), "model.onnx")
        np.savez(inputs, np.random.default_rng(0).normal(size=(16, 3, 224, 224)).astype(np.float32))
    code, log = olive(run, store, inputs, {})
    assert code == 0, log
    output = Path("out/output")
    (plan,) = output.glob("*.plan.json")
    (figures,) = output.glob("*.pruning.json")
    found = document(figures)
    assert (found["status"], found["verified"]) == ("met", True)
    (folder,) = (
        path.parent for path in Path("out/cache").rglob("run.json") if '"onnxmdppruning"' in path.read_text()
    )
    (pruned,) = folder.rglob("*.onnx")
    assert run("verify", "model.onnx", pruned, plan).code == 0
    quantized = onnx.load(output / "model.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in quantized.graph.node}
    assert convolutions(output / "model.onnx") == convolutions(pruned) < convolutions(Path("model.onnx"))
    for metrics in ("input_model_metrics.json", "metrics.json"):
        assert document(output / metrics)["latency-p50"]["value"] > 0


@needs_olive
def test_a_pruned_transformer_is_fused(run: Run, exported: Callable[..., Path], store: Path) -> None:
    shutil.copy(exported("vit_micro"), "model.onnx")
    code, log = olive(run, store, None, {}, "--transformer", "vit")
    assert code == 0, log
    fused = onnx.load("out/output/model.onnx")
    assert "SkipLayerNormalization" in {node.op_type for node in fused.graph.node}
    original, output = (
        sum(map(np.size, map(to_array, m.graph.initializer))) for m in (onnx.load("model.onnx"), fused)
    )
    assert output < original


@needs_olive
def test_targets_are_searched_and_one_out_of_reach_is_dropped(run: Run, store: Path) -> None:
    shutil.copy(DEMO, "model.onnx")
    changes = {
        "prune": {"target_ratio": [0.01, 0.6, 0.85]},
        "search_strategy": {"execution_order": "joint", "sampler": "sequential"},
    }
    code, log = olive(run, store, None, changes)
    assert code == 0, log
    assert "is below the smallest reachable latency" in log
    nodes = document(Path("out/output/footprint.json"))
    ratios = {
        n["model_id"]: n["pass_run_config"]["target_ratio"]
        for n in nodes.values()
        if n["from_pass"] == "onnxmdppruning"
    }
    assert set(ratios.values()) == {0.6, 0.85}
    ranked = [node for node in nodes.values() if node["parent_model_id"] in ratios]
    best = min(ranked, key=lambda node: node["metrics"]["value"]["latency-p50"]["value"])
    assert [node["is_pareto_frontier"] for node in ranked].count(True) == 1
    assert best["is_pareto_frontier"]
    assert Path("out/output/model.onnx").is_file()


@needs_olive
def test_a_target_out_of_reach_ends_a_run_without_a_model(run: Run, store: Path) -> None:
    shutil.copy(DEMO, "model.onnx")
    code, log = olive(run, store, None, {"prune": {"target_ratio": 0.01}})
    assert code == 1
    assert "is below the smallest reachable latency" in log.splitlines()[-1]
    assert not list(Path("out/output").rglob("*.onnx"))


@needs_olive
@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        ({"target_ratio": None}, "exactly one of target_ms and target_ratio"),
        ({"target_ms": 1.0}, "exactly one of target_ms and target_ratio"),
        ({"target_ratio": -0.5}, "larger than 0"),
        ({"target_ratio": "fast"}, "valid number"),
        ({"exclud": ["head"]}, "has no parameter 'exclud'; it takes target_ms, target_ratio"),
        ({"threads": "two"}, "valid integer"),
    ],
)
def test_wrong_parameters_are_refused_by_validation(given: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        made({"target_ratio": 0.5} | given)


def made(config: dict[str, Any]) -> Any:
    """Our pass, as Olive makes it for the CPU."""
    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from olive.passes.olive_pass import create_pass_from_dict

    from onnx_mdp.integrations.olive_pass import OnnxMDPPruning

    return create_pass_from_dict(OnnxMDPPruning, config, True, DEFAULT_CPU_ACCELERATOR)


def passed(config: dict[str, Any], folder: Path) -> Any:
    """The demo model, run through our pass."""
    from olive.model import ONNXModelHandler

    return made(config).run(ONNXModelHandler(str(DEMO)), str(folder))


@needs_olive
def test_a_model_that_meets_its_target_is_returned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert passed({"target_ms": 1e6}, tmp_path / "out").model_path == str(DEMO)


@needs_olive
@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ({"ignored_names": ["nothing"]}, "nothing"),
        ({"criterion": "best"}, "best"),
        ({"provider": "OpenVINOExecutionProvider"}, "OpenVINOExecutionProvider is not part of"),
        ({"repair": ["lstsq"]}, "repair"),
        ({"finetune_data_config": {"name": "none"}, "finetune": {"epoch": 1}}, "epoch"),
    ],
)
def test_what_cannot_be_pruned_ends_the_run(
    tmp_path: Path, store: Path, config: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(ValueError, match=fragment):
        passed({"target_ratio": 0.8, "store": str(store)} | config, tmp_path / "out")
    assert not list(tmp_path.rglob("*.onnx"))


@needs_olive
def test_ignored_nodes_stay_and_weights_are_trained(tmp_path: Path, store: Path, inputs: Path) -> None:
    pytest.importorskip("safetensors")
    importlib.import_module("onnx_mdp.integrations.olive_data")
    described = {"image": {"shape": [16, 3, 64, 64], "dtype": "float32"}}
    source = {"type": "onnx_mdp_inputs", "path": str(inputs), "inputs": described}
    data = {"name": "shapes", "load_dataset_config": source} | {
        "dataloader_config": {"type": "no_auto_batch_dataloader"}
    }
    first = next(node.name for node in onnx.load(DEMO).graph.node if node.op_type == "Conv")
    config = {"data_config": data, "finetune_data_config": data, "finetune": {"steps": 2, "batch": 16}}
    config |= {
        "ignored_names": [first],
        "target_ratio": 0.8,
        "store": str(store),
        "save_as_external_data": True,
    }
    output = passed(config, tmp_path / "out")
    figures = output.model_attributes["onnx_mdp"]
    assert figures["status"] == "met"
    assert figures["finetuning"]["after"]["loss"] <= figures["finetuning"]["before"]["loss"]
    assert Path(f"{output.model_path}.data").is_file()
    assert outputs(Path(output.model_path), first) == outputs(DEMO, first)
