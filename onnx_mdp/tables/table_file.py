"""A latency table as a JSON file: measured on one machine, solved on another, without ONNX Runtime."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.files import write_text
from onnx_mdp.tables.calibrating import Calibration
from onnx_mdp.tables.cost_terms import cost_terms
from onnx_mdp.tables.latency import LatencyTable, table_key, valid_for
from onnx_mdp.tables.staircases import COEFFICIENTS
from onnx_mdp.tables.variants import full_variant

if TYPE_CHECKING:
    from onnx_mdp.document_forms import TableForm

__all__ = ["load_table", "save_table", "table_json"]

# 1: four coefficients, and models timed before they were warm; 2: weights cost the same in every model.
_SCHEMA_VERSION = 3


def table_json(structure: Structure, table: LatencyTable) -> str:
    """The table as JSON with sorted keys."""
    calibration = table.calibration
    document: dict[str, Any] = {
        "schema_version": _SCHEMA_VERSION,
        "context": dict(table.context),
        "key": table.key,
        "granularity": table.granularity,
        "coefficients": {key: list(values) for key, values in table.coefficients.items()},
        "calibration": {n: getattr(calibration, n) for n in Calibration.__slots__ if n != "shares"},
        "choices": {structure.dimensions[i].name: list(widths) for i, widths in table.choices.items()},
    }
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"


def save_table(
    structure: Structure, table: LatencyTable, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a table for any other machine.

    Raises:
        OutputError: the file is there already, or cannot be written.
    """
    write_text(table_json(structure, table), Path(path), overwrite=overwrite)


def load_table(path: str | os.PathLike[str], structure: Structure) -> LatencyTable:
    """Read a table file for the model that it was measured on.

    Raises:
        UsageError: missing, not a table, of another schema, or of another model or other input shapes.
    """
    from onnx_mdp.document_forms import TableForm, read_document

    document = read_document(Path(path), TableForm, "a latency table", "`onnx-mdp profile -o` writes one")
    if document.schema_version > _SCHEMA_VERSION:
        raise UsageError(f"{path} was written by a newer onnx-mdp; upgrade")
    if document.schema_version < _SCHEMA_VERSION:
        raise UsageError(
            f"{path} was written by an older onnx-mdp, whose tables mean something else: write it again with "
            "`onnx-mdp profile -o`"
        )
    if any(len(values) != COEFFICIENTS for values in document.coefficients.values()):
        raise UsageError(f"{path} is not a latency table: each layer takes {COEFFICIENTS} coefficients")
    if document.key != table_key(structure):
        raise UsageError(f"{path} was measured on another model or at other input shapes")
    table = LatencyTable(
        context=document.context,
        key=document.key,
        granularity=document.granularity,
        terms=cost_terms(structure),
        coefficients=document.coefficients,
        calibration=Calibration(**document.calibration.model_dump()),
        choices=_choices(path, document, structure),
        measured=0,
        seconds=0.0,
    )
    return valid_for(table, structure, full_variant(structure))


def _choices(
    path: str | os.PathLike[str], document: TableForm, structure: Structure
) -> dict[int, tuple[int, ...]]:
    choices = {}
    for index in structure.prunable:
        dimension = structure.dimensions[index]
        widths = document.choices.get(dimension.name, [])
        ascending = all(a < b for a, b in itertools.pairwise(widths))
        if not widths or not ascending or widths[0] < 1 or widths[-1] != dimension.count:
            raise UsageError(
                f"{path} does not offer widths of {dimension.name} that end at its {dimension.count}"
            )
        choices[index] = tuple(widths)
    return choices
