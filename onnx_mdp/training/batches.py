"""What one step is told: a batch of inputs with their targets, and which part of it a process takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Batch", "Share", "placed"]

Array = npt.NDArray[Any]
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_Rows = TypeVar("_Rows", bound=npt.NDArray[Any])


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays ``[n, ...]`` by input, and targets ``[n, ...]`` if there are any."""

    inputs: dict[str, Array]
    targets: Array | None

    @property
    def rows(self) -> int:
        """How many rows each input has."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of every batch this process takes: the ``rank``-th of ``size`` equal ones."""

    rank: int = 0
    size: int = 1

    def part(self, rows: _Rows) -> _Rows:
        """The rows of this process; a remainder is left out."""
        each = len(rows) // self.size
        return cast(_Rows, rows[self.rank * each : (self.rank + 1) * each])


def placed(array: Array, device: torch.device, *, channels_last: bool = False) -> Tensor:
    """An array on a device, an image or a volume with its channels last in memory if asked for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
    order = _CHANNELS_LAST.get(tensor.dim()) if channels_last else None
    return tensor if order is None else tensor.to(memory_format=order)
