"""Rules for operators that sum over an axis: the label ends there, and weights make new ones."""

from __future__ import annotations

import numpy as np

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.rules.attention import Side, multiply_activations, multiply_sides
from onnx_mdp.rules.elementwise import meet
from onnx_mdp.rules.labelling import Labelling, Labels, couple, rule, varying

__all__ = ["reduced_axes"]


@rule("Conv")
def conv(state: Labelling, operation: Operation) -> None:
    """``y[o] = sum_i w[o, i] * x[i]``; the j-th channels of all groups are one unit, depthwise ones pass.

    The weight is ``[O, I/group, ...]``. Frozen: units whose weight is computed at run time.
    """
    weight = state.constant(operation, 1)
    groups = operation.attributes.get("group", 1)
    if weight is None:
        state.freeze_inputs(operation, f"{operation} computes its weight at run time")
        return
    out_channels, group_inputs = weight.shape[:2]
    channels = _channels(state, operation, group_inputs * groups)
    if groups == 1:
        state.site(operation, 1, 1, channels, "in")
        made = state.fresh(out_channels)
    elif group_inputs == 1:
        made = np.repeat(channels, out_channels // groups)
    else:
        channels = _couple_groups(state, operation, channels, groups)
        state.site(operation, 1, 1, channels[:group_inputs], "in")
        made = np.tile(state.fresh(out_channels // groups), groups)
    state.site(operation, 1, 0, made, "each" if group_inputs == 1 and groups > 1 else "out")
    state.site(operation, 2, 0, made)
    state.reduces(operation, 0)
    state.emit(operation, made.reshape((1, -1) + (1,) * (weight.ndim - 2)))


@rule("ConvTranspose")
def conv_transpose(state: Labelling, operation: Operation) -> None:
    """As Conv, with the weight laid out ``[I, O/group, ...]``.

    Frozen: units whose weight is computed at run time.
    """
    weight = state.constant(operation, 1)
    groups = operation.attributes.get("group", 1)
    if weight is None:
        state.freeze_inputs(operation, f"{operation} computes its weight at run time")
        return
    inputs, group_outputs = weight.shape[:2]
    channels = _channels(state, operation, inputs)
    depthwise = groups == inputs > 1
    if depthwise:
        made = np.repeat(channels, group_outputs)
    else:
        if groups > 1:
            channels = _couple_groups(state, operation, channels, groups)
        single = state.fresh(group_outputs)
        state.site(operation, 1, 1, single, "out")
        made = np.tile(single, groups)
    state.site(operation, 1, 0, channels, "each" if depthwise else "in")
    state.site(operation, 2, 0, made)
    state.reduces(operation, 0)
    state.emit(operation, made.reshape((1, -1) + (1,) * (weight.ndim - 2)))


def _channels(state: Labelling, operation: Operation, count: int) -> Labels:
    labels = state.labels(operation.inputs[0])
    return state.vector(labels, 1, count, f"{operation} reads spatially varying channels")


def _couple_groups(state: Labelling, operation: Operation, channels: Labels, groups: int) -> Labels:
    """The j-th channels of all groups leave together, so that the groups stay equally wide."""
    joint = couple(state, channels.reshape(groups, -1), 0, f"{operation} has groups with fixed channels")
    return np.tile(joint.reshape(-1), groups)


@rule("Gemm")
def gemm(state: Labelling, operation: Operation) -> None:
    """``y = alpha * A B + beta * C``: where one of A and B is constant its rows or columns are new units.

    Either may be transposed, C is met as in Add. Frozen: units that meet fixed ones.
    """
    axes = [operation.attributes.get(key, 0) for key in ("transA", "transB")]
    contracted = (0 if axes[0] else 1, 1 if axes[1] else 0)
    if state.is_constant(operation.inputs[1]):
        made = _made_by_matrix(state, operation, 0, 1, contracted).reshape(1, -1)
    elif state.is_constant(operation.inputs[0]):
        made = _made_by_matrix(state, operation, 1, 0, contracted).reshape(-1, 1)
    else:
        sides = [Side(state.labels(name), state.shape(name)) for name in operation.inputs[:2]]
        left, right = (side.transposed if turned else side for side, turned in zip(sides, axes, strict=True))
        made = multiply_sides(state, operation, left, right)
    if len(operation.inputs) > 2 and operation.inputs[2]:
        made = meet(state, operation, state.shape(operation.outputs[0]), {2: operation.inputs[2]}, made)
    state.emit(operation, made)


def _made_by_matrix(
    state: Labelling, operation: Operation, data: int, weight: int, contracted: tuple[int, int]
) -> Labels:
    """New units of a product of two matrices, one constant; its own axis ends the units of the other."""
    matrix, axis = state.shape(operation.inputs[weight]), contracted[weight]
    labels = state.labels(operation.inputs[data])
    why = f"{operation} reads two prunable axes"
    channels = state.vector(labels, contracted[data], matrix[axis], why)
    made = state.fresh(matrix[1 - axis])
    state.site(operation, weight, axis, channels, "in")
    state.site(operation, weight, 1 - axis, made, "out")
    state.reduces(operation, data)
    return made


@rule("MatMul")
def matmul(state: Labelling, operation: Operation) -> None:
    """``x W`` or ``W x`` with a constant matrix ``W``, or two activations, whose units meet.

    Frozen: units that meet fixed ones; factors that are vectors or batched constants.
    """
    left, right = (state.is_constant(name) for name in operation.inputs)
    ranks = [len(state.shape(name)) for name in operation.inputs]
    if right and ranks[1] == 2:
        _matmul_by_weight(state, operation, data=0, weight=1)
    elif left and not right and ranks[0] == 2 and ranks[1] > 1:
        _matmul_by_weight(state, operation, data=1, weight=0)
    else:
        multiply_activations(state, operation)


def _matmul_by_weight(state: Labelling, operation: Operation, *, data: int, weight: int) -> None:
    matrix = state.shape(operation.inputs[weight])
    in_axis, data_axis = (0, -1) if weight else (1, -2)
    labels = state.labels(operation.inputs[data])
    if state.is_constant(operation.inputs[data]):
        # A decoder's first layer may read learned queries alone: they are cut as an activation would be.
        labels = state.fresh(matrix[in_axis])
        state.site(operation, data, len(state.shape(operation.inputs[data])) - 1, labels)
    channels = state.vector(labels, data_axis, matrix[in_axis], f"{operation} reads two prunable axes")
    made = state.fresh(matrix[1 - in_axis])
    state.site(operation, weight, in_axis, channels, "in")
    state.site(operation, weight, 1 - in_axis, made, "out")
    state.reduces(operation, data)
    rank = len(state.shape(operation.outputs[0]))
    state.emit(operation, made.reshape((1,) * (rank - 1) + (-1,) if weight else (1,) * (rank - 2) + (-1, 1)))


@rule(
    *(
        "ReduceSum ReduceMean ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSum "
        "ReduceLogSumExp"
    ).split()
)
def reduces_axes(state: Labelling, operation: Operation) -> None:
    """Units end where they are summed over, and pass elsewhere. Over one of two axes, rows are left.

    Frozen: with axes that are computed at run time.
    """
    labels = state.labels(operation.inputs[0])
    axes = reduced_axes(state, operation, labels.ndim)
    if axes is None:
        state.freeze_inputs(operation, f"{operation} computes its axes at run time")
        return
    inside = [axis for axis in varying(labels) if axis in axes]
    if inside and len(inside) < len(varying(labels)):
        state.reduces(operation, 0)
        shape = [1 if axis in inside else extent for axis, extent in enumerate(labels.shape)]
        rows = state.fresh(int(np.prod(shape))).reshape(shape)
        state.calls(rows, "groups")
        state.holds(rows, labels)
        labels = rows
    elif inside:
        state.reduces(operation, 0)
        labels = np.zeros((1,) * labels.ndim, np.int32)
    if not operation.attributes.get("keepdims", 1):
        labels = labels.reshape([extent for axis, extent in enumerate(labels.shape) if axis not in axes])
    state.emit(operation, labels)


def reduced_axes(state: Labelling, operation: Operation, rank: int) -> tuple[int, ...] | None:
    """The axes that a reduction ends; None if they are computed at run time."""
    listed = operation.attributes.get("axes")
    if len(operation.inputs) > 1 and operation.inputs[1]:
        given = state.constant(operation, 1)
        if given is None:
            return None
        listed = given.reshape(-1).tolist()
    if not listed:
        return () if operation.attributes.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(int(axis) % rank for axis in listed)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "MaxPool", "AveragePool", "LpPool")
def pools(state: Labelling, operation: Operation) -> None:
    """Channels are pooled one by one.

    Frozen: units over the pooled positions, and where the indices of maxima are an output.
    """
    labels = state.labels(operation.inputs[0])
    spatial = [axis for axis in varying(labels) if axis > 1]
    if spatial or any(map(state.is_read, operation.outputs[1:])):
        state.freeze(labels, f"{operation} pools over a prunable axis, or gives places of all channels")
        labels = np.zeros((1,) * labels.ndim, np.int32)
    state.emit(operation, labels)


@rule("RNN", "GRU", "LSTM")
def recurs(state: Labelling, operation: Operation) -> None:
    """Input features end at the columns of the input weight.

    Frozen: initial states and the hidden width.
    """
    why = f"{operation} carries a state"
    for name in operation.inputs[3:]:
        if name:
            state.freeze(state.labels(name), why)
    weight = state.constant(operation, 1)
    labels = state.labels(operation.inputs[0])
    if weight is None or state.constant(operation, 2) is None or set(varying(labels)) - {2}:
        state.freeze_inputs(operation, f"{why}, or computes its weights")
        return
    channels = state.vector(labels, 2, weight.shape[2], why)
    state.site(operation, 1, 2, channels, "in")
    state.reduces(operation, 0)
