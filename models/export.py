"""From a name to a checked ONNX file, through either exporter of torch.

``torchscript`` is the tracing exporter (opset 17 unless told), ``dynamo`` the one on torch.export (opset 18).
They name weights, pool and flatten differently, so both belong in a test.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from models.catalog import CATALOG, Architecture, build

__all__ = ["export", "export_module", "main"]

Exporter = Literal["torchscript", "dynamo"]
_OPSETS: dict[str, int] = {"torchscript": 17, "dynamo": 18}
_RELATIVE_TOLERANCE = 1e-4
_DRAWS = 10


def export(
    name: str,
    path: Path | str,
    exporter: Exporter = "torchscript",
    dynamic_batch: bool = False,
    fold_batchnorm: bool = True,
    opset: int | None = None,
    seed: int = 0,
) -> Path:
    """Build the catalog's ``name`` from ``seed``, write it to ``path`` and return the path.

    See `export_module` for what is written and what is checked; ``KeyError`` for an unknown name.
    """
    made = CATALOG[name]
    return export_module(
        build(name, seed),
        made.input_shape,
        path,
        exporter,
        dynamic_batch,
        fold_batchnorm,
        opset,
        made.outputs,
        made.others,
    )


def export_module(
    module: nn.Module,
    input_shape: tuple[int, ...],
    path: Path | str,
    exporter: Exporter = "torchscript",
    dynamic_batch: bool = False,
    fold_batchnorm: bool = True,
    opset: int | None = None,
    outputs: tuple[str, ...] = ("logits",),
    others: tuple[tuple[str, tuple[int, ...]], ...] = (),
) -> Path:
    """Write one self-contained ONNX file from ``image`` and ``others`` to ``outputs``; return its path.

    The batch is 1, or the symbol ``batch``. The module is put in evaluation mode. The file has passed
    ``onnx.checker`` and agreed with torch in ONNX Runtime to 1e-4 of the largest value of each output, else
    ``ValueError``. A model that chooses by score may choose otherwise by rounding alone, so that one random
    input of ten is enough: no wrong export agrees on any.
    """
    module.eval()
    path = Path(path)
    # torch.export specialises an example batch of 1 to a constant.
    batch = 2 if dynamic_batch else 1
    generator = torch.Generator().manual_seed(1)
    architecture = Architecture(nn.Module, input_shape, outputs, others)

    def drawn() -> dict[str, torch.Tensor]:
        names = ("image", *(name for name, _ in others))
        return dict(zip(names, architecture.inputs(batch, generator), strict=True))

    version = opset or _OPSETS[exporter]
    write = _export_dynamo if exporter == "dynamo" else _export_torchscript
    with _quiet(), torch.no_grad():
        write(module, inputs := drawn(), outputs, path, dynamic_batch, fold_batchnorm, version)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    errors = [_error(module, session, inputs, outputs)]
    while errors[-1] > _RELATIVE_TOLERANCE and len(errors) < _DRAWS:
        errors.append(_error(module, session, drawn(), outputs))
    if not errors[-1] <= _RELATIVE_TOLERANCE:
        raise ValueError(f"{path} differs from torch by {min(errors):.1e} of a largest value: do not use it.")
    return path


def _export_torchscript(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    path: Path,
    dynamic_batch: bool,
    fold: bool,
    opset: int,
) -> None:
    axes = {name: {0: "batch"} for name in (*inputs, *outputs)} if dynamic_batch else None
    # Its constant folding is what folds BatchNorm; PRESERVE keeps the nodes of a module in eval mode.
    training = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        module,
        tuple(inputs.values()),
        str(path),
        dynamo=False,
        opset_version=opset,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_axes=axes,
        do_constant_folding=fold,
        training=training,
    )


def _export_dynamo(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    path: Path,
    dynamic_batch: bool,
    fold: bool,
    opset: int,
) -> None:
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if dynamic_batch else None
    torch.onnx.export(
        module,
        tuple(inputs.values()),
        str(path),
        dynamo=True,
        opset_version=opset,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_shapes=shapes,
        optimize=fold,
        external_data=False,
        verbose=False,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporters print, log and warn about their own deprecation."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _error(
    module: nn.Module,
    session: onnxruntime.InferenceSession,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
) -> float:
    """The largest difference from torch of any output, as a share of that output's largest value."""
    with torch.no_grad():
        made = module(*inputs.values())
    expected = [made] if isinstance(made, torch.Tensor) else made
    actual = session.run(list(outputs), {name: tensor.numpy() for name, tensor in inputs.items()})
    pairs = [(found, wanted.numpy()) for found, wanted in zip(actual, expected, strict=True)]
    return max(float(np.abs(found - wanted).max() / np.abs(wanted).max()) for found, wanted in pairs)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(CATALOG), help="the model to export")
    parser.add_argument("-o", "--output", type=Path, help="the file to write (default: NAME.onnx)")
    parser.add_argument("--all", type=Path, metavar="DIR", help="export the whole catalog to DIR")
    parser.add_argument("--exporter", choices=sorted(_OPSETS), default="torchscript")
    parser.add_argument("--opset", type=int, help="default: 17 for torchscript, 18 for dynamo")
    parser.add_argument("--dynamic-batch", action="store_true", help="name the batch axis instead of 1")
    parser.add_argument("--keep-batchnorm", action="store_true", help="do not fold BatchNorm")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args(argv)
    if (arguments.name is None) == (arguments.all is None):
        parser.error("name one model, or give --all DIR")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command line and print one line a file; return the exit code."""
    given = _arguments(argv)
    if given.all is None:
        jobs = {given.name: given.output or Path(f"{given.name}.onnx")}
    else:
        given.all.mkdir(parents=True, exist_ok=True)
        jobs = {name: given.all / f"{name}_{given.exporter}.onnx" for name in CATALOG}
    for name, path in jobs.items():
        options = given.exporter, given.dynamic_batch, not given.keep_batchnorm, given.opset, given.seed
        export(name, path, *options)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
