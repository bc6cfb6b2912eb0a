"""Models computed as they are written (half precision in float32), a few times, with no copy of the weights.

A session packs and copies its weights, which pays where many runs follow; a large model then lies in memory
several times. Here the weights are *inputs* of the graph, fed at every run from where they lie already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnx_mdp.model_io import clone
from onnx_mdp.precision import in_float32, widened
from onnx_mdp.runtime import NodeArg, Runtime, import_onnxruntime, open_session

__all__ = ["Computation", "weightless", "with_weights"]

_LARGE_BYTES = 2**12

Weights = Mapping[str, ir.TensorProtocol]


class Computation:
    """An unoptimised session on the CPU; the weights stay where they are."""

    def __init__(self, model: ir.Model, outputs: Sequence[str] = ()) -> None:
        """Open a model; ``outputs`` names inner tensors that shall be outputs as well.

        Raises:
            MeasurementError: ONNX Runtime cannot load the model.
        """
        proto, weights = weightless(in_float32(model))
        known = {output.name for output in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in known)
        self._session: Any = open_session(proto.SerializeToString(), Runtime(), optimize=False)
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

    def run(self, names: Sequence[str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
        """Compute the outputs ``names`` as arrays."""
        found: list[Any] = self._session.run(list(names), {**self._weights, **widened(feeds)})
        return found

    def run_values(self, names: Sequence[str], feeds: Mapping[str, npt.NDArray[Any]]) -> Sequence[Any]:
        """Compute the outputs ``names`` as ``OrtValue``: who needs the shape alone pays for no copy."""
        make = import_onnxruntime().OrtValue.ortvalue_from_numpy
        fed = {
            name: make(np.ascontiguousarray(array))
            for name, array in (self._weights | widened(feeds)).items()
        }
        found: Sequence[Any] = self._session.run_with_ort_values(list(names), fed)
        return found


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
