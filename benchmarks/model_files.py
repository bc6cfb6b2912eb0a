"""The models that are measured: real weights from the development zoo, exports of ``models``, or any file.

The zoo lies in ``ONNX_MDP_ZOO``, else in ``../shared/zoo``; exports are made once, into ``out/models``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness import ROOT, note
from onnx_mdp.errors import UsageError

__all__ = ["ZOO_FILES", "model_path", "zoo_file", "zoo_files"]

ZOO_FILES: Mapping[str, str] = {
    "efficientnet_lite0": "imagenet/tf_efficientnet_lite0_dynamo.onnx",
    "mobilenet_v2": "imagenet/mobilenet_v2_tv.onnx",
    "resnet20": "cifar10/resnet20.onnx",
    "resnet56": "cifar10/resnet56.onnx",
}
_EXPORTERS = ("torchscript", "dynamo")


def zoo_file(name: str) -> Path:
    """A file of the development zoo: in ``ONNX_MDP_ZOO``, else in ``../shared/zoo``.

    Raises:
        UsageError: it is not there.
    """
    path = _zoo() / name
    if not path.is_file():
        raise UsageError(f"no zoo file {path}; set ONNX_MDP_ZOO to the folder of the development zoo")
    return path.resolve()


def zoo_files() -> tuple[str, ...]:
    """The names of all ONNX files of the development zoo.

    Raises:
        UsageError: there is none.
    """
    names = tuple(sorted(path.relative_to(_zoo()).as_posix() for path in _zoo().rglob("*.onnx")))
    if not names:
        raise UsageError(f"no ONNX file in {_zoo()}; set ONNX_MDP_ZOO to the folder of the development zoo")
    return names


def _zoo() -> Path:
    return Path(os.environ.get("ONNX_MDP_ZOO") or ROOT.parent / "shared" / "zoo")


def model_path(name: str) -> Path:
    """The ONNX file of a model: from the zoo, exported once to ``out/models``, or the file of that name.

    Raises:
        UsageError: there is no such model, or it cannot be exported.
    """
    if name in ZOO_FILES:
        return zoo_file(ZOO_FILES[name])
    if name.endswith(".onnx") and Path(name).is_file():
        return Path(name).resolve()
    architecture, _, exporter = name.rpartition("_")
    if exporter not in _EXPORTERS:
        known = f"{', '.join(ZOO_FILES)}, resnet50_torchscript, resnet50_dynamo and the like, and files"
        raise UsageError(f"no model is called {name!r}; there are {known}")
    path = ROOT / "out" / "models" / f"{name}.onnx"
    if not path.is_file():
        _export(architecture, exporter, path)
    return path


def _export(architecture: str, exporter: str, path: Path) -> None:
    """Export under another name first, so that an interrupted export leaves no half file."""
    note(f"exporting {path.stem} …")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.onnx")
    command = [sys.executable, "-m", "models.export", architecture, "--exporter", exporter, "-o", str(draft)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        draft.unlink(missing_ok=True)
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"{path.stem} cannot be exported ({reason}); exports need onnx-mdp[torch]")
    draft.replace(path)
