"""A training run on the disk: one safetensors file, replaced in one step, that holds all a run needs to go
on.

Tensors are named ``model:…`` (weights and statistics by initializer), ``average:…`` (their moving average),
``best:…`` (the best so far) and ``optimizer.KEY:…``; the counters and scores are JSON in the file's metadata.
What is random in a step comes from the seed and the step's number, so no generator needs to be saved. Nothing
is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from onnx_mdp.errors import OutputError, UsageError
from onnx_mdp.files import write_files

__all__ = [
    "Checkpoint",
    "as_run",
    "check_folder",
    "load_checkpoint",
    "prepare_folder",
    "save_checkpoint",
]

Tensors = dict[str, Tensor]
_FILE = "checkpoint.safetensors"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by ``group:name``, counters and scores, and what identifies the run."""

    tensors: Tensors
    state: Mapping[str, Any]
    run: Mapping[str, Any]

    def group(self, name: str) -> Tensors:
        """The tensors of one group, by their names in it."""
        prefix = f"{name}:"
        return {key[len(prefix) :]: t for key, t in self.tensors.items() if key.startswith(prefix)}


def prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the folder, and refuse one that holds another run or none to resume.

    Raises:
        OutputError, UsageError: with the remedy.
    """
    check_folder(folder, resume=resume, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {folder}: {error.strerror}; choose another folder") from error


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds another run, or none to resume.

    Raises:
        OutputError, UsageError: with the remedy.
    """
    there = (folder / _FILE).is_file()
    if resume and not there:
        raise UsageError(f"--resume: {folder} holds no checkpoint; leave --resume out to begin")
    if there and not (resume or overwrite):
        raise OutputError(
            f"{folder} holds a checkpoint; pass --resume to go on, or --overwrite to begin anew"
        )


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Replace the checkpoint of the folder in one step."""
    header = {"version": _VERSION, "state": checkpoint.state, "run": checkpoint.run}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    data = safetensors.torch.save(tensors, {"onnx_mdp": json.dumps(header, sort_keys=True)})
    write_files({folder / _FILE: data})


def load_checkpoint(folder: Path, run: Mapping[str, Any]) -> Checkpoint:
    """Read the checkpoint of a folder.

    Raises:
        UsageError: it cannot be read, or is of another run than ``run``.
    """
    path = folder / _FILE
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["onnx_mdp"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        state, held, version = header["state"], header["run"], header["version"]
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} is no readable checkpoint; begin anew with --overwrite") from error
    if version != _VERSION:
        raise UsageError(f"{path} was written by another version of onnx-mdp; begin anew with --overwrite")
    for key in sorted({*run, *held}):
        if run.get(key) != held.get(key):
            raise UsageError(
                f"the checkpoint in {folder} is of another run: {key} was {held.get(key)}, is "
                f"{run.get(key)}; repeat that command, or begin anew with --overwrite"
            )
    return Checkpoint(tensors, state, held)


def as_run(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description as it is read back from JSON."""
    held: dict[str, Any] = json.loads(json.dumps(description))
    return held
