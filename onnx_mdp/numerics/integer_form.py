"""Quantized activations without their rounding: integers written out as real numbers.

    q = min(max(x / s + z, low), high)      x = (q - z) · s

Rounding turns noise of float32 into whole steps, so that two models that compute the same differ by a step
now and then. Without it they do not, and every saturation, scale and zero point still acts. What depends on
no input value (quantized weights) keeps its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_mdp.model_io import clone
from onnx_mdp.numerics.independence import independent_outputs

__all__ = ["is_quantized", "without_rounding"]

_RANGES = {
    ir.DataType[name]: limits
    for name, limits in {
        "INT4": (-8, 7),
        "INT8": (-128, 127),
        "INT16": (-(2**15), 2**15 - 1),
        "UINT4": (0, 15),
        "UINT8": (0, 255),
        "UINT16": (0, 2**16 - 1),
    }.items()
}
_INTEGERS = (*_RANGES, ir.DataType.INT32)


def is_quantized(model: ir.Model) -> bool:
    """Whether activations of the main graph are rounded to integers."""
    pure = set(independent_outputs(model))
    return any(_key(node) in _WRITERS and node.outputs[0].name not in pure for node in model.graph)


def without_rounding(model: ir.Model, ranks: Mapping[str, int]) -> ir.Model:
    """The same model in real numbers, itself if it has no integers; ``ranks`` are those of its tensors."""
    if not is_quantized(model):
        return model
    real = clone(model)
    pure = set(independent_outputs(real))
    floats: set[str] = set()
    for node in list(real.graph):
        names = [str(v.name) for v in node.outputs if v.name]
        if all(name in pure for name in names):
            continue
        if _key(node) in _WRITERS:
            _replace(real, node, ranks)
            floats.update(names)
        elif any(v is not None and v.name in floats for v in node.inputs) and node.op_type != "Shape":
            _carry(real, node)
            floats.update(names)
    for value in real.graph.outputs:
        if value.name in floats and value.dtype in _INTEGERS:
            value.dtype = ir.DataType.FLOAT
    return real


def _key(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _replace(model: ir.Model, node: ir.Node, ranks: Mapping[str, int]) -> None:
    writer = _Writer(model, node, ranks)
    _WRITERS[_key(node)](writer)
    model.graph.insert_before(node, writer.nodes)
    for slot, result in writer.results.items():
        old = node.outputs[slot]
        if not old.name:
            continue
        name = str(old.name)
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        old.name, result.name = f"{name}__rounded", name
    model.graph.remove(node, safe=True)


def _carry(model: ir.Model, node: ir.Node) -> None:
    """Let an operator that moved integers move real numbers: its constants are cast, a Cast is nothing."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() in [int(kind) for kind in _INTEGERS]:
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    for slot, value in enumerate(node.inputs):
        if value is not None and value.const_value is not None and value.const_value.dtype in _RANGES:
            cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
            model.graph.insert_before(node, cast)
            node.replace_input_with(slot, cast.outputs[0])
            cast.outputs[0].name = f"{node.outputs[0].name}__real_{slot}"
    for value in node.outputs:
        if value.dtype in _INTEGERS and not value.is_graph_output():
            value.dtype = ir.DataType.FLOAT


class _Writer:
    """Collects the nodes that stand for one node; ``results`` are its outputs by slot."""

    def __init__(self, model: ir.Model, node: ir.Node, ranks: Mapping[str, int]) -> None:
        self.model = model
        self.node = node
        self.ranks = ranks
        self.nodes: list[ir.Node] = []
        self.results: dict[int, ir.Value] = {}

    def add(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes))
        self.nodes.append(node)
        node.outputs[0].name = f"{self.node.outputs[0].name}__{len(self.nodes)}"
        return node.outputs[0]

    def number(self, value: float | Sequence[int]) -> ir.Value:
        array = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        return self.add("Constant", value=ir.tensor(array))

    def input(self, slot: int) -> ir.Value | None:
        return self.node.inputs[slot] if slot < len(self.node.inputs) else None

    def real(self, slot: int) -> ir.Value:
        return self.add("Cast", self.input(slot), to=int(ir.DataType.FLOAT))

    def along(self, value: ir.Value, slot: int, axis: int) -> ir.Value:
        """A scale or zero point (of input ``slot``) for each index, laid along ``axis`` of that input."""
        operand = self.node.inputs[slot]
        assert operand is not None
        name = str(operand.name)
        rank = self.ranks.get(name, 1)
        return self.add("Reshape", value, self.number([-1, *[1] * (rank - 1 - axis % rank)]))

    def centred(self, slot: int, zero: int, axis: int | None = None) -> ir.Value:
        """``q - z`` of the integers in one slot."""
        value = self.real(slot)
        if self.input(zero) is None:
            return value
        point = self.real(zero)
        return self.add("Sub", value, point if axis is None else self.along(point, slot, axis))

    def dequantized(self, slot: int, scale: int, zero: int, axis: int | None = None) -> ir.Value:
        """``(q - z) · s``; ``axis`` is that of scales for each index."""
        by = self.real(scale)
        return self.add(
            "Mul", self.centred(slot, zero, axis), by if axis is None else self.along(by, slot, axis)
        )

    def quantized(self, value: ir.Value, scale: int, zero: int, axis: int | None = None) -> ir.Value:
        """``x / s + z`` within the limits of the integers."""
        by, point = self.real(scale), self.input(zero)
        made = self.add("Div", value, by if axis is None else self.along(by, 0, axis))
        kind = ir.DataType.UINT8
        if point is not None:
            kind = point.dtype or (point.const_value.dtype if point.const_value is not None else kind)
            shift = self.real(zero)
            made = self.add("Add", made, shift if axis is None else self.along(shift, 0, axis))
        elif self.attribute("output_dtype", 0):
            kind = ir.DataType(self.attribute("output_dtype", 0))
        low, high = _RANGES.get(kind, (-3e38, 3e38))
        return self.add("Min", self.add("Max", made, self.number(float(low))), self.number(float(high)))

    def attribute(self, name: str, default: int) -> int:
        return self.node.attributes[name].as_int() if name in self.node.attributes else default

    def axis(self, slot: int) -> int | None:
        """The axis of the scales in ``slot``; None where there is one scale."""
        value = self.input(slot)
        shape = None if value is None or value.shape is None else tuple(value.shape)
        return None if shape in (None, (), (1,)) else self.attribute("axis", 1)


def _quantize(writer: _Writer) -> None:
    assert writer.input(0) is not None
    value = writer.real(0)
    writer.results[0] = writer.quantized(value, 1, 2, writer.axis(1))


def _dequantize(writer: _Writer) -> None:
    writer.results[0] = writer.dequantized(0, 1, 2, writer.axis(1))


def _dynamic(writer: _Writer) -> None:
    zero, value = writer.number(0.0), writer.real(0)
    high = writer.add("Max", writer.add("ReduceMax", value, keepdims=0), zero)
    low = writer.add("Min", writer.add("ReduceMin", value, keepdims=0), zero)
    step = writer.add("Div", writer.add("Sub", high, low), writer.number(255.0))
    scale = writer.add("Max", step, writer.number(1e-30))
    point = writer.add("Neg", writer.add("Div", low, scale))
    made = writer.add("Add", writer.add("Div", value, scale), point)
    writer.results.update({0: made, 1: scale, 2: point})


def _product(op_type: str, weight_axis: int | None) -> Callable[[_Writer], None]:
    """ConvInteger and MatMulInteger; the zero points of the weight may be one for each output."""

    def write(writer: _Writer) -> None:
        value = writer.input(3)
        wide = value is not None and value.shape is not None and tuple(value.shape) not in ((), (1,))
        weight = writer.centred(1, 3, weight_axis if wide else None)
        made = writer.add(op_type, writer.centred(0, 2), weight)
        maker = made.producer()
        assert maker is not None
        maker.attributes.update(writer.node.attributes)
        writer.results[0] = made

    return write


_WRITERS: Mapping[str, Callable[[_Writer], None]] = {
    "ConvInteger": _product("Conv", 0),
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _product("MatMul", None),
    "QuantizeLinear": _quantize,
}
