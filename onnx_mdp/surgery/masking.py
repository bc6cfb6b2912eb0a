"""The masked original: the model with a mask before whatever reads a pruned axis, and nothing sliced.

A mask stands in front of each Conv, Gemm, MatMul and reduction that reads a pruned axis (−∞ before a
maximum, kept-unit counts for a mean), a LayerNormalization is written out with statistics over kept units,
and the branches of removed blocks are multiplied by zero. "Zero the producer's weights" would be another,
false statement: a bias or ``sigmoid(0)`` leaves a constant behind.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from onnx_mdp.analysis.labels import keep_vector
from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.numerics.precision import in_float32
from onnx_mdp.numerics.qdq_form import in_qdq_form
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.rules import Labelling, Labels
from onnx_mdp.rules.contraction import reduced_axes
from onnx_mdp.running.computation import weightless, with_weights
from onnx_mdp.surgery.attention_scale import score_factors

__all__ = ["masked_model"]

_NORMS = ("LayerNormalization", "RMSNormalization")
_GROUP_NORMS = ("GroupNormalization", "InstanceNormalization")
_NEUTRAL = {"ReduceMax": -math.inf, "ReduceMin": math.inf, "ReduceLogSumExp": -math.inf, "ReduceProd": 1.0}


def masked_model(original: ir.Model, structure: Structure, plan: PruningPlan) -> ir.Model:
    """The original graph (projections split, in float32) with masks, nothing sliced; it shares weights."""
    whole = structure.shadow.model if structure.shadow.rearranged else in_qdq_form(original)
    proto, weights = weightless(in_float32(whole))
    removed = removed_classes(plan, structure)
    masks = _Masks(proto, {n.output[0]: n for n in proto.graph.node if n.output})
    for index, slot in structure.graph.reductions:
        operation = structure.shadow.operations[index]
        labels = structure.graph.read(operation, slot)
        if labels is not None and removed[labels].any():
            masks.restrict(operation, slot, _Kept.of(structure, operation, slot, labels, removed))
    if plan.rescale_attention:
        for index, factor in score_factors(structure, removed).items():
            masks.scale(structure.shadow.operations[index], factor)
    for block in structure.blocks:
        if block.name in plan.removed_blocks:
            joint = structure.shadow.operations[block.joint]
            masks.silence(joint.outputs[0], list(joint.inputs).index(block.branch))
    masks.install()
    return with_weights(proto, weights)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Which entries of an input stay, broadcast, and how many of ``full`` stay in what one statistic is of.

    That is the whole of the reduced axes, or one group: where anything of it stays, as much stays as of any
    other. ``shape`` is the shape of the input at the bound sizes.
    """

    mask: npt.NDArray[np.bool_]
    full: int
    count: int
    shape: tuple[int, ...]

    @staticmethod
    def of(
        structure: Structure, operation: Operation, slot: int, labels: Labels, removed: npt.NDArray[np.bool_]
    ) -> _Kept:
        shape = structure.shadow.shapes[operation.inputs[slot]]
        mask = keep_vector(labels, removed)
        parts = _parts(structure, operation, mask)
        return _Kept(mask, parts.shape[1], int(parts.sum(1).max()), shape)


def _parts(structure: Structure, operation: Operation, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """``bool[statistics, entries]``: the part of a mask that each statistic of an operation is of."""
    rank = mask.ndim
    if operation.op_type in _GROUP_NORMS:
        groups = operation.attributes.get("num_groups", mask.shape[1]) if mask.shape[1] > 1 else 1
        return mask.reshape(mask.shape[0] * groups, -1)
    axes: Sequence[int] = ()
    if operation.op_type in _NORMS:
        axes = range(operation.attributes.get("axis", -1) % rank, rank)
    elif operation.op_type == "ReduceMean":
        axes = reduced_axes(Labelling(structure.shadow), operation, rank) or ()
    last = np.moveaxis(mask, axes, range(rank - len(axes), rank))
    return last.reshape(-1, math.prod(mask.shape[axis] for axis in axes))


class _Masks:
    """Collects the nodes to insert before (and after) nodes of a proto."""

    def __init__(self, proto: onnx.ModelProto, makers: Mapping[str, onnx.NodeProto]) -> None:
        self.proto = proto
        self.makers = makers
        self.before: dict[str, list[onnx.NodeProto]] = {}
        self.after: dict[str, list[onnx.NodeProto]] = {}
        self.count = 0

    def restrict(self, operation: Operation, slot: int, kept: _Kept) -> None:
        """Let an operation see only the kept indices of its input ``slot``."""
        node = self.makers[operation.outputs[0]]
        name = node.input[slot]
        if node.op_type in _NORMS:
            self._restrict_norm(operation, kept)
            return
        if node.op_type in _GROUP_NORMS:
            self._restrict_group_norm(operation, kept)
            return
        neutral = _NEUTRAL.get(node.op_type, 0.0)
        node.input[slot] = self._where(operation.outputs[0], kept.mask, name, neutral)
        if node.op_type == "ReduceMean":
            # Apart, for their quotient would be rounded.
            full, count = (self._constant(np.asarray(n, np.float32)) for n in (kept.full, kept.count))
            output = operation.outputs[0]
            mean, total = f"{output}__mean_over_all", f"{output}__total"
            self.after.setdefault(output, []).extend(
                [
                    helper.make_node("Mul", [mean, full], [total]),
                    helper.make_node("Div", [total, count], [output]),
                ]
            )
            node.output[0] = mean

    def _restrict_norm(self, operation: Operation, kept: _Kept) -> None:
        """Write the normalisation out, with mean and variance over the kept units alone.

        The masked node becomes the last Mul or Add; what it computes of removed units, nobody reads.
        """
        output = operation.outputs[0]
        node = self.makers[output]
        centred = operation.op_type == "LayerNormalization"
        mask = self._constant(kept.mask.astype(np.float32))
        rank = len(kept.shape)
        axes = range(operation.attributes.get("axis", -1) % rank, rank)
        alike = math.prod(kept.shape[axis] for axis in axes if kept.mask.shape[axis] == 1)
        count = self._constant(np.asarray(kept.count * alike, np.float32))
        epsilon = self._constant(np.asarray(operation.attributes.get("epsilon", 1e-5), np.float32))
        add = functools.partial(self._add, output)

        def mean(value: str) -> str:
            place = self._constant(np.asarray(axes, np.int64))
            return add("Div", add("ReduceSum", value, place), count)

        value = node.input[0]
        if centred:
            value = add("Sub", value, mean(add("Mul", value, mask)))
        kept_value = add("Mul", value, mask)
        deviation = add("Sqrt", add("Add", mean(add("Mul", kept_value, kept_value)), epsilon))
        value = add("Mul", add("Div", value, deviation), node.input[1])
        bias = (
            node.input[2]
            if len(node.input) > 2 and node.input[2]
            else self._constant(np.zeros((), np.float32))
        )
        del node.input[:], node.attribute[:], node.output[1:]
        node.op_type = "Add"
        node.input.extend([value, bias])

    def _restrict_group_norm(self, operation: Operation, kept: _Kept) -> None:
        """Write the normalisation out, with mean and variance over the kept channels of each group."""
        output = operation.outputs[0]
        node = self.makers[output]
        add = functools.partial(self._add, output)
        channels = kept.shape[1]
        groups = operation.attributes.get("num_groups", channels)
        ratio = self._constant(np.asarray(kept.full / kept.count))
        lines = self._constant(np.asarray([0, groups, -1], np.int64))
        along = self._constant(np.asarray([0, channels, *[1] * (len(kept.shape) - 2)], np.int64))
        group = self._constant(np.arange(channels) * groups // channels)
        epsilon = self._constant(np.asarray(operation.attributes.get("epsilon", 1e-5), np.float32))

        def mean(value: str) -> str:
            """Of each group, laid along its channels; in float64, for a group may have a million values."""
            masked = add("Reshape", self._where(output, kept.mask, value, 0.0), lines)
            wide = add("Cast", masked, to=onnx.TensorProto.DOUBLE)
            if operation.version < 18:
                pooled = add("ReduceMean", wide, axes=[2])
            else:
                pooled = add("ReduceMean", wide, self._constant(np.asarray([2])))
            narrow = add("Cast", add("Mul", pooled, ratio), to=onnx.TensorProto.FLOAT)
            return add("Reshape", add("Gather", narrow, group, axis=1), along)

        value = add("Sub", node.input[0], mean(node.input[0]))
        deviation = add("Sqrt", add("Add", mean(add("Mul", value, value)), epsilon))
        scale, bias = (
            add("Reshape", name, self._constant(np.asarray([1, -1, *[1] * (len(kept.shape) - 2)])))
            for name in node.input[1:]
        )
        value = add("Mul", add("Div", value, deviation), scale)
        del node.input[:], node.attribute[:]
        node.op_type = "Add"
        node.input.extend([value, bias])

    def scale(self, operation: Operation, factor: float) -> None:
        """Multiply what an operation reads first."""
        node = self.makers[operation.outputs[0]]
        by = self._constant(np.asarray(factor, np.float32))
        node.input[0] = self._add(operation.outputs[0], "Mul", node.input[0], by)

    def silence(self, output: str, slot: int) -> None:
        """Multiply one input of the maker of ``output`` by zero."""
        node = self.makers[output]
        self._insert(node, slot, "Mul", [node.input[slot], self._constant(np.zeros((), np.float32))])

    def install(self) -> None:
        """Put the collected nodes in topological order."""
        nodes: list[onnx.NodeProto] = []
        makers = {id(node): output for output, node in self.makers.items()}
        for node in self.proto.graph.node:
            output = makers.get(id(node), "")
            nodes += [*self.before.get(output, []), node, *self.after.get(output, [])]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(copies)

    def _where(self, output: str, mask: npt.NDArray[np.bool_], value: str, neutral: float) -> str:
        """``value`` where the mask is true, before the maker of ``output``.

        Not a product: what a removed unit holds may be infinite, and 0 · ∞ is no zero. Channels that were
        merged with positions, or heads with the batch, are masked apart from these, which may be symbolic.
        """
        add = functools.partial(self._add, output)
        changes = np.flatnonzero(np.diff(mask).any(axis=tuple(range(mask.ndim - 1))))
        run = math.gcd(mask.shape[-1], *(changes + 1).tolist())
        apart = value
        if mask.ndim > 1 and mask.shape[0] > 1:
            rest = add("Gather", add("Shape", value), self._constant(np.arange(1, mask.ndim)))
            heads = self._constant(np.asarray([-1, mask.shape[0]]))
            apart, mask = add("Reshape", value, add("Concat", heads, rest, axis=0)), mask[None]
        elif run > 1:
            parts = np.asarray([*[0] * (mask.ndim - 1), mask.shape[-1] // run, -1])
            apart, mask = add("Reshape", value, self._constant(parts)), mask[..., ::run, None]
        chosen = self._chosen(output, mask, apart, neutral)
        return chosen if apart == value else add("Reshape", chosen, add("Shape", value))

    def _chosen(self, output: str, mask: npt.NDArray[np.bool_], value: str, neutral: float) -> str:
        """``Where``, or before opset 9, which has none, a product of finite numbers."""
        add = functools.partial(self._add, output)
        if next(o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")) >= 9:
            other = self._constant(np.asarray(neutral, np.float32))
            return add("Where", self._constant(mask), value, other)
        bounds = np.finfo(np.float32)
        finite = add("Clip", value, min=float(bounds.min), max=float(bounds.max))
        kept = add("Mul", finite, self._constant(mask.astype(np.float32)))
        filler = np.where(mask, 0, np.clip(neutral, bounds.min, bounds.max)).astype(np.float32)
        return add("Add", kept, self._constant(filler))

    def _add(self, output: str, op_type: str, *inputs: str, **attributes: Any) -> str:
        """A node before the maker of ``output``; the name of what it makes."""
        name = f"mdp_mask_{self.count}"
        self.count += 1
        node = helper.make_node(op_type, list(inputs), [name], **attributes)
        self.before.setdefault(output, []).append(node)
        return name

    def _insert(self, node: onnx.NodeProto, slot: int, op_type: str, inputs: Sequence[str]) -> None:
        output = next(o for o, n in self.makers.items() if n is node)
        name = f"mdp_mask_{self.count}"
        self.count += 1
        self.before.setdefault(output, []).append(helper.make_node(op_type, list(inputs), [name]))
        node.input[slot] = name

    def _constant(self, array: npt.NDArray[Any]) -> str:
        name = f"mdp_mask_{self.count}_value"
        self.count += 1
        self.proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name
