"""The pruning plan: which units stay and which blocks go, as a value and as reviewable JSON."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.structure import Dimension, Structure
from onnx_mdp.errors import UsageError

__all__ = [
    "PruningPlan",
    "check_plan",
    "from_ranges",
    "kept_count",
    "kept_units",
    "load_plan",
    "plan_identity",
    "plan_inputs",
    "plan_json",
    "removed_classes",
    "to_ranges",
]

_SCHEMA_VERSION = 1
_MOST_UNITS = 2**24  # of a plan
_DIGITS = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """What to keep of a model.

    ``keep`` maps each dimension that loses units to the kept unit indices, ascending; dimensions that
    are not named keep all. Units of a width are counted through its heads; every head that stays keeps as
    many, and units of a head that goes need not be named. ``removed_blocks`` are names of residual blocks.
    ``rescale_attention`` divides attention scores by the root of the width that is left, and not by the
    original's. ``states`` are the inputs, and the outputs that become them, that were pruned together.
    The other fields say how the plan was found: milliseconds are those of the device in ``provenance``,
    importance is the kept share of the total (0 to 1), ``bound`` is the solver's proven upper limit of it
    and ``gap`` the relative distance to it.
    """

    keep: Mapping[str, tuple[int, ...]]
    removed_blocks: tuple[str, ...] = ()
    rescale_attention: bool = False
    states: Mapping[str, str] = field(default_factory=dict)
    predicted_ms: float | None = None
    importance_share: float | None = None
    status: Literal["optimal", "feasible", "infeasible", "manual"] = "manual"
    bound: float | None = None
    gap: float | None = None
    solver: str | None = None
    seconds: float | None = None
    fastest_ms: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether the plan changes nothing."""
        return not self.keep and not self.removed_blocks


def to_ranges(indices: Iterable[int]) -> str:
    """Write ascending indices as ranges.

    >>> to_ranges([0, 1, 2, 7, 9, 10])
    '0-2,7,9-10'
    """
    parts = []
    for _, run in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        parts.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ",".join(parts)


def from_ranges(text: str, limit: int = _MOST_UNITS) -> tuple[int, ...]:
    """Read what `to_ranges` wrote.

    >>> from_ranges("0-2,7")
    (0, 1, 2, 7)

    Raises:
        UsageError: not ascending ranges below ``limit``.
    """
    indices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _DIGITS.fullmatch(first) or (dash and not _DIGITS.fullmatch(last)):
            raise UsageError(f"the plan holds {part[:40]!r} where a range of units such as 0-31 is expected")
        start, stop = int(first), int(last or first)
        if stop >= limit or start > stop or (indices and start <= indices[-1]):
            raise UsageError(f"the plan's range {part!r} is out of order or too large")
        indices.extend(range(start, stop + 1))
    return tuple(indices)


def plan_json(plan: PruningPlan) -> str:
    """The plan as JSON with sorted keys, ready for review in a diff."""
    return json.dumps(_document_of(plan), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _document_of(plan: PruningPlan) -> dict[str, Any]:
    """The plan as a JSON-ready dictionary."""
    same = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name != "keep"}
    ranges = {name: to_ranges(units) for name, units in plan.keep.items()}
    return {"schema_version": _SCHEMA_VERSION, "keep": ranges, **same}


def plan_identity(plan: PruningPlan) -> str:
    """A hash of what the plan does, not of how it was found."""
    bare = PruningPlan(
        keep=dict(sorted(plan.keep.items())),
        removed_blocks=tuple(sorted(plan.removed_blocks)),
        rescale_attention=plan.rescale_attention,
        states=dict(plan.states),
    )
    return hashlib.sha256(plan_json(bare).encode()).hexdigest()[:16]


def plan_inputs(plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    """The input shapes that a plan was made for; nothing where it does not say."""
    inputs = plan.provenance.get("inputs")
    shapes = inputs.items() if isinstance(inputs, Mapping) else ()
    return {
        str(name): tuple(shape)
        for name, shape in shapes
        if isinstance(shape, (list, tuple)) and all(type(size) is int for size in shape)
    }


def load_plan(path: str | os.PathLike[str]) -> PruningPlan:
    """Read a plan file.

    Raises:
        UsageError: missing, not a plan, or of a newer schema.
    """
    from onnx_mdp.document_forms import PlanForm, read_document

    document = read_document(Path(path), PlanForm, "a pruning plan", "`prune` and `solve` write plans")
    if document.schema_version > _SCHEMA_VERSION:
        raise UsageError(
            f"{path} was written by a newer onnx-mdp (schema {document.schema_version}); upgrade"
        )
    values = document.model_dump(exclude={"schema_version", "keep", "removed_blocks"})
    keep, left = {}, _MOST_UNITS
    for name, text in document.keep.items():
        keep[name] = from_ranges(text, left)
        left -= len(keep[name])
    return PruningPlan(keep=keep, removed_blocks=tuple(document.removed_blocks), **values)


def check_plan(plan: PruningPlan, structure: Structure) -> None:
    """Refuse a plan that does not fit the model.

    Raises:
        UsageError: it was made for another model, or names an unknown or frozen dimension or block.
    """
    made_for = plan.provenance.get("model")
    if made_for is not None and made_for != structure.shadow.source:
        raise UsageError("the plan was made for another model: the content hash in its provenance differs")
    if plan.rescale_attention and not structure.shadow.plain:
        raise UsageError("attention scores can be rescaled in float32 only; leave rescale_attention out")
    if plan.states and dict(plan.states) != dict(structure.shadow.states):
        made = " ".join(f"--state {source}={target}" for source, target in plan.states.items())
        raise UsageError(f"the plan was made with {made}, the model was analysed with other states")
    dimensions = {d.name: d for d in structure.dimensions}
    for name, units in plan.keep.items():
        if name not in dimensions:
            raise UsageError(f"the plan prunes dimension {name!r}, which the model does not have")
        if dimensions[name].frozen is not None:
            raise UsageError(f"the plan prunes {name!r}, which is frozen: {dimensions[name].frozen}")
        if not units or list(units) != sorted(set(units)) or units[0] < 0:
            raise UsageError(f"the plan's units of {name!r} must be distinct, ascending and at least one")
        if units[-1] >= len(dimensions[name].units):
            raise UsageError(
                f"the plan keeps units of {name!r} that do not exist; it has {len(dimensions[name].units)}"
            )
        _check_rows(plan, structure, dimensions[name])
    unknown = set(plan.removed_blocks) - {b.name for b in structure.blocks}
    if unknown:
        raise UsageError(f"the plan removes block {sorted(unknown)[0]!r}, which the model does not have")


def _check_rows(plan: PruningPlan, structure: Structure, dimension: Dimension) -> None:
    """Heads that stay must be equally wide."""
    kept = set(plan.keep[dimension.name])
    counts = {
        sum(row * dimension.count + unit in kept for unit in range(dimension.count))
        for row in _kept_rows(plan, structure, dimension)
    }
    if len(counts) > 1 or 0 in counts:
        raise UsageError(
            f"the plan keeps {sorted(counts)} units of {dimension.name!r} in its heads; all need as many"
        )


def _kept_rows(plan: PruningPlan, structure: Structure, dimension: Dimension) -> tuple[int, ...]:
    """The heads of a width that stay."""
    if dimension.heads is None:
        return tuple(range(dimension.rows))
    return kept_units(plan, structure, dimension.heads)


def kept_units(plan: PruningPlan, structure: Structure, index: int) -> tuple[int, ...]:
    """The kept unit indices of a dimension; those of removed heads are gone."""
    dimension = structure.dimensions[index]
    named = plan.keep.get(dimension.name, tuple(range(len(dimension.units))))
    if dimension.heads is None:
        return named
    rows = set(_kept_rows(plan, structure, dimension))
    return tuple(unit for unit in named if unit // dimension.count in rows)


def kept_count(plan: PruningPlan, structure: Structure, index: int) -> int:
    """How many units a dimension keeps, in each head that stays."""
    dimension = structure.dimensions[index]
    return len(kept_units(plan, structure, index)) // len(_kept_rows(plan, structure, dimension))


def removed_classes(plan: PruningPlan, structure: Structure) -> npt.NDArray[np.bool_]:
    """``bool[classes]``: the index classes that the plan removes; the units of a head go with it."""
    removed = np.zeros(structure.graph.classes, np.bool_)
    for index, dimension in enumerate(structure.dimensions):
        removed[list(dimension.units)] = True
        removed[[dimension.units[unit] for unit in kept_units(plan, structure, index)]] = False
    return removed
