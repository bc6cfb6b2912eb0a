"""The forms of plan and table files; loaded when one is read, so that measuring needs no pydantic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnx_mdp.errors import UsageError
from onnx_mdp.json_input import read_text

__all__ = ["PlanForm", "TableForm", "read_document"]

_MOST_MS = 1e9

_Form = TypeVar("_Form", bound=BaseModel)
Milliseconds = Annotated[float, Field(ge=0, le=_MOST_MS)]
Share = Annotated[float, Field(ge=0, le=1e6)]


class _Strict(BaseModel):
    """An unknown key is an error, so that a misspelt document is never half applied."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PlanForm(_Strict):
    """A plan; ``keep`` holds ranges of units by dimension name."""

    schema_version: int
    keep: dict[str, str]
    removed_blocks: list[str] = []
    rescale_attention: bool = False
    states: dict[str, str] = {}
    predicted_ms: float | None = None
    importance_share: float | None = None
    status: Literal["optimal", "feasible", "infeasible", "manual"] = "manual"
    bound: float | None = None
    gap: float | None = None
    solver: str | None = None
    seconds: float | None = None
    fastest_ms: float | None = None
    provenance: dict[str, Any] = {}


class _Calibration(_Strict):
    scale: Share
    offset_ms: Annotated[float, Field(ge=-_MOST_MS, le=_MOST_MS)]
    base_ms: Milliseconds
    median_error: float
    worst_error: float
    noise: float
    cache_mb: Annotated[float, Field(gt=0, le=_MOST_MS)]
    ms_per_mb: Annotated[float, Field(ge=0, le=_MOST_MS)]


class TableForm(_Strict):
    """A table; ``choices`` are the widths, in units, that it was made for, by dimension name."""

    schema_version: int
    context: dict[str, str | int]
    key: str
    granularity: Annotated[int, Field(ge=1, le=2**16)]
    coefficients: dict[str, tuple[Milliseconds, ...]]
    calibration: _Calibration
    choices: dict[str, list[int]]


def read_document(path: Path, form: type[_Form], name: str, what: str) -> _Form:
    """Read a JSON file of a form that is called ``name``.

    Raises:
        UsageError: the file cannot be read or has another form; the first fault is named.
    """
    text = read_text(path, what)
    try:
        return form.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:80] or "the document"
        raise UsageError(f"{path} is not {name}: {place}: {first['msg']}; {what}") from error
