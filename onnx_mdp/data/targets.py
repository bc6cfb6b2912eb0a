"""What samples should become: class numbers, or numbers of any shape, from archives, folders or tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.errors import UsageError

__all__ = ["TARGET_NAMES", "Targets", "archive_targets", "folder_targets"]

Array = npt.NDArray[Any]
TARGET_NAMES = ("labels", "label", "targets")  # arrays of an archive that are no inputs
_MAX_BYTES = 2 * 10**9
_FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class Targets:
    """``values`` hold one row a sample: int64 classes, or float32; ``classes`` names folders, by number."""

    values: Array
    classes: tuple[str, ...] | None = None


def archive_targets(
    arrays: dict[str, Array], labels: str | None, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> Targets | None:
    """Take the targets out of ``arrays``, which afterwards are the inputs by the model's names."""
    name = labels or next((n for n in TARGET_NAMES if n in arrays and n not in shapes), None)
    if name is not None and (name not in arrays or name in shapes):
        raise UsageError(
            f"--labels {name}: {path} holds {', '.join(sorted(arrays))}; name one that is no input"
        )
    targets = None if name is None else arrays.pop(name)
    if len(shapes) == len(arrays) == 1:
        arrays[next(iter(shapes))] = arrays.pop(next(iter(arrays)))
    if set(arrays) != set(shapes):
        found, wanted = (", ".join(sorted(some)) or "nothing" for some in (arrays, shapes))
        raise UsageError(
            f"{path} holds the inputs {found}, but the model takes {wanted}; save exactly these and `labels`"
        )
    if targets is None:
        return None
    return Targets(targets.astype(np.float32 if targets.dtype.kind == "f" else np.int64))


def folder_targets(
    labels: str, folder: Path, files: Sequence[Path], classes: Sequence[str] | None
) -> Targets:
    """The class of each file: its subfolder, or what a CSV or JSON file says."""
    if labels != _FOLDER:
        return Targets(_tabled(Path(labels), folder, files))
    names = [file.relative_to(folder).parts[0] for file in files]
    loose = next((file for file in files if file.parent == folder), None)
    if loose is not None:
        raise UsageError(f"--labels folder: {loose} lies in no class folder; move it into one")
    numbered = tuple(sorted(set(names)) if classes is None else classes)
    strange = sorted(set(names) - set(numbered))
    if strange:
        raise UsageError(f"{folder} has a class {strange[0]!r} that the training data has not")
    number = {name: index for index, name in enumerate(numbered)}
    return Targets(np.array([number[name] for name in names], np.int64), numbered)


def _tabled(table: Path, folder: Path, files: Sequence[Path]) -> Array:
    classes = _read_table(table)
    found = []
    for file in files:
        keys = (file.relative_to(folder).as_posix(), file.name, file.stem)
        label = next((classes[key] for key in keys if key in classes), None)
        if label is None:
            raise UsageError(f"{table} gives {keys[0]} no class; add it, or remove the image from {folder}")
        found.append(label)
    return np.array(found, np.int64)


def _read_table(table: Path) -> dict[str, int]:
    if not table.is_file():
        raise UsageError(
            f"--labels {table}: no such file; give `folder`, or a .csv or .json of file and class"
        )
    if table.stat().st_size > _MAX_BYTES:
        raise UsageError(f"{table} is above 2 GB, which is no table of classes")
    try:
        text = table.read_text(encoding="utf-8-sig")
        rows = list(json.loads(text).items()) if table.suffix == ".json" else _csv_rows(text)
        classes = {str(name): int(label) for name, label in rows}
    except (ValueError, AttributeError, RecursionError) as error:
        form = '{"a.jpg": 3, ...}' if table.suffix == ".json" else "lines such as a.jpg,3"
        raise UsageError(f"{table} does not give files their class numbers; write {form}") from error
    if any(label < 0 for label in classes.values()):
        raise UsageError(f"{table} holds a class below 0; number the classes as the model's outputs are")
    return classes


def _csv_rows(text: str) -> list[tuple[str, str]]:
    rows = [(row[0].strip(), row[1].strip()) for row in csv.reader(text.splitlines()) if len(row) == 2]
    if rows and not rows[0][1].lstrip("-").isdigit():
        rows = rows[1:]  # a heading
    if not rows:
        raise ValueError("no row")
    return rows
