"""What Olive runs a pruning workflow from, as documents: its package config and the workflow itself.

Olive knows a pass that is not its own from ``--package-config``, which takes the place of the list of its own
passes; so the file holds those as well.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_mdp.errors import MissingBackendError, UsageError
from onnx_mdp.json_input import read_text
from onnx_mdp.running.runtime import Runtime

__all__ = ["DATA_SCRIPT", "Inputs", "package_config", "workflow"]

DATA_SCRIPT = '"""Gives Olive the data set onnx_mdp_inputs."""\n\nimport onnx_mdp.integrations.olive_data\n'

_PASS = {
    "module_path": "onnx_mdp.integrations.olive_pass.OnnxMDPPruning",
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["*"],
    "dataset": "dataset_optional",
    "module_dependencies": ["onnx-mdp"],
    "run_on_target": True,  # Olive then refuses a provider that is not there, where it would take the CPU
}
_DEVICES = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "gpu",
    "DmlExecutionProvider": "gpu",
    "MIGraphXExecutionProvider": "gpu",
    "NvTensorRTRTXExecutionProvider": "gpu",
    "OpenVINOExecutionProvider": "gpu",
    "QNNExecutionProvider": "npu",
    "TensorrtExecutionProvider": "gpu",
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """Shapes and numpy types of a model's inputs, and where real ones come from, if anywhere."""

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    data: Path | None = None
    preprocess: str | None = None
    samples: int = 64


def package_config(base: Path | None) -> dict[str, Any]:
    """Olive's list of passes, or that in a file, with ours.

    Raises:
        MissingBackendError: Olive is not installed.
        UsageError: the file is no package config.
    """
    path = base or _installed_config()
    try:
        document = json.loads(read_text(path, "pass a package config of Olive, or leave --config out"))
    except (ValueError, RecursionError):
        document = None
    passes = document.get("passes") if isinstance(document, dict) else None
    if not isinstance(passes, dict):
        raise UsageError(f"{path} is no package config of Olive, with passes in JSON; leave --config out")
    return {**document, "passes": {**passes, "OnnxMDPPruning": _PASS}}


def _installed_config() -> Path:
    found = importlib.util.find_spec("olive")
    for folder in () if found is None else found.submodule_search_locations or ():
        if (path := Path(folder) / "olive_config.json").is_file():
            return path
    raise MissingBackendError("`export olive` needs Olive: run `pip install 'onnx-mdp[olive]'`.")


def workflow(
    model: Path,
    folder: Path,
    pruning: Mapping[str, Any],
    inputs: Inputs,
    where: Runtime,
    transformer: str | None = None,
) -> dict[str, Any]:
    """Prune, fuse, quantize where there is data for it, and measure the latency before and after.

    ``folder`` is where Olive writes; ``pruning`` holds parameters of the pass, the target among them;
    ``transformer`` is a kind of model that ONNX Runtime's fusions for transformers know.

    Raises:
        UsageError: Olive does not know the execution provider.
    """
    data = {} if inputs.data is None else {"data_config": "inputs"}
    fuse = {"type": "OnnxPeepholeOptimizer"}
    if transformer is not None:
        fuse = {"type": "OrtTransformersOptimization", "model_type": transformer}
    prune = _pruning(inputs, where) | dict(pruning) | data
    if transformer is not None:
        prune["carry_files"] = False  # the fusions take attributes of a model for those of Hugging Face
    passes = {"prune": prune, "fuse": fuse}
    if data:
        types = {"precision": "int8", "activation_type": "uint8", "per_channel": True}
        passes["quantize"] = {"type": "OnnxStaticQuantization", **types, **data}
    return {
        "input_model": {"type": "ONNXModel", "model_path": str(model)},
        "systems": {"here": _system(where)},
        "data_configs": [_data_config(inputs, folder)],
        "evaluators": {"latency": {"metrics": [_latency(where)]}},
        "passes": passes,
        "host": "here",
        "target": "here",
        "evaluator": "latency",
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "output"),
    }


def _pruning(inputs: Inputs, where: Runtime) -> dict[str, Any]:
    return {
        "type": "OnnxMDPPruning",
        "input_shapes": {name: list(shape) for name, shape in inputs.shapes.items()},
        "provider_options": dict(where.options),
        "provider_precision": where.precision,
        "allow_fallback": where.allow_fallback,
        "threads": where.threads,
        "samples": inputs.samples,
    }


def _system(where: Runtime) -> dict[str, Any]:
    device = "cpu" if where.on_cpu else _DEVICES.get(where.provider)
    if where.provider not in _DEVICES:
        raise UsageError(f"Olive has no {where.provider}; choose one of {', '.join(_DEVICES)} with --ep")
    accelerator = {"device": device, "execution_providers": [where.provider]}
    return {"type": "LocalSystem", "accelerators": [accelerator]}


def _data_config(inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Real inputs by way of our data set, else ones."""
    if inputs.data is None:
        ones = {
            "input_names": list(inputs.shapes),
            "input_shapes": [list(shape) for shape in inputs.shapes.values()],
            "input_types": [inputs.types[name] for name in inputs.shapes],
        }
        return {"name": "inputs", "type": "DummyDataContainer", "load_dataset_config": ones}
    described = {n: {"shape": list(s), "dtype": inputs.types[n]} for n, s in inputs.shapes.items()}
    return {
        "name": "inputs",
        "user_script": str(folder / "olive_inputs.py"),
        "load_dataset_config": {
            "type": "onnx_mdp_inputs",
            "path": str(inputs.data),
            "inputs": described,
            "preprocess": inputs.preprocess,
            "samples": inputs.samples,
        },
        "dataloader_config": {"type": "no_auto_batch_dataloader"},
    }


def _latency(where: Runtime) -> dict[str, Any]:
    """Olive's own measurement, on as many threads as the pruning measured."""
    settings: dict[str, Any] = {
        "session_options": {"intra_op_num_threads": where.threads, "inter_op_num_threads": 1}
    }
    if where.options:
        settings |= {"execution_provider": [where.provider], "provider_options": [dict(where.options)]}
    runs = {"warmup_num": 20, "repeat_test_num": 100}
    return {
        "name": "latency",
        "type": "latency",
        "data_config": "inputs",
        "sub_types": [{"name": "p50", "priority": 1, "metric_config": runs}, {"name": "min"}],
        "user_config": {"inference_settings": {"onnx": settings}},
    }
