"""ONNX models in and out: loading with safety checks, hashing, and atomic saving."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
import onnx_ir as ir

from onnx_mdp.errors import MissingBackendError, UnreadableModelError, UnsupportedModelError, UsageError
from onnx_mdp.protobuf_forms import fill_sparse_tensors, refuse_double_names
from onnx_mdp.untrusted import check_model

if TYPE_CHECKING:
    from onnx_graphsurgeon import Graph as SurgeonGraph

__all__ = [
    "PARAMETER_TYPES",
    "ModelLike",
    "clone",
    "content_hash",
    "is_large",
    "load_model",
    "model_bytes",
    "model_proto",
    "parameter_count",
    "surgeon_graph",
    "topology_hash",
]

ModelLike: TypeAlias = "str | Path | onnx.ModelProto | ir.Model | SurgeonGraph"

# Floats, and integers that are too short for anything but quantized floats.
PARAMETER_TYPES = frozenset(
    ir.DataType[name] for name in "FLOAT FLOAT16 BFLOAT16 DOUBLE INT8 UINT8 INT4 UINT4".split()
)
_MOST_BYTES = 2**31 - 2**20  # protobuf's limit, and some room for the graph


def load_model(source: ModelLike) -> ir.Model:
    """Load an ONNX model from a path, a ``ModelProto``, an ``onnx_ir.Model`` or a ``gs.Graph``.

    Raises:
        UnreadableModelError: the file is missing, is not ONNX, is truncated, or points at
            external data outside its own folder.
    """
    if isinstance(source, (str, os.PathLike)):
        return _load_file(Path(source))
    if isinstance(source, ir.Model):
        return clone(source)
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source)
    surgeon = sys.modules.get("onnx_graphsurgeon")
    if surgeon is not None and isinstance(source, surgeon.Graph):
        exported: onnx.ModelProto = surgeon.export_onnx(source)
        return _from_proto(exported)
    raise UsageError(
        "a model must be a path, a ModelProto, an onnx_ir.Model or a graphsurgeon Graph, "
        f"not {type(source).__name__}"
    )


def _from_proto(proto: onnx.ModelProto) -> ir.Model:
    refuse_double_names(proto)
    return _in_arrays(ir.from_proto(fill_sparse_tensors(proto)))


def _load_file(path: Path) -> ir.Model:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise UnreadableModelError(f"{path} {kind}; give the path of an .onnx file")
    try:
        proto = onnx.load_model(path, load_external_data=False)
        check_model(proto, path)
        refuse_double_names(proto)
        model = ir.from_proto(fill_sparse_tensors(proto))
        ir.external_data.set_base_dir(model.graph, path.parent)
        _sort(model, path)
        model = _in_arrays(ir.external_data.load_to_model(model))
    except UnreadableModelError:
        raise
    except PermissionError as error:
        raise UnreadableModelError(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # protobuf and onnx-ir raise many kinds for malformed bytes
        raise UnreadableModelError(
            f"{path} is not a readable ONNX model: it is truncated, corrupt or another kind of file"
        ) from error
    if not proto.opset_import or not len(model.graph):
        raise UnreadableModelError(f"{path} is not an ONNX model: it holds no graph; export the model again")
    return model


def _sort(model: ir.Model, path: Path) -> None:
    """Bring every graph into an order in which values are made before they are read."""
    try:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    except ValueError as error:
        raise UnreadableModelError(
            f"{path} is not a valid model: its graph has a cycle; export the model again"
        ) from error


def _in_arrays(model: ir.Model) -> ir.Model:
    """Take every tensor out of the protobuf, which copies it at each look and ends with the last of them."""
    for value in (v for graph in model.graphs() for v in graph.initializers.values()):
        if value.const_value is not None:
            value.const_value = _array(value.const_value)
    functions = (node for function in model.functions.values() for node in function.all_nodes())
    for node in (*model.graph.all_nodes(), *functions):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                tensor = _array(attribute.as_tensor())
                node.attributes[name] = ir.AttrTensor(name, tensor, attribute.doc_string)
    return model


def _array(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype == ir.DataType.STRING:
        return tensor
    return ir.Tensor(
        tensor.numpy(),
        dtype=tensor.dtype,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def clone(model: ir.Model) -> ir.Model:
    """An independent copy whose tensors may share memory with the original."""
    return model.clone()


def model_bytes(model: ir.Model) -> bytes:
    """Serialise to one protobuf, as ONNX Runtime takes it.

    Raises:
        UnsupportedModelError: the weights exceed protobuf's limit of 2 GB.
    """
    data: bytes = model_proto(model).SerializeToString()
    return data


def model_proto(model: ir.Model) -> onnx.ModelProto:
    """The protobuf of a model, with copies of its weights.

    Raises:
        UnsupportedModelError: the weights exceed protobuf's limit of 2 GB.
    """
    if is_large(model):
        raise UnsupportedModelError("the model holds more than 2 GB of weights, too much for one file")
    return ir.to_proto(model)


def surgeon_graph(model: ir.Model) -> SurgeonGraph:
    """The model as a graph of onnx-graphsurgeon.

    Raises:
        MissingBackendError: onnx-graphsurgeon is not installed.
    """
    try:
        import onnx_graphsurgeon
    except ImportError as error:
        raise MissingBackendError(
            "to_graph needs onnx-graphsurgeon: run `pip install 'onnx-mdp[graphsurgeon]'`."
        ) from error
    graph: SurgeonGraph = onnx_graphsurgeon.import_onnx(model_proto(model))
    return graph


def is_large(model: ir.Model) -> bool:
    """Whether the weights exceed what one protobuf holds."""
    stored = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in stored if tensor is not None) > _MOST_BYTES


def parameter_count(model: ir.Model) -> int:
    """Number of parameters in the initializers (and in Constant nodes) of the main graph, by their types."""
    tensors = [v.const_value for v in model.graph.initializers.values()]
    tensors += [
        n.attributes["value"].as_tensor()
        for n in model.graph
        if n.op_type == "Constant" and "value" in n.attributes
    ]
    return sum(t.size for t in tensors if t is not None and t.dtype in PARAMETER_TYPES)


def topology_hash(model: ir.Model) -> str:
    """Sha256 (16 hex digits) of the graph and the shapes of its weights, but not of their values."""
    digest = hashlib.sha256()
    for line in _description(model):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:16]


def content_hash(model: ir.Model) -> str:
    """Sha256 (16 hex digits) of the graph and of every weight; independent of the file layout."""
    digest = hashlib.sha256()
    for line in _description(model):
        digest.update(line.encode() + b"\n")
    for name in sorted(model.graph.initializers):
        tensor = model.graph.initializers[name].const_value
        if tensor is not None:
            digest.update(_tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def _tensor_bytes(tensor: ir.TensorProtocol) -> bytes:
    if tensor.dtype == ir.DataType.STRING:
        return repr(tensor.numpy().tolist()).encode()
    return tensor.tobytes()


def _description(model: ir.Model) -> Iterator[str]:
    yield f"opset {sorted(model.opset_imports.items())}"
    yield from (f"input {v.name} {v.dtype} {v.shape}" for v in model.graph.inputs)
    yield from (f"output {v.name}" for v in model.graph.outputs)
    for name in sorted(model.graph.initializers):
        tensor = model.graph.initializers[name].const_value
        if tensor is not None:
            yield f"weight {name} {tensor.dtype} {tuple(tensor.shape)}"
    yield from map(_node_text, model.graph)
    for key, function in sorted(model.functions.items()):
        yield f"function {key} {sorted(function.opset_imports.items())}"
        defaults = [f"{name}={_attribute_text(a)}" for name, a in sorted(function.attributes.items())]
        yield f"{[v.name for v in function.inputs]} {[v.name for v in function.outputs]} {defaults}"
        yield from map(_node_text, function)


def _node_text(node: ir.Node) -> str:
    attributes = [f"{k}={_attribute_text(a)}" for k, a in sorted(node.attributes.items())]
    inputs = [v.name if v is not None else "" for v in node.inputs]
    return f"{node.domain}.{node.op_type} {inputs} {[v.name for v in node.outputs]} {attributes}"


def _attribute_text(attribute: Any) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.TENSOR:
        return _tensor_text(attribute.as_tensor())
    if attribute.type == ir.AttributeType.GRAPH:
        return _body_text(attribute.as_graph())
    if attribute.type == ir.AttributeType.GRAPHS:
        return str([_body_text(graph) for graph in attribute.as_graphs()])
    return str(attribute.value)


def _body_text(graph: ir.Graph) -> str:
    """A digest of a subgraph and its weights: texts in texts in texts would double at every level."""
    weights = [
        f"{name}={_tensor_text(value.const_value)}"
        for name, value in sorted(graph.initializers.items())
        if value.const_value is not None
    ]
    ends = [v.name for v in graph.inputs], [v.name for v in graph.outputs]
    text = "\n".join((str(ends), *weights, *map(_node_text, graph)))
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor_text(tensor: ir.TensorProtocol) -> str:
    digest = hashlib.sha256(_tensor_bytes(tensor)).hexdigest()[:16]
    return f"{tensor.dtype}{tuple(tensor.shape)}{digest}"
