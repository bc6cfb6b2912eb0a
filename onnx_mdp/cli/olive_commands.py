"""`export olive`: the files that Olive prunes from, and the command that runs them."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_mdp.analysis.binding import bind_shapes
from onnx_mdp.cli.options import Options, parse_shapes
from onnx_mdp.data.feeds import input_types
from onnx_mdp.errors import OutputError, UsageError
from onnx_mdp.files import check_output, write_files
from onnx_mdp.integrations.olive_workflow import DATA_SCRIPT, Inputs, package_config, workflow
from onnx_mdp.model_io import load_model
from onnx_mdp.numerics.precision import has_halves

__all__ = ["OliveOptions", "run_export_olive"]


@dataclass(frozen=True, slots=True)
class OliveOptions:
    """What `export olive` takes besides the common options."""

    output: Path
    base: Path | None = None
    target_ms: float | None = None
    target_ratio: float | None = None
    data: Path | None = None
    preprocess: str | None = None
    samples: int = 64
    transformer: str | None = None
    overwrite: bool = False

    def target(self) -> dict[str, float]:
        """The one target that was given."""
        both = {"target_ms": self.target_ms, "target_ratio": self.target_ratio}
        found = {name: value for name, value in both.items() if value is not None}
        if len(found) != 1:
            raise UsageError("give exactly one of --target-ms and --target-ratio")
        if not all(0 < value < math.inf for value in found.values()):
            raise UsageError("the target must be a number larger than 0")
        return found


def run_export_olive(model: Path | None, options: Options, wanted: OliveOptions) -> int:
    """Write the package config, and for a model a workflow that prunes it."""
    package, run = wanted.output / "olive_package.json", wanted.output / "olive_run.json"
    texts = {package: _json(package_config(wanted.base))}
    line = f"Olive's passes and OnnxMDPPruning → {package}"
    if model is None:
        if any(given is not None for given in (wanted.target_ms, wanted.target_ratio, wanted.data)):
            raise UsageError("a target and --data are for a workflow; name the model too")
    else:
        texts[run] = _json(_workflow(model, options, wanted))
        command = shlex.join(["olive", "run", "--config", str(run), "--package-config", str(package)])
        line = f"{line}\nworkflow → {run}; run it with `{command}`"
        if wanted.data is not None:
            texts[wanted.output / "olive_inputs.py"] = DATA_SCRIPT
        else:
            options.screen.warn("no --data: units are ranked by magnitude alone, and nothing is quantized")
    _write(texts, wanted)
    options.screen.result(line, {"schema_version": 1, "written": [str(path) for path in texts]})
    return 0


def _workflow(path: Path, options: Options, wanted: OliveOptions) -> dict[str, Any]:
    if options.provider_library is not None:
        raise UsageError("Olive registers a library itself; name it beside the provider in the workflow")
    model = load_model(path)
    shapes = bind_shapes(model, parse_shapes(options.input_shapes, model), options.batch)
    types = {name: str(dtype) for name, dtype in input_types(model).items()}
    inputs = Inputs(shapes, types, wanted.data, wanted.preprocess, wanted.samples)
    pruning: dict[str, Any] = {**wanted.target()}
    if wanted.data is not None and not has_halves(model):
        pruning["repair"] = ["lstsq"]
    if options.store is not None:
        pruning["store"] = str(options.store)
    return workflow(path, wanted.output, pruning, inputs, options.runtime(), wanted.transformer)


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def _write(texts: dict[Path, str], wanted: OliveOptions) -> None:
    try:
        wanted.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {wanted.output}: {error.strerror}; choose another folder") from error
    for path in texts:
        check_output(path, overwrite=wanted.overwrite)
    write_files({path: text.encode() for path, text in texts.items()})
