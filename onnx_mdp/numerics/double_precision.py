"""Models in float64, for the law where the rounding of float32 hides it.

A sigmoid that saturates or a factor of 10⁵ amplifies the rounding of float32 until two correct models differ
by percents. ONNX Runtime has no convolution in float64; ONNX's reference evaluator has, but spends minutes on
a large map, so convolutions are sums over the kernel's places here: one matrix product each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

__all__ = ["BatchNormalization", "Conv", "ConvTranspose", "in_double", "run_in_double"]

Array = npt.NDArray[Any]


def in_double(model: ir.Model | onnx.ModelProto) -> onnx.ModelProto:
    """The same model with float64 in place of float32."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model if isinstance(model, onnx.ModelProto) else ir.to_proto(model))
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    tensors = [
        *proto.graph.initializer,
        *(a.t for n in proto.graph.node for a in n.attribute if a.HasField("t")),
    ]
    for tensor in (t for t in tensors if t.data_type == onnx.TensorProto.FLOAT):
        wide = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    casts = [
        n for n in proto.graph.node if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.FLOAT
    ]
    for node in casts:
        node.attribute[0].CopyFrom(helper.make_attribute("to", onnx.TensorProto.DOUBLE))
    return proto


def run_in_double(
    model: ir.Model | onnx.ModelProto, feeds: Mapping[str, Array], names: Sequence[str] | None = None
) -> list[Array]:
    """Outputs for these inputs, computed in float64: all, or the tensors of these ``names``.

    The evaluator raises errors of many kinds for operators that it does not know.
    """
    wide = {name: a.astype(np.float64) if a.dtype.kind == "f" else a for name, a in feeds.items()}
    evaluator = ReferenceEvaluator(in_double(model), new_ops=[BatchNormalization, Conv, ConvTranspose])
    with np.errstate(all="ignore"):  # its sigmoid computes both halves of the real line everywhere
        outputs = evaluator.run(None if names is None else list(names), wide)
    return [np.asarray(output) for output in outputs]


class BatchNormalization(OpRun):
    """The form of inference; the evaluator takes statistics of the batch where a file names a momentum."""

    def _run(self, *inputs: Array, epsilon: float = 1e-5, **_: Any) -> tuple[Array]:
        scale, bias, mean, variance = (v.reshape(-1, *[1] * (inputs[0].ndim - 2)) for v in inputs[1:])
        return ((inputs[0] - mean) / np.sqrt(variance + epsilon) * scale + bias,)


class Conv(OpRun):
    """A convolution of images."""

    def _run(self, *inputs: Array, group: int = 1, **attributes: Any) -> tuple[Array]:
        (step, spread), (top, left, bottom, right) = _geometry(attributes, inputs)
        kernel = _grouped(inputs[1], group)
        image = np.pad(inputs[0], ((0, 0), (0, 0), (top, bottom), (left, right)))
        parts = image.reshape(len(image), group, -1, *image.shape[2:])
        size = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(image.shape[2:], kernel.shape[3:], step, spread, strict=True)
        ]
        total = np.zeros((len(image), inputs[1].shape[0], *size))
        for place in np.ndindex(*kernel.shape[3:]):
            at: tuple[Any, ...] = (..., *_seen(place, size, step, spread))
            total += _mixed(kernel[(..., *place)], parts[at]).reshape(total.shape)
        return (_biased(total, inputs),)


class ConvTranspose(OpRun):
    """A transposed convolution of images with explicit padding."""

    def _run(self, *inputs: Array, group: int = 1, **attributes: Any) -> tuple[Array]:
        if attributes.get("auto_pad") not in (None, "NOTSET") or attributes.get("output_shape"):
            raise NotImplementedError("a transposed convolution that computes its padding")
        (step, spread), (top, left, bottom, right) = _geometry(attributes, inputs)
        more = attributes.get("output_padding") or (0, 0)
        kernel = _grouped(inputs[1], group).swapaxes(1, 2)
        image = inputs[0]
        parts = image.reshape(len(image), group, -1, *image.shape[2:])
        size = [
            s * (n - 1) + d * (k - 1) + 1 + m
            for n, k, s, d, m in zip(image.shape[2:], kernel.shape[3:], step, spread, more, strict=True)
        ]
        total = np.zeros((len(image), group, kernel.shape[1], *size))
        for place in np.ndindex(*kernel.shape[3:]):
            at: tuple[Any, ...] = (..., *_seen(place, image.shape[2:], step, spread))
            total[at] += _mixed(kernel[(..., *place)], parts)
        total = total.reshape(len(image), -1, *size)[:, :, top : size[0] - bottom, left : size[1] - right]
        return (_biased(total, inputs),)


def _geometry(
    attributes: Mapping[str, Any], inputs: Sequence[Array]
) -> tuple[tuple[Sequence[int], Sequence[int]], Sequence[int]]:
    """Strides and dilations, and the padding above, to the left, below and to the right."""
    step, spread = attributes.get("strides") or (1, 1), attributes.get("dilations") or (1, 1)
    mode = attributes.get("auto_pad") or "NOTSET"
    if not mode.startswith("SAME"):
        return (step, spread), attributes.get("pads") or (0, 0, 0, 0)
    before, after = [], []
    for n, k, s, d in zip(inputs[0].shape[2:], inputs[1].shape[2:], step, spread, strict=True):
        missing = max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
        half = missing // 2
        before.append(half if mode == "SAME_UPPER" else missing - half)
        after.append(missing - before[-1])
    return (step, spread), (*before, *after)


def _grouped(weight: Array, group: int) -> Array:
    return weight.reshape(group, -1, *weight.shape[1:])


def _seen(
    place: Sequence[int], size: Sequence[int], step: Sequence[int], spread: Sequence[int]
) -> list[slice]:
    """The positions that one place of the kernel meets."""
    axes = zip(place, size, step, spread, strict=True)
    return [slice(p * d, p * d + s * (n - 1) + 1, s) for p, n, s, d in axes]


def _mixed(matrix: Array, image: Array) -> Array:
    """``float64[group, out, in]`` times ``float64[batch, group, in, height, width]``."""
    flat = np.matmul(matrix, image.reshape(*image.shape[:3], -1))
    mixed: Array = flat.reshape(*flat.shape[:3], *image.shape[3:])
    return mixed


def _biased(total: Array, inputs: Sequence[Array]) -> Array:
    if len(inputs) < 3:
        return total
    biased: Array = np.add(total, inputs[2].reshape(-1, 1, 1))
    return biased
