"""Products of two activations, and the rules of the attention operators of opset 23.

In ``q kᵀ`` the contracted axis is a width: query and key units meet there one by one. The batch cells of the
product that have units of their own are its **heads**: each gets an atom, which holds the units of its row
and travels with the scores to the product with ``v``, whose row it holds too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.rules.elementwise import meet
from onnx_mdp.rules.labelling import Labelling, Labels, align, align_shape, couple, rule, squash, varying

__all__ = ["Side", "multiply_activations", "multiply_sides"]


def multiply_activations(state: Labelling, operation: Operation) -> None:
    """``a b`` of two activations (or a batched constant), summed over the last axis of ``a``."""
    rank = len(state.shape(operation.outputs[0]))
    names = operation.inputs[:2]
    if min(len(state.shape(name)) for name in names) < 2 or any(map(state.is_constant, names)):
        state.freeze_inputs(operation, f"{operation} multiplies by a vector or a batched constant")
        return
    left, right = (
        Side(align(state.labels(name), rank), align_shape(state.shape(name), rank)) for name in names
    )
    state.emit(operation, multiply_sides(state, operation, left, right))


@dataclass(frozen=True, slots=True)
class Side:
    """One factor of a product: squashed labels and the shape, both of the rank of the product."""

    labels: Labels
    shape: tuple[int, ...]

    @property
    def transposed(self) -> Side:
        return Side(self.labels.swapaxes(-1, -2), (*self.shape[:-2], self.shape[-1], self.shape[-2]))


def multiply_sides(state: Labelling, operation: Operation, a: Side, b: Side) -> Labels:
    """The labels of ``a b``, and what meets in it."""
    left, right, rank = a.labels, b.labels, a.labels.ndim
    summed = rank - 1 in varying(left) or rank - 2 in varying(right)
    outer = rank - 2 in varying(left), rank - 1 in varying(right)
    if any(outer) if summed else all(outer):
        why = f"{operation} multiplies two prunable axes"
        state.freeze(left, why)
        state.freeze(right, why)
        return np.zeros((1,) * rank, np.int32)
    if summed:
        return _contract(state, operation, left, right.swapaxes(-1, -2))
    return _mix(state, operation, a, b)


def _contract(state: Labelling, operation: Operation, left: Labels, right: Labels) -> Labels:
    """``q kᵀ``: units of both sides meet; every batch cell with units of its own becomes a head."""
    why = f"{operation} contracts a prunable axis with a fixed one"
    state.freeze(np.where(right == 0, left, 0), why)
    state.freeze(np.where(left == 0, right, 0), why)
    state.union(left, right)
    joint = squash(np.where((left > 0) & (right > 0), left, 0))
    state.calls(joint, "qk")
    state.reduces(operation, 0)
    state.reduces(operation, 1)
    if any(axis < joint.ndim - 2 for axis in varying(joint)):
        rows = _rows(state, joint)
        state.freeze(np.where((joint == 0).any((-2, -1), keepdims=True), rows, 0), why)
        return rows
    return np.zeros((1,) * joint.ndim, np.int32)


def _rows(state: Labelling, labels: Labels) -> Labels:
    """A new atom for each batch cell; it holds the labels of the cell."""
    shape = (*labels.shape[:-2], 1, 1)
    rows = state.fresh(int(np.prod(shape))).reshape(shape)
    state.calls(rows, "heads")
    state.holds(rows, labels)
    return rows


def _mix(state: Labelling, operation: Operation, a: Side, b: Side) -> Labels:
    """``scores v``: the units of ``v`` pass; the heads of the scores hold its rows."""
    rank = a.labels.ndim
    wide, thin = (a.labels, b) if rank - 2 in varying(a.labels) else (b.labels, a)
    batch = {axis for axis in varying(wide) if axis < rank - 2}
    if not {rank - 1, rank - 2} & set(varying(wide)):
        return _meet_heads(state, operation, a.labels, b.labels)
    state.calls(wide, "value")
    if (thin.labels > 0).any():
        why = f"{operation} multiplies heads with rows that cannot be pruned"
        state.freeze(np.where(wide == 0, thin.labels, 0), why)
        if not set(varying(thin.labels)) <= batch:
            state.freeze(thin.labels, why)
        state.holds(thin.labels, wide)
    elif batch:
        rows = _rows(state, wide)
        if any(thin.shape[axis] > 1 for axis in batch):
            state.freeze(rows, f"{operation} mixes each head with scores that cannot be pruned")
    return wide


def _meet_heads(state: Labelling, operation: Operation, left: Labels, right: Labels) -> Labels:
    """Both sides are labelled by batch cell alone."""
    why = f"{operation} multiplies prunable with fixed batch entries"
    state.freeze(np.where(right == 0, left, 0), why)
    state.freeze(np.where(left == 0, right, 0), why)
    state.union(left, right)
    return np.asarray(np.where((left > 0) & (right > 0), left, 0), np.int32)


@rule("Attention")
def attention(state: Labelling, operation: Operation) -> None:
    """``softmax(scale · q kᵀ + mask) v``, of ``[batch, heads, tokens, width]`` or with heads × width as one.

    Fewer heads of key and value than of query serve a group of these each: key head ``h`` the h-th group.
    Frozen: with a key/value cache, with scores as an output, tokens, and where it reads a constant.
    """
    if any(operation.inputs[4:]) or any(operation.outputs[1:]):
        state.freeze_inputs(operation, f"{operation} keeps keys and values, or gives its scores away")
        return
    names = operation.inputs[:3]
    if any(map(state.is_constant, names)) or any(0 in varying(state.labels(name)) for name in names):
        state.freeze_inputs(operation, f"{operation} reads a constant, or a prunable batch")
        return
    counts = [_head_count(state, operation, slot) for slot in range(3)]
    query, key, value = (
        _of_heads(state, operation, slot, counts[0] // count) for slot, count in enumerate(counts)
    )
    scores = multiply_sides(state, operation, query, key.transposed)
    shape = (*query.shape[:3], key.shape[2])
    mask = {3: operation.inputs[3]} if len(operation.inputs) > 3 and operation.inputs[3] else {}
    if mask:
        scores = meet(state, operation, shape, mask, scores)
    if {2, 3} & set(varying(scores)):
        state.freeze(scores, f"{operation} normalises over a prunable axis")
        scores = np.zeros_like(scores)
    mixed = multiply_sides(state, operation, Side(scores, shape), value)
    if len(state.shape(operation.outputs[0])) == 3:
        state.view(mixed, 1)
        mixed = _merge_width(mixed, counts[0], value.shape[3])
    state.emit(operation, mixed)


def _head_count(state: Labelling, operation: Operation, slot: int) -> int:
    shape = state.shape(operation.inputs[slot])
    return int(
        shape[1] if len(shape) == 4 else operation.attributes["kv_num_heads" if slot else "q_num_heads"]
    )


def _of_heads(state: Labelling, operation: Operation, slot: int, times: int) -> Side:
    """An input as ``[batch, heads, tokens, width]``, each head ``times`` over."""
    name = operation.inputs[slot]
    heads = _head_count(state, operation, slot)
    labels, shape = _split_width(state.labels(name), state.shape(name), heads)
    if len(state.shape(name)) == 3:
        state.view(labels, 1)
    if 1 in varying(labels):
        labels = labels.repeat(times, 1)
    return Side(labels, (shape[0], shape[1] * times, *shape[2:]))


def _split_width(labels: Labels, shape: tuple[int, ...], heads: int) -> tuple[Labels, tuple[int, ...]]:
    """Labels and shape of ``[batch, tokens, heads · width]`` as ``[batch, heads, tokens, width]``."""
    if len(shape) == 4:
        return labels, shape
    batch, tokens, both = shape
    if 2 in varying(labels):
        labels = labels.reshape(*labels.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    else:
        labels = labels[:, None]
    return squash(labels), (batch, heads, tokens, both // heads)


def _merge_width(labels: Labels, heads: int, width: int) -> Labels:
    """The inverse of `_split_width`."""
    batch, _, tokens, _ = labels.shape
    wide = np.broadcast_to(labels, (batch, heads, tokens, width))
    return wide.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * width)


@rule("RotaryEmbedding")
def rotates(state: Labelling, operation: Operation) -> None:
    """The widths of a head turn in pairs by angles that all heads share: heads may go.

    Frozen: the widths, tokens, and heads that the operator does not count.
    """
    name = operation.inputs[0]
    shape = state.shape(name)
    heads = shape[1] if len(shape) == 4 else operation.attributes.get("num_heads", 0)
    labels = state.labels(name)
    if not heads or not set(varying(labels)) <= {1, 2, 3}:
        state.freeze_inputs(operation, f"{operation} does not say how many heads it turns")
        return
    labels, whole = _split_width(labels, shape, heads)
    labels = couple(state, labels, 3, f"{operation} turns fixed and prunable widths together")
    if any(axis in varying(labels) for axis in (0, 2)):
        state.freeze(labels, f"{operation} turns each token by another angle")
    state.emit(operation, labels if len(shape) == 4 else _merge_width(labels, heads, whole[3]))
