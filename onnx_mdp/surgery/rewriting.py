"""Model and plan in, slimmer model out: slice weights, patch shape operands, bypass blocks.

Names, opset, metadata, input and output signatures and symbolic dimensions stay as they are, except for the
sizes of states. Only these change: initializer data along the cut axes, entries of shape operands that equal
a changed extent, ``group`` and ``split`` attributes, the wiring around removed blocks, and fused projections
whose parts no longer have equal widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.labels import keep_vector
from onnx_mdp.analysis.shadow import add_initializer, drop_unread, unique_name
from onnx_mdp.analysis.states import resize_states
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.model_io import clone
from onnx_mdp.plan import PruningPlan, check_plan, removed_classes
from onnx_mdp.rules import Site
from onnx_mdp.surgery.attention_scale import rescale_scores
from onnx_mdp.surgery.fusion import fuse_projections
from onnx_mdp.surgery.operand_patches import Edit, patch_operands

__all__ = ["rewrite"]

Mask = npt.NDArray[np.bool_]


def rewrite(structure: Structure, plan: PruningPlan, *, split: bool = False) -> ir.Model:
    """A new model without what the plan removes; an empty plan keeps every weight bit for bit.

    Projections that were fused are fused again where the plan keeps as many units of all their parts, unless
    they shall stay ``split``: the form whose operations the analysis knows, and the table measures.

    Raises:
        UsageError: the plan does not fit the model.
    """
    check_plan(plan, structure)
    model = clone(structure.shadow.model)
    edit = Edit(structure, removed_classes(plan, structure), model, tuple(model.graph))
    _slice_initializers(edit)
    patch_operands(edit)
    if plan.rescale_attention:
        rescale_scores(model, edit.nodes, structure, edit.removed)
    _bypass_blocks(edit, plan)
    drop_unread(model)
    if not split:
        fuse_projections(model, structure.shadow)
        drop_unread(model)
    _forget_shapes(model)
    resize_states(model, structure, edit.removed)
    return model


def _slice_initializers(edit: Edit) -> None:
    """Cut each weight for each reader; readers that keep the same indices go on sharing it."""
    cuts: dict[tuple[int, int], list[Site]] = {}
    for site in edit.structure.graph.cuts:
        cuts.setdefault((site.operation, site.slot), []).append(site)
    versions: dict[tuple[str, bytes], ir.Value] = {}
    for (index, slot), sites in cuts.items():
        masks = {site.axis: keep_vector(site.labels, edit.removed) for site in sites}
        if all(mask.all() for mask in masks.values()):
            continue
        name = edit.structure.shadow.operations[index].inputs[slot]
        key = (name, b"".join(bytes([axis]) + np.packbits(masks[axis]).tobytes() for axis in sorted(masks)))
        if key not in versions:
            stored = name in edit.model.graph.initializers
            versions[key] = _sliced(edit, name, masks) if stored else _selected(edit, index, slot, masks)
        edit.nodes[index].replace_input_with(slot, versions[key])
    _restore_names(edit.model, versions)


def _sliced(edit: Edit, name: str, masks: Mapping[int, Mask]) -> ir.Value:
    array = edit.structure.shadow.constants[name]
    for axis, mask in masks.items():
        array = np.compress(mask, array, axis)
    original = edit.model.graph.initializers[name]
    value = add_initializer(edit.model, f"{name}__pruned", np.ascontiguousarray(array))
    value.doc_string = original.doc_string
    if original.const_value is not None and value.const_value is not None:
        value.const_value.doc_string = original.const_value.doc_string
    return value


def _selected(edit: Edit, index: int, slot: int, masks: Mapping[int, Mask]) -> ir.Value:
    """What is computed at run time is cut before its first reader."""
    node = edit.nodes[index]
    value = node.inputs[slot]
    assert value is not None
    for axis, mask in masks.items():
        kept = add_initializer(edit.model, f"{value.name}__kept", np.flatnonzero(mask))
        gather = ir.Node("", "Gather", [value, kept], [ir.AttrInt64("axis", axis)])
        gather.name = unique_name(edit.model, f"{node.name}/pruned_{slot}")
        gather.outputs[0].name = unique_name(edit.model, f"{value.name}__pruned")
        edit.model.graph.insert_before(node, gather)
        value = gather.outputs[0]
    return value


def _restore_names(model: ir.Model, versions: Mapping[tuple[str, bytes], ir.Value]) -> None:
    """The first pruned version of a weight takes the name of an original that nobody reads any more."""
    for (name, _), value in versions.items():
        original = model.graph.initializers.get(name)
        if original is not None and not list(original.uses()) and not original.is_graph_output():
            del model.graph.initializers[name]
            del model.graph.initializers[str(value.name)]
            value.name = name
            model.graph.initializers[name] = value


def _bypass_blocks(edit: Edit, plan: PruningPlan) -> None:
    values = {str(v.name): v for n in edit.nodes for v in n.outputs if v.name}
    values |= {str(v.name): v for v in edit.model.graph.inputs}
    # Last first: the shortcut of a removed block may be the output of a removed block before it.
    for block in reversed(edit.structure.blocks):
        if block.name not in plan.removed_blocks:
            continue
        joint = edit.nodes[block.joint]
        shortcut = values[block.shortcut]
        if joint.outputs[0].is_graph_output():
            branch_slot = 1 - list(joint.inputs).index(shortcut)
            zero = add_initializer(edit.model, f"{block.branch}__removed", _zero_like(edit, shortcut))
            joint.replace_input_with(branch_slot, zero)
        else:
            joint.outputs[0].replace_all_uses_with(shortcut)


def _zero_like(edit: Edit, value: ir.Value) -> npt.NDArray[Any]:
    dtype = value.dtype or edit.structure.shadow.types.get(str(value.name), ir.DataType.FLOAT)
    return np.zeros((), dtype.numpy())


def _forget_shapes(model: ir.Model) -> None:
    """Shapes of inner tensors are stale now; runtimes infer them again."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
