"""What `export` does: a model in the layout of a server, a tracker or another tool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_mdp.analysis.binding import bind_shapes
from onnx_mdp.cli.options import Options, parse_shapes
from onnx_mdp.data.calibration import load_data
from onnx_mdp.data.feeds import input_types
from onnx_mdp.errors import UsageError
from onnx_mdp.json_input import read_text
from onnx_mdp.large_models import for_session
from onnx_mdp.model_io import load_model
from onnx_mdp.plan import load_plan
from onnx_mdp.reports.report import printable
from onnx_mdp.running.runtime import open_session
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.serving.golden_outputs import golden, write_golden
from onnx_mdp.serving.mlflow_model import check_folder, history, write_mlflow
from onnx_mdp.serving.triton import served, write_repository

__all__ = [
    "HistoryFiles",
    "InputOptions",
    "run_export_mlflow",
    "run_export_polygraphy",
    "run_export_triton",
]


@dataclass(frozen=True, slots=True)
class InputOptions:
    """Real inputs, how images become such, and how many; without ``data`` they are drawn."""

    data: Path | None = None
    preprocess: str | None = None
    samples: int = 4


@dataclass(frozen=True, slots=True)
class HistoryFiles:
    """Where a model comes from: its plan, and what ``prune --json`` printed."""

    plan: Path | None = None
    result: Path | None = None


def run_export_triton(
    path: Path, repository: Path, options: Options, name: str | None, max_batch: int, *, overwrite: bool
) -> int:
    """Write a model into a model repository of Triton Inference Server."""
    model = load_model(path)
    wanted = served(
        model,
        path.stem if name is None else name,
        options.runtime(),
        max_batch=max_batch,
        input_shapes=parse_shapes(options.input_shapes, model),
    )
    folder = write_repository(model, wanted, repository, overwrite=overwrite)
    runtime = wanted.runtime
    line = (
        f"EXPORTED  Triton model {wanted.name} on {runtime.provider}, {runtime.threads} thread(s), "
        f"batches of at most {max(1, max_batch)} → {folder}"
    )
    document = {
        "schema_version": 1,
        "name": wanted.name,
        "max_batch": max_batch,
        "provider": runtime.provider,
        "precision": runtime.precision,
        "threads": runtime.threads,
        "warm_up": {name: list(shape) for name, shape in wanted.warm_up.items()},
        "output": str(folder),
    }
    options.screen.result(line, document)
    return 0


def run_export_polygraphy(
    path: Path, folder: Path, options: Options, inputs: InputOptions, *, overwrite: bool
) -> int:
    """Write golden inputs and outputs."""
    model = load_model(path)
    found = golden(model, _feeds(model, options, inputs), options.runtime())
    files = write_golden(found, folder, overwrite=overwrite)
    options.screen.note(
        f"check it with: polygraphy run {path} --onnxrt --load-inputs {files[0]} --load-outputs {files[1]}"
    )
    line = f"EXPORTED  {len(found.feeds)} golden inputs and their outputs → {folder}"
    document = {
        "schema_version": 1,
        "runs": len(found.feeds),
        "outputs": list(found.outputs[0]),
        "inputs_file": str(files[0]),
        "outputs_file": str(files[1]),
    }
    options.screen.result(line, document)
    return 0


def run_export_mlflow(
    path: Path, folder: Path, options: Options, inputs: InputOptions, files: HistoryFiles, *, overwrite: bool
) -> int:
    """Write a folder in MLflow's format."""
    check_folder(folder, overwrite=overwrite)
    model = load_model(path)
    told = history(
        model,
        None if files.plan is None else load_plan(files.plan),
        None if files.result is None else _result(files.result),
    )
    (example,) = _feeds(model, options, inputs)
    write_mlflow(model, folder, options.runtime(), example, told, overwrite=overwrite)
    options.screen.result(
        f"EXPORTED  MLflow model, flavour mlflow.onnx → {folder}",
        {"schema_version": 1, "metadata": told, "output": str(folder)},
    )
    return 0


def _feeds(model: ir.Model, options: Options, inputs: InputOptions) -> Sequence[Mapping[str, Any]]:
    """As many inputs as wanted: of the data, or drawn."""
    shapes = bind_shapes(model, parse_shapes(options.input_shapes, model))
    if inputs.data is not None:
        data = load_data(
            inputs.data,
            shapes,
            input_types(model),
            preprocess=inputs.preprocess,
            samples=inputs.samples,
        )
        options.screen.note(f"inputs: {printable(data.source)}")
        return data.feeds
    if inputs.preprocess is not None:
        raise UsageError("--preprocess says how --data images become inputs; pass --data too")
    options.screen.note("no --data: the inputs are random floats, and zeros where integers are taken")
    session = open_session(for_session(model), options.runtime())
    return [random_feeds(session, shapes, seed) for seed in range(inputs.samples)]


def _result(path: Path) -> Mapping[str, Any]:
    what = "give what `prune --json` printed"
    try:
        document = json.loads(read_text(path, what))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {what}") from error
    if not isinstance(document, dict) or document.get("schema_version") != 1:
        raise UsageError(f"{path} is no result of onnx-mdp: {what}")
    return document
