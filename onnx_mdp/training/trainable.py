"""Which stored tensors of a model are weights, which are statistics, and which are constants.

A float initializer, or a float in a Constant node, is

- a **statistic**, if it is the running mean or variance of one BatchNormalization and nothing else;
- a **weight**, if an output depends on it smoothly: through operands that are read as elements (not as
  sizes, axes, bounds or scales of a Resize) and operators that have a gradient; and if it is an operand of a
  layer (the weight or bias of a convolution, a product, a normalisation, the slopes of a PRelu), or has more
  than one element;
- a **constant** otherwise: epsilons, bounds, 1/√d, sizes. So is what was designed and not trained: a table of
  half-integers that are not all equal (anchors, grids, masks of 0 and −100, the 0 … 15 of a box decoder), and
  a Constant node that holds one number everywhere (the ones that an exporter scales a group norm with).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.numerics.independence import subgraphs
from onnx_mdp.training.kernels import KERNELS

__all__ = ["StoredTensors", "constant_of", "operator_key", "sort_stored"]

_ALL = frozenset(range(64))
_LAYER_SLOTS: Mapping[str, frozenset[int]] = {
    "BatchNormalization": frozenset({1, 2}),
    "Conv": frozenset({1, 2}),
    "ConvTranspose": frozenset({1, 2}),
    "Einsum": _ALL,
    "GRU": frozenset({1, 2, 3}),
    "Gemm": frozenset({0, 1, 2}),
    "GroupNormalization": frozenset({1, 2}),
    "InstanceNormalization": frozenset({1, 2}),
    "LSTM": frozenset({1, 2, 3, 7}),
    "LayerNormalization": frozenset({1, 2}),
    "MatMul": frozenset({0, 1}),
    "PRelu": frozenset({1}),
    "RMSNormalization": frozenset({1}),
    "RNN": frozenset({1, 2, 3}),
    "com.microsoft::FusedConv": frozenset({1, 2}),
    "com.microsoft::FusedGemm": frozenset({0, 1, 2}),
    "com.microsoft::FusedMatMul": frozenset({0, 1}),
}
_STATISTIC_SLOTS = (3, 4)
# Operators whose outputs do not follow their inputs smoothly, and operands that name places.
_STEPS = frozenset(
    (
        "And ArgMax ArgMin BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Equal Floor Greater "
        "GreaterOrEqual Hardmax IsInf IsNaN Less LessOrEqual NonMaxSuppression NonZero Not Or Round Shape "
        "Sign Size Xor"
    ).split()
)
_PLACE_SLOTS: Mapping[str, frozenset[int]] = {
    "Compress": frozenset({1}),
    "EyeLike": frozenset({0}),
    "Gather": frozenset({1}),
    "GatherElements": frozenset({1}),
    "GatherND": frozenset({1}),
    "MaxRoiPool": frozenset({1}),
    "OneHot": frozenset({0, 1, 2}),
    "ReverseSequence": frozenset({1}),
    "RoiAlign": frozenset({1, 2}),
    "Scatter": frozenset({1}),
    "ScatterElements": frozenset({1}),
    "ScatterND": frozenset({1}),
    "TensorScatter": frozenset({2}),
    "Where": frozenset({0}),
}
# What brings a weight to its layer in another shape.
_PASSING = frozenset("Cast CastLike Flatten Identity Reshape Squeeze Transpose Unsqueeze".split())


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The stored tensors of the main graph, each name in one of three kinds; ``constants`` of any type."""

    weights: dict[str, npt.NDArray[Any]]
    statistics: dict[str, npt.NDArray[Any]]
    constants: dict[str, npt.NDArray[Any]]


def operator_key(node: ir.Node) -> str:
    """The name of a node's operator in the registry of kernels."""
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def constant_of(node: ir.Node) -> npt.NDArray[Any] | None:
    """What a Constant node holds; None for text and sparse tensors."""
    for name, attribute in node.attributes.items():
        if name == "value":
            tensor = attribute.as_tensor()
            return None if tensor.dtype == ir.DataType.STRING else tensor.numpy()
        if name in ("value_float", "value_floats"):
            return np.asarray(attribute.value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(attribute.value, np.int64)
    return None


def sort_stored(model: ir.Model) -> StoredTensors:
    """Tell the stored tensors of a float32 model apart."""
    found = StoredTensors({}, {}, {})
    smooth = _smooth(model)
    for value, array in _stored(model):
        name = str(value.name)
        if _is_statistic(value):
            found.statistics[name] = array
        elif _is_weight(value, array, smooth):
            found.weights[name] = array
        else:
            found.constants[name] = array
    return found


def _stored(model: ir.Model) -> Iterator[tuple[ir.Value, npt.NDArray[Any]]]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype != ir.DataType.STRING:
            yield value, tensor.numpy()
    for node in model.graph:
        array = constant_of(node) if node.op_type == "Constant" else None
        if array is not None:
            yield node.outputs[0], array


def _smooth(model: ir.Model) -> set[ir.Value]:
    """Values that some output depends on with a gradient, as far as operators tell."""
    found = set(model.graph.outputs)
    for node in reversed(model.graph):
        if not found.isdisjoint(node.outputs):
            found.update(_smooth_inputs(node))
    return found


def _smooth_inputs(node: ir.Node) -> Iterator[ir.Value]:
    for graph in subgraphs(node):
        yield from (value for inner in graph for value in _smooth_inputs(inner))
        yield from graph.outputs
    if node.op_type in _STEPS or (node.op_type == "Cast" and not _casts_to_float(node)):
        return
    kernel = KERNELS.get(operator_key(node))
    read = (kernel.host if kernel else frozenset()) | _PLACE_SLOTS.get(node.op_type, frozenset())
    yield from (v for slot, v in enumerate(node.inputs) if v is not None and slot not in read)


def _casts_to_float(node: ir.Node) -> bool:
    return ir.DataType(node.attributes["to"].as_int()).is_floating_point()


def _is_statistic(value: ir.Value) -> bool:
    uses = [
        (use.node, use.idx)
        for held in _aliases(value)
        for use in held.uses()
        if use.node.op_type != "Identity" or use.node.domain not in ("", "ai.onnx")
    ]
    return len(uses) == 1 and uses[0][0].op_type == "BatchNormalization" and uses[0][1] in _STATISTIC_SLOTS


def _aliases(value: ir.Value) -> Iterator[ir.Value]:
    """A value and what Identity nodes make of it."""
    yield value
    for use in value.uses():
        if use.node.op_type == "Identity" and use.node.graph is value.graph:
            yield from _aliases(use.node.outputs[0])


def _is_weight(value: ir.Value, array: npt.NDArray[Any], smooth: set[ir.Value]) -> bool:
    if array.dtype.kind != "f" or value not in smooth or not array.size or value.is_graph_output():
        return False
    if value.producer() is not None and bool((array == array.reshape(-1)[0]).all()):
        return False
    if array.size > 1:
        return not _designed(array)
    return any(use.idx in _LAYER_SLOTS.get(operator_key(use.node), ()) for use in _uses(value))


def _uses(value: ir.Value) -> Iterator[Any]:
    """Where a value is read, in whatever shape."""
    for use in value.uses():
        yield use
        if use.node.op_type in _PASSING and use.idx == 0:
            yield from _uses(use.node.outputs[0])


def _designed(array: npt.NDArray[Any]) -> bool:
    """Whether a table holds half-integers only, and not one number everywhere."""
    doubled = 2 * array.reshape(-1)
    return bool((doubled == np.rint(doubled)).all() and (doubled != doubled[0]).any())
