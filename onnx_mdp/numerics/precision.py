"""Half precision: the float32 twin of a float16 or bfloat16 model, in which everything is computed.

The twin has the same nodes and names; weights, inputs, outputs and the targets of Casts are float32. Every
half number is a float32 number, and activations that the file rounds between its nodes are not rounded in the
twin: there the law holds to the rounding of float32, and every operator has a kernel. What depends on no
input value is rounded as in the file. The file itself is analysed and rewritten as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnx_mdp.model_io import PARAMETER_TYPES, clone
from onnx_mdp.numerics.independence import independent_outputs

__all__ = ["as_stored", "has_halves", "in_float32", "is_float", "is_parameter", "tensor_types", "widened"]

Array = npt.NDArray[Any]
_Graph: TypeAlias = "ir.Graph | ir.Function"

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Attributes that name the type of an output, or that of an intermediate result.
_TYPE_ATTRIBUTES = frozenset(
    {"dtype", "output_datatype", "output_dtype", "softmax_precision", "stash_type", "to"}
)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of this type hold floats; numpy itself does not know bfloat16 as one."""
    return ir.DataType.from_numpy(dtype).is_floating_point()


def is_parameter(dtype: np.dtype[Any]) -> bool:
    """Whether an initializer of this type holds parameters: floats, or integers that stand for some."""
    return ir.DataType.from_numpy(dtype) in PARAMETER_TYPES


def has_halves(model: ir.Model) -> bool:
    """Whether any tensor of a model is stored, fed, cast or returned in half precision."""
    values = (v for graph in _graphs(model) for v in (*graph.inputs, *graph.outputs))
    weights = (v for graph in model.graphs() for v in graph.initializers.values())
    return any(_is_half(v.dtype) for v in (*values, *weights)) or any(
        _names_half(attribute) for node in _nodes(model) for attribute in node.attributes.values()
    )


def in_float32(model: ir.Model) -> ir.Model:
    """The twin of a model, or the model itself if it has nothing in half precision."""
    if not has_halves(model):
        return model
    twin = clone(model)
    for graph in twin.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _wide_tensor(value.const_value)
    for node in _nodes(twin):
        for name, attribute in list(node.attributes.items()):
            if _names_half(attribute):
                node.attributes[name] = _wide_attribute(attribute)
        for output in node.outputs:
            output.type = _wide_type(output.type)
    _round_constants(twin, model)
    for value in (
        v for graph in _graphs(twin) for v in (*graph.inputs, *graph.outputs, *_initializers(graph))
    ):
        value.type = _wide_type(value.type)
    return twin


def _round_constants(twin: ir.Model, model: ir.Model) -> None:
    """What depends on no input value is rounded as in the file: it is a constant to the analysis."""
    pure = set(independent_outputs(model))
    nodes = [n for n in twin.graph if n.op_type != "Constant" and n.outputs and n.outputs[0].name in pure]
    types = tensor_types(model) if nodes else {}
    for value in (v for node in nodes for v in node.outputs):
        half = types.get(str(value.name))
        if _is_half(half) and half is not None and not value.is_graph_output():
            maker = value.producer()
            assert maker is not None
            rounded = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(half))])
            wide = ir.Node("", "Cast", rounded.outputs, [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
            value.replace_all_uses_with(wide.outputs[0])
            rounded.replace_input_with(0, value)
            twin.graph.insert_after(maker, [rounded, wide])
            wide.outputs[0].name, value.name = value.name, f"{value.name}__unrounded"
            rounded.outputs[0].name = f"{wide.outputs[0].name}__rounded"


def widened(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What the twin takes for these inputs of the model."""
    halves = [half.numpy() for half in _HALVES]
    return {
        name: array.astype(np.float32) if array.dtype in halves else array for name, array in feeds.items()
    }


def tensor_types(model: ir.Model) -> dict[str, ir.DataType]:
    """The element type of every tensor of the main graph, as far as ONNX can tell."""
    typed = clone(model)
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(typed)
    values = (*typed.graph.inputs, *typed.graph.initializers.values(), *_made(typed))
    return {str(value.name): value.dtype for value in values if value.dtype is not None}


def as_stored(values: Mapping[str, Array], types: Mapping[str, ir.DataType]) -> dict[str, Array]:
    """Values that the twin computed, in the types of the model; without those of a type that is not known."""
    if not types:
        return dict(values)
    return {name: array.astype(types[name].numpy()) for name, array in values.items() if name in types}


def _made(model: ir.Model) -> Iterator[ir.Value]:
    return (value for node in model.graph for value in node.outputs)


def _graphs(model: ir.Model) -> Iterator[_Graph]:
    yield from model.graphs()
    yield from model.functions.values()


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _initializers(graph: _Graph) -> Iterator[ir.Value]:
    if isinstance(graph, ir.Graph):
        yield from graph.initializers.values()


def _is_half(dtype: ir.DataType | None) -> bool:
    return dtype in _HALVES


def _names_half(attribute: Any) -> bool:
    if attribute.is_ref():
        return False
    if attribute.type == ir.AttributeType.TENSOR:
        return _is_half(attribute.as_tensor().dtype)
    named = attribute.type == ir.AttributeType.INT and attribute.name in _TYPE_ATTRIBUTES
    return named and int(attribute.as_int()) in [int(half) for half in _HALVES]


def _wide_attribute(attribute: ir.Attr) -> ir.Attr:
    if attribute.type == ir.AttributeType.TENSOR:
        return ir.AttrTensor(attribute.name, _wide_tensor(attribute.as_tensor()), attribute.doc_string)
    return ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))


def _wide_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not _is_half(tensor.dtype):
        return tensor
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name, doc_string=tensor.doc_string)


def _wide_type(kind: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    if isinstance(kind, (ir.SequenceType, ir.OptionalType)):
        inner = _wide_type(kind.elem_type)
        assert inner is not None
        return type(kind)(inner)
    return ir.TensorType(ir.DataType.FLOAT) if kind is not None and _is_half(kind.dtype) else kind
