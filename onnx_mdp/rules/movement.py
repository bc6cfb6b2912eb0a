"""Rules for operators that only move data: they run, in numpy, on the labels themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.numerics.precision import is_float
from onnx_mdp.rules.labelling import Labelling, Labels, align, couple, expand, rule, squash, varying

__all__ = ["normalised_axes", "slice_ranges"]


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(state: Labelling, operation: Operation) -> None:
    """Only axes that are split or merged are expanded; the outer ones of these are treated as whole.

    Frozen: empty tensors, and extents that mix a prunable with a symbolic one.
    """
    before, after = state.shape(operation.inputs[0]), state.shape(operation.outputs[0])
    if 0 in before:
        state.freeze_inputs(operation, f"{operation} reshapes an empty tensor")
        return
    labels = state.labels(operation.inputs[0])
    source: list[int] = []
    target: list[int] = []
    runs = [(left, right) for left, right in _segments(before, after)]
    for left, right in runs:
        moved = any(extent > 1 for extent in labels.shape[left])
        source += before[left] if moved else [1] * len(before[left])
        target += after[right] if moved else [1] * len(after[right])
    moved_labels = squash(np.broadcast_to(labels, source).reshape(target))
    for left, right in runs:
        _outer_axes_whole(state, labels, left)
        _outer_axes_whole(state, moved_labels, right)
    if operation.op_type == "Reshape" and not _one_can_be_inferred(state, operation, moved_labels):
        _freeze_moving(state, operation, 1, moved_labels, range(len(after)))
    state.emit(operation, moved_labels)


def _one_can_be_inferred(state: Labelling, operation: Operation, labels: Labels) -> bool:
    """A single entry that mixes a prunable extent with a symbolic one (heads × batch) can become -1."""
    target = state.constant(operation, 1)
    if target is None:
        return False
    moving = [axis for axis in varying(labels) if state.entry_moves(operation, 1, axis)]
    return len(moving) == 1 and bool((target > 0).all())


def _outer_axes_whole(state: Labelling, labels: Labels, run: slice) -> None:
    """Within a run of axes that becomes another, elements are ordered by the outer axes first."""
    inside = [axis for axis in varying(labels) if run.start <= axis < run.stop]
    for axis in inside[:-1]:
        state.whole(labels, axis)


def _freeze_moving(
    state: Labelling, operation: Operation, slot: int, labels: Labels, axes: Sequence[int]
) -> None:
    """A shape operand that mixes a prunable extent with a symbolic dimension cannot be patched."""
    for place, axis in enumerate(axes):
        if axis in varying(labels) and state.entry_moves(operation, slot, place):
            state.freeze(labels, f"{operation} computes a prunable extent from a symbolic dimension")


def _segments(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The smallest runs of axes, before and after, that hold the same elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        a, b = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        yield slice(a, i), slice(b, j)


@rule("Transpose")
def transpose(state: Labelling, operation: Operation) -> None:
    """Axes change places."""
    labels = state.labels(operation.inputs[0])
    order = operation.attributes.get("perm") or tuple(range(labels.ndim))[::-1]
    state.emit(operation, labels.transpose(order))


def normalised_axes(
    state: Labelling, operation: Operation, slot: int, rank: int, count: int
) -> tuple[int, ...] | None:
    """The axes of an operator that lists them in an input (or attribute ``axes``), default 0, 1, …"""
    listed = state.constant(operation, slot)
    if listed is None and slot < len(operation.inputs) and operation.inputs[slot]:
        return None
    axes = (
        listed.reshape(-1).tolist() if listed is not None else operation.attributes.get("axes", range(count))
    )
    return tuple(int(axis) % rank for axis in axes)


def slice_ranges(state: Labelling, operation: Operation) -> dict[int, tuple[int, int, int]] | None:
    """``{axis: (start, stop, step)}`` of a Slice, clamped as ONNX does; None if computed at run time."""
    shape = state.shape(operation.inputs[0])
    if len(operation.inputs) > 1:
        bounds = [state.constant(operation, slot) for slot in (1, 2)]
        if any(bound is None for bound in bounds):
            return None
        starts, ends = (np.asarray(bound).reshape(-1).tolist() for bound in bounds)
    else:
        starts, ends = list(operation.attributes["starts"]), list(operation.attributes["ends"])
    axes = normalised_axes(state, operation, 3, len(shape), len(starts))
    steps = state.constant(operation, 4)
    if axes is None or (steps is None and len(operation.inputs) > 4 and operation.inputs[4]):
        return None
    strides = steps.reshape(-1).tolist() if steps is not None else [1] * len(starts)
    ranges = {}
    for axis, start, stop, step in zip(axes, starts, ends, strides, strict=True):
        clamped = slice(start, None if step < 0 and stop < -shape[axis] else stop, step)
        ranges[axis] = clamped.indices(shape[axis])
    return ranges


@rule("Slice")
def slices(state: Labelling, operation: Operation) -> None:
    """A contiguous range keeps its labels.

    Frozen: strides over a prunable axis, and bounds that are computed at run time.
    """
    labels = state.labels(operation.inputs[0])
    ranges = slice_ranges(state, operation)
    if ranges is None:
        state.freeze_inputs(operation, f"{operation} computes its bounds at run time")
        return
    for axis, (start, stop, step) in ranges.items():
        if axis not in varying(labels):
            continue
        if step != 1:
            state.freeze(labels, f"{operation} takes every {step}th index of a prunable axis")
        for slot in (1, 2):
            _freeze_moving(state, operation, slot, labels, tuple(ranges))
        state.whole(labels, axis)
        labels = labels.take(range(start, stop, step), axis)
    state.emit(operation, labels)


@rule("Split", "SplitToSequence")
def split(state: Labelling, operation: Operation) -> None:
    """Each output takes its range of the labels.

    Frozen: what becomes a sequence.
    """
    labels = state.labels(operation.inputs[0])
    if operation.op_type != "Split":
        state.freeze_inputs(operation, f"{operation} makes a sequence")
        return
    axis = operation.attributes.get("axis", 0) % labels.ndim
    state.whole(labels, axis)
    start = 0
    for output, name in enumerate(operation.outputs):
        stop = start + (state.shape(name)[axis] if name else 0)
        part = labels.take(range(start, stop), axis) if axis in varying(labels) else labels
        state.emit(operation, part, output)
        start = stop


@rule("Gather")
def gather(state: Labelling, operation: Operation) -> None:
    """Constant indices, of any rank, select labels.

    Frozen: an axis along which indices are computed at run time, or a single index is selected.
    """
    labels = state.labels(operation.inputs[0])
    axis = operation.attributes.get("axis", 0) % max(labels.ndim, 1)
    indices = state.constant(operation, 1)
    rank = len(state.shape(operation.inputs[1]))
    if axis not in varying(labels):
        state.emit(operation, labels.reshape(labels.shape[:axis] + (1,) * rank + labels.shape[axis + 1 :]))
    elif indices is None or operation.inputs[1] in state.shadow.dynamic:
        state.freeze_inputs(operation, f"{operation} selects a prunable axis at run time")
    elif rank == 0 and len(varying(labels)) > 1:
        # One index is left of this axis, so it cannot be cut: what differs along it leaves together.
        joint = couple(state, labels, axis, f"{operation} selects among fixed and prunable indices")
        state.emit(operation, joint.squeeze(axis))
    else:
        state.whole(labels, axis)
        chosen = squash(labels.take(indices.astype(np.int64), axis))
        if not rank:
            state.freeze(chosen, f"{operation} selects a single index of a prunable axis")
        if rank > 1:  # one index table cannot keep other places in each head
            chosen = state.single(chosen, f"{operation} selects fixed and prunable indices")
        state.emit(operation, chosen)


@rule("Concat")
def concat(state: Labelling, operation: Operation) -> None:
    """Labels are laid end to end; where they vary along other axes alone, the operands meet.

    Frozen: units that meet a fixed index, and tensors over two prunable axes.
    """
    rank = len(state.shape(operation.outputs[0]))
    axis = operation.attributes["axis"] % rank
    labels = [state.labels(name) for name in operation.inputs]
    across = {a for label in labels for a in varying(label)}
    if across <= {axis} or axis in across:
        parts = [
            expand(label, axis, state.shape(n)[axis])
            for label, n in zip(labels, operation.inputs, strict=True)
        ]
        extents = [max(part.shape[a] for part in parts) for a in range(rank)]
        wide = [np.broadcast_to(p, [*extents[:axis], p.shape[axis], *extents[axis + 1 :]]) for p in parts]
        joined = squash(np.concatenate(wide, axis))
        state.whole(joined, axis)
        state.emit(operation, joined)
        return
    if not all(set(varying(label)) in (set(), across) for label in labels):
        state.freeze_inputs(operation, f"{operation} joins tensors over two prunable axes")
        return
    joint = np.zeros((1,) * rank, np.int32)
    for label in labels:
        state.union(joint, label)
        joint = np.where(joint > 0, joint, label).astype(np.int32)
    if any(map(state.is_constant, operation.inputs)):
        joint = state.single(joint, f"{operation} joins a constant over two prunable axes")
    for slot, name in enumerate(operation.inputs):
        if not state.is_constant(name):
            fixed = (labels[slot] == 0) & (joint > 0)
            state.freeze(np.where(fixed, joint, 0), f"{operation} joins {name!r}, which cannot be pruned")
        elif varying(joint):
            (along,) = varying(joint)
            state.site(operation, slot, along, state.vector(joint, along, joint.shape[along], ""))
    state.emit(operation, joint)


@rule("Expand", "Tile")
def repeats(state: Labelling, operation: Operation) -> None:
    """Labels are repeated; a constant (a class token) has a unit for each index of its last axis.

    Frozen: a prunable axis that is repeated.
    """
    before, after = state.shape(operation.inputs[0]), state.shape(operation.outputs[0])
    labels = align(_expanded_labels(state, operation), len(after))
    before = (1,) * (len(after) - len(before)) + before
    filled = state.is_constant(operation.inputs[0]) and set(before) <= {1}
    for axis in varying(labels):
        if before[axis] != after[axis] and not filled:
            state.freeze(labels, f"{operation} repeats a prunable axis")
            labels = np.zeros((1,) * len(after), np.int32)
            break
    readers = sum(operation.outputs[0] in reader.inputs for reader in state.shadow.operations)
    if readers == 1 and not state.is_constant(operation.inputs[0]):
        grown = (axis for axis in range(len(after)) if before[axis] == 1 < after[axis])
        target = [1] * (len(after) - state.shape(operation.inputs[1])[0])
        state.repeated[operation.outputs[0]] = tuple(
            axis for axis in grown if not state.entry_moves(operation, 1, axis - len(target))
        )
    places = state.shape(operation.inputs[1])[0]
    _freeze_moving(state, operation, 1, labels, range(len(after) - places, len(after)))
    state.emit(operation, labels)


def _expanded_labels(state: Labelling, operation: Operation) -> Labels:
    """A constant that is expanded (a class token, a query) has a unit for each index of its last axis."""
    name = operation.inputs[0]
    value = state.shadow.constants.get(name)
    shape = state.shape(operation.outputs[0])
    if value is None or not is_float(value.dtype) or not shape or shape[-1] == 1:
        return state.labels(name)
    if value.size == 1 and operation.op_type == "Expand":
        return _fresh_along(state, len(shape), len(shape) - 1, shape[-1])
    if not value.ndim or value.shape[-1] != shape[-1]:
        return state.labels(name)
    made = state.fresh(value.shape[-1])
    state.site(operation, 0, value.ndim - 1, made)
    return made.reshape((1,) * (value.ndim - 1) + (-1,))


@rule("ConstantOfShape")
def fills(state: Labelling, operation: Operation) -> None:
    """One value everywhere: a unit for each index of the last axis, unless its extent is computed."""
    shape = state.shape(operation.outputs[0])
    if shape and shape[-1] > 1 and not state.entry_moves(operation, 0, len(shape) - 1):
        state.emit(operation, _fresh_along(state, len(shape), len(shape) - 1, shape[-1]))


@rule("Pad")
def pad(state: Labelling, operation: Operation) -> None:
    """Padded indices of a prunable axis can be removed too, by padding less.

    Frozen: a prunable axis that is padded by reflection or edges or cropped, or by computed amounts.
    """
    labels = state.labels(operation.inputs[0])
    amounts = state.constant(operation, 1) if len(operation.inputs) > 1 else operation.attributes.get("pads")
    mode = operation.attributes.get("mode", "constant")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    flat = None if amounts is None else [int(p) for p in np.asarray(amounts).reshape(-1)]
    axes = None if flat is None else normalised_axes(state, operation, 3, labels.ndim, len(flat) // 2)
    if flat is None or axes is None:
        state.freeze_inputs(operation, f"{operation} computes its padding at run time")
        return
    for place, axis in enumerate(axes):
        before, after = flat[place], flat[place + len(axes)]
        if axis in varying(labels) and (before or after):
            labels = state.single(labels, f"{operation} pads fixed and prunable indices")
        if axis not in varying(labels) or not (before or after):
            continue
        _freeze_moving(state, operation, 1, labels, (*axes, *axes))
        if mode != "constant" or before < 0 or after < 0:
            state.freeze(labels, f"{operation} pads a prunable axis by {mode} ({before}, {after})")
            labels = np.zeros((1,) * labels.ndim, np.int32)
            break
        ends = [_fresh_along(state, labels.ndim, axis, count) for count in (before, after)]
        labels = np.concatenate([ends[0], labels, ends[1]], axis)
    state.emit(operation, labels)


def _fresh_along(state: Labelling, rank: int, axis: int, count: int) -> Labels:
    return state.fresh(count).reshape([count if a == axis else 1 for a in range(rank)])


@rule("DepthToSpace")
def depth_to_space(state: Labelling, operation: Operation) -> None:
    """The blocks that one output channel is made of leave together.

    Frozen: blocks that mix fixed and prunable channels.
    """
    labels = state.labels(operation.inputs[0])
    size = operation.attributes["blocksize"] ** 2
    channels = state.shape(operation.inputs[0])[1]
    vector = state.vector(labels, 1, channels, f"{operation} moves spatially varying channels")
    mode = operation.attributes.get("mode", "DCR")
    crd = (mode.decode() if isinstance(mode, bytes) else mode) == "CRD"
    blocks = vector.reshape(-1, size) if crd else vector.reshape(size, -1)
    joint = couple(state, blocks, 1 if crd else 0, f"{operation} mixes fixed and prunable channels")
    state.emit(operation, joint.reshape(1, -1, 1, 1))


@rule("SpaceToDepth")
def space_to_depth(state: Labelling, operation: Operation) -> None:
    """Every channel appears once for each position in its block."""
    labels = state.labels(operation.inputs[0])
    channels = state.shape(operation.inputs[0])[1]
    vector = state.vector(labels, 1, channels, f"{operation} moves spatially varying channels")
    state.emit(operation, np.tile(vector, operation.attributes["blocksize"] ** 2).reshape(1, -1, 1, 1))


@rule("Resize", "Upsample")
def resize(state: Labelling, operation: Operation) -> None:
    """Positions are interpolated channel by channel.

    Frozen: a prunable axis that is resized or cropped.
    """
    labels = state.labels(operation.inputs[0])
    before, after = state.shape(operation.inputs[0]), state.shape(operation.outputs[0])
    touched = _cropped_axes(state, operation, labels.ndim)
    if any(before[axis] != after[axis] or axis in touched for axis in varying(labels)):
        state.freeze(labels, f"{operation} resizes a prunable axis")
        labels = np.zeros((1,) * labels.ndim, np.int32)
    state.emit(operation, labels)


def _cropped_axes(state: Labelling, operation: Operation, rank: int) -> set[int]:
    """The axes of which a Resize may read a part only."""
    mode = operation.attributes.get("coordinate_transformation_mode", "")
    if (mode.decode() if isinstance(mode, bytes) else mode) != "tf_crop_and_resize":
        return set()
    axes = [axis % rank for axis in operation.attributes.get("axes", range(rank))]
    regions = state.constant(operation, 1)
    if regions is None or regions.size != 2 * len(axes):
        return set(axes)
    starts, ends = regions.reshape(2, -1)
    return {axis for axis, start, end in zip(axes, starts, ends, strict=True) if (start, end) != (0, 1)}
