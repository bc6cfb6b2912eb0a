"""A folder in MLflow's format, flavour ``mlflow.onnx``: a model, its signature, an example, its history.

MLflow itself writes the folder (extra ``mlflow``), beside its final place, where it appears whole or not at
all.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnx_mdp.errors import MissingBackendError, OutputError, UnsupportedModelError, UsageError
from onnx_mdp.large_models import for_session
from onnx_mdp.model_io import model_proto
from onnx_mdp.plan import PruningPlan, plan_identity
from onnx_mdp.running.provider_options import portable_options
from onnx_mdp.running.runtime import Runtime, import_onnxruntime, open_session, run_model
from onnx_mdp.serving.signature import Port, provenance, signature

__all__ = ["check_folder", "history", "write_mlflow"]

_MARK = "MLmodel"  # the file that makes a folder a model
_PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
}
_FIGURES = ("status", "target_ms", "base_ms", "predicted_ms", "measured_ms", "noise", "verified", "max_error")
_FOUND = ("predicted_ms", "importance_share", "status", "solver")


def history(model: ir.Model, plan: PruningPlan | None, result: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where a model comes from, as metadata: what its file says, how its plan was found, what was measured.

    Raises:
        UsageError: the plan is another model's, or the result another plan's.
    """
    told: dict[str, Any] = dict(provenance(model))
    if plan is not None:
        if told.get("onnx_mdp.plan") != plan_identity(plan):
            raise UsageError("the model was not made by this plan: give the one that `prune` wrote beside it")
        told |= {f"onnx_mdp.plan.{key}": getattr(plan, key) for key in _FOUND}
        told |= {f"onnx_mdp.plan.{key}": value for key, value in plan.provenance.items()}
        if result is not None and result.get("predicted_ms", plan.predicted_ms) != plan.predicted_ms:
            raise UsageError("the result is that of another prune than the plan: give what it printed")
    if result is not None:
        told |= {f"onnx_mdp.{key}": result[key] for key in _FIGURES if key in result}
    return told


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse early a folder that exists, unless it is a model of MLflow that may be replaced.

    Raises:
        OutputError: with the remedy.
    """
    if not os.path.lexists(folder):
        if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK):
            raise OutputError(f"cannot write {folder}: {folder.parent} is no folder that can be written")
        return
    if not overwrite:
        raise OutputError(f"{folder} exists; choose another output or pass --overwrite")
    if folder.is_symlink() or not (folder / _MARK).is_file():
        raise OutputError(f"{folder} is no MLflow model, so it is not replaced; choose another output")


def write_mlflow(
    model: ir.Model,
    folder: Path,
    runtime: Runtime,
    example: Mapping[str, npt.NDArray[Any]],
    history: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write a model with a signature of named tensors, an ``example`` of its inputs, and metadata.

    A loaded model runs on ``runtime``'s provider, with its options and threads. The example is run so here:
    where a provider is missing, MLflow would serve on the CPU with a warning.

    Raises:
        MissingBackendError: MLflow is not installed, or the provider is missing.
        MeasurementError: the example does not run.
        UnsupportedModelError: a type that MLflow has not, or more than 2 GB of weights.
        OutputError: the folder exists, or cannot be written.
    """
    check_folder(folder, overwrite=overwrite)
    flavour, models = _import("mlflow.onnx"), _import("mlflow.models")
    run_model(open_session(for_session(model), runtime), example)
    draft = folder.parent / f".onnx-mdp-{secrets.token_hex(8)}"
    try:
        flavour.save_model(
            model_proto(model),
            str(draft),
            signature=_signature(models, model),
            input_example=dict(example),
            metadata=dict(history),
            onnx_execution_providers=[_provider(runtime)],
            onnx_session_options={"intra_op_num_threads": runtime.threads, "inter_op_num_threads": 1},
            pip_requirements=[f"onnx=={onnx.__version__}", _package(runtime)],
            save_as_external_data=False,
        )
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}; choose another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingBackendError(
            f"MLflow is not installed ({error.name} is missing): run `pip install 'onnx-mdp[mlflow]'`"
        ) from error


def _provider(runtime: Runtime) -> Any:
    told = portable_options(runtime.provider, threads=runtime.threads, precision=runtime.precision)
    return (runtime.provider, told) if told else runtime.provider


def _package(runtime: Runtime) -> str:
    """What to install where the model is loaded."""
    name = _PACKAGES.get(runtime.provider, "onnxruntime")
    return f"{name}=={import_onnxruntime().__version__}"


def _signature(models: Any, model: ir.Model) -> Any:
    schema = importlib.import_module("mlflow.types.schema")
    ports = signature(model)
    inputs, outputs = (
        schema.Schema([schema.TensorSpec(_dtype(port), port.dims, port.name) for port in some])
        for some in (ports.inputs, ports.outputs)
    )
    return models.ModelSignature(inputs, outputs)


def _dtype(port: Port) -> np.dtype[Any]:
    dtype = np.dtype(port.dtype.numpy())
    if dtype.kind not in "biuf":
        raise UnsupportedModelError(f"{port.name!r} is {port.dtype}, which MLflow's signatures do not know")
    return dtype
