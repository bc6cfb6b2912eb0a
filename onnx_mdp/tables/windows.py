"""Windows: consecutive cost terms of a variant, cut out as a model of their own.

A provider that compiles a whole graph shows no times of its parts. What it computes faster or slower can be
learned from models that hold a few terms each. Where such a window is cut, feature maps cross its border, and
the provider pays for changes of layout that the whole model does not: a window names what crosses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.analysis.structure import Structure, extent
from onnx_mdp.model_io import model_bytes
from onnx_mdp.tables.cost_terms import CostTerm, anchors, width

__all__ = ["Window", "cut_window"]


@dataclass(frozen=True, slots=True)
class Window:
    """A serialised model, the shapes of its inputs, its terms as (key, read width, made width), its borders.

    A border is (direction and size of a feature map, channels); tensors of other ranks are none.
    """

    model: bytes
    shapes: Mapping[str, tuple[int, ...]]
    terms: tuple[tuple[str, int, int], ...]
    borders: tuple[tuple[str, int], ...]


def cut_window(
    structure: Structure, terms: Sequence[CostTerm], model: ir.Model, kept: Mapping[int, int]
) -> Window | None:
    """Cut ``terms`` out of the variant ``model`` that keeps ``kept`` units and all blocks.

    None where nothing but constants would go in, nothing come out, or more be needed than comes in.
    """
    charged = anchors(structure)
    inside = {term.operation for term in terms}
    operations = [op for op in structure.shadow.operations if charged[op.index] in inside]
    values = {str(v.name): v for v in model.graph.inputs}
    values |= {str(v.name): v for node in model.graph for v in node.outputs if v.name}
    inputs = [name for name in _read(structure, operations) if name in values]
    outputs = [name for name in _left(structure, operations, inside, charged) if name in values]
    if not inputs or not outputs:
        return None
    try:
        graph = ir.convenience.extract(model.graph, [values[n] for n in inputs], [values[n] for n in outputs])
    except ValueError:  # not bounded by these inputs
        return None
    shapes = {name: _shape(structure, name, kept) for name in inputs}
    for value, name in zip(graph.inputs, inputs, strict=True):
        _describe(structure, value, name, shapes[name])
    for value, name in zip(graph.outputs, outputs, strict=True):
        _describe(structure, value, name, None)
    return Window(
        model_bytes(ir.Model(graph, ir_version=model.ir_version)),
        shapes,
        tuple((t.key, width(t.reads, kept), width(t.makes, kept)) for t in terms),
        tuple(
            (f"{way} {structure.shadow.shapes[name][2:]}", _shape(structure, name, kept)[1])
            for way, names in (("in", inputs), ("out", outputs))
            for name in names
            if len(structure.shadow.shapes[name]) == 4
        ),
    )


def _read(structure: Structure, operations: Sequence[Operation]) -> list[str]:
    """Activations that come from outside, each once."""
    shadow = structure.shadow
    made = {name for op in operations for name in op.outputs}
    read = (name for op in operations for name in op.inputs if name and name not in made)
    return list(dict.fromkeys(n for n in read if n not in shadow.constants and n not in shadow.independent))


def _left(
    structure: Structure, operations: Sequence[Operation], inside: set[int], charged: Sequence[int]
) -> list[str]:
    """What others read, or the caller."""
    readers = structure.shadow.consumers()
    return [
        name
        for op in operations
        for name in op.outputs
        if name in structure.shadow.outputs
        or any(charged[index] not in inside for index, _ in readers.get(name, ()))
    ]


def _shape(structure: Structure, name: str, kept: Mapping[int, int]) -> tuple[int, ...]:
    rank = len(structure.shadow.shapes[name])
    return tuple(width(extent(structure, name, axis), kept) for axis in range(rank))


def _describe(structure: Structure, value: ir.Value, name: str, shape: tuple[int, ...] | None) -> None:
    value.shape = None if shape is None else ir.Shape(shape)
    if value.type is None:
        value.type = ir.TensorType(structure.shadow.types.get(name, ir.DataType.FLOAT))
