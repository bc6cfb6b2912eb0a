"""Layers in integers written out: what they read is dequantized, and what they make quantized.

    QLinearConv(x, w, b) = QuantizeLinear(Conv(DequantizeLinear(x), DequantizeLinear(w), DequantizeLinear(b)))

Runtimes fuse this form into the layers in integers again when they load it. A layer is left as it is where
its form is not known, or its opset has no scale for each channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_mdp.model_io import clone

__all__ = ["in_qdq_form"]

_AXES_SINCE = 13  # DequantizeLinear with a scale for each index


def in_qdq_form(model: ir.Model) -> ir.Model:
    """The same model with its layers in integers written out; the model itself if it has none."""
    if not any(_key(node) in _FORMS for node in model.graph):
        return model
    written = clone(model)
    for node in [node for node in written.graph if _key(node) in _FORMS]:
        layer = _Layer(written, node)
        made = _FORMS[_key(node)](layer)
        if made is None:
            continue
        written.graph.insert_before(node, layer.nodes)
        for value in layer.constants:
            written.graph.register_initializer(value)
        old, name = node.outputs[0], str(node.outputs[0].name)
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        made.type, made.shape = old.type, old.shape
        old.name, made.name = f"{name}__integers", name
        written.graph.remove(node, safe=True)
    _merge(written)
    return written


def _merge(model: ir.Model) -> None:
    """Dequantize a tensor once, in place, for all its readers: a shortcut and its branch read the same."""
    known: dict[tuple[object, ...], ir.Value] = {}
    for node in [n for n in model.graph if n.op_type == "DequantizeLinear"]:
        value, attributes = node.outputs[0], sorted((k, a.value) for k, a in node.attributes.items())
        first = known.setdefault((*node.inputs, *attributes), value)
        if first is not value and not value.is_graph_output():
            value.replace_all_uses_with(first)
            model.graph.remove(node, safe=True)


def _key(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


class _Layer:
    """Collects the nodes and constants that stand for one layer."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.node = node
        self.opset = model.opset_imports.get("", 1)
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    @property
    def name(self) -> str:
        return str(self.node.outputs[0].name)

    def input(self, slot: int) -> ir.Value | None:
        return self.node.inputs[slot] if slot < len(self.node.inputs) else None

    def add(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes))
        self.nodes.append(node)
        node.name = f"{self.node.name or self.name}/{op_type.lower()}_{len(self.nodes)}"
        node.outputs[0].name = f"{self.name}__{op_type.lower()}_{len(self.nodes)}"
        return node.outputs[0]

    def scale(self, slot: int) -> np.ndarray[Any, Any] | None:
        """A scale, or a zero point, that the file holds."""
        value = self.input(slot)
        return None if value is None or value.const_value is None else value.const_value.numpy()

    def real(self, slot: int, *, axis: int = 1) -> ir.Value | None:
        """The numbers that the integers in ``slot`` and the scale and zero point behind it stand for."""
        scale, zero = self.scale(slot + 1), self.scale(slot + 2)
        if scale is None or scale.ndim > 1 or (zero is not None and zero.size != scale.size):
            return None
        inputs = [self.input(slot), self.input(slot + 1), self.input(slot + 2)]
        if scale.size > 1 and self.opset < _AXES_SINCE:
            return None
        along = {"axis": axis} if scale.size > 1 else {}
        return self.add("DequantizeLinear", *inputs, **along)

    def bias(self, slot: int, scales: tuple[int, int]) -> ir.Value | None:
        """A bias in int32, whose scale is the product of those of data and weight."""
        found = [self.scale(s) for s in scales]
        assert all(scale is not None for scale in found)
        product = np.asarray(math.prod(s for s in found if s is not None), np.float32)
        name = f"{self.name}__bias_scale"
        flat = product.reshape(-1) if product.size > 1 else product.reshape(())
        value = ir.Value(
            name=name,
            shape=ir.Shape(flat.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(flat, name=name),
        )
        self.constants.append(value)
        axis = {"axis": 0} if flat.ndim else {}
        return self.add("DequantizeLinear", self.input(slot), value, **axis)

    def integers(self, value: ir.Value, slot: int) -> ir.Value | None:
        """``value`` quantized by the scale in ``slot`` and the zero point behind it."""
        return self.add("QuantizeLinear", value, self.input(slot), self.input(slot + 1))

    def attributes(self, *names: str) -> dict[str, ir.Attr]:
        return {name: self.node.attributes[name] for name in names if name in self.node.attributes}


def _conv(layer: _Layer) -> ir.Value | None:
    data, weight = layer.real(0), layer.real(3, axis=0)
    if data is None or weight is None:
        return None
    inputs = [data, weight]
    if layer.input(8) is not None:
        inputs += [b for b in [layer.bias(8, (1, 4))] if b is not None]
    return layer.integers(layer.add("Conv", *inputs, **dict(layer.node.attributes)), 6)


def _matmul(layer: _Layer) -> ir.Value | None:
    data = layer.real(0)
    weight = layer.real(3, axis=1)
    return None if data is None or weight is None else layer.integers(layer.add("MatMul", data, weight), 6)


def _gemm(layer: _Layer) -> ir.Value | None:
    turned = "transB" in layer.node.attributes and layer.node.attributes["transB"].as_int()
    data, weight = layer.real(0), layer.real(3, axis=0 if turned else 1)
    if data is None or weight is None:
        return None
    inputs = [data, weight]
    if layer.input(6) is not None:
        inputs += [b for b in [layer.bias(6, (1, 4))] if b is not None]
    made = layer.add("Gemm", *inputs, **layer.attributes("alpha", "transA", "transB"))
    return made if layer.input(7) is None else layer.integers(made, 7)


def _two(op_type: str) -> Callable[[_Layer], ir.Value | None]:
    def write(layer: _Layer) -> ir.Value | None:
        left, right = layer.real(0), layer.real(3)
        return None if left is None or right is None else layer.integers(layer.add(op_type, left, right), 6)

    return write


def _one(op_type: str, *names: str) -> Callable[[_Layer], ir.Value | None]:
    """An operator of one operand with these attributes; channels come first."""

    def write(layer: _Layer) -> ir.Value | None:
        last = layer.attributes("channels_last").get("channels_last")
        data = None if last is not None and last.as_int() else layer.real(0)
        if data is None:
            return None
        return layer.integers(layer.add(op_type, data, **layer.attributes(*names)), 3)

    return write


def _concat(layer: _Layer) -> ir.Value | None:
    parts = [layer.real(slot) for slot in range(2, len(layer.node.inputs), 3)]
    if any(part is None for part in parts):
        return None
    return layer.integers(layer.add("Concat", *parts, **layer.attributes("axis")), 0)


def _softmax(layer: _Layer) -> ir.Value | None:
    version = layer.attributes("opset").get("opset")
    known = version is not None and (version.as_int() < 13) == (layer.opset < 13)
    return _one("Softmax", "axis")(layer) if known else None


_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
_FORMS: Mapping[str, Callable[[_Layer], ir.Value | None]] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "com.microsoft::QGemm": _gemm,
    "com.microsoft::QLinearAdd": _two("Add"),
    "com.microsoft::QLinearAveragePool": _one("AveragePool", *_POOL),
    "com.microsoft::QLinearConcat": _concat,
    "com.microsoft::QLinearGlobalAveragePool": _one("GlobalAveragePool"),
    "com.microsoft::QLinearLeakyRelu": _one("LeakyRelu", "alpha"),
    "com.microsoft::QLinearMul": _two("Mul"),
    "com.microsoft::QLinearSigmoid": _one("Sigmoid"),
    "com.microsoft::QLinearSoftmax": _softmax,
}
