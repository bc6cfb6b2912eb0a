"""Models computed as they are written (half precision in float32), a few times, with no copy of the weights.

A session packs and copies its weights, which pays where many runs follow; a large model then lies in memory
several times. Here the weights are *inputs* of the graph, fed at every run from where they lie already.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnx_mdp.errors import MeasurementError, UnsupportedModelError
from onnx_mdp.model_io import clone
from onnx_mdp.numerics.precision import in_float32, widened
from onnx_mdp.running.runtime import NodeArg, Runtime, import_onnxruntime, open_session
from onnx_mdp.supervision import deadline
from onnx_mdp.untrusted import MOST_TENSOR_BYTES

__all__ = ["Computation", "weightless", "with_weights"]

_LARGE_BYTES = 2**12
_ITEM_BYTES = 4
_MOST_SECONDS = 300.0  # of one run on one thread
_GRACE_SECONDS = 30.0  # in which the node that is running may end

Weights = Mapping[str, ir.TensorProtocol]


class Computation:
    """An unoptimised session on the CPU; the weights stay where they are."""

    def __init__(
        self,
        model: ir.Model,
        outputs: Sequence[str] = (),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        measured: Sequence[str] = (),
        *,
        alone: bool = False,
    ) -> None:
        """Open a model; ``outputs`` names inner tensors that shall be outputs as well.

        Those of ``measured`` may be asked for their shapes. ``alone``: nothing else is an output or computed.
        With ``shapes``, those of the inputs, it is known before the first run how large most tensors are.

        Raises:
            MeasurementError: ONNX Runtime cannot load the model.
            UnsupportedModelError: a tensor would be larger than 4 GB.
        """
        proto, weights = weightless(in_float32(model))
        if alone:
            _keep_only(proto, (*outputs, *measured))
        known = {output.name for output in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in known)
        self._extents = {name: f"mdp_shape_{index}" for index, name in enumerate(measured)}
        for name, made in self._extents.items():
            proto.graph.node.append(onnx.helper.make_node("Shape", [name], [made]))
            proto.graph.output.append(onnx.ValueInfoProto(name=made))
        bound = _bind(proto, shapes or {})
        try:
            self._session: Any = open_session(proto.SerializeToString(), Runtime(), optimize=False)
        except MeasurementError as error:
            if not bound:
                raise
            raise MeasurementError(f"{str(error).rstrip('.')}, at these input shapes") from error
        for arg in self._session.get_outputs():
            _refuse_absurd(arg)
        # ONNX Runtime reads a contiguous array where it lies.
        self._weights = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in weights.items()}

    @property
    def inputs(self) -> tuple[NodeArg, ...]:
        """The inputs of the model."""
        return tuple(arg for arg in self._session.get_inputs() if arg.name not in self._weights)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return tuple(arg.name for arg in self._session.get_outputs())

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the outputs that are tensors: no sequences, maps or optional values."""
        return tuple(arg.name for arg in self._session.get_outputs() if arg.type.startswith("tensor("))

    def run(self, names: Sequence[str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
        """Compute the outputs ``names`` as arrays."""
        with _time_limit() as limit:
            found: list[Any] = self._session.run(list(names), {**self._weights, **widened(feeds)}, limit)
        return found

    def shapes(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors ``measured``, in one run.

        ONNX Runtime takes the shape of a tensor as soon as there is one and then forgets the tensor, so that
        activations are never held together.
        """
        found = self.run(tuple(self._extents.values()), feeds)
        return {name: tuple(map(int, shape)) for name, shape in zip(self._extents, found, strict=True)}


def _keep_only(proto: onnx.ModelProto, outputs: Sequence[str]) -> None:
    """Drop the outputs of a model, and the nodes that the tensors ``outputs`` do not need."""
    needed, kept = set(outputs), []
    for node in reversed(proto.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(_read(node))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del proto.graph.output[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, its subgraphs included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _read(inner)
            yield from (output.name for output in graph.output)


def _bind(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Give the inputs their shapes; whether that changed any."""
    changed = False
    for value in proto.graph.input:
        sizes = shapes.get(value.name, ())
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes, strict=False):
            changed |= dim.dim_value != size
            dim.dim_value = size
    return changed


def _refuse_absurd(arg: NodeArg) -> None:
    sizes = [size for size in arg.shape if isinstance(size, int)]
    size = math.prod(sizes) * _ITEM_BYTES
    if len(sizes) == len(arg.shape) and size > MOST_TENSOR_BYTES:
        raise UnsupportedModelError(
            f"tensor {arg.name!r} of the model would have the shape {sizes}, {size / 1e9:.1f} GB: "
            "check the shapes that the model computes, or choose smaller inputs with --input-shape"
        )


@contextmanager
def _time_limit() -> Iterator[Any]:
    """Options of a run that ends, between two nodes, when it has taken too long."""
    options = import_onnxruntime().RunOptions()
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        options.terminate = True

    timer = threading.Timer(_MOST_SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        with deadline(_MOST_SECONDS + _GRACE_SECONDS):
            yield options
    except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
        if not stopped.is_set():
            raise
        raise MeasurementError(
            f"one run of the model took more than {_MOST_SECONDS / 60:.0f} minutes and was stopped: "
            "choose smaller inputs with --input-shape"
        ) from error
    finally:
        timer.cancel()


def weightless(model: ir.Model) -> tuple[onnx.ModelProto, Weights]:
    """The protobuf of a model whose float weights of 4 KiB and more are inputs, and these weights."""
    bare = clone(model)
    weights: dict[str, ir.TensorProtocol] = {}
    listed = {value.name for value in bare.graph.inputs}
    for name, value in list(bare.graph.initializers.items()):
        tensor = value.const_value
        large = tensor is not None and tensor.nbytes >= _LARGE_BYTES and tensor.dtype == ir.DataType.FLOAT
        if tensor is None or not large or value.is_graph_output():
            continue
        weights[name] = tensor
        del bare.graph.initializers[name]
        value.const_value, value.shape, value.dtype = None, ir.Shape(tensor.shape.numpy()), tensor.dtype
        if name not in listed:
            bare.graph.inputs.append(value)
    return ir.to_proto(bare), weights


def with_weights(proto: onnx.ModelProto, weights: Weights) -> ir.Model:
    """The model that `weightless` (and an edit of its protobuf) was made from; it shares the weights."""
    model = ir.from_proto(proto)
    for value in [value for value in model.graph.inputs if value.name in weights]:
        model.graph.inputs.remove(value)
        value.const_value = weights[str(value.name)]
        model.graph.register_initializer(value)
    return model
