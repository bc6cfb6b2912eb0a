"""Rules for operators that treat every element alike: labels pass, or meet under broadcasting."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.rules.labelling import Labelling, Labels, align, align_shape, couple, rule, squash, varying

__all__ = ["meet"]


@rule(
    *(
        "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp "
        "Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not "
        "Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan "
        "Tanh ThresholdedRelu CastLike BitCast com.microsoft::Gelu com.microsoft::QuickGelu"
    ).split()
)
def passes(state: Labelling, operation: Operation) -> None:
    """Each output element depends on the input element at the same place."""
    state.emit(operation, state.labels(operation.inputs[0]))


@rule("Dropout")
def dropout(state: Labelling, operation: Operation) -> None:
    """At inference the identity, with an optional mask of the same shape."""
    for output in range(len(operation.outputs)):
        state.emit(operation, state.labels(operation.inputs[0]), output)


@rule("Shape")
def shape(state: Labelling, operation: Operation) -> None:
    """Reads no element: a computed shape is patched where it is used."""


@rule("Size")
def size(state: Labelling, operation: Operation) -> None:
    """One number that cannot be patched.

    Frozen: what it counts, unless the count is a constant.
    """
    state.freeze_inputs(operation, f"{operation} counts a prunable axis together with a symbolic one")


@rule(
    *(
        "Add Sub Mul Div Pow Min Max Sum Mean Mod PRelu Where Equal Greater GreaterOrEqual Less "
        "LessOrEqual And Or Xor BitShift BitwiseAnd BitwiseOr BitwiseXor com.microsoft::BiasGelu "
        "com.microsoft::FastGelu"
    ).split()
)
def meets(state: Labelling, operation: Operation) -> None:
    """Operands meet position by position under broadcasting; constants are cut as the others are.

    Frozen: units that meet a fixed index, or a single one that is broadcast over them; two axes that cross.
    """
    operands = {slot: name for slot, name in enumerate(operation.inputs) if name}
    joint = meet(state, operation, state.shape(operation.outputs[0]), operands)
    state.emit(operation, joint if varying(joint) else _spread(state, operation, operands, joint))


def meet(
    state: Labelling,
    operation: Operation,
    shape: tuple[int, ...],
    operands: Mapping[int, str],
    computed: Labels | None = None,
) -> Labels:
    """The labels of ``shape`` where operands, by slot, meet; ``computed`` is one that has no name."""
    aligned = {
        slot: align(state.labels(name), len(shape))
        for slot, name in operands.items()
        if not state.is_constant(name)
    }
    extents = {slot: align_shape(state.shape(name), len(shape)) for slot, name in operands.items()}
    names = {slot: repr(name) for slot, name in operands.items()}
    if computed is not None:
        aligned[-1], extents[-1], names[-1] = computed, shape, "what it computes"
    _leave_computed(state, operation, operands, aligned)
    copies = _leave_copies(state, operands, aligned, extents)
    for slot in (slot for slot in copies if not varying(aligned[slot])):
        state.freeze(aligned[slot], f"{operation} meets one prunable index of {names[slot]} many times over")
        aligned[slot] = np.zeros_like(aligned[slot])
    axes = {axis for labels in aligned.values() for axis in varying(labels)}
    for slot in aligned:
        heads = bool(varying(aligned[slot])) and set(varying(aligned[slot])) < axes
        if any(extents[slot][axis] == 1 and shape[axis] > 1 for axis in axes) and not heads:
            state.freeze(aligned[slot], f"{operation} broadcasts {names[slot]} over a prunable axis")
            aligned[slot] = np.zeros_like(aligned[slot])
    joint = np.zeros((1,) * len(shape), np.int32)
    for slot in sorted(aligned, key=lambda s: -int((aligned[s] > 0).any())):
        joint = _meet(state, operation, joint, aligned[slot])
    for slot, labels in aligned.items():
        if slot in copies:
            continue
        _check_broadcast(state, operation, names[slot], labels, extents[slot], joint)
    for slot in operands:
        if slot in copies:
            found, own = squash(joint), len(state.shape(operands[slot]))
            state.tensors[operands[slot]] = found.reshape(found.shape[len(shape) - own :])
        elif slot not in aligned:
            _cut_constant(state, operation, slot, extents[slot], joint)
    return joint


def _spread(state: Labelling, operation: Operation, operands: Mapping[int, str], joint: Labels) -> Labels:
    """A constant with one axis gives an activation of extent 1 its units: a statistic times a gain."""
    extents = {slot: align_shape(state.shape(name), joint.ndim) for slot, name in operands.items()}
    constants = [slot for slot, name in operands.items() if state.is_constant(name)]
    axes = {axis for slot in constants for axis, extent in enumerate(extents[slot]) if extent > 1}
    floats = all(state.shadow.constants[operands[slot]].dtype.kind == "f" for slot in constants)
    if len(axes) != 1 or not floats or len(constants) == len(operands):
        return joint
    (axis,) = axes
    if any(extents[slot][axis] > 1 for slot in operands if slot not in constants):
        return joint
    count = max(extents[slot][axis] for slot in constants)
    made = state.fresh(count).reshape([count if a == axis else 1 for a in range(joint.ndim)])
    for slot in constants:
        _cut_constant(state, operation, slot, extents[slot], made)
    return made


def _leave_computed(
    state: Labelling, operation: Operation, operands: Mapping[int, str], aligned: dict[int, Labels]
) -> None:
    """What depends on no input value is cut as a constant is, unless its own labels fit the others."""
    computed = [slot for slot in aligned if slot in operands and state.is_computed(operands[slot])]
    axes = {axis for slot, labels in aligned.items() if slot not in computed for axis in varying(labels)}
    for slot in computed:
        own = set(varying(aligned[slot]))
        if not own or (axes and own != axes):
            state.freeze(aligned.pop(slot), f"{operation} meets {operands[slot]!r} along another axis")


def _leave_copies(
    state: Labelling,
    operands: Mapping[int, str],
    aligned: dict[int, Labels],
    extents: Mapping[int, tuple[int, ...]],
) -> tuple[int, ...]:
    """Operands that were expanded, for this reader alone, along axes that are labelled here."""
    axes = {axis for labels in aligned.values() for axis in varying(labels)}
    found = []
    for slot, name in operands.items():
        missing = axes - set(varying(aligned[slot])) if slot in aligned else set()
        full = all(extents[slot][axis] > 1 for axis in axes)
        offset = len(extents[slot]) - len(state.shape(name))
        if missing and full and missing <= {axis + offset for axis in state.repeats(name)}:
            found.append(slot)
    return tuple(found)


def _meet(state: Labelling, operation: Operation, joint: Labels, labels: Labels) -> Labels:
    axes, others = set(varying(joint)), set(varying(labels))
    if axes and others and (axes < others or others < axes):
        heads, units = (joint, labels) if axes < others else (labels, joint)
        state.freeze(np.where(units == 0, heads, 0), f"{operation} combines a head with fixed units")
        state.holds(heads, units)
        return units
    if axes and others and axes != others:
        why = f"{operation} combines two prunable axes"
        state.freeze(joint, why)
        state.freeze(labels, why)
        return np.zeros((1,) * joint.ndim, np.int32)
    state.union(joint, labels)
    return np.asarray(np.where(joint > 0, joint, labels), np.int32)


def _check_broadcast(
    state: Labelling, operation: Operation, name: str, labels: Labels, extents: tuple[int, ...], joint: Labels
) -> None:
    """An operand may leave a labelled axis out (extent 1), but may not be fixed or single along it."""
    for axis in varying(joint):
        if extents[axis] > 1:
            fixed = ((labels == 0) | (axis not in varying(labels))) & (joint > 0)
            state.freeze(np.where(fixed, joint, 0), f"{operation} meets {name}, which cannot be pruned")


def _cut_constant(
    state: Labelling, operation: Operation, slot: int, extents: tuple[int, ...], joint: Labels
) -> None:
    axes = [axis for axis in varying(joint) if extents[axis] > 1]
    for axis in axes:
        vector = state.vector(
            joint, axis, extents[axis], f"{operation} has a constant over two prunable axes"
        )
        offset = len(extents) - len(state.shape(operation.inputs[slot]))
        state.site(operation, slot, axis - offset, vector)


@rule("Softmax", "LogSoftmax", "Hardmax")
def normalises(state: Labelling, operation: Operation) -> None:
    """Labels pass along the axes that are not normalised.

    Frozen: the normalised axis, whose sum would change.
    """
    labels = state.labels(operation.inputs[0])
    flattens = operation.version < 13
    axis = operation.attributes.get("axis", 1 if flattens else -1) % max(labels.ndim, 1)
    if any(a == axis or (flattens and a > axis) for a in varying(labels)):
        state.freeze(labels, f"{operation} normalises over a prunable axis")
        labels = np.zeros_like(labels)
    state.emit(operation, labels)


@rule("BatchNormalization")
def normalises_each_channel(state: Labelling, operation: Operation) -> None:
    """Statistics and affine parameters are constants of one channel each.

    Frozen: parameters that are computed at run time.
    """
    labels = state.labels(operation.inputs[0])
    why = f"{operation} normalises over a prunable axis"
    for axis in varying(labels):
        if axis != 1:
            labels = couple(state, labels, axis, why)
    vector = state.vector(labels, 1, state.shape(operation.inputs[0])[1], why)
    for slot in range(1, len(operation.inputs)):
        state.site(operation, slot, 0, vector)
    state.emit(operation, labels)
