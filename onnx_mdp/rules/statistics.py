"""Rules for statistics over a labelled axis: layer, group and instance norms, with their parameters."""

from __future__ import annotations

import numpy as np

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.rules.labelling import Labelling, expand, rule, squash, varying

__all__: list[str] = []


@rule("LayerNormalization", "RMSNormalization")
def normalises_over_units(state: Labelling, operation: Operation) -> None:
    """Statistics over the kept units of the last axes; one scale and bias for each unit.

    Frozen: two prunable axes at once, and where the statistics are outputs that are read.
    """
    labels = state.labels(operation.inputs[0])
    shape = state.shape(operation.inputs[0])
    first = operation.attributes.get("axis", -1) % len(shape)
    inside = [axis for axis in varying(labels) if axis >= first]
    if not inside:
        state.emit(operation, labels)
        return
    for slot in range(1, len(operation.inputs)):
        extents = state.shape(operation.inputs[slot]) if operation.inputs[slot] else ()
        for axis in inside:
            place = axis - len(shape) + len(extents)
            if place >= 0 and extents[place] > 1:
                why = f"{operation} has a parameter over two prunable axes"
                state.site(operation, slot, place, state.vector(labels, axis, shape[axis], why))
    if len(inside) > 1:
        state.freeze(labels, f"{operation} normalises over two prunable axes")
    if any(map(state.is_read, operation.outputs[1:])):
        state.freeze(labels, f"{operation} gives its statistics to another operator")
    state.reduces(operation, 0)
    state.emit(operation, labels)


@rule("GroupNormalization", since=21)  # the form of opset 18 was withdrawn: it has parameters for each group
@rule("InstanceNormalization")
def normalises_groups(state: Labelling, operation: Operation) -> None:
    """Statistics over the kept channels and positions of each group; a group is a row that may go as well.

    InstanceNormalization has groups of one channel. Exporters without the group norm write it as one of
    ``[batch, groups, channels · positions]``. Frozen: two prunable axes at once, and a prunable batch.
    """
    labels, shape = state.labels(operation.inputs[0]), state.shape(operation.inputs[0])
    grouped = operation.op_type == "GroupNormalization"
    groups = operation.attributes["num_groups"] if grouped else shape[1]
    wide = expand(labels, 1, shape[1]) if 1 in varying(labels) else labels
    parts = (groups, -1) if 1 in varying(labels) else (1, 1)
    view = squash(wide.reshape(labels.shape[0], *parts, *labels.shape[2:]))
    inside = [axis for axis in varying(view) if axis != 1]
    if 0 in inside or len(inside) > 1:
        state.freeze(labels, f"{operation} normalises over two prunable axes, or over the batch")
    rows = view
    if inside:
        state.reduces(operation, 0)
        rows = np.zeros((1,) * view.ndim, np.int32)
        if 1 in varying(view):
            rows = state.fresh(groups).reshape([-1 if axis == 1 else 1 for axis in range(view.ndim)])
            state.calls(rows, "groups")
            state.holds(rows, view)
            state.view(view, 1)
    owners = labels if grouped else rows.squeeze(2)
    for slot in (1, 2):
        vector = state.vector(owners, 1, shape[1], f"{operation} has a parameter over two prunable axes")
        state.site(operation, slot, 0, vector)
    state.emit(operation, labels)


@rule("LpNormalization")
def normalises_length(state: Labelling, operation: Operation) -> None:
    """The length is taken over the kept units.

    Frozen: units over two axes.
    """
    labels = state.labels(operation.inputs[0])
    if operation.attributes.get("axis", -1) % labels.ndim in varying(labels):
        if len(varying(labels)) > 1:
            state.freeze(labels, f"{operation} normalises over two prunable axes")
        state.reduces(operation, 0)
    state.emit(operation, labels)


@rule("MeanVarianceNormalization", "LRN")
def normalises_places(state: Labelling, operation: Operation) -> None:
    """Axes without statistics pass.

    Frozen: the axes that statistics are taken over, which for LRN are neighbouring channels.
    """
    labels = state.labels(operation.inputs[0])
    axes = (1,) if operation.op_type == "LRN" else operation.attributes.get("axes", (0, 2, 3))
    if {axis % labels.ndim for axis in axes} & set(varying(labels)):
        state.freeze(labels, f"{operation} normalises over a prunable axis")
        labels = np.zeros_like(labels)
    state.emit(operation, labels)
