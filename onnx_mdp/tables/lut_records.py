"""Latency measurements as values and as JSON lines, checked wherever they come from outside."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx_mdp.errors import UsageError
from onnx_mdp.json_input import read_text

__all__ = [
    "FORMAT",
    "RUN_FIELDS",
    "SAMPLE_FIELDS",
    "SMALLEST",
    "Run",
    "Sample",
    "canonical",
    "json_object",
    "matches",
    "parse_lines",
    "plain_values",
    "run_from",
]

FORMAT = {"format": "onnx-mdp-lut", "schema_version": 1}
SMALLEST = 1  # the number of the smallest variant; 0 is the unpruned model
_REMEDY = "write the file with `onnx-mdp lut export`"
_MOST = 1e12  # milliseconds, widths, nodes


def _whole(value: Any) -> int:
    number = int(value)
    if not -_MOST <= number <= _MOST:
        raise ValueError("out of range")
    return number


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 <= number <= _MOST:
        raise ValueError("out of range")
    return number


_Fields = Mapping[str, Callable[[Any], Any]]
RUN_FIELDS: _Fields = {
    "variant": _whole,
    "seed": _whole,
    "plain_ms": _positive,
    "sum_ms": _positive,
    "nodes": _whole,
    "seconds": _positive,
}
SAMPLE_FIELDS: _Fields = {"key": str, "a": _positive, "b": _positive, "ms": _positive, "count": _whole}


@dataclass(frozen=True, slots=True)
class Sample:
    """One layer's time within a run: shape key, staircase coordinates, milliseconds, runtime nodes."""

    key: str
    a: float
    b: float
    ms: float
    count: int


@dataclass(frozen=True, slots=True)
class Run:
    """One profiled variant of a model: its plain time, the sum over its nodes, and its samples.

    `seconds` is what the measurement cost; `payload` is any JSON object that describes the variant.
    """

    variant: int
    seed: int
    plain_ms: float
    sum_ms: float
    nodes: int
    seconds: float
    samples: tuple[Sample, ...] = ()
    payload: dict[str, Any] = field(default_factory=dict)


def run_from(fields: Mapping[str, Any], samples: Iterator[Mapping[str, Any]], payload: Any) -> Run:
    """A run from values of any types.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: a value is missing or is not what it should be.
    """
    found = tuple(Sample(**_typed(SAMPLE_FIELDS, sample)) for sample in samples)
    return Run(**_typed(RUN_FIELDS, fields), samples=found, payload=dict(payload))


def parse_lines(path: Path) -> list[dict[str, Any]]:
    """The records of an export.

    Raises:
        UsageError: the file is no export, or one of its lines is no record.
    """
    first, *rest = read_text(path, _REMEDY).splitlines() or [""]
    if first != canonical(FORMAT):
        raise UsageError(f"'{path}' is not a latency export that this version reads: {_REMEDY}.")
    return [_parse(path, number, text) for number, text in enumerate(rest, start=2)]


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        record = {"context": canonical(json_object(line["context"]))} | {
            key: str(line[key]) for key in ("model_hash", "created")
        }
        if "calibration" in line:
            return record | {"calibration": json_object(line["calibration"])}
        run = line["run"]
        return record | {"run": run_from(run, iter(run["samples"]), json_object(run["payload"]))}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"Line {number} of '{path}' is not a latency record: {_REMEDY}.") from error


def matches(only: str, context: Mapping[str, Any], model_hash: str) -> bool:
    """Whether the model or a value of the context holds ``only``, a shell pattern without regard to case."""
    values = (model_hash, *map(str, context.values()))
    return any(fnmatch.fnmatchcase(value.lower(), f"*{only.lower()}*") for value in values)


def json_object(value: Any) -> dict[str, Any]:
    """The same JSON object.

    Raises:
        ValueError: it is none, or holds a number that JSON has not.
    """
    if not isinstance(value, dict) or not all(map(_finite, value.values())):
        raise ValueError("not an object of finite numbers")
    return value


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _typed(fields: _Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kind(values[name]) for name, kind in fields.items()}


def plain_values(fields: _Fields, value: Run | Sample) -> tuple[Any, ...]:
    """The values of a record as SQLite takes them: it would store NumPy integers as binary objects."""
    values = (getattr(value, name) for name in fields)
    return tuple(value.item() if hasattr(value, "item") else value for value in values)


def canonical(value: Mapping[str, Any]) -> str:
    """JSON on one line with sorted keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
