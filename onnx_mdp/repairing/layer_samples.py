"""A linear layer as a matrix product: its weights, and samples of what they are multiplied with.

One sample is one position of the output. Weights are ``[groups, outputs, unknowns]`` of one group each,
inputs ``[groups, samples, unknowns]``; an unknown is an input channel, or one at a place of the kernel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.repairing.linear_layers import Layer, store

__all__ = ["inputs_at", "outputs_at", "store_matrix", "weight_matrix"]

Array = npt.NDArray[Any]
Wide = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


def weight_matrix(layer: Layer) -> Wide:
    """The weights, ``float64[groups, outputs, unknowns]``."""
    assert layer.weight.const_value is not None
    held = layer.weight.const_value.numpy().astype(np.float64)
    if layer.node.op_type == "Conv":
        return held.reshape(_groups(layer), -1, math.prod(held.shape[1:]))
    return (held if _outputs_first(layer) else held.T)[None]


def store_matrix(layer: Layer, matrix: Wide) -> None:
    """Put other weights into the layer, ``float64[groups, outputs, unknowns]``."""
    store(layer.weight, matrix if _outputs_first(layer) else matrix[0].T)


def outputs_at(layer: Layer, tensor: Array, places: Places) -> Array:
    """``[samples, channels]``: a tensor that is laid out as the outputs are, at flat positions."""
    lines = np.moveaxis(tensor, layer.axis, -1)
    return lines.reshape(-1, lines.shape[-1])[places]


def inputs_at(layer: Layer, tensor: Array, extents: tuple[int, ...], places: Places) -> Array:
    """``[groups, samples, unknowns]``: the inputs of flat positions of an output with these ``extents``.

    Extents are those of the output without its channels.
    """
    if layer.node.op_type != "Conv":
        lines = np.moveaxis(tensor, -2, -1) if _on_the_left(layer) else tensor
        return lines.reshape(-1, lines.shape[-1])[places][None]
    batch, *at = np.unravel_index(places, extents)
    kernel = _kernel(layer)
    padded, steps, spaces = _padded(layer, tensor, extents[1:])
    rank = len(kernel)
    index: list[Array] = [batch.reshape(-1, *[1] * rank)]
    for d in range(rank):
        offsets = at[d][:, None] * steps[d] + np.arange(kernel[d]) * spaces[d]
        shape = [1] * rank
        shape[d] = kernel[d]
        index.append(offsets.reshape(-1, *shape))
    patches = np.moveaxis(padded, 1, -1)[tuple(index)].reshape(len(places), math.prod(kernel), -1)
    grouped = patches.reshape(len(places), math.prod(kernel), _groups(layer), -1)
    return np.ascontiguousarray(grouped.transpose(2, 0, 3, 1)).reshape(_groups(layer), len(places), -1)


def _padded(
    layer: Layer, tensor: Array, extents: tuple[int, ...]
) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
    """The padded input of a Conv, its strides and its dilations."""
    rank = len(extents)
    steps = _integers(layer, "strides", (1,) * rank)
    spaces = _integers(layer, "dilations", (1,) * rank)
    pads = _integers(layer, "pads", (0,) * 2 * rank)
    mode = layer.node.attributes.get("auto_pad")
    if mode is not None and mode.as_string() in ("SAME_UPPER", "SAME_LOWER"):
        sizes = zip(extents, steps, _kernel(layer), spaces, tensor.shape[2:], strict=True)
        needed = [max((o - 1) * s + (k - 1) * d + 1 - i, 0) for o, s, k, d, i in sizes]
        less, more = [n // 2 for n in needed], [n - n // 2 for n in needed]
        pads = (*less, *more) if mode.as_string() == "SAME_UPPER" else (*more, *less)
    widths = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    return np.pad(tensor, widths), steps, spaces


def _kernel(layer: Layer) -> tuple[int, ...]:
    assert layer.weight.const_value is not None
    return tuple(layer.weight.const_value.shape.numpy()[2:])


def _groups(layer: Layer) -> int:
    return _integers(layer, "group", (1,))[0]


def _integers(layer: Layer, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = layer.node.attributes.get(name)
    if attribute is None:
        return default
    return tuple(attribute.as_ints()) if isinstance(attribute.value, (list, tuple)) else (attribute.as_int(),)


def _on_the_left(layer: Layer) -> bool:
    return layer.node.inputs[0] is layer.weight


def _outputs_first(layer: Layer) -> bool:
    """Whether the first axis of the weight counts the outputs."""
    transposed = layer.node.attributes.get("transB")
    turned = transposed is not None and bool(transposed.as_int())
    return layer.node.op_type == "Conv" or turned or _on_the_left(layer)
