"""What a model file must keep to before anything works on it: a file from elsewhere is not trusted.

All that a file can declare is checked against what it holds, on the protobuf and before any of it is copied:
external data stays beside the model, tensors are as large as their dimensions say, every value that is read
is made somewhere, and local functions neither call themselves nor unfold into more nodes than a network has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir

from onnx_mdp.errors import UnreadableModelError

__all__ = ["MOST_TENSOR_BYTES", "available_bytes", "check_model"]

MOST_TENSOR_BYTES = 2**32  # of one activation, on the way from an input to an output
_MOST_NODES = 10**6  # of a model whose functions are unfolded
_MOST_ELEMENTS = 2**40  # whether the file holds them is checked next
_MOST_FILLED = 2**30  # elements of a sparse tensor when it is filled
_Function: TypeAlias = "tuple[str, str, str]"


def check_model(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse a model that declares what cannot be.

    Raises:
        UnreadableModelError: external data outside the model's folder or shorter than declared, a tensor
            that is not as large as its dimensions, a value that nothing makes, recursive functions.
    """
    for sparse in _sparse_tensors(proto):
        _check_dims(sparse.dims, _MOST_FILLED, sparse.values.name, path)
    _check_text(proto, path)
    for tensor in _tensors(proto):
        _check_dims(tensor.dims, _MOST_ELEMENTS, tensor.name, path)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
        elif tensor.data_type == onnx.TensorProto.STRING:
            if len(tensor.string_data) != math.prod(tensor.dims):
                raise UnreadableModelError(
                    f"{path} holds another number of strings in {tensor.name!r} than it declares"
                )
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != _declared_bytes(tensor):
            raise UnreadableModelError(
                f"{path} declares {_declared_bytes(tensor)} bytes of tensor {tensor.name!r} and holds "
                f"{len(tensor.raw_data)}: it is truncated or corrupt"
            )
    _check_size(proto, path)
    if proto.HasField("graph") and not any(opset.domain in ("", "ai.onnx") for opset in proto.opset_import):
        raise UnreadableModelError(
            f"{path} does not say which version of ONNX's operators it uses; export it again"
        )
    for holder in _holders(proto.graph, *proto.functions):
        _check_attributes(holder, path)
    _check_values(proto.graph, path, [])
    for function in proto.functions:
        _check_values(function, path, [])
    _check_functions(proto, path)


def available_bytes() -> int | None:
    """The memory that a process can still get; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["MemAvailable"] + sizes.get("SwapFree", 0) if "MemAvailable" in sizes else None


def _check_text(proto: onnx.ModelProto, path: Path) -> None:
    """Protobuf hands over as bytes what is not UTF-8."""
    stack: list[Any] = [proto]
    while stack:
        for descriptor, held in stack.pop().ListFields():
            items = [held] if isinstance(held, (str, bytes)) or hasattr(held, "ListFields") else held
            if descriptor.type == descriptor.TYPE_MESSAGE:
                stack.extend(items)
            elif descriptor.type == descriptor.TYPE_STRING and any(isinstance(i, bytes) for i in items):
                raise UnreadableModelError(
                    f"{path} is not a valid model: a {descriptor.name} in it is not UTF-8; export it again"
                )


# -- tensors ------------------------------------------------------------------------------------------------


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, those in attributes, subgraphs and functions included."""
    for holder in _holders(proto.graph, *proto.functions):
        yield from getattr(holder, "initializer", ())
        for attribute in (a for node in holder.node for a in node.attribute):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
    for sparse in _sparse_tensors(proto):
        yield from (sparse.values, sparse.indices)


def _sparse_tensors(proto: onnx.ModelProto) -> Iterator[onnx.SparseTensorProto]:
    for holder in _holders(proto.graph, *proto.functions):
        yield from getattr(holder, "sparse_initializer", ())
        for attribute in (a for node in holder.node for a in node.attribute):
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor
            yield from attribute.sparse_tensors


def _holders(*roots: Any) -> Iterator[Any]:
    """The graphs and functions given, and every graph inside them."""
    stack = list(roots)
    while stack:
        holder = stack.pop()
        yield holder
        stack.extend(graph for node in holder.node for graph in _subgraphs(node))


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _check_dims(dims: Sequence[int], most: int, name: str, path: Path) -> None:
    if any(not 0 <= dim <= most for dim in dims) or math.prod(dims) > most:
        text = "×".join(map(str, dims[:8])) + ("×…" if len(dims) > 8 else "")
        raise UnreadableModelError(
            f"{path} declares tensor {name!r} with the dimensions {text}, which no weight has; "
            "it is corrupt, export the model again"
        )


def _declared_bytes(tensor: onnx.TensorProto) -> int:
    """What the dimensions need; nothing for strings, which have no fixed size."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return 0
    bits: float = ir.DataType(tensor.data_type).bitwidth
    size: float = math.prod(tensor.dims) * bits / 8
    return math.ceil(size)


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.resolve().parent
    target = folder / location
    outside = (
        not location
        or os.path.isabs(location)
        or folder not in target.resolve().parents
        or any(part == ".." for part in Path(location).parts)
    )
    if outside or target.is_symlink():
        raise UnreadableModelError(
            f"{path} stores tensor {tensor.name!r} outside its own folder; "
            "external data must be a plain file beside the model"
        )
    if not target.is_file():
        raise UnreadableModelError(
            f"{path} needs the external data file {location!r}, which is not beside it"
        )
    offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    needed = _declared_bytes(tensor)
    if offset < 0 or length < 0 or 0 < length < needed:
        raise UnreadableModelError(
            f"{path} places tensor {tensor.name!r}, of {needed} bytes, at offset {offset} and length "
            f"{length} of {location!r}, where none is; export the model again"
        )
    if offset + max(length, needed) > target.stat().st_size:
        raise UnreadableModelError(
            f"{path} reads tensor {tensor.name!r} beyond the end of {location!r}, which is truncated"
        )


def _check_size(proto: onnx.ModelProto, path: Path) -> None:
    """Many tensors may share a file, or one region of it, and be more than it holds."""
    size, available = sum(map(_declared_bytes, _tensors(proto))), available_bytes()
    if available is not None and size > available:
        raise UnreadableModelError(
            f"{path} declares {size / 1e9:.1f} GB of weights, and {available / 1e9:.1f} GB of memory are left"
        )


# -- values -------------------------------------------------------------------------------------------------


def _check_attributes(holder: Any, path: Path) -> None:
    for node in holder.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.UNDEFINED:
                raise UnreadableModelError(
                    f"{path} is not a valid model: attribute {attribute.name!r} of {node.op_type} "
                    f"{node.name!r} has no type; export the model again"
                )


def _check_values(holder: Any, path: Path, outer: Sequence[set[str]]) -> None:
    """Every value that is read is made; the order of nodes, and cycles, are `ir.Graph.sort`'s."""
    is_function = isinstance(holder, onnx.FunctionProto)
    made = set(holder.input) if is_function else {value.name for value in holder.input}
    if not is_function:
        made.update(tensor.name for tensor in holder.initializer)
        made.update(sparse.values.name for sparse in holder.sparse_initializer)
    made.update(name for node in holder.node for name in node.output)
    scopes = (made, *outer)
    for node in holder.node:
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                raise UnreadableModelError(
                    f"{path} is not a valid model: {node.op_type} {node.name!r} reads {name!r}, "
                    "which nothing makes; export the model again"
                )
        for graph in _subgraphs(node):
            _check_values(graph, path, scopes)
    for name in holder.output if is_function else [value.name for value in holder.output]:
        if name not in made:  # a subgraph may not hand out what it has from outside
            raise UnreadableModelError(
                f"{path} is not a valid model: nothing makes its output {name!r}; export the model again"
            )


# -- functions ----------------------------------------------------------------------------------------------


def _check_functions(proto: onnx.ModelProto, path: Path) -> None:
    """A runtime unfolds functions: forty that call each other twice are 2⁴⁰ nodes."""
    bodies = {(f.domain, f.name, f.overload): f for f in proto.functions}
    calls = {key: {call for call in _calls(body) if call in bodies} for key, body in bodies.items()}
    sizes: dict[_Function, int] = {}
    try:
        for key in TopologicalSorter(calls).static_order():
            sizes[key] = _size(bodies[key], sizes)
    except CycleError as error:
        raise UnreadableModelError(
            f"{path} is not a valid model: its function {error.args[1][0][1]!r} calls itself; "
            "export the model again"
        ) from error
    if _size(proto.graph, sizes) > _MOST_NODES:
        raise UnreadableModelError(
            f"{path} unfolds into more than {_MOST_NODES} nodes, which no network has; export the model again"
        )


def _calls(holder: Any) -> Iterator[_Function]:
    for inner in _holders(holder):
        for node in inner.node:
            yield node.domain, node.op_type, node.overload


def _size(holder: Any, sizes: dict[_Function, int]) -> int:
    """The nodes of a graph or function with all functions unfolded."""
    return sum(sizes.get(call, 1) for call in _calls(holder))
