"""Rules for products of two activations and for statistics over a labelled axis: attention and its norms.

In ``q kᵀ`` the contracted axis is a width: query and key units meet there one by one. The batch cells of the
product that have units of their own are its **heads**: each gets an atom, which holds the units of its row
and travels with the scores to the product with ``v``, whose row it holds too.
"""

from __future__ import annotations

import numpy as np

from onnx_mdp.rules.labelling import Labelling, Labels, align, rule, varying
from onnx_mdp.shadow import Operation

__all__ = ["multiply_activations"]


def multiply_activations(state: Labelling, operation: Operation) -> None:
    """``a b`` of two activations (or a batched constant), summed over the last axis of ``a``."""
    rank = len(state.shape(operation.outputs[0]))
    names = operation.inputs[:2]
    ranks = [len(state.shape(name)) for name in names]
    if min(ranks) < 2 or any(map(state.is_constant, names)):
        state.freeze_inputs(operation, f"{operation} multiplies by a vector or a batched constant")
        return
    left, right = (align(state.labels(name), rank) for name in names)
    summed = rank - 1 in varying(left) or rank - 2 in varying(right)
    outer = rank - 2 in varying(left), rank - 1 in varying(right)
    if any(outer) if summed else all(outer):
        why = f"{operation} multiplies two prunable axes"
        state.freeze(left, why)
        state.freeze(right, why)
    elif summed:
        _contract(state, operation, left, right.swapaxes(-1, -2))
    else:
        _mix(state, operation, left, right)


def _contract(state: Labelling, operation: Operation, left: Labels, right: Labels) -> None:
    """``q kᵀ``: units of both sides meet; every batch cell with units of its own becomes a head."""
    why = f"{operation} contracts a prunable axis with a fixed one"
    state.freeze(np.where(right == 0, left, 0), why)
    state.freeze(np.where(left == 0, right, 0), why)
    state.union(left, right)
    joint = np.asarray(np.where((left > 0) & (right > 0), left, 0), np.int32)
    state.calls(joint, "qk")
    state.reduces(operation, 0)
    state.reduces(operation, 1)
    if any(axis < joint.ndim - 2 for axis in varying(joint)):
        state.emit(operation, _rows(state, joint))


def _rows(state: Labelling, labels: Labels) -> Labels:
    """A new atom for each batch cell; it holds the labels of the cell."""
    shape = (*labels.shape[:-2], 1, 1)
    rows = state.fresh(int(np.prod(shape))).reshape(shape)
    state.calls(rows, "heads")
    state.holds(rows, labels)
    return rows


def _mix(state: Labelling, operation: Operation, left: Labels, right: Labels) -> None:
    """``scores v``: the units of ``v`` pass; the heads of the scores hold its rows."""
    rank = left.ndim
    wide, thin, slot = (left, right, 1) if rank - 2 in varying(left) else (right, left, 0)
    batch = {axis for axis in varying(wide) if axis < rank - 2}
    extents = (1,) * (rank - len(state.shape(operation.inputs[slot]))) + state.shape(operation.inputs[slot])
    if not {rank - 1, rank - 2} & set(varying(wide)):
        _meet_heads(state, operation, left, right)
        return
    state.calls(wide, "value")
    if (thin > 0).any():
        why = f"{operation} multiplies heads with rows that cannot be pruned"
        state.freeze(np.where(wide == 0, thin, 0), why)
        if not set(varying(thin)) <= batch:
            state.freeze(thin, why)
        state.holds(thin, wide)
    elif batch:
        rows = _rows(state, wide)
        if any(extents[axis] > 1 for axis in batch):
            state.freeze(rows, f"{operation} mixes each head with scores that cannot be pruned")
    state.emit(operation, wide)


def _meet_heads(state: Labelling, operation: Operation, left: Labels, right: Labels) -> None:
    """Both sides are labelled by batch cell alone."""
    why = f"{operation} multiplies prunable with fixed batch entries"
    state.freeze(np.where(right == 0, left, 0), why)
    state.freeze(np.where(left == 0, right, 0), why)
    state.union(left, right)
    state.emit(operation, np.where((left > 0) & (right > 0), left, 0))


@rule("LayerNormalization", "RMSNormalization")
def normalises_over_units(state: Labelling, operation: Operation) -> None:
    """Statistics over the kept units of the last axes; one scale and bias for each unit."""
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
    if any(name in reader.inputs for name in operation.outputs[1:] for reader in state.shadow.operations):
        state.freeze(labels, f"{operation} gives its statistics to another operator")
    state.reduces(operation, 0)
    state.emit(operation, labels)
