"""Fuse projections again: what the analysis split becomes one layer where the parts stayed equally wide.

    x W_k + b_k, reshaped to [..., H, d]   =   part k of   x [W_0 W_1 …] + [b_0 b_1 …], [..., parts, H, d]

The nodes are those of the original, with their names; only weights, biases and the target of the reshape are
put together from the parts. Which units a part kept does not matter, only how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.projections import FusedProjection
from onnx_mdp.analysis.shadow import Shadow, add_initializer, unique_name

__all__ = ["fuse_projections"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Target:
    """The target of a part's reshape: ``entries``, and where some are computed, the original's ``computed``.

    ``fixed`` marks the entries that are not; entries are None where the plan changed none of them.
    """

    entries: Array | None
    fixed: Array | None = None
    computed: ir.Value | None = None

    def same(self, other: _Target) -> bool:
        """Whether another part is reshaped alike."""
        pairs = ((self.entries, other.entries), (self.fixed, other.fixed))
        equal = (a is b if a is None or b is None else np.array_equal(a, b) for a, b in pairs)
        return self.computed is other.computed and all(equal)


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the layers that a projection was split into; ``output`` is what its readers read."""

    linear: ir.Node
    bias: ir.Node | None
    target: _Target
    output: ir.Value


@dataclass(frozen=True, slots=True)
class _Layer:
    """A projection as it was: its nodes in order, from the linear one to those that select the parts."""

    names: FusedProjection
    linear: ir.Node
    bias: ir.Node | None
    reshape: ir.Node
    nodes: tuple[ir.Node, ...]


def fuse_projections(model: ir.Model, shadow: Shadow) -> None:
    """Fuse, in place, every split projection whose parts are equally wide. Dead nodes are left behind.

    ``model`` is what a plan left of the normalised model of ``shadow``.
    """
    order = {id(node): place for place, node in enumerate(shadow.unsplit.graph)}
    makers = {str(v.name): node for node in shadow.unsplit.graph for v in node.outputs}
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    for names in shadow.split:
        # A part that nobody reads is not worth computing again.
        if len(names.selected) < names.parts or not all(name in values for _, name in names.selected):
            continue
        layer = _layer(names, makers, order)
        parts = [_part(values[name], names) for _, name in sorted(names.selected)]
        weights = _weights(layer, parts)
        if weights is not None and all(v.const_value is not None for v in _others(layer, weights)):
            _build(model, layer, parts, weights)


def _layer(names: FusedProjection, makers: Mapping[str, ir.Node], order: Mapping[int, int]) -> _Layer:
    linear, bias = makers[names.linear], makers[names.bias] if names.bias is not None else None
    found: dict[int, ir.Node] = {}
    for _, name in names.selected:
        node = makers[name]
        while node is not linear:
            found[id(node)] = node
            node = linear if node is bias else _maker(node.inputs[0])
    nodes = (linear, *sorted(found.values(), key=lambda node: order[id(node)]))
    return _Layer(names, linear, bias, makers[names.reshape], nodes)


def _part(output: ir.Value, names: FusedProjection) -> _Part:
    """Walk up from what a part gives: Transpose, Reshape, Add of a bias, linear layer."""
    reshape = _maker(output)
    if reshape.op_type == "Transpose":
        reshape = _maker(reshape.inputs[0])
    linear, bias = _maker(reshape.inputs[0]), None
    if names.bias is not None:
        bias = linear
        linear = _maker(next(v for v in bias.inputs if v is not None and v.const_value is None))
    return _Part(linear, bias, _target(reshape.inputs[1]), output)


def _target(value: ir.Value | None) -> _Target:
    assert value is not None
    if value.const_value is not None:
        return _Target(_array(value))
    choice = _maker(value)
    if choice.op_type != "Where":  # a Gather of the original's entries
        return _Target(None, None, choice.inputs[0])
    fixed, entries, gathered = choice.inputs
    return _Target(_array(entries), _array(fixed), _maker(gathered).inputs[0])


def _maker(value: ir.Value | None) -> ir.Node:
    node = None if value is None else value.producer()
    assert node is not None
    return node


def _array(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _weights(layer: _Layer, parts: Sequence[_Part]) -> dict[tuple[str, int], Array] | None:
    """Weight and biases of all parts by (output, slot) of their node; None where parts are not alike."""
    first = parts[0]
    data = {id(part.linear.inputs[0]) for part in parts}
    if len(data) > 1 or not all(part.target.same(first.target) for part in parts):
        return None
    transposed = layer.linear.op_type == "Gemm" and "transB" in layer.linear.attributes
    transposed = transposed and bool(layer.linear.attributes["transB"].as_int())
    operands = [(layer.linear, 1, 0 if transposed else 1, [part.linear for part in parts])]
    if len(layer.linear.inputs) > 2 and layer.linear.inputs[2] is not None:
        operands.append((layer.linear, 2, -1, [part.linear for part in parts]))
    if layer.bias is not None:
        slot = next(s for s, v in enumerate(layer.bias.inputs) if v is not layer.linear.outputs[0])
        operands.append((layer.bias, slot, -1, [part.bias for part in parts if part.bias is not None]))
    found: dict[tuple[str, int], Array] = {}
    for node, slot, axis, split in operands:
        original = node.inputs[slot]
        joined = (
            None if original is None or original.const_value is None else _joined(original, axis, slot, split)
        )
        if joined is None:
            return None
        found[str(node.outputs[0].name), slot] = joined
    return found


def _joined(original: ir.Value, axis: int, slot: int, split: Iterable[ir.Node]) -> Array | None:
    """The operand of all parts along ``axis``; one that is the same for all parts was never cut."""
    arrays = [_array(node.inputs[slot]) for node in split]
    whole = _array(original)
    if not whole.ndim or whole.shape[axis] == 1:
        return arrays[0] if all(np.array_equal(arrays[0], array) for array in arrays) else None
    return np.concatenate(arrays, axis) if len({array.shape for array in arrays}) == 1 else None


def _others(layer: _Layer, weights: Mapping[tuple[str, int], Array]) -> list[ir.Value]:
    """The inputs that are taken from the original: indices, axes and sizes of what selects the parts."""
    own = {id(v) for node in layer.nodes for v in node.outputs}
    special = {(str(layer.linear.outputs[0].name), 0), (str(layer.reshape.outputs[0].name), 1), *weights}
    return [
        value
        for node in layer.nodes
        for slot, value in enumerate(node.inputs)
        if value is not None and id(value) not in own and (str(node.outputs[0].name), slot) not in special
    ]


def _build(
    model: ir.Model, layer: _Layer, parts: Sequence[_Part], weights: Mapping[tuple[str, int], Array]
) -> None:
    """Put the nodes of the original where the first part is, and let its readers read them."""
    data, outputs = parts[0].linear.inputs[0], {part.output.name: part.output for part in parts}
    place = next(part.linear for part in parts if part.output.name == layer.names.selected[0][1])
    for name, output in outputs.items():
        output.name = f"{name}__split"
    made: dict[int, ir.Value] = {}
    for node in layer.nodes:
        inputs: list[ir.Value | None] = []
        for slot, value in enumerate(node.inputs):
            key = str(node.outputs[0].name), slot
            if value is None or id(value) in made:
                inputs.append(None if value is None else made[id(value)])
            elif node is layer.linear and slot == 0:
                inputs.append(data)
            elif node is layer.reshape and slot == 1:
                inputs.append(_fused_target(model, layer, value, parts[0].target, place))
            else:
                inputs.append(_constant(model, value, weights[key] if key in weights else _array(value)))
        copy = _copy(node, inputs)
        model.graph.insert_before(place, copy)
        made.update({id(old): new for old, new in zip(node.outputs, copy.outputs, strict=True)})
    for value in (v for node in layer.nodes for v in node.outputs if v.name in outputs):
        outputs[value.name].replace_all_uses_with(made[id(value)])


def _copy(node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.type = old.name, old.type
    return copy


def _fused_target(
    model: ir.Model, layer: _Layer, original: ir.Value, target: _Target, place: ir.Node
) -> ir.Value:
    """The parts' target with an entry for the parts, computed at run time where the original is."""
    axis = layer.names.axis
    if target.computed is None:
        assert target.entries is not None
        entries = np.insert(target.entries, axis, _array(original)[axis])
        return _constant(model, original, entries)
    if target.entries is None or target.fixed is None:
        return target.computed
    fixed = add_initializer(model, f"{original.name}__fixed", np.insert(target.fixed, axis, True))
    entries = np.insert(target.entries, axis, layer.names.parts)
    inputs = [fixed, add_initializer(model, f"{original.name}__pruned", entries), target.computed]
    choice = ir.Node("", "Where", inputs, name=unique_name(model, f"{layer.reshape.name}/pruned_1"))
    choice.outputs[0].name = unique_name(model, f"{original.name}__patched")
    model.graph.insert_before(place, choice)
    return choice.outputs[0]


def _constant(model: ir.Model, original: ir.Value, array: Array) -> ir.Value:
    """An initializer with the name of the original, the same for all layers that share it."""
    held = model.graph.initializers.get(str(original.name))
    if held is not None and np.array_equal(_array(held), array):
        return held
    same = original.const_value is not None and np.array_equal(_array(original), array)
    value = add_initializer(model, str(original.name), _array(original) if same else array)
    value.doc_string = original.doc_string
    if original.const_value is not None and value.const_value is not None:
        value.const_value.doc_string = original.const_value.doc_string
    return value
