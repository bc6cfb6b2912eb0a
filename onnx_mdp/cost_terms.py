"""Which operations cost time, and on which kept widths their time depends.

Runtimes fuse a convolution with what follows it (normalisation, activation, residual add). So every
element-wise operation is charged to the operation that computes its largest-index input of equal shape, its
**anchor**; what remains are convolutions, linear layers, pools, concats, resizes: one `CostTerm` each, with
the widths it reads (``a``) and makes (``b``). Terms of equal `key` are the same computation at other widths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx_mdp.rules import varying
from onnx_mdp.shadow import Operation
from onnx_mdp.structure import Extent, Structure, extent

__all__ = ["CONTRACTIONS", "CostTerm", "anchors", "cost_terms", "width"]

CONTRACTIONS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_ELEMENTWISE = frozenset(
    (
        "Abs Add BatchNormalization Cast Ceil Clip Div Dropout Elu Erf Exp Floor Gelu HardSigmoid "
        "HardSwish Identity InstanceNormalization LeakyRelu Log Max Min Mish Mul Neg PRelu Pow "
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
    joined = {
        charged[op.index]
        for op in structure.shadow.operations
        if op.op_type == "Add" and not any(name in structure.shadow.constants for name in op.inputs)
    }
    return tuple(
        _term(structure, op, op.index in joined)
        for op in structure.shadow.operations
        if charged[op.index] == op.index
    )


def width(extent_: Extent, kept: Mapping[int, int]) -> int:
    """The width of an extent when dimension ``i`` keeps ``kept[i]`` units."""
    return extent_.fixed + sum(coefficient * kept[index] for index, coefficient in extent_.terms)


def _term(structure: Structure, operation: Operation, joined: bool) -> CostTerm:
    reads, makes, kind = _widths(structure, operation)
    shapes = structure.shadow.shapes
    described: dict[str, Any] = {"op": operation.op_type, "kind": kind}
    described |= {
        name: _plain(operation.attributes[name]) for name in _SHAPED if name in operation.attributes
    }
    described["in"] = _without_width(structure, operation.inputs[0]) if operation.inputs else []
    described["out"] = _without_width(structure, operation.outputs[0])
    if operation.op_type in CONTRACTIONS:
        described["weight"] = list(shapes[operation.inputs[1]][2:])
        described["add"] = joined
    return CostTerm(
        operation.index, json.dumps(described, sort_keys=True, separators=(",", ":")), reads, makes
    )


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return list(value) if isinstance(value, (tuple, list)) else value


def _without_width(structure: Structure, name: str) -> list[int]:
    """The shape of a tensor with its channel axis set to -1."""
    shape = list(structure.shadow.shapes.get(name, ()))
    axis = _width_axis(structure, name)
    if axis is not None:
        shape[axis] = -1
    return shape


def _width_axis(structure: Structure, name: str) -> int | None:
    """The labelled axis, else the channel axis of a feature map, else the last axis of a matrix."""
    labels = structure.graph.tensors.get(name)
    if labels is not None and varying(labels):
        return varying(labels)[0]
    rank = len(structure.shadow.shapes.get(name, ()))
    return {0: None, 1: 0, 2: 1, 3: 2}.get(rank, 1)


def _widths(structure: Structure, operation: Operation) -> tuple[Extent, Extent, str]:
    one = Extent(1, ())
    if operation.op_type in CONTRACTIONS and operation.inputs[1] in structure.shadow.constants:
        reads = _width(structure, operation.inputs[0])
        makes = _width(structure, operation.outputs[0])
        groups = operation.attributes.get("group", 1)
        if groups > 1 and groups == structure.shadow.shapes[operation.inputs[0]][1]:
            return one, makes, "depthwise"
        return reads, makes, f"groups {groups}"
    source = next((n for n in operation.inputs if n and n not in structure.shadow.constants), "")
    makes = _width(structure, operation.outputs[0])
    if not makes.terms and source:
        return one, _width(structure, source), "moves"
    return one, makes, "moves"


def _width(structure: Structure, name: str) -> Extent:
    axis = _width_axis(structure, name)
    return Extent(1, ()) if axis is None else extent(structure, name, axis)
