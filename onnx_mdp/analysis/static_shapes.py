"""Shapes and constants without running a model: ONNX's own inference, and its reference evaluator.

Planning from a table needs no runtime. Inference does not know every shape that a run would show; then the
model needs ONNX Runtime after all. A model that does not run at other sizes still says by its arithmetic
what follows the size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_mdp.errors import MissingBackendError

__all__ = ["doubled_sizes", "infer_statically"]


def infer_statically(
    proto: onnx.ModelProto,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Sequence[str],
    pure: Sequence[str],
) -> tuple[dict[str, tuple[int, ...]], dict[str, npt.NDArray[Any]]]:
    """The shapes of the tensors ``wanted`` and the values of those that depend on no input value.

    Raises:
        MissingBackendError: inference finds no static shape for one of them.
    """
    static = onnx.ModelProto.FromString(proto.SerializeToString())
    del static.graph.value_info[:]  # what a file says of its inner sizes may hold for other inputs
    for value in static.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in static.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            dim.dim_value = size
    try:
        inferred = onnx.shape_inference.infer_shapes(static, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise _needs_runtime(str(error).splitlines()[0][:120]) from error
    seen = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)
        if value.type.tensor_type.HasField("shape")
        and all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    }
    values = _values(inferred, seen, pure)
    seen |= {name: value.shape for name, value in values.items()}
    unknown = [name for name in wanted if name not in seen]
    if unknown:
        raise _needs_runtime(f"the shape of {unknown[0]!r} is not static")
    return {name: seen[name] for name in wanted}, values


def doubled_sizes(
    proto: onnx.ModelProto,
    seen: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, npt.NDArray[Any]],
    names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """What size arithmetic makes of tensors of the shapes ``seen`` with every symbolic extent doubled.

    An extent is symbolic where inference finds no number for it, the inputs being as the file has them: the
    channels of a convolution are none, whatever the image. Nothing but the nodes that make ``names`` is
    evaluated; ``constants`` holds what else these read. The result is empty where that fails.
    """
    bare = onnx.ModelProto.FromString(proto.SerializeToString())
    del bare.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except onnx.shape_inference.InferenceError:
        inferred = bare
    fixed = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.graph.value_info, *inferred.graph.input)
    }
    doubled = {}
    for name, shape in seen.items():
        sizes = fixed.get(name, [])
        known = sizes if len(sizes) == len(shape) else [0] * len(shape)
        doubled[name] = tuple(size if size == n else 2 * size for size, n in zip(shape, known, strict=True))
    read = {v for node in bare.graph.node if set(names) & set(node.output) for v in node.input} - set(names)
    inferred.graph.initializer.extend(
        numpy_helper.from_array(constants[name], name) for name in sorted(read & constants.keys())
    )
    try:
        return _values(inferred, doubled, names)
    except MissingBackendError:
        return {}


def _values(
    proto: onnx.ModelProto, seen: Mapping[str, tuple[int, ...]], pure: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Evaluate the nodes of the pure tensors; what they ask the shape of is fed as zeros without memory."""
    names = set(pure)
    nodes = [node for node in proto.graph.node if names & set(node.output)]
    stored = {tensor.name for tensor in proto.graph.initializer}
    asked = {name for node in nodes for name in node.input if name and name not in stored | names}
    if not asked <= seen.keys():
        raise _needs_runtime(f"the shape of {min(asked - seen.keys())!r} is not static")
    inputs = [onnx.helper.make_tensor_value_info(name, 1, seen[name]) for name in sorted(asked)]
    outputs = [onnx.ValueInfoProto(name=name) for name in pure]
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    graph = onnx.helper.make_graph(nodes, "constants", inputs, outputs, tensors)
    model = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    feeds = {name: np.broadcast_to(np.zeros((), np.float32), seen[name]) for name in asked}
    try:
        found = ReferenceEvaluator(model).run(list(pure), feeds) if pure else []
    except Exception as error:  # the evaluator's operators raise whatever they like
        raise _needs_runtime(str(error).splitlines()[0][:120]) from error
    return {name: np.asarray(value) for name, value in zip(pure, found, strict=True)}


def _needs_runtime(why: str) -> MissingBackendError:
    return MissingBackendError(
        f"the shapes of this model cannot be told without running it ({why}): install ONNX Runtime, "
        "`pip install onnx-mdp[cpu]`"
    )
