"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export a model of ``models.catalog`` once a session; skips without torch."""
    pytest.importorskip("torch")
    from models.export import export

    folder = tmp_path_factory.mktemp("exports")

    def exported_file(name: str, exporter: str = "torchscript", *, dynamic_batch: bool = False) -> Path:
        path: Path = folder / f"{name}_{exporter}_{dynamic_batch}.onnx"
        if not path.is_file():
            export(name, path, exporter, dynamic_batch)
        return path

    return exported_file
