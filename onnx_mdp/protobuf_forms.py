"""Forms of a file that onnx-ir does not read: sparse tensors are filled, and double names refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_mdp.errors import UnreadableModelError

__all__ = ["fill_sparse_tensors", "refuse_double_names"]


def refuse_double_names(proto: onnx.ModelProto) -> None:
    """Refuse a graph in which two values have one name.

    Raises:
        UnreadableModelError: it says which value.
    """
    graph = proto.graph
    stored = [tensor.name for tensor in graph.initializer]
    stored += [tensor.values.name for tensor in graph.sparse_initializer]
    made = [name for node in graph.node for name in node.output if name]
    given = {value.name for value in graph.input} - set(stored)
    for names in (stored, [*set(stored), *given, *made]):
        double = [name for name, count in Counter(names).items() if count > 1]
        if double:
            raise UnreadableModelError(
                f"the model has two values named {double[0]!r}, so that what reads it is undecided; "
                "export it again with a name for each"
            )


def fill_sparse_tensors(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with dense tensors for its sparse ones; the model itself where it has none.

    A file can be read that declares up to 2³⁰ elements so; a larger one is refused before.
    """
    if not any(_sparse(holder) for holder in _holders(proto)):
        return proto
    filled = onnx.ModelProto()
    filled.CopyFrom(proto)
    for holder in _holders(filled):
        if isinstance(holder, onnx.GraphProto):
            holder.initializer.extend(_dense(sparse) for sparse in holder.sparse_initializer)
            del holder.sparse_initializer[:]
        for attribute in _sparse_attributes(holder):
            value = onnx.helper.make_attribute("value", _dense(attribute.sparse_tensor))
            attribute.CopyFrom(value)
    return filled


def _holders(proto: onnx.ModelProto) -> Iterator[Any]:
    stack: list[Any] = [proto.graph, *proto.functions]
    while stack:
        holder = stack.pop()
        yield holder
        for attribute in (a for node in holder.node for a in node.attribute):
            stack += [attribute.g] if attribute.HasField("g") else []
            stack += attribute.graphs


def _sparse(holder: Any) -> bool:
    return bool(getattr(holder, "sparse_initializer", ())) or bool(_sparse_attributes(holder))


def _sparse_attributes(holder: Any) -> list[onnx.AttributeProto]:
    return [a for node in holder.node for a in node.attribute if a.HasField("sparse_tensor")]


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """Indices are positions in the flat tensor, or one row of coordinates for each value."""
    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    array = np.zeros(tuple(sparse.dims), values.dtype)
    if places.ndim == 2:
        array[tuple(places.T)] = values
    else:
        array.reshape(-1)[places] = values
    return numpy_helper.from_array(array, sparse.values.name)
