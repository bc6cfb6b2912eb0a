"""The registry of kernels: what an ONNX operator computes, in torch, in the form of each opset.

A kernel takes its node, as a ``Call``, and the operands, None where an optional one is left out; it returns
a tensor, or one for each output. Sizes and axes are integers on the CPU, whatever the device of the module:
an operand that a kernel reads as numbers is declared as ``host`` and is not moved to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from onnx_mdp.errors import UnsupportedModelError

__all__ = ["KERNELS", "Call", "Compute", "Kernel", "axes_of", "floats", "integers", "kernel", "of_sizes"]

Compute = Callable[..., Any]
_OfSizes = TypeVar("_OfSizes", bound=Compute)


@dataclass(frozen=True, slots=True)
class Call:
    """One node of a graph, as far as its operands do not say it.

    ``opset`` is the version of the operator's domain, ``outputs`` the number of results that are asked for,
    ``training`` whether the module is in training mode.
    """

    operator: str
    name: str
    opset: int
    attributes: Mapping[str, Any]
    outputs: int = 1
    training: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default where the node has none."""
        return self.attributes.get(name, default)

    def unsupported(self, what: str) -> UnsupportedModelError:
        """The refusal of a form that has no kernel."""
        return UnsupportedModelError(
            f"{self.operator} {self.name!r} has {what}, which has no form in torch here: the model can be "
            "pruned but not fine-tuned"
        )


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function and the slots of the operands that it reads as numbers."""

    compute: Compute
    host: frozenset[int]


KERNELS: dict[str, Kernel] = {}


def kernel(*op_types: str, host: Sequence[int] = ()) -> Callable[[Compute], Compute]:
    """Register a function for operators of the ONNX domain, or ``domain::Operator`` of another one."""

    def register(function: Compute) -> Compute:
        for op_type in op_types:
            if op_type in KERNELS:
                raise ValueError(f"two kernels for {op_type}")
            KERNELS[op_type] = Kernel(function, frozenset(host))
        return function

    return register


def of_sizes(function: _OfSizes) -> _OfSizes:
    """A function of numbers alone: `torch.compile` takes what it gives for a constant."""
    return cast(_OfSizes, torch.compiler.assume_constant_result(function))  # type: ignore[no-untyped-call]


def integers(operand: Tensor) -> list[int]:
    """The numbers of an operand such as a shape."""
    return [int(number) for number in operand.reshape(-1).tolist()]


def floats(operand: Tensor) -> list[float]:
    """The numbers of an operand such as the scales of a Resize."""
    return [float(number) for number in operand.reshape(-1).tolist()]


def axes_of(call: Call, operand: Tensor | None) -> list[int] | None:
    """Axes, which older forms have as an attribute and newer ones as an operand."""
    if operand is not None:
        return integers(operand)
    given = call.get("axes")
    return None if given is None else list(given)
