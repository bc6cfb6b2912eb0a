"""What a rewrite changes beside weights: shape operands and attributes that name an extent that is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.shadow import Operation, add_initializer, unique_name
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.rules import Labelling
from onnx_mdp.rules.movement import normalised_axes, slice_ranges

__all__ = ["Edit", "patch_operands"]

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Edit:
    """The model under edit, its nodes by operation index, and the classes that go."""

    structure: Structure
    removed: Mask
    model: ir.Model
    nodes: tuple[ir.Node, ...]

    def keep(self, name: str, axis: int) -> Mask:
        """``bool[extent]``: which indices of an activation's axis stay."""
        return self.structure.graph.keep(name, axis, self.removed)

    def cuts(self, name: str, axis: int) -> bool:
        """Whether an activation's axis becomes shorter."""
        return not bool(self.keep(name, axis).all())

    def computes_from_cut(self, name: str) -> bool:
        """Whether a run-time computation reads the shape of a tensor that becomes smaller."""
        makers = {o: op for op in self.structure.shadow.operations for o in op.outputs}
        stack, seen = [name], {name}
        while stack:
            maker = makers.get(stack.pop())
            if maker is None:
                continue
            if maker.op_type in ("Shape", "Size"):
                source = maker.inputs[0]
                if any(self.cuts(source, axis) for axis in range(len(self.structure.shadow.shapes[source]))):
                    return True
                continue
            fresh = [i for i in maker.inputs if i and i not in seen]
            seen.update(fresh)
            stack += fresh
        return False

    def constant(self, operation: Operation, slot: int) -> npt.NDArray[Any] | None:
        name = operation.inputs[slot] if slot < len(operation.inputs) else ""
        return self.structure.shadow.constants.get(name)


def patch_operands(edit: Edit) -> None:
    """Let every operation name the extents that are left, in place."""
    for operation in edit.structure.shadow.operations:
        patch = _PATCHES.get(operation.op_type)
        if patch is not None and not operation.domain:
            patch(edit, operation)


def _set_operand(edit: Edit, operation: Operation, slot: int, values: npt.NDArray[Any]) -> None:
    """Give a shape operand new entries; entries that change with a symbolic dimension stay computed.

    A computed operand is also pinned where nothing differs but its computation reads a shape that the
    plan changes: ``Shape`` of another, now narrower, tensor.
    """
    old = edit.constant(operation, slot)
    name = operation.inputs[slot]
    if old is None or (np.array_equal(old, values) and not edit.computes_from_cut(name)):
        return
    node = edit.nodes[operation.index]
    fixed = add_initializer(edit.model, f"{name}__pruned", values.astype(old.dtype))
    moving = edit.structure.shadow.dynamic.get(name)
    if moving is None:
        node.replace_input_with(slot, fixed)
        return
    chosen = _entries(edit, node, f"{name}__fixed", fixed, slot, ~moving | (values != old))
    chosen.name = unique_name(edit.model, f"{name}__patched")
    node.replace_input_with(slot, chosen)


def _entries(edit: Edit, node: ir.Node, stem: str, fixed: ir.Value, slot: int, mask: Mask) -> ir.Value:
    """``Where(mask, fixed, input of the node)``, or before opset 9, which has none, a sum of products."""

    def add(op_type: str, *inputs: ir.Value | None) -> ir.Value:
        made = ir.Node("", op_type, list(inputs))
        made.name = unique_name(edit.model, f"{node.name}/pruned_{slot}")
        made.outputs[0].name = unique_name(edit.model, f"{stem}_{op_type}")
        edit.model.graph.insert_before(node, made)
        return made.outputs[0]

    if edit.model.opset_imports.get("", 9) >= 9:
        return add("Where", add_initializer(edit.model, stem, mask), fixed, node.inputs[slot])
    assert fixed.const_value is not None
    values = fixed.const_value.numpy()
    moving = add_initializer(edit.model, stem, (~mask).astype(values.dtype))
    kept = add_initializer(edit.model, f"{stem}_values", np.where(mask, values, 0).astype(values.dtype))
    return add("Add", add("Mul", node.inputs[slot], moving), kept)


def _set_ints(edit: Edit, operation: Operation, name: str, value: int | tuple[int, ...]) -> None:
    attribute = ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrInt64s(name, value)
    edit.nodes[operation.index].attributes[name] = attribute


def _patch_target_shape(edit: Edit, operation: Operation) -> None:
    """Reshape, Expand, ConstantOfShape: entries that name the old extent name the new one.

    A computed entry of a Reshape that mixes a cut extent with a symbolic one is left to be inferred.
    """
    slot = 0 if operation.op_type == "ConstantOfShape" else 1
    old = edit.constant(operation, slot)
    if old is None:
        return
    moving = edit.structure.shadow.dynamic.get(operation.inputs[slot], np.zeros(old.shape, np.bool_))
    output = operation.outputs[0]
    offset = len(edit.structure.shadow.shapes[output]) - len(old)
    new = old.copy()
    special = (-1, 0) if operation.op_type == "Reshape" else (1,)
    for place, entry in enumerate(old.tolist()):
        if entry not in special and edit.cuts(output, place + offset):
            new[place] = -1 if moving[place] else int(edit.keep(output, place + offset).sum())
    _set_operand(edit, operation, slot, new)


def _patch_resize(edit: Edit, operation: Operation) -> None:
    old = edit.constant(operation, 3)
    if old is None or not old.size:
        return
    rank = len(edit.structure.shadow.shapes[operation.outputs[0]])
    axes = [axis % rank for axis in operation.attributes.get("axes", range(rank))]
    kept = [int(edit.keep(operation.outputs[0], axis).sum()) for axis in axes]
    _set_operand(edit, operation, 3, np.asarray(kept, old.dtype))


def _patch_split(edit: Edit, operation: Operation) -> None:
    axis = operation.attributes.get("axis", 0) % len(edit.structure.shadow.shapes[operation.inputs[0]])
    if not edit.cuts(operation.inputs[0], axis):
        return
    sizes = tuple(int(edit.keep(output, axis).sum()) for output in operation.outputs)
    node = edit.nodes[operation.index]
    if operation.version < 13:
        _set_ints(edit, operation, "split", sizes)
        return
    node.attributes.pop("num_outputs", None)
    fixed = add_initializer(edit.model, f"{operation.outputs[0]}__split", np.asarray(sizes, np.int64))
    node.resize_inputs(2)
    node.replace_input_with(1, fixed)


def _patch_slice(edit: Edit, operation: Operation) -> None:
    state = Labelling(edit.structure.shadow)
    ranges = slice_ranges(state, operation)
    source = operation.inputs[0]
    if ranges is None or not any(edit.cuts(source, axis) for axis in ranges):
        return
    bounds = [
        np.asarray(
            edit.constant(operation, slot) if len(operation.inputs) > 1 else operation.attributes[key]
        ).copy()
        for slot, key in ((1, "starts"), (2, "ends"))
    ]
    for place, (axis, (start, stop, _)) in enumerate(ranges.items()):
        if edit.cuts(source, axis):
            keep = edit.keep(source, axis)
            bounds[0][place], bounds[1][place] = int(keep[:start].sum()), int(keep[:stop].sum())
    if len(operation.inputs) > 1:
        _set_operand(edit, operation, 1, bounds[0])
        _set_operand(edit, operation, 2, bounds[1])
    else:
        _set_ints(edit, operation, "starts", tuple(bounds[0].tolist()))
        _set_ints(edit, operation, "ends", tuple(bounds[1].tolist()))


def _patch_gather(edit: Edit, operation: Operation) -> None:
    source = operation.inputs[0]
    axis = operation.attributes.get("axis", 0) % max(len(edit.structure.shadow.shapes[source]), 1)
    indices = edit.constant(operation, 1)
    if indices is None or not edit.cuts(source, axis):
        return
    keep = edit.keep(source, axis)
    wrapped = np.where(indices < 0, indices + len(keep), indices)
    for place in range(indices.ndim):
        kept = edit.keep(operation.outputs[0], axis + place)
        wrapped = np.compress(kept, wrapped, place)
    _set_operand(edit, operation, 1, (np.cumsum(keep) - 1)[wrapped])


def _patch_pad(edit: Edit, operation: Operation) -> None:
    output, source = operation.outputs[0], operation.inputs[0]
    as_input = len(operation.inputs) > 1
    old = edit.constant(operation, 1) if as_input else operation.attributes["pads"]
    if old is None:
        return
    new = np.asarray(old).copy()
    shape = edit.structure.shadow.shapes[source]
    axes = normalised_axes(Labelling(edit.structure.shadow), operation, 3, len(shape), len(new) // 2) or ()
    for place, axis in enumerate(axes):
        if edit.cuts(output, axis):
            keep = edit.keep(output, axis)
            before, after = int(new[place]), int(new[place + len(axes)])
            new[place] = int(keep[:before].sum())
            new[place + len(axes)] = int(keep[len(keep) - after :].sum())
    if as_input:
        _set_operand(edit, operation, 1, new)
    else:
        _set_ints(edit, operation, "pads", tuple(new.tolist()))


def _patch_tile(edit: Edit, operation: Operation) -> None:
    """One index that is repeated along a cut axis is repeated as often as indices are left."""
    old = edit.constant(operation, 1)
    if old is None:
        return
    shapes, output = edit.structure.shadow.shapes, operation.outputs[0]
    new = old.copy()
    for axis, extent in enumerate(shapes[operation.inputs[0]]):
        if extent == 1 and edit.cuts(output, axis):
            new[axis] = int(edit.keep(output, axis).sum())
    _set_operand(edit, operation, 1, new)


def _patch_groups(edit: Edit, operation: Operation) -> None:
    """A depthwise convolution has as many groups as input channels are left."""
    groups = operation.attributes.get("group", 1)
    if groups > 1 and groups == edit.structure.shadow.shapes[operation.inputs[0]][1]:
        _set_ints(edit, operation, "group", int(edit.keep(operation.inputs[0], 1).sum()))


def _patch_attention(edit: Edit, operation: Operation) -> None:
    """Fewer heads, and the scale of the original width, which the operator would compute from the new one."""
    query = operation.inputs[0]
    rank = len(edit.structure.shadow.shapes[query])
    if rank == 3:
        for slot, name in ((0, "q_num_heads"), (1, "kv_num_heads"), (0, "num_heads")):
            if name in operation.attributes:
                heads = _kept_parts(edit.keep(operation.inputs[slot], 2), operation.attributes[name])
                _set_ints(edit, operation, name, heads)
    if operation.op_type != "Attention" or "scale" in operation.attributes:
        return
    count = operation.attributes["q_num_heads"] if rank == 3 else 1
    keep = edit.keep(query, rank - 1)
    if int(keep.sum()) // _kept_parts(keep, count) < len(keep) // count:
        scale = ir.AttrFloat32("scale", 1 / math.sqrt(len(keep) // count))
        edit.nodes[operation.index].attributes["scale"] = scale


def _patch_group_norm(edit: Edit, operation: Operation) -> None:
    groups = operation.attributes["num_groups"]
    _set_ints(edit, operation, "num_groups", _kept_parts(edit.keep(operation.inputs[0], 1), groups))


def _kept_parts(keep: Mask, parts: int) -> int:
    """How many of equal parts keep anything."""
    return int(keep.reshape(parts, -1).any(1).sum())


_PATCHES: Mapping[str, Callable[[Edit, Operation], None]] = {
    "Attention": _patch_attention,
    "ConstantOfShape": _patch_target_shape,
    "Conv": _patch_groups,
    "ConvTranspose": _patch_groups,
    "Expand": _patch_target_shape,
    "Gather": _patch_gather,
    "GroupNormalization": _patch_group_norm,
    "Pad": _patch_pad,
    "Reshape": _patch_target_shape,
    "Resize": _patch_resize,
    "RotaryEmbedding": _patch_attention,
    "Slice": _patch_slice,
    "Split": _patch_split,
    "Tile": _patch_tile,
}
