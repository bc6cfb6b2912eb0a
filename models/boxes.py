"""What the detectors here share: the maps of a predictor as one row for each box."""

from __future__ import annotations

from torch import Tensor

__all__ = ["box_rows"]


def box_rows(x: Tensor, columns: int) -> Tensor:
    """Map ``float[N, A·columns, H, W]`` to ``float[N, H·W·A, columns]``."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, columns)
