"""What the report of a prune says, as values and as a JSON file, which HTML and Markdown only show.

It holds no folder names, no host names, and no
weights. Milliseconds are normalised to the state of the machine at ``base_ms``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from onnx_mdp.errors import UsageError
from onnx_mdp.json_input import read_text
from onnx_mdp.planning.closed_loop import Round
from onnx_mdp.reports.fidelity import Fidelity
from onnx_mdp.reports.figures import Layer
from onnx_mdp.reports.frozen_parts import FrozenPart

__all__ = [
    "BlockLine",
    "Costs",
    "DimensionLine",
    "FileLine",
    "Front",
    "Operation",
    "OutputProof",
    "Proof",
    "Report",
    "load_report",
    "report_json",
]

_SCHEMA_VERSION = 1
_KIND = "prune report"
_MOST = 1e18  # of any number
_WHAT = "give a .report.json that `onnx-mdp prune --report` wrote"

_Number = TypeVar("_Number", int, float)
Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class BlockLine:
    """A residual block that could go, and whether it did."""

    name: str
    kind: str
    removed: bool


@dataclass(frozen=True, slots=True)
class DimensionLine:
    """A prunable dimension, in channels; ``kept`` is 0 where its block went."""

    name: str
    kind: str
    size: int
    kept: int


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation with what is fused into it; ``after_ms`` is None where there is no plan."""

    name: str
    kind: str
    before_ms: float
    after_ms: float | None


@dataclass(frozen=True, slots=True)
class Costs:
    """The table's milliseconds; ``around_ms`` is what it charges to no operation, before and after."""

    operations: tuple[Operation, ...]
    around_ms: tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Front:
    """The best plans by the table: (milliseconds, share of the importance); ``chosen`` is on it."""

    points: tuple[tuple[float, float], ...]
    chosen: tuple[float, float] | None
    seconds: float


@dataclass(frozen=True, slots=True)
class OutputProof:
    """The worst difference of an output between pruned and masked model, and the output's scale.

    ``cosine`` and ``moved`` say how far it went from the unpruned model on one random input; None: no number.
    """

    name: str
    difference: float
    scale: float
    cosine: float | None
    moved: float | None


@dataclass(frozen=True, slots=True)
class Proof:
    """The verification of the model as it was sliced; see `onnx_mdp.surgery.verification.Evidence`."""

    verified: bool
    worst: float
    tolerance: float
    inputs_tried: int
    outputs: tuple[OutputProof, ...]
    runtime_noise: float | None
    checker: str | None
    constant: tuple[str, ...]
    judged: str | None
    followed: bool


@dataclass(frozen=True, slots=True)
class FileLine:
    """A file, what it is, and the SHA-256 of its bytes; of its content where it is in several pieces."""

    what: str
    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Report:
    """All that the report of a prune says."""

    status: Literal["met", "missed", "infeasible", "nothing_to_do"]
    version: str
    when: str
    command: str
    model: str
    output: str | None
    target_ms: float
    base_ms: float
    base_now_ms: float
    predicted_ms: float | None
    measured_ms: float | None
    fastest_ms: float | None
    noise: float
    tolerance: float
    params: tuple[int, int]
    macs: tuple[int, int]
    criterion: str | None
    importance_share: float | None
    solver: str | None
    gap: float | None
    rounds: tuple[Round, ...]
    layers: tuple[Layer, ...]
    blocks: tuple[BlockLine, ...]
    costs: Costs | None
    front: Front | None
    dimensions: tuple[DimensionLine, ...]
    frozen: tuple[FrozenPart, ...]
    data: str | None
    fidelity: Fidelity | None
    proof: Proof | None
    then: tuple[str, ...]
    notes: tuple[str, ...]
    environment: Mapping[str, Scalar]
    files: tuple[FileLine, ...]
    seconds: Mapping[str, float]


def report_json(report: Report) -> str:
    """The report as JSON, in the order of its fields."""
    document = {"schema_version": _SCHEMA_VERSION, "kind": _KIND, **asdict(report)}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def load_report(path: Path) -> Report:
    """Read a report file.

    Raises:
        UsageError: it is missing, it is no report, or it is damaged or of another schema.
    """
    from pydantic import TypeAdapter, ValidationError

    document = _document(path)
    if document.get("kind") != _KIND:
        raise UsageError(f"{path} is no report of a prune; {_WHAT}")
    if document.get("schema_version") != _SCHEMA_VERSION:
        raise UsageError(f"{path} has another schema than this onnx-mdp reads, {_SCHEMA_VERSION}; {_WHAT}")
    held = {name: value for name, value in document.items() if name not in ("kind", "schema_version")}
    try:
        report: Report = TypeAdapter(Report).validate_json(json.dumps(held), strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:80]
        raise UsageError(f"{path} is damaged: {place}: {first['msg']}; {_WHAT}") from error
    if json.loads(report_json(report)) != document:
        raise UsageError(f"{path} holds what no report holds; {_WHAT}")
    return report


def _document(path: Path) -> dict[str, Any]:
    text = read_text(path, _WHAT)
    try:
        document = json.loads(text, parse_constant=_refused, parse_int=_int, parse_float=_float)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON, or holds a number beyond reason; {_WHAT}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} is no report of a prune; {_WHAT}")
    return document


def _int(text: str) -> int:
    return _bounded(int(text))


def _float(text: str) -> float:
    return _bounded(float(text))


def _bounded(number: _Number) -> _Number:
    if not abs(number) < _MOST:
        raise ValueError(number)
    return number


def _refused(text: str) -> float:
    raise ValueError(text)
