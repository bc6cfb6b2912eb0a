"""What `export` does: a model in the layout of a server, a tracker or another tool."""

from __future__ import annotations

from pathlib import Path

from onnx_mdp.cli.options import Options, parse_shapes
from onnx_mdp.model_io import load_model
from onnx_mdp.serving.triton import served, write_repository

__all__ = ["run_export_triton"]


def run_export_triton(
    path: Path, repository: Path, options: Options, name: str | None, max_batch: int, *, overwrite: bool
) -> int:
    """Write a model into a model repository of Triton Inference Server."""
    model = load_model(path)
    shapes = parse_shapes(options.input_shapes, model)
    wanted = served(
        model,
        path.stem if name is None else name,
        options.runtime(),
        max_batch=max_batch,
        input_shapes=shapes,
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
