"""Rules for operators that pick, sort, accumulate or write by position: what is not looked at passes.

Frozen, with a reason: labels along the axis that is looked at (sorted over, accumulated, picked from by
computed indices), for the result depends on every index there; labels that vary over more than one axis
where the operands must agree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.rules.elementwise import meet
from onnx_mdp.rules.labelling import Labelling, Labels, align, couple, rule, squash, varying

__all__: list[str] = []


def _passing(
    state: Labelling, operation: Operation, axes: Collection[int], does: str, slot: int = 0
) -> Labels:
    """The labels of an input, which are frozen and gone if they vary along ``axes``."""
    labels = state.labels(operation.inputs[slot])
    if set(varying(labels)) & {axis % max(labels.ndim, 1) for axis in axes}:
        state.freeze(labels, f"{operation} {does} a prunable axis")
        return np.zeros((1,) * labels.ndim, np.int32)
    return labels


@rule("CumSum", "CumProd")
def accumulates(state: Labelling, operation: Operation) -> None:
    """Each line along the axis is its own.

    Frozen: the axis that is accumulated, and one that is computed at run time.
    """
    axis = state.constant(operation, 1)
    if axis is None:
        state.freeze_inputs(operation, f"{operation} computes its axis at run time")
        return
    state.emit(operation, _passing(state, operation, (int(axis.reshape(-1)[0]),), "accumulates"))


@rule("TopK")
def sorts(state: Labelling, operation: Operation) -> None:
    """Values and places have the units of the lines that are sorted.

    Frozen: the axis that is sorted.
    """
    labels = _passing(state, operation, (operation.attributes.get("axis", -1),), "sorts")
    for output in range(len(operation.outputs)):
        state.emit(operation, labels, output)


@rule("ArgMax", "ArgMin")
def finds(state: Labelling, operation: Operation) -> None:
    """Places have the units of the lines that are searched.

    Frozen: the axis that is searched, where places would be others.
    """
    axis = operation.attributes.get("axis", 0)
    labels = _passing(state, operation, (axis,), "searches")
    if not operation.attributes.get("keepdims", 1):
        labels = labels.squeeze(axis)
    state.emit(operation, labels)


@rule("OneHot")
def one_hot(state: Labelling, operation: Operation) -> None:
    """Each index becomes a line along a new axis, which is fixed."""
    labels = state.labels(operation.inputs[0])
    axis = operation.attributes.get("axis", -1) % (labels.ndim + 1)
    state.emit(operation, np.expand_dims(labels, axis))


@rule("Trilu", "EyeLike")
def triangles(state: Labelling, operation: Operation) -> None:
    """Matrices are cut at their diagonals one by one.

    Frozen: the two last axes, which the diagonal compares.
    """
    state.emit(operation, _passing(state, operation, (-1, -2), "compares by place"))


@rule("ReverseSequence")
def reverses(state: Labelling, operation: Operation) -> None:
    """Sequences are reversed feature by feature.

    Frozen: the batch and the time axis.
    """
    axes = operation.attributes.get("batch_axis", 1), operation.attributes.get("time_axis", 0)
    state.emit(operation, _passing(state, operation, axes, "reverses"))


@rule("Compress")
def compresses(state: Labelling, operation: Operation) -> None:
    """Slices are selected whole.

    Frozen: the axis that is selected from; all axes of a tensor that is flattened first.
    """
    rank = len(state.shape(operation.inputs[0]))
    axis = operation.attributes.get("axis")
    labels = _passing(state, operation, range(rank) if axis is None else (axis,), "compresses")
    state.emit(operation, labels.reshape(-1)[:1] if axis is None else labels)


@rule("CenterCropPad")
def crops(state: Labelling, operation: Operation) -> None:
    """The other axes pass.

    Frozen: the axes that are cropped or padded.
    """
    rank = len(state.shape(operation.inputs[0]))
    axes = operation.attributes.get("axes", range(rank))
    state.emit(operation, _passing(state, operation, axes, "crops"))


@rule("RoiAlign", "MaxRoiPool")
def regions(state: Labelling, operation: Operation) -> None:
    """Regions are read channel by channel, at the same places in each.

    Frozen: the other axes, and prunable regions.
    """
    state.freeze(state.labels(operation.inputs[1]), f"{operation} reads prunable regions")
    state.emit(operation, _passing(state, operation, (0, 2, 3), "reads regions over"))


@rule("GatherND")
def gather_places(state: Labelling, operation: Operation) -> None:
    """Indices select places by the leading axes; what lies at a place keeps its labels.

    Frozen: the axes that the indices select along.
    """
    labels = state.labels(operation.inputs[0])
    places = state.shape(operation.inputs[1])
    selected = operation.attributes.get("batch_dims", 0) + places[-1]
    if any(axis < selected for axis in varying(labels)):
        state.freeze_inputs(operation, f"{operation} selects along a prunable axis")
        return
    rank = len(state.shape(operation.outputs[0]))
    state.emit(operation, align(labels.reshape(labels.shape[selected:]), rank))


@rule("GridSample")
def grid_sample(state: Labelling, operation: Operation) -> None:
    """Positions are interpolated channel by channel, at the same places in each.

    Frozen: prunable positions, and a grid with units.
    """
    labels = state.labels(operation.inputs[0])
    if set(varying(labels)) <= {1} and not varying(state.labels(operation.inputs[1])):
        state.emit(operation, labels)
    else:
        state.freeze_inputs(operation, f"{operation} samples over a prunable axis")


@rule("GatherElements")
def gathers_elements(state: Labelling, operation: Operation) -> None:
    """Data and indices meet place by place; indices that many read are cut before each reader.

    Frozen: the axis that is picked from, and indices for a part of a prunable axis.
    """
    data, places = operation.inputs[:2]
    before, after = state.shape(data), state.shape(places)
    along = {*varying(state.labels(data)), *varying(state.labels(places))}
    axis = operation.attributes.get("axis", 0) % len(before)
    if axis in along or any(before[a] != after[a] for a in along):
        state.freeze_inputs(operation, f"{operation} picks from a prunable axis, or for a part of it")
        return
    # Indices that were expanded for this reader alone are expanded less.
    fits = state.is_constant(places) or varying(state.labels(places)) or along <= {*state.repeats(places)}
    joint = meet(state, operation, after, {0: data, 1: places} if fits else {0: data})
    for a in () if fits else varying(joint):
        state.selects(operation, 1, a, state.vector(joint, a, after[a], f"{operation} picks over two axes"))
    state.emit(operation, joint)


@rule("Scatter", "ScatterElements")
def scatters_elements(state: Labelling, operation: Operation) -> None:
    """Data, indices and updates meet place by place.

    Frozen: the axis that is written to, and several prunable axes.
    """
    rank = len(state.shape(operation.inputs[0]))
    axis = operation.attributes.get("axis", 0) % rank
    for slot in range(3):
        _forget(state, operation, slot, {axis})
    along = _only_axis(state, operation, (0, 1, 2))
    if along is None:
        return
    state.emit(operation, _meet_along(state, operation, dict.fromkeys(range(3), along), rank, along))


@rule("TensorScatter")
def writes_to_cache(state: Labelling, operation: Operation) -> None:
    """Cache and update meet place by place.

    Frozen: the axis that is written to, the batch, and several prunable axes.
    """
    rank = len(state.shape(operation.inputs[0]))
    axis = operation.attributes.get("axis", -2) % rank
    for slot in range(2):
        _forget(state, operation, slot, {0, axis})
    along = _only_axis(state, operation, (0, 1))
    if along is not None:
        state.emit(operation, _meet_along(state, operation, dict.fromkeys(range(2), along), rank, along))


@rule("ScatterND")
def scatters_places(state: Labelling, operation: Operation) -> None:
    """What lies at a place meets its update.

    Frozen: the leading axes, by which places are written.
    """
    rank, depth = len(state.shape(operation.inputs[0])), state.shape(operation.inputs[1])[-1]
    shift = len(state.shape(operation.inputs[2])) - rank
    _forget(state, operation, 0, set(range(depth)))
    _forget(state, operation, 2, set(range(depth + shift)))
    state.freeze(state.labels(operation.inputs[1]), f"{operation} writes at prunable places")
    found = {a for a in varying(state.labels(operation.inputs[0]))}
    found |= {a - shift for a in varying(state.labels(operation.inputs[2]))}
    if len(found) > 1:
        state.freeze_inputs(operation, f"{operation} writes over two prunable axes")
    elif found:
        (axis,) = found
        joint = _meet_along(state, operation, {0: axis, 2: axis + shift}, rank, axis)
        state.emit(operation, joint)


def _forget(state: Labelling, operation: Operation, slot: int, axes: Collection[int]) -> None:
    """Freeze an input if it varies along ``axes``."""
    labels = state.labels(operation.inputs[slot])
    if set(varying(labels)) & set(axes):
        state.freeze(labels, f"{operation} writes along a prunable axis")


def _only_axis(state: Labelling, operation: Operation, slots: Collection[int]) -> int | None:
    """The one axis along which these inputs vary; None, and what varies is frozen, where it is not one."""
    found = {axis for slot in slots for axis in varying(state.labels(operation.inputs[slot]))}
    extents = {tuple(state.shape(operation.inputs[slot])[axis] for axis in sorted(found)) for slot in slots}
    if len(found) != 1 or len(extents) > 1:
        state.freeze_inputs(operation, f"{operation} writes over several prunable axes, or a part of one")
        return None
    return found.pop()


def _meet_along(
    state: Labelling, operation: Operation, places: Mapping[int, int], rank: int, axis: int
) -> Labels:
    """The output's labels where inputs, by slot, meet along one axis each; a constant is cut as they are."""
    names = {slot: operation.inputs[slot] for slot in places}
    extent = state.shape(names[min(places)])[places[min(places)]]
    joint = np.zeros(extent, np.int32)
    why = f"{operation} meets fixed and prunable indices"
    for slot, place in places.items():
        if not state.is_constant(names[slot]):
            vector = state.vector(state.labels(names[slot]), place, extent, why)
            state.union(joint, vector)
            joint = np.where(joint > 0, joint, vector).astype(np.int32)
    for slot, place in places.items():
        if state.is_constant(names[slot]):
            state.site(operation, slot, place, joint)
        else:
            vector = state.vector(state.labels(names[slot]), place, extent, why)
            state.freeze(np.where(vector == 0, joint, 0), f"{why}: {names[slot]!r} cannot be pruned")
    return squash(joint.reshape([-1 if a == axis else 1 for a in range(rank)]))


@rule("Col2Im")
def columns(state: Labelling, operation: Operation) -> None:
    """The rows that one output channel is made of leave together.

    Frozen: the blocks, and a block shape that is computed at run time.
    """
    labels = _passing(state, operation, (0, 2), "moves")
    places = state.constant(operation, 2)
    if places is None:
        state.freeze_inputs(operation, f"{operation} computes its block shape at run time")
        return
    channels = state.shape(operation.inputs[0])[1]
    why = f"{operation} mixes fixed and prunable channels"
    blocks = state.vector(labels, 1, channels, why).reshape(-1, int(np.prod(places)))
    joint = couple(state, blocks, 1, why).reshape(-1)
    rank = len(state.shape(operation.outputs[0]))
    state.emit(operation, joint.reshape([-1 if axis == 1 else 1 for axis in range(rank)]))
