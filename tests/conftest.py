"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Outcome, call


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


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Small networks lose time on a second thread, most where others compute as well; skips without torch."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Run a command in an empty folder with a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONNX_MDP_STORE", str(tmp_path / "lut.sqlite"))
    monkeypatch.setenv("COLUMNS", "110")
    return lambda *arguments: call(capfd, monkeypatch, *arguments)
