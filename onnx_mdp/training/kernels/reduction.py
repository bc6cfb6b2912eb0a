"""Kernels of the reductions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onnx_mdp.training.kernels.registry import Call, axes_of, kernel

__all__: list[str] = []


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.mean(axes, keep) if x.is_floating_point() else x.double().mean(axes, keep).to(x.dtype)


def _norm(order: int) -> Callable[[Tensor, list[int], bool], Tensor]:
    def reduce(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        wide = x if x.is_floating_point() else x.double()
        y: Tensor = torch.linalg.vector_norm(wide, order, axes, keep)
        return y.to(x.dtype)

    return reduce


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keep)
    return x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": _norm(1),
    "ReduceL2": _norm(2),  # whose gradient is 0 at 0, where that of a square root is infinite
    "ReduceLogSum": lambda x, axes, keep: _sum(x, axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMean": _mean,
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, axes, keep: _sum(x.square(), axes, keep),
}


@kernel(*_REDUCTIONS, host=(1,))
def _reduce(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    along = axes_of(call, axes)
    if not along:
        if call.get("noop_with_empty_axes", 0):
            return x
        along = list(range(x.dim()))
    return _REDUCTIONS[call.operator](x, along, bool(call.get("keepdims", 1)))
