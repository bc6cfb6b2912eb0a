"""A program at the sizes of one batch: shape arithmetic is done once, the rest can be traced.

`torch.compile` stops where a kernel reads the numbers of a tensor. Of a graph whose inputs have known sizes
these follow from the file: from stored numbers and from Shape nodes. Here they are computed ahead of time,
and handed to the kernels as `Numbers`, so that a trace goes through the whole graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onnx_mdp.training.program import Program, Step, with_last

__all__ = ["FixedSizes", "Numbers", "Sizes", "fix_sizes", "sizes_of"]

Sizes = tuple[tuple[str, tuple[int, ...]], ...]
_OF_SIZES = frozenset({"Shape", "Size"})
_MOST = 1024  # numbers of an operand; kernels read axes, sizes, bounds


@dataclass(frozen=True, slots=True)
class Numbers:
    """An operand's numbers, read as those of a tensor on the CPU."""

    numbers: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, device: torch.device) -> Tensor:
        return torch.tensor(self.numbers, dtype=self.dtype, device=device).reshape(self.shape)

    def reshape(self, size: int) -> Numbers:
        """All in one row."""
        assert size == -1
        return replace(self, shape=(len(self.numbers),))

    def tolist(self) -> list[Any]:
        return list(self.numbers)

    def item(self) -> Any:
        return self.numbers[0]

    def numel(self) -> int:
        return len(self.numbers)

    def dim(self) -> int:
        return len(self.shape)

    def __int__(self) -> int:
        return int(self.numbers[0])

    def __float__(self) -> float:
        return float(self.numbers[0])


@dataclass(frozen=True, slots=True)
class FixedSizes:
    """What is left to run at these sizes, and the values that are known."""

    steps: tuple[Step, ...]
    values: Mapping[str, Any]


def sizes_of(feeds: Mapping[str, Tensor]) -> Sizes:
    """The shapes of inputs."""
    return tuple(sorted((name, tuple(tensor.shape)) for name, tensor in feeds.items()))


def fix_sizes(
    program: Program,
    values: dict[str, Any],
    known: Mapping[str, Tensor],
    run: Callable[[Step, dict[str, Any]], None],
) -> FixedSizes:
    """Run a program once, and take out of it what its sizes decide.

    ``values`` are stored tensors and inputs, ``known`` those of them that are numbers of the file; ``run``
    runs a step.
    """
    held: dict[str, Any] = dict(known)
    left: list[Step] = []
    for step in program.steps:
        run(replace(step, last=()), values)
        results = {name: values[name] for name in step.outputs if name in values}
        if _decided(step, held) and all(_on_the_cpu(x) for x in results.values()):
            held.update(results)
        else:
            left.append(_with_numbers(step, held))
        for name in step.last:
            if name not in held:
                values.pop(name, None)
    made = {name for step in left for name in step.outputs} | set(program.inputs)
    return FixedSizes(tuple(with_last(left, made)), held)


def _on_the_cpu(result: Any) -> bool:
    return isinstance(result, Tensor) and result.device.type == "cpu"


def _decided(step: Step, held: Mapping[str, Any]) -> bool:
    if step.kernel is None:
        return False
    if step.calls[0].operator in _OF_SIZES:
        return True
    read = [name for name in step.inputs if name]
    return bool(read) and all(name in held for name in read)


def _numbers(tensor: Tensor) -> Numbers:
    return Numbers(tuple(tensor.reshape(-1).tolist()), tuple(tensor.shape), tensor.dtype)


def _with_numbers(step: Step, held: dict[str, Any]) -> Step:
    """The step, with the operands that its kernel reads as numbers under names of their own."""
    inputs = list(step.inputs)
    for slot in step.kernel.host if step.kernel else ():
        name = inputs[slot] if slot < len(inputs) else ""
        if isinstance(held.get(name), Tensor) and held[name].numel() <= _MOST:
            inputs[slot] = f"{name}#numbers"
            held[inputs[slot]] = _numbers(held[name])
    return replace(step, inputs=tuple(inputs))
