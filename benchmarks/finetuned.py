"""Fine-tuning as benchmarks need it: bytes in, bytes out, one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from benchmarks.harness import note
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.torch_backend import require_torch

if TYPE_CHECKING:
    from onnx_mdp.training.finetuning import FinetuneRequest

__all__ = ["finetuned"]


_STEPS_AT_RISK = 100


def finetuned(
    model: bytes,
    teacher: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    request: FinetuneRequest,
    kept: Path | None = None,
) -> tuple[bytes, float]:
    """The model, whose inputs are float32, after training by its teacher, and the seconds that it took.

    A run that was interrupted goes on from the folder ``kept``.
    """
    require_torch("fine-tuning")
    from onnx_mdp.training.distributed import process_group
    from onnx_mdp.training.finetuning import finetune

    student, expert = (load_model(onnx.load_from_string(data)) for data in (model, teacher))
    dtypes = {name: np.dtype(np.float32) for name in shapes}
    if kept is not None:
        begun = any(kept.glob("*"))
        request = replace(request, checkpoint=kept, every=_STEPS_AT_RISK, resume=begun)
    with process_group("auto") as group:
        found = finetune(student, expert, shapes, dtypes, request, group, _silent, note)
    return model_bytes(found.model), found.run.seconds


def _silent(stage: str, done: int, total: int) -> None:
    """Show no progress but the lines of the run."""
