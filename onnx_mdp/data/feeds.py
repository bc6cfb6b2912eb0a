"""Calibration inputs in whatever form a caller has them: a path, batches, a reader or a function."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.binding import graph_inputs
from onnx_mdp.data.calibration import CalibrationData, fitted, load_data
from onnx_mdp.errors import UsageError

__all__ = ["DataLike", "DataReader", "checked_batch", "input_types", "read_data"]

Array = npt.NDArray[Any]


@runtime_checkable
class DataReader(Protocol):
    """What ``onnxruntime.quantization.CalibrationDataReader`` promises."""

    def get_next(self) -> Mapping[str, Any] | None:
        """The next batch, None after the last."""


DataLike: TypeAlias = (
    "str | os.PathLike[str] | CalibrationData | DataReader | Mapping[str, Any] | Iterable[Any] "
    "| Callable[[], Iterable[Any]]"
)
"""A path (see `load_data`), or batches: one, several, a reader of them, or a function that returns them.

A batch maps every input to an array ``[n, ...]``, or is a pair of that and labels ``int[n]``; where the model
has one input, the array alone will do. Any array that numpy takes is one.
"""


def read_data(
    data: DataLike,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    *,
    preprocess: str | None = None,
    samples: int = 64,
    labels: str | None = None,
) -> CalibrationData:
    """Feeds of ``shapes`` with at most ``samples`` samples; of batches, the first ones are taken.

    Raises:
        UsageError: the data is missing, unreadable, or does not fit the model.
    """
    if isinstance(data, CalibrationData):
        return data
    if isinstance(data, (str, os.PathLike)):
        return load_data(Path(data), shapes, dtypes, preprocess=preprocess, samples=samples, labels=labels)
    if preprocess is not None or labels is not None:
        raise UsageError("preprocess and labels are for data in files; give batches that the model takes")
    size = {shape[:1] for shape in shapes.values()}
    if len(size) != 1 or () in size:
        raise UsageError(f"data needs inputs with a common batch size, but the model takes {dict(shapes)}")
    return _gathered(_batches(data), shapes, dtypes, samples, size.pop()[0])


def _batches(data: Any) -> Iterator[Any]:
    if isinstance(data, (Mapping, np.ndarray)):
        return iter([data])
    if isinstance(data, DataReader):
        return iter(data.get_next, None)
    made = data() if callable(data) else data
    if not isinstance(made, Iterable):
        raise UsageError(f"data must be a path or give batches, but {type(made).__name__} cannot be iterated")
    return iter(made)


def _gathered(
    batches: Iterator[Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    samples: int,
    size: int,
) -> CalibrationData:
    """The first samples, cut into feeds of ``size``."""
    parts: list[tuple[Mapping[str, Array], Array | None]] = []
    held = 0
    while held < samples and (batch := next(batches, None)) is not None:
        parts.append(checked_batch(batch, shapes, dtypes, "the data"))
        held += len(next(iter(parts[-1][0].values())))
    count = min(held, samples) // size * size
    if count < 1:
        raise UsageError(f"{min(held, samples)} samples do not fill a batch of {size}; give more")
    arrays = {name: np.concatenate([inputs[name] for inputs, _ in parts])[:count] for name in shapes}
    starts = range(0, count, size)
    feeds = tuple(
        {name: np.ascontiguousarray(array[start : start + size]) for name, array in arrays.items()}
        for start in starts
    )
    given = [targets for _, targets in parts if targets is not None]
    labels = None
    if len(given) == len(parts) and all(targets.dtype.kind in "iu" for targets in given):
        numbers = np.concatenate(given)[:count].astype(np.int64)
        labels = tuple(numbers[start : start + size] for start in starts)
    return CalibrationData(feeds, f"{count} samples", labels)


def checked_batch(
    batch: Any,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    where: str,
) -> tuple[dict[str, Array], Array | None]:
    """A batch in the model's names and types, with any number of rows, and its targets if it has some.

    Raises:
        UsageError: it does not fit the model; the message begins with ``where``.
    """
    inputs, targets = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if not isinstance(inputs, Mapping):
        if len(shapes) != 1:
            raise UsageError(f"{where} must give a dict of the inputs {', '.join(shapes)}")
        inputs = {next(iter(shapes)): inputs}
    if set(inputs) != set(shapes):
        given, taken = ", ".join(map(str, inputs)), ", ".join(shapes)
        raise UsageError(f"{where} gives the inputs {given}, but the model takes {taken}")
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or array.shape[1:] != shapes[name][1:] or array.ndim < 1:
            raise UsageError(
                f"{where} gives {name!r} as {array.dtype}{list(array.shape)}, but the model takes "
                f"{('n', *shapes[name][1:])}"
            )
    rows = {len(array) for array in arrays.values()}
    values = None if targets is None else np.asarray(targets)
    if len(rows) != 1 or (values is not None and values.shape[:1] != (min(rows),)):
        raise UsageError(f"{where} gives inputs or labels with different numbers of rows")
    return {name: fitted(array, name, dtypes[name]) for name, array in arrays.items()}, values


def input_types(model: ir.Model) -> dict[str, np.dtype[Any]]:
    """The types of the arrays that the inputs take."""
    return {str(v.name): _numpy_type(v.dtype) for v in graph_inputs(model) if v.dtype is not None}


def _numpy_type(dtype: ir.DataType) -> np.dtype[Any]:
    """The type of the arrays of an input; numpy has no bfloat16, which is compared in float32 anyway."""
    return np.dtype(np.float32 if dtype == ir.DataType.BFLOAT16 else dtype.numpy())
