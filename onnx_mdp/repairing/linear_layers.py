"""The linear layers of a pruned model, and the tensors of the original that they are what is left of.

A layer is a Conv, Gemm or MatMul with a stored weight, together with the BatchNormalization or the Add of a
constant that alone reads it. It is judged at its ``target``: its own output, or, where that is added to
something that is known before, the sum. There it makes up for what went wrong on the other way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.shadow import Operation, add_initializer
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.surgery.changed_weights import ADDED_BIAS

__all__ = ["Layer", "LayerRepair", "Normalization", "linear_layers", "numbers", "shift", "store"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_LINEAR = ("Conv", "Gemm", "MatMul")
_UNBOUNDED = (-math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Normalization:
    """The stored parameters of a BatchNormalization: a channel times ``gain``, plus ``offset``."""

    scale: ir.Value
    bias: ir.Value
    mean: ir.Value
    variance: ir.Value
    epsilon: float

    @property
    def gain(self) -> Vector:
        """``γ / √(σ² + ε)``, ``float64[channels]``."""
        return numbers(self.scale) / np.sqrt(numbers(self.variance) + self.epsilon)

    @property
    def offset(self) -> Vector:
        """``β − μ · gain``, ``float64[channels]``."""
        return numbers(self.bias) - self.gain * numbers(self.mean)


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer of the pruned model, named by the first output of its node.

    ``data`` is its input; ``own`` its output, normalisation and bias included; ``target`` the tensor that it
    is judged by, in which ``other`` is added to ``own`` unless it is None. ``axis`` is that of the outputs in
    all three, and ``kept`` says which outputs of the original are left. ``bias`` is what is added in the node
    or after it, if anything; ``fixed`` why nothing else can be added to the outputs, or None. A normalisation
    of something else than one layer is a layer itself, whose weight is its scale. ``bounds`` are those that
    a Relu or Clip, which alone reads the target, holds it to.
    """

    name: str
    node: ir.Node
    data: str
    weight: ir.Value
    own: str
    target: str
    other: str | None
    axis: int
    kept: Mask
    bias: ir.Value | None
    normalization: Normalization | None
    fixed: str | None
    bounds: tuple[float, float] = _UNBOUNDED

    @property
    def offset(self) -> Vector:
        """What is added to each output, ``float64[outputs]``."""
        held = np.zeros(int(self.kept.sum()))
        if self.bias is not None:
            held = held + numbers(self.bias).reshape(-1)
        norm = self.normalization
        return held if norm is None else norm.gain * held + norm.offset


@dataclass(frozen=True, slots=True)
class LayerRepair:
    """What became of one layer: its relative squared error before and after, or why it was ``kept`` as it is.

    Errors are ``Σ‖y − y₀‖² / Σ‖y₀ − mean(y₀)‖²``, where ``y₀`` is the original's.
    """

    method: str
    layer: str
    before: float | None = None
    after: float | None = None
    kept: str | None = None


def numbers(value: ir.Value) -> Vector:
    """What an initializer holds, in float64."""
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def store(value: ir.Value, array: Array) -> None:
    """Put other numbers into an initializer, in its type."""
    held = value.const_value
    assert held is not None
    stored = np.ascontiguousarray(array, held.dtype.numpy()).reshape(held.shape.numpy())
    value.const_value = ir.Tensor(stored, name=held.name, doc_string=held.doc_string)


def shift(model: ir.Model, layer: Layer, by: Vector) -> None:
    """Add ``by``, ``float64[outputs]``, to outputs that are not fixed; a Conv or Gemm may get a bias."""
    value = layer.bias if layer.normalization is None else layer.normalization.bias
    if value is not None:
        store(value, numbers(value).reshape(-1) + by)
        return
    layer.node.resize_inputs(3)
    made = add_initializer(model, f"{layer.weight.name}{ADDED_BIAS}", by.astype(np.float32))
    layer.node.replace_input_with(2, made)


def linear_layers(
    structure: Structure, model: ir.Model, removed: Mask
) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The layers of what a plan left of a model, in order, and why others are none, by their outputs."""
    originals = {o.outputs[0]: o for o in structure.shadow.operations if o.outputs}
    latest = _latest_layers(model)
    layers: list[Layer] = []
    others: dict[str, str] = {}
    for node in model.graph:
        found: Layer | str = ""
        if node.op_type in _LINEAR and node.domain in ("", "ai.onnx"):
            found = _layer(structure, removed, originals, latest, node)
        elif node.op_type == "BatchNormalization" and node.outputs[0].name not in {la.own for la in layers}:
            found = _normalization_alone(structure, removed, node)
        if isinstance(found, Layer):
            layers.append(found)
        elif found:
            others[str(node.outputs[0].name)] = found
    return tuple(layers), others


def _normalization_alone(structure: Structure, removed: Mask, node: ir.Node) -> Layer | str:
    """A normalisation of something else than a layer alone."""
    data, name = node.inputs[0], str(node.outputs[0].name)
    assert data is not None
    kept = structure.graph.keep(name, 1, removed)
    normalization = _normalization(node, data, kept)
    if normalization is None:
        return "its parameters are shared or computed"
    return Layer(
        name=name,
        node=node,
        data=str(data.name),
        weight=normalization.scale,
        own=name,
        target=name,
        other=None,
        axis=1,
        kept=kept,
        bias=None,
        normalization=normalization,
        fixed=None,
    )


def _latest_layers(model: ir.Model) -> dict[ir.Value, int]:
    """For each tensor, the place of the last linear layer that it depends on, or -1."""
    latest: dict[ir.Value, int] = {}
    for place, node in enumerate(model.graph):
        before = max((latest.get(v, -1) for v in node.inputs if v is not None), default=-1)
        latest.update(dict.fromkeys(node.outputs, place if node.op_type in _LINEAR else before))
    return latest


def _layer(
    structure: Structure,
    removed: Mask,
    originals: Mapping[str, Operation],
    latest: Mapping[ir.Value, int],
    node: ir.Node,
) -> Layer | str:
    """A layer, or why it is none; nothing where two activations are multiplied."""
    stored = [slot for slot, value in enumerate(node.inputs[:2]) if _is_stored(value)]
    name = str(node.outputs[0].name)
    if len(stored) != 1:
        return "" if node.op_type == "MatMul" else "its weight is not stored"
    operation, weight, data = originals.get(name), node.inputs[stored[0]], node.inputs[1 - stored[0]]
    assert weight is not None
    assert data is not None
    refusal = _refusal(operation, node, stored[0], weight, data)
    if refusal is not None:
        return refusal
    left = node.op_type == "MatMul" and stored[0] == 0
    rank = len(structure.shadow.shapes[name])
    axis = 1 if node.op_type != "MatMul" else rank - 2 if left else rank - 1
    own, normalization = node.outputs[0], None
    kept = structure.graph.keep(name, axis, removed)
    if weight.shape is None or weight.shape[_made_axis(node, left)] != kept.sum():
        return "its outputs are not those that the plan keeps"
    bias = node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None
    if bias is not None and not (_is_stored(bias) and numbers(bias).size in (1, kept.sum())):
        return "its bias is computed or no vector"
    fixed = None if bias is None or _along(bias, -1, kept) else "its bias is shared"
    reader = _only_reader(own)
    if reader is not None and (norm := _normalization(reader, own, kept)) is not None:
        own, normalization, fixed = reader.outputs[0], norm, None
    elif reader is not None and bias is None and (added := _added(reader, own, axis - rank, kept)):
        own, bias = reader.outputs[0], added
    elif bias is None and node.op_type == "MatMul":
        fixed = "it has no bias"
    target, other = _sum(structure, own, latest, latest[node.outputs[0]])
    return Layer(
        name=name,
        node=node,
        data=str(data.name),
        weight=weight,
        own=str(own.name),
        target=str(target.name),
        other=None if other is None else str(other.name),
        axis=axis,
        kept=kept,
        bias=bias,
        normalization=normalization,
        fixed=fixed,
        bounds=_bounds(target),
    )


def _refusal(
    operation: Operation | None, node: ir.Node, slot: int, weight: ir.Value, data: ir.Value
) -> str | None:
    if operation is None or operation.op_type != node.op_type:
        return "it stands for several layers of the analysis, fused again"
    if len(list(weight.uses())) > 1 or weight.is_graph_output():
        return "its weight is shared"
    if weight.dtype != ir.DataType.FLOAT:
        return "its weight is not float32"
    if node.op_type != "Conv" and (weight.shape is None or len(weight.shape) != 2):
        return "its weight is no matrix"
    if node.op_type == "Gemm":
        attributes = operation.attributes
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        if slot == 0 or attributes.get("transA", 0) or not plain:
            return "it scales or turns its inputs"
    return None


def _sum(
    structure: Structure, own: ir.Value, latest: Mapping[ir.Value, int], place: int
) -> tuple[ir.Value, ir.Value | None]:
    """The sum that a layer's output is one part of, and the other part: known before the layer is."""
    reader = _only_reader(own)
    if reader is None or reader.op_type != "Add" or own.is_graph_output():
        return own, None
    other = next((v for v in reader.inputs if v is not own), None)
    shapes, total = structure.shadow.shapes, reader.outputs[0]
    alike = {shapes.get(str(own.name)), shapes.get(str(total.name))}
    if other is None or other.const_value is not None or len(alike) > 1 or None in alike:
        return own, None
    if latest.get(other, -1) >= place or shapes.get(str(other.name)) not in alike:
        return own, None
    return total, other


def _bounds(value: ir.Value) -> tuple[float, float]:
    """What a Relu or a Clip holds a value to, if nothing else reads it."""
    reader = _only_reader(value)
    if reader is None or reader.op_type not in ("Clip", "Relu"):
        return _UNBOUNDED
    if reader.op_type == "Relu":
        return 0.0, math.inf
    low, high = (_limit(reader, slot, name) for slot, name in ((1, "min"), (2, "max")))
    return (-math.inf if low is None else low), (math.inf if high is None else high)


def _limit(node: ir.Node, slot: int, name: str) -> float | None:
    """A limit of a Clip: an attribute before opset 11, an input since."""
    value = node.inputs[slot] if slot < len(node.inputs) else None
    if value is not None and _is_stored(value):
        return float(numbers(value).reshape(-1)[0])
    return node.attributes[name].as_float() if name in node.attributes else None


def _normalization(node: ir.Node, value: ir.Value, kept: Mask) -> Normalization | None:
    """What normalises a value, if all of its parameters are stored and nobody else's."""
    if node.op_type != "BatchNormalization" or node.inputs[0] is not value or len(node.outputs) > 1:
        return None
    parameters = [v for v in node.inputs[1:] if v is not None and _along(v, -1, kept)]
    if len(parameters) < 4:
        return None
    scale, bias, mean, variance = parameters
    epsilon = node.attributes.get("epsilon")
    return Normalization(scale, bias, mean, variance, 1e-5 if epsilon is None else epsilon.as_float())


def _added(node: ir.Node, value: ir.Value, axis: int, kept: Mask) -> ir.Value | None:
    """The constant that is added to a value, if it holds one number for each output."""
    if node.op_type != "Add":
        return None
    other = next((v for v in node.inputs if v is not value), None)
    return other if other is not None and _along(other, axis, kept) else None


def _along(value: ir.Value, axis: int, kept: Mask) -> bool:
    """Whether a value is stored, nobody else's, and holds a number for each output along an axis."""
    stored = value.const_value if _is_stored(value) else None
    if stored is None or len(list(value.uses())) > 1 or value.is_graph_output():
        return False
    sizes = stored.shape.numpy()
    return len(sizes) >= -axis and sizes[axis] == math.prod(sizes) == kept.sum()


def _made_axis(node: ir.Node, left: bool) -> int:
    """The axis of the weight that counts the outputs."""
    transposed = node.attributes.get("transB")
    return 0 if node.op_type == "Conv" or left or (transposed is not None and transposed.as_int()) else 1


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
