"""What the frozen dimensions hold, by the operator that froze them: where a new rule would pay most."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx_mdp.analysis.shadow import Operation, Shadow
from onnx_mdp.analysis.structure import Dimension, Structure, operation_macs
from onnx_mdp.numerics.precision import is_parameter

__all__ = ["FrozenPart", "frozen_parts", "held_macs", "held_params"]

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_ALONE = "its channels all live and die together"


@dataclass(frozen=True, slots=True)
class FrozenPart:
    """Dimensions that operators of one type froze for one reason, and what these hold together.

    ``operator`` is None where no single operator froze them (a graph output, or a dimension of one unit);
    ``reason`` is that of the first one. A weight or an operation between two of them counts once; ``ms`` is
    None without a latency table.
    """

    operator: str | None
    nodes: tuple[str, ...]
    reason: str
    dimensions: tuple[str, ...]
    params: int
    macs: int
    ms: float | None


def frozen_parts(
    structure: Structure, milliseconds: Mapping[int, float] | None = None
) -> tuple[FrozenPart, ...]:
    """The frozen dimensions by operator type and reason; those that hold most come first.

    ``milliseconds`` maps indices of operations to their time in the unpruned model.
    """
    groups: dict[tuple[str | None, str], list[Dimension]] = {}
    for index, dimension in enumerate(structure.dimensions):
        if index not in structure.prunable:
            groups.setdefault(_alike(structure, dimension), []).append(dimension)
    parts = [_part(structure, key[0], group, milliseconds) for key, group in groups.items()]
    return tuple(sorted(parts, key=lambda part: (part.ms or 0.0, part.macs, part.params), reverse=True))


def _maker(structure: Structure, dimension: Dimension) -> Operation | None:
    return None if dimension.frozen_by is None else structure.shadow.operations[dimension.frozen_by]


def _alike(structure: Structure, dimension: Dimension) -> tuple[str | None, str]:
    """Reasons that differ only in the names that they tell are one."""
    reason, operation = dimension.frozen or _ALONE, _maker(structure, dimension)
    if operation is None:
        return None, _QUOTED.sub("''", reason)
    return operation.op_type, _QUOTED.sub("''", reason.replace(str(operation), operation.op_type))


def _part(
    structure: Structure,
    operator: str | None,
    group: list[Dimension],
    milliseconds: Mapping[int, float] | None,
) -> FrozenPart:
    makers = [operation for d in group if (operation := _maker(structure, d)) is not None]
    touched = {member.operation for dimension in group for member in dimension.members}
    return FrozenPart(
        operator=operator,
        nodes=tuple(dict.fromkeys(maker.name or maker.outputs[0] for maker in makers)),
        reason=group[0].frozen or _ALONE,
        dimensions=tuple(dimension.name for dimension in group),
        params=held_params(structure.shadow, group),
        macs=held_macs(structure.shadow, group),
        ms=None if milliseconds is None else sum(milliseconds.get(index, 0.0) for index in touched),
    )


def held_params(shadow: Shadow, dimensions: Iterable[Dimension]) -> int:
    """Elements of the parameters that any of the dimensions cuts."""
    names = {member.tensor for dimension in dimensions for member in dimension.members}
    arrays = [shadow.constants[name] for name in names if name in shadow.constants]
    return sum(array.size for array in arrays if is_parameter(array.dtype))


def held_macs(shadow: Shadow, dimensions: Iterable[Dimension]) -> int:
    """Multiply-accumulates of the operations that read an initializer which any of the dimensions cuts."""
    touched = {member.operation for dimension in dimensions for member in dimension.members}
    return sum(operation_macs(shadow.operations[index], shadow.shapes) for index in touched)
