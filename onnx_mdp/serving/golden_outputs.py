"""Golden inputs and outputs in Polygraphy's JSON, so that ``polygraphy run`` checks a model anywhere again.

``inputs.json`` holds what was fed and ``outputs.json`` what ONNX Runtime gave, in the form that Polygraphy
itself saves: arrays as ``.npy`` in base64, each object with the name of its class. Nothing of Polygraphy is
needed to write it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.errors import UnsupportedModelError
from onnx_mdp.files import check_output, make_folder, write_files
from onnx_mdp.large_models import for_session
from onnx_mdp.running.runtime import Runtime, open_session, run_model

__all__ = ["Golden", "golden", "write_golden"]

_CLASS = "polygraphy_class"
_RUNNER = "onnx-mdp"

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Golden:
    """What a model was fed, and what it returned, by name; one of each for every run."""

    feeds: tuple[Mapping[str, Array], ...]
    outputs: tuple[Mapping[str, Array], ...]


def golden(model: ir.Model, feeds: Sequence[Mapping[str, Array]], runtime: Runtime) -> Golden:
    """Run a model on every feed.

    Raises:
        MeasurementError: it does not run.
        UnsupportedModelError: an output is no array of numbers, or holds one that is not finite.
    """
    session = open_session(for_session(model), runtime)
    names = [str(value.name) for value in model.graph.outputs]
    results = [dict(zip(names, run_model(session, feed, names), strict=True)) for feed in feeds]
    for name, array in (pair for result in results for pair in result.items()):
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise UnsupportedModelError(
                f"output {name!r} is no array of numbers, which Polygraphy cannot compare"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UnsupportedModelError(
                f"output {name!r} holds values that are not finite, which equal nothing; pass other inputs"
            )
    return Golden(tuple(feeds), tuple(results))


def write_golden(golden: Golden, folder: Path, *, overwrite: bool = False) -> tuple[Path, Path]:
    """Write ``inputs.json`` and ``outputs.json`` into a folder, which is made if need be.

    Raises:
        OutputError: they exist, or cannot be written.
    """
    paths = folder / "inputs.json", folder / "outputs.json"
    if folder.is_dir():
        for path in paths:
            check_output(path, overwrite=overwrite)
    make_folder(folder)
    documents = _inputs(golden), _outputs(golden)
    texts = [json.dumps(document, indent=1, allow_nan=False) + "\n" for document in documents]
    write_files({path: text.encode() for path, text in zip(paths, texts, strict=True)})
    return paths


def _inputs(golden: Golden) -> list[dict[str, Any]]:
    return [{name: _array(array) for name, array in feed.items()} for feed in golden.feeds]


def _outputs(golden: Golden) -> dict[str, Any]:
    iterations = [
        _object(
            "IterationResult",
            outputs={n: _object("LazyArray", values=_array(a)) for n, a in outputs.items()},
            runtime=0.0,
            runner_name=_RUNNER,
        )
        for outputs in golden.outputs
    ]
    return _object("RunResults", lst=[[_RUNNER, iterations]])


def _array(array: Array) -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return _object("ndarray", array=base64.b64encode(file.getvalue()).decode())


def _object(kind: str, **fields: Any) -> dict[str, Any]:
    return fields | {_CLASS: kind}
