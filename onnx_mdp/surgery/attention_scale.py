"""The scale of attention scores where query and key become narrower.

    softmax(q kᵀ / √d)   keeps its √d, unless it shall become √d' of the new width.

Nothing is added where the file has a constant to change: a factor beside the product of query and key, or the
attribute of the operator. Otherwise a Mul comes before the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.labels import keep_vector
from onnx_mdp.analysis.shadow import add_initializer, unique_name
from onnx_mdp.analysis.structure import Structure

__all__ = ["rescale_scores", "score_factors", "unit_products"]

_MOVES = frozenset(("Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))


def unit_products(structure: Structure) -> list[int]:
    """Operations that sum over units of two activations: query times key."""
    operations = structure.shadow.operations
    return [
        i
        for i, slot in structure.graph.reductions
        if operations[i].op_type in ("Attention", "MatMul")
        and slot == 0
        and (i, 1) in structure.graph.reductions
    ]


def score_factors(structure: Structure, removed: npt.NDArray[np.bool_]) -> dict[int, float]:
    """√(d/d') of every product of query and key that becomes narrower, by operation index."""
    factors = {}
    for index in unit_products(structure):
        names = structure.shadow.operations[index].inputs[:2]
        labels = next(structure.graph.tensors[name] for name in names if name in structure.graph.tensors)
        mask, heads = keep_vector(labels, removed), structure.graph.head[labels]
        full = mask.size // len(np.unique(heads))
        kept = int(mask.sum()) // max(len(np.unique(heads[mask])), 1)
        if 0 < kept < full:
            factors[index] = math.sqrt(full / kept)
    return factors


def rescale_scores(
    model: ir.Model, nodes: Sequence[ir.Node], structure: Structure, removed: npt.NDArray[np.bool_]
) -> None:
    """Multiply the scores, in place; ``nodes`` are those of the model, in the order of its operations."""
    for index, factor in score_factors(structure, removed).items():
        node, operation = nodes[index], structure.shadow.operations[index]
        if node.op_type == "Attention":
            # Patched before: where the width changed, there is a scale.
            scale = node.attributes["scale"].as_float()
            node.attributes["scale"] = ir.AttrFloat32("scale", scale * factor)
            continue
        beside = next(_constant_factors(node, structure), None)
        if beside is not None:
            reader, slot = beside
            value = reader.inputs[slot]
            assert value is not None
            old = structure.shadow.constants[str(value.name)]
            new = (old * factor if reader.op_type == "Mul" else old / factor).astype(old.dtype)
            reader.replace_input_with(slot, add_initializer(model, f"{value.name}__rescaled", new))
            continue
        query = node.inputs[0]
        by = add_initializer(model, f"{operation.inputs[0]}__scale", np.asarray(factor, np.float32))
        product = ir.Node("", "Mul", [query, by], name=unique_name(model, f"{node.name}/rescaled"))
        product.outputs[0].name = unique_name(model, f"{operation.inputs[0]}__rescaled")
        model.graph.insert_before(node, product)
        node.replace_input_with(0, product.outputs[0])


def _constant_factors(product: ir.Node, structure: Structure) -> Iterator[tuple[ir.Node, int]]:
    """(node, slot) of scalars that only the scores, or only the query or the key, are multiplied with."""
    for source in (product.inputs[0], product.inputs[1]):
        while source is not None and len(list(source.uses())) == 1 and not source.is_graph_output():
            maker = source.producer()
            if maker is None:
                break
            yield from _scalars(maker, structure)
            source = maker.inputs[0] if maker.op_type in _MOVES else None
    made = product.outputs[0]
    if len(list(made.uses())) == 1 and not made.is_graph_output():
        (reader,) = (use.node for use in made.uses())
        yield from _scalars(reader, structure)


def _scalars(node: ir.Node, structure: Structure) -> Iterator[tuple[ir.Node, int]]:
    slots = {"Mul": (0, 1), "Div": (1,)}.get(node.op_type, ())
    for slot in slots:
        value = node.inputs[slot]
        constant = structure.shadow.constants.get("" if value is None else str(value.name))
        scalar = constant is not None and constant.size == 1 and np.issubdtype(constant.dtype, np.floating)
        if value is not None and scalar and value.name not in structure.shadow.dynamic:
            yield node, slot
