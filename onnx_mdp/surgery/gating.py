"""The model with a gate for each unit: the law's masks as inputs, so that they may be any number.

    f(g)    g = 1: the model; g = 0 for a removed unit: the masked original; ∂f/∂g: what a unit does

A gate stands where the units of a tensor end: in front of a linear layer ``W (g ⊙ x)``, whose gradient is
``Σ w · ∂f/∂w`` over the weights that read the unit, be they folded, shared or stored in another form. Of two
units that meet in a product one has the gate, for both leave together; where a unit passes (a depthwise
convolution) there is none before the end. Statistics are weighted means,

    μ = Σ g x / Σ g      σ² = Σ g (x − μ)² / Σ g

a maximum is of ``x + log g``, a product of ``1 + g (x − 1)``. The branch of each removable block has a gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.shadow import Operation, add_initializer, drop_unread, unique_name
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.model_io import clone
from onnx_mdp.numerics.integer_form import without_rounding
from onnx_mdp.numerics.precision import in_float32, is_float
from onnx_mdp.rules import Labels

__all__ = ["GatedModel", "gated_model"]

_NORMS = ("LayerNormalization", "RMSNormalization")
_GROUP_NORMS = ("GroupNormalization", "InstanceNormalization")
_SINCE_INPUT_AXES = 18


@dataclass(frozen=True, slots=True)
class GatedModel:
    """A model with gates as further inputs; all ones give the original.

    ``units`` maps an input, ``float32`` of the shape of the labels, to the class (``int32``) that each of its
    entries gates, 0 for none; ``blocks`` maps the name of a block to a scalar input.
    """

    model: ir.Model
    units: Mapping[str, Labels]
    blocks: Mapping[str, str]

    def feeds(
        self, keep: npt.NDArray[Any], removed_blocks: Sequence[str] = ()
    ) -> dict[str, npt.NDArray[np.float32]]:
        """The gates for a value of each class, ``[classes]``, and blocks that are silent."""
        values = np.where(np.arange(len(keep)) == 0, 1, keep).astype(np.float32)
        gates = {name: values[labels] for name, labels in self.units.items()}
        silent = {name: np.asarray(block not in removed_blocks) for block, name in self.blocks.items()}
        return gates | {name: value.astype(np.float32) for name, value in silent.items()}


def gated_model(structure: Structure) -> GatedModel:
    """The normalised model in real numbers (float32, nothing rounded to integers) with its gates."""
    shadow = structure.shadow
    ranks = {name: len(shape) for name, shape in shadow.shapes.items()}
    model = clone(without_rounding(in_float32(shadow.model), ranks))
    _unpack(model, structure)
    writer = _Writer(model)
    makers = {str(value.name): node for node in model.graph for value in node.outputs}
    units: dict[str, Labels] = {}
    for operation, slot, labels in _ends(structure):
        gate = writer.gate(labels.shape)
        units[str(gate.name)] = labels
        shape = shadow.shapes[operation.inputs[slot]]
        writer.install(makers[operation.outputs[0]], operation, slot, gate, shape)
    blocks: dict[str, str] = {}
    for block in structure.blocks:
        gate = writer.gate(())
        blocks[block.name] = str(gate.name)
        joint = shadow.operations[block.joint]
        slot = list(joint.inputs).index(block.branch)
        writer.multiply(makers[joint.outputs[0]], slot, gate)
    return GatedModel(model, units, blocks)


def _unpack(model: ir.Model, structure: Structure) -> None:
    """Store weights as what their readers see, where the file stores integers or another type."""
    constants = structure.shadow.constants
    made = [value for node in model.graph for value in node.outputs if value.name in structure.shadow.chains]
    for value in made:
        array = constants[str(value.name)]
        kind = np.float32 if is_float(array.dtype) else array.dtype
        value.replace_all_uses_with(add_initializer(model, f"{value.name}__unpacked", array.astype(kind)))
    drop_unread(model)


def _ends(structure: Structure) -> Iterator[tuple[Operation, int, Labels]]:
    """Where units end or statistics are taken over them: the operation, its input, and the classes there."""
    gated: set[int] = set()
    frozen = list(structure.graph.reasons)
    ended = {site.operation for site in structure.graph.sites if site.role == "in"}
    for index, slot in structure.graph.reductions:
        operation = structure.shadow.operations[index]
        depthwise = operation.op_type in ("Conv", "ConvTranspose") and index not in ended
        labels = structure.graph.read(operation, slot)
        if labels is None or depthwise or index in gated:
            continue
        labels = np.where(np.isin(labels, frozen), 0, labels)
        if labels.any():
            gated.add(index)
            yield operation, slot, labels


def _data(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


class _Writer:
    """Adds gates and nodes to a model; a resource of `gated_model` alone."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.axes_are_inputs = model.opset_imports.get("", 1) >= _SINCE_INPUT_AXES
        self.names = (unique_name(model, f"mdp_gate_{number}") for number in range(10**9))

    def gate(self, shape: tuple[int, ...]) -> ir.Value:
        """One more input of the model."""
        kind = ir.TensorType(ir.DataType.FLOAT)
        value = ir.Value(name=next(self.names), shape=ir.Shape(shape), type=kind)
        self.model.graph.inputs.append(value)
        return value

    def install(
        self, node: ir.Node, operation: Operation, slot: int, gate: ir.Value, shape: tuple[int, ...]
    ) -> None:
        """Let an operation read its input ``slot``, of this shape, through a gate."""
        if node.op_type in _NORMS:
            self._norm(node, operation, gate)
        elif node.op_type in _GROUP_NORMS:
            self._group_norm(node, operation, gate, shape[1])
        elif node.op_type == "LpNormalization":
            self._length(node, operation, gate)
        elif node.op_type == "ReduceMean":
            attributes, axes = list(node.attributes.values()), node.inputs[1:]
            share = self._node(node, "ReduceMean", [gate, *axes], attributes)
            self.multiply(node, slot, gate)
            self._then(node, "Div", self._not_zero(node, share))
        elif node.op_type in ("ReduceMax", "ReduceLogSumExp"):
            node.replace_input_with(slot, self._of(node, "Add", node.inputs[slot], self._log(node, gate)))
        elif node.op_type == "ReduceMin":
            node.replace_input_with(slot, self._of(node, "Sub", node.inputs[slot], self._log(node, gate)))
        elif node.op_type == "ReduceProd":
            one = self._constant(np.ones((), np.float32))
            beyond = self._of(node, "Mul", gate, self._of(node, "Sub", node.inputs[slot], one))
            node.replace_input_with(slot, self._of(node, "Add", beyond, one))
        else:
            self.multiply(node, slot, gate)

    def multiply(self, node: ir.Node, slot: int, gate: ir.Value) -> None:
        """Multiply an input of a node."""
        node.replace_input_with(slot, self._of(node, "Mul", node.inputs[slot], gate))

    def _norm(self, node: ir.Node, operation: Operation, gate: ir.Value) -> None:
        value, rank = _data(node), len(gate.shape or ())
        axes = range(operation.attributes.get("axis", -1) % rank, rank)
        share = self._not_zero(node, self._mean(node, gate, axes))

        def mean(inner: ir.Value) -> ir.Value:
            return self._of(node, "Div", self._mean(node, self._of(node, "Mul", inner, gate), axes), share)

        if operation.op_type == "LayerNormalization":
            value = self._of(node, "Sub", value, mean(value))
        value = self._over_deviation(node, operation, value, mean(self._of(node, "Mul", value, value)))
        self._scaled(node, value, list(node.inputs[1:]))

    def _group_norm(self, node: ir.Node, operation: Operation, gate: ir.Value, channels: int) -> None:
        value, rank = _data(node), len(gate.shape or ())
        groups = operation.attributes.get("num_groups", channels)
        lines = self._constant(np.asarray([0, groups, -1]))
        along = self._constant(np.asarray([0, channels, *[1] * (rank - 2)]))
        group = self._constant(np.arange(channels) * groups // channels)
        whole = self._of(node, "Expand", gate, self._of(node, "Shape", value))

        def mean(inner: ir.Value) -> ir.Value:
            """Of each group, laid along its channels."""
            pooled = self._mean(node, self._of(node, "Reshape", inner, lines), (2,))
            spread = self._node(node, "Gather", [pooled, group], [ir.AttrInt64("axis", 1)])
            return self._of(node, "Reshape", spread, along)

        share = self._not_zero(node, mean(whole))

        def weighted(inner: ir.Value) -> ir.Value:
            return self._of(node, "Div", mean(self._of(node, "Mul", inner, whole)), share)

        value = self._of(node, "Sub", value, weighted(value))
        value = self._over_deviation(node, operation, value, weighted(self._of(node, "Mul", value, value)))
        shape = self._constant(np.asarray([1, -1, *[1] * (rank - 2)]))
        self._scaled(node, value, [self._of(node, "Reshape", v, shape) for v in node.inputs[1:]])

    def _length(self, node: ir.Node, operation: Operation, gate: ir.Value) -> None:
        value = _data(node)
        axes = (operation.attributes.get("axis", -1) % len(gate.shape or ()),)
        kind = f"ReduceL{operation.attributes.get('p', 2)}"
        length = self._reduced(node, kind, self._of(node, "Mul", value, gate), axes)
        self._become(node, self._of(node, "Div", value, length))

    def _over_deviation(
        self, node: ir.Node, operation: Operation, value: ir.Value, variance: ir.Value
    ) -> ir.Value:
        epsilon = self._constant(np.asarray(operation.attributes.get("epsilon", 1e-5), np.float32))
        deviation = self._of(node, "Sqrt", self._of(node, "Add", variance, epsilon))
        return self._of(node, "Div", value, deviation)

    def _scaled(self, node: ir.Node, value: ir.Value, affine: Sequence[ir.Value | None]) -> None:
        """The result of a norm: times its scale, plus its bias where it has one."""
        for op_type, parameter in zip(("Mul", "Add"), affine, strict=False):
            if parameter is not None:
                value = self._of(node, op_type, value, parameter)
        self._become(node, value)

    def _become(self, node: ir.Node, value: ir.Value) -> None:
        """Let another value take the place of what a node makes."""
        old = node.outputs[0]
        name = old.name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        old.name, value.name = f"{name}__ungated", name
        self.model.graph.remove(node, safe=True)

    def _then(self, node: ir.Node, op_type: str, other: ir.Value) -> None:
        """Apply an operation to what a node makes, under the old name."""
        old = node.outputs[0]
        result = ir.Node("", op_type, [old, other], name=next(self.names))
        old.replace_all_uses_with(result.outputs[0], replace_graph_outputs=True)
        result.replace_input_with(0, old)
        result.outputs[0].name, old.name = old.name, f"{old.name}__ungated"
        self.model.graph.insert_after(node, result)

    def _not_zero(self, node: ir.Node, share: ir.Value) -> ir.Value:
        """A row or group that is gone has no units to take the mean of."""
        return self._of(node, "Add", share, self._constant(np.asarray(1e-30, np.float32)))

    def _mean(self, node: ir.Node, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        return self._reduced(node, "ReduceMean", value, axes)

    def _reduced(self, node: ir.Node, op_type: str, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """A reduction that keeps its axes with extent 1."""
        if self.axes_are_inputs:
            return self._of(node, op_type, value, self._constant(np.asarray(axes)))
        return self._node(node, op_type, [value], [ir.AttrInt64s("axes", axes)])

    def _log(self, node: ir.Node, gate: ir.Value) -> ir.Value:
        return self._of(node, "Log", gate)

    def _of(self, node: ir.Node, op_type: str, *inputs: ir.Value | None) -> ir.Value:
        return self._node(node, op_type, inputs, [])

    def _node(
        self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr]
    ) -> ir.Value:
        """What a new node before ``node`` makes."""
        new = ir.Node("", op_type, inputs, attributes, name=next(self.names))
        new.outputs[0].name = new.name
        self.model.graph.insert_before(node, new)
        return new.outputs[0]

    def _constant(self, array: npt.NDArray[Any]) -> ir.Value:
        return add_initializer(self.model, next(self.names), np.ascontiguousarray(array))
