"""Which operations cost time, and on which kept widths their time depends.

Runtimes fuse a convolution with what follows it (normalisation, activation, residual add). So every
element-wise operation is charged to the operation that computes its largest-index input of equal shape, its
**anchor**; what remains are convolutions, linear layers, pools, concats, resizes: one `CostTerm` each, with
the widths it reads (``a``) and makes (``b``). Terms of equal `key` are the same computation at other widths.
Projections read or make heads × width; products of query and key, or scores and value, and what moves
either, are terms of the width ``a`` and the number of heads ``b``: together the tables
C_qk(embedding, heads, qk), C_v(embedding, heads, value) and C_mlp(embedding, mlp) of the paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.analysis.structure import Extent, Structure, extent, input_extent
from onnx_mdp.rules import varying

__all__ = [
    "CONTRACTIONS",
    "HEADS",
    "SUMMED_HEADS",
    "CostTerm",
    "Layer",
    "anchors",
    "cost_terms",
    "held",
    "width",
]

CONTRACTIONS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
HEADS = "heads"  # the kind of a term that makes heads: these are counted one by one
SUMMED_HEADS = "heads, width summed"  # query times key
_ELEMENTWISE = frozenset(
    (
        "Abs Add BatchNormalization Cast Ceil Clip Div Dropout Elu Erf Exp Floor Gelu GroupNormalization "
        "HardSigmoid HardSwish Identity InstanceNormalization LeakyRelu Log Max Min Mish Mul Neg PRelu Pow "
        "Reciprocal Relu Round Selu Sigmoid Softplus Sqrt Sub Sum Swish Tanh ThresholdedRelu Where"
    ).split()
)
_SHAPED = ("kernel_shape", "strides", "dilations", "pads", "mode", "axis", "perm")


@dataclass(frozen=True, slots=True)
class CostTerm:
    """Time of one operation and the element-wise ones it anchors, as a function of two widths.

    ``key`` is the JSON of everything but the widths; ``reads`` and ``makes`` give the widths in channels
    as functions of kept units.
    """

    operation: int
    key: str
    reads: Extent
    makes: Extent


def anchors(structure: Structure) -> tuple[int, ...]:
    """For each operation the index of the one that its time is charged to."""
    shadow = structure.shadow
    producer = {o: op.index for op in shadow.operations for o in op.outputs if o}
    found: list[int] = []
    for operation in shadow.operations:
        makers = [
            producer[name]
            for name in operation.inputs
            if name in producer and shadow.shapes.get(name) == shadow.shapes.get(operation.outputs[0])
        ]
        join = operation.op_type in _ELEMENTWISE and makers
        found.append(found[max(makers)] if join else operation.index)
    return tuple(found)


def cost_terms(structure: Structure) -> tuple[CostTerm, ...]:
    """One term for each anchor, in graph order."""
    charged = anchors(structure)
    added = [
        op
        for op in structure.shadow.operations
        if op.op_type == "Add" and not any(name in structure.shadow.constants for name in op.inputs)
    ]
    joined = {charged[op.index] for op in added}
    normalised = {charged[op.index] for op in added if _only_normalised(structure, op)}
    riders: dict[int, list[str]] = {}
    for op in structure.shadow.operations:
        if charged[op.index] != op.index:
            riders.setdefault(charged[op.index], []).append(op.op_type)
    return tuple(
        _term(structure, op, op.index in joined, op.index in normalised, sorted(riders.get(op.index, [])))
        for op in structure.shadow.operations
        if charged[op.index] == op.index
    )


Layer = tuple[str, int, int]  # the key of a term, and the widths that it reads and makes


def held(
    structure: Structure, terms: Sequence[CostTerm], kept: Mapping[int, int], removed: Collection[str]
) -> list[Layer]:
    """What a model takes time for that keeps ``kept`` units of each dimension and lacks some blocks."""
    blocks = [block for block in structure.blocks if block.name in removed]
    gone = {index for block in blocks for index in (*block.operations, block.joint)}
    return [(t.key, width(t.reads, kept), width(t.makes, kept)) for t in terms if t.operation not in gone]


def width(extent_: Extent, kept: Mapping[int, int]) -> int:
    """The width of an extent when dimension ``i`` keeps ``kept[i]`` units (of each head)."""
    return extent_.fixed + sum(c * math.prod(kept[index] for index in scope) for scope, c in extent_.terms)


def _only_normalised(structure: Structure, operation: Operation) -> bool:
    """Whether nothing but a LayerNormalization reads the sum: the runtime makes one operation of both."""
    name = operation.outputs[0]
    readers = [op.op_type for op in structure.shadow.operations if name in op.inputs]
    return readers == ["LayerNormalization"] and name not in structure.shadow.outputs


def _term(
    structure: Structure, operation: Operation, joined: bool, normalised: bool, riders: list[str]
) -> CostTerm:
    reads, makes, kind = _widths(structure, operation)
    shapes = structure.shadow.shapes
    described: dict[str, Any] = {"op": operation.op_type, "kind": kind}
    described |= {
        name: _plain(operation.attributes[name]) for name in _SHAPED if name in operation.attributes
    }
    described["in"] = _without_width(structure, operation.inputs[0]) if operation.inputs else []
    described["out"] = _without_width(structure, operation.outputs[0])
    if not operation.op_type.startswith("Conv"):
        # A convolution hides what rides on it in its own loop; a matrix product does not: GELU costs.
        described["riders"] = riders
    if operation.op_type in CONTRACTIONS:
        if operation.inputs[1] in structure.shadow.constants:
            described["weight"] = list(shapes[operation.inputs[1]][2:])
        described["add"] = joined
        if normalised:
            described["normalised"] = True
    return CostTerm(
        operation.index, json.dumps(described, sort_keys=True, separators=(",", ":")), reads, makes
    )


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return list(value) if isinstance(value, (tuple, list)) else value


def _without_width(structure: Structure, name: str) -> list[int]:
    """The shape of a tensor with its channel axes set to -1."""
    shape = list(structure.shadow.shapes.get(name, ()))
    for axis in _width_axes(structure, name):
        shape[axis] = -1
    return shape


def _width_axes(structure: Structure, name: str) -> tuple[int, ...]:
    """The labelled axes, else the channel axis of a feature map, else the last axis of a matrix."""
    labels = structure.graph.tensors.get(name)
    if labels is not None and varying(labels):
        return varying(labels)
    rank = len(structure.shadow.shapes.get(name, ()))
    return {0: (), 1: (0,), 2: (1,), 3: (2,)}.get(rank, (1,))


def _widths(structure: Structure, operation: Operation) -> tuple[Extent, Extent, str]:
    one = Extent(1, ())
    if operation.op_type in CONTRACTIONS and operation.inputs[1] in structure.shadow.constants:
        reads = _width(structure, operation.inputs[0])
        if operation.inputs[0] in structure.shadow.constants:
            last = len(structure.shadow.shapes[operation.inputs[0]]) - 1
            reads = input_extent(structure, operation, 0, last)
        makes = _width(structure, operation.outputs[0])
        groups = operation.attributes.get("group", 1)
        if groups > 1 and groups == structure.shadow.shapes[operation.inputs[0]][1]:
            return one, makes, "depthwise"
        return reads, makes, f"groups {groups}"
    if operation.op_type == "MatMul":
        return _product_widths(structure, operation)
    if operation.op_type == "Attention" and not operation.domain:
        return _width(structure, operation.inputs[0]), _width(structure, operation.outputs[0]), "attention"
    source = next((n for n in operation.inputs if n and n not in structure.shadow.constants), "")
    makes = _width(structure, operation.outputs[0])
    kind = HEADS if _counts_heads(structure, operation.outputs[0]) else "moves"
    if not makes.terms and source:
        return one, _width(structure, source), "moves"
    return _heads_apart(structure, operation.outputs[0]) or (one, makes, kind)


def _heads_apart(structure: Structure, name: str) -> tuple[Extent, Extent, str] | None:
    """The width of each head and the number of heads, where these are axes of their own.

    What moves such a tensor copies a piece for each head, and short pieces cost more than their length.
    """
    extents = [extent(structure, name, axis) for axis in _width_axes(structure, name)]
    counted = [_of_heads(structure, each) for each in extents]
    if sorted(counted) != [False, True] or not all(each.terms for each in extents):
        return None
    return extents[counted.index(False)], extents[counted.index(True)], HEADS


def _of_heads(structure: Structure, made: Extent) -> bool:
    return any(structure.dimensions[index].kind == "heads" for scope, _ in made.terms for index in scope)


def _product_widths(structure: Structure, operation: Operation) -> tuple[Extent, Extent, str]:
    """The labelled matrix axis and the labelled batch axis of a product of two activations."""
    found = {False: Extent(1, ()), True: Extent(1, ())}
    for name in operation.inputs[:2]:
        rank = len(structure.shadow.shapes[name])
        labels = structure.graph.tensors.get(name)
        for axis in () if labels is None else varying(labels):
            found[axis < rank - 2] = extent(structure, name, axis)
    made = structure.graph.tensors.get(operation.outputs[0])
    summed = made is None or len(varying(made)) < len([e for e in found.values() if e.terms])
    return found[False], found[True], SUMMED_HEADS if summed else HEADS


def _counts_heads(structure: Structure, name: str) -> bool:
    """Whether the only labelled axis of a tensor counts heads."""
    labels = structure.graph.tensors.get(name)
    rows = {row for grid in structure.graph.grids for row in grid.rows}
    return labels is not None and len(varying(labels)) == 1 and int(labels.max()) in rows


def _width(structure: Structure, name: str) -> Extent:
    """The product of the extents of the width axes."""
    product = Extent(1, ())
    for axis in _width_axes(structure, name):
        product = _times(product, extent(structure, name, axis))
    return product


def _times(a: Extent, b: Extent) -> Extent:
    parts = [((), a.fixed), *a.terms], [((), b.fixed), *b.terms]
    totals: dict[tuple[int, ...], int] = {}
    for scope, factor in parts[0]:
        for other, times in parts[1]:
            both = tuple(sorted((*scope, *other)))
            totals[both] = totals.get(both, 0) + factor * times
    terms = tuple((scope, c) for scope, c in totals.items() if scope and c)
    return Extent(totals.get((), 0), terms)
