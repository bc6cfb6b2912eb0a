"""Models and the numbers that belong to them, kept in a folder, so that an interrupted benchmark goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from onnx_mdp.files import write_text

__all__ = ["Kept", "Made"]

Made = tuple[bytes, Mapping[str, float]]


class Kept:
    """A folder of ``<name>.onnx`` and ``<name>.json``; the second is written last, so a pair is whole."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def __contains__(self, name: str) -> bool:
        return (self._folder / f"{name}.json").is_file()

    def unfinished(self, name: str) -> Path:
        """A folder for what is not whole yet."""
        return self._folder / f"{name}.unfinished"

    def made(self, name: str, make: Callable[[], Made]) -> Made:
        """What is kept under the name; else what is made now, and then kept."""
        model, numbers = self._folder / f"{name}.onnx", self._folder / f"{name}.json"
        if name in self:
            return model.read_bytes(), json.loads(numbers.read_text())
        found = make()
        model.write_bytes(found[0])
        write_text(json.dumps(found[1]) + "\n", numbers, overwrite=True)
        shutil.rmtree(self.unfinished(name), ignore_errors=True)
        return found
