"""What each operator computes, in torch: one function of a few lines per operator or family."""

from __future__ import annotations

from onnx_mdp.training.kernels import (
    attention,
    convolutions,
    elementwise,
    movement,
    normalisation,
    pooling,
    recurrence,
    reduction,
    regions,
    resampling,
    selection,
)
from onnx_mdp.training.kernels.registry import KERNELS, Call, Kernel, kernel

__all__ = [
    "KERNELS",
    "Call",
    "Kernel",
    "attention",
    "convolutions",
    "elementwise",
    "kernel",
    "movement",
    "normalisation",
    "pooling",
    "recurrence",
    "reduction",
    "regions",
    "resampling",
    "selection",
]
