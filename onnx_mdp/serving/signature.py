"""The inputs and outputs of a model as others are told of them: names, types, and sizes that may be open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnx_mdp.analysis.binding import graph_inputs
from onnx_mdp.errors import UnsupportedModelError
from onnx_mdp.model_io import clone

__all__ = ["Port", "Signature", "provenance", "signature"]

_OURS = "onnx_mdp."


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output; an open size is the name that the file gives it, which may be empty."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """The sizes, -1 where one is open."""
        return tuple(size if isinstance(size, int) else -1 for size in self.shape)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model is fed and what it returns, in the order of the file."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def signature(model: ir.Model) -> Signature:
    """The signature of a model; sizes that the file leaves out are inferred.

    Raises:
        UnsupportedModelError: an input or output is no tensor, or has no known rank.
    """
    values = (*graph_inputs(model), *model.graph.outputs)
    if any(value.shape is None or value.type is None for value in values):
        model = clone(model)
        ShapeInferencePass()(model)
    inputs = tuple(_port(value, "input") for value in graph_inputs(model))
    return Signature(inputs, tuple(_port(value, "output") for value in model.graph.outputs))


def provenance(model: ir.Model) -> Mapping[str, str]:
    """What `prune` and what followed it noted in the file: the plan's hash, its source, changed weights."""
    return {key: text for key, text in sorted(model.metadata_props.items()) if key.startswith(_OURS)}


def _port(value: ir.Value, kind: str) -> Port:
    if not isinstance(value.type, ir.TensorType) or value.dtype is None:
        raise UnsupportedModelError(f"{kind} {value.name!r} is no tensor, so no server can be told of it")
    if value.shape is None:
        raise UnsupportedModelError(
            f"{kind} {value.name!r} has no known rank; export the model again with the shapes of its {kind}s"
        )
    return Port(str(value.name), value.dtype, tuple(map(_size, value.shape)))


def _size(size: int | ir.SymbolicDim) -> int | str:
    if isinstance(size, int):
        return size if size > 0 else ""
    return str(size.value or "")
