"""Weights that a file stores in another form than its layers read: quantized, or in half precision.

Between the stored tensor and the layer stands a chain of DequantizeLinear, Cast, Transpose and Identity.
Folding it would store the weight in float32; so it stays, and each layer gets a chain of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

__all__ = ["CHAIN", "separate_readers", "stored_outputs"]

_QUANTIZERS = ("DequantizeLinear", "QuantizeLinear")
CHAIN = (*_QUANTIZERS, "Cast", "Identity", "Transpose")


def stored_outputs(
    model: ir.Model, pure: Collection[str], types: Mapping[str, ir.DataType]
) -> dict[str, bool]:
    """What nodes make of stored weights alone; true where the weight is followed through them, axis by axis.

    ``pure`` names what depends on no input value; ``types`` the element types, in a model in half precision.
    """
    found: dict[str, bool] = {}
    for node in model.graph:
        names = [str(v.name) for v in node.outputs if v.name]
        source = node.inputs[0] if node.inputs else None
        if source is None or not all(name in pure for name in names):
            continue
        if _unpacks(node, source, types):
            found.update({name: found.get(str(source.name), True) for name in names})
        elif any(v is not None and v.name in found for v in node.inputs):
            follows = node.op_type in CHAIN and found.get(str(source.name), False)
            found.update(dict.fromkeys(names, follows))
    return found


def _unpacks(node: ir.Node, source: ir.Value, types: Mapping[str, ir.DataType]) -> bool:
    """Whether a node reads a stored tensor and gives it another type."""
    maker = source.producer()
    if node.domain not in ("", "ai.onnx") or (maker is not None and maker.op_type != "Constant"):
        return False
    cast = [types.get(str(value.name)) for value in (source, node.outputs[0])]
    floats = all(kind is not None and kind.is_floating_point() for kind in cast)
    return node.op_type in _QUANTIZERS or (node.op_type == "Cast" and floats)


def separate_readers(model: ir.Model, chains: Collection[str]) -> dict[str, str]:
    """Give each reader of a chain one of its own, in place; each new name with what it copies."""
    copies: dict[str, str] = {}
    for node in reversed([n for n in model.graph if n.outputs and n.outputs[0].name in chains]):
        value = node.outputs[0]
        for number, use in enumerate(list(value.uses())[1:], 2):
            copy = ir.Node(node.domain, node.op_type, node.inputs, list(node.attributes.values()))
            copy.name = f"{node.name or value.name}/reader_{number}"
            copy.outputs[0].name = f"{value.name}/reader_{number}"
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            model.graph.insert_after(node, copy)
            use.node.replace_input_with(use.idx, copy.outputs[0])
            copies[str(copy.outputs[0].name)] = str(value.name)
    return copies
