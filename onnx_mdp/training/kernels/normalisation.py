"""Kernels of normalisations and of Softmax and its kin."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_mdp.training.kernels.registry import Call, kernel

__all__: list[str] = []

_LINES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Hardmax": lambda x, axis: torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0),
    "LogSoftmax": lambda x, axis: F.log_softmax(x, axis),
    "Softmax": lambda x, axis: F.softmax(x, axis),
}


@kernel(*_LINES)
def _lines(call: Call, x: Tensor) -> Tensor:
    """Before opset 13 all axes from ``axis`` on are one line."""
    apply = _LINES[call.operator]
    if call.opset >= 13:
        return apply(x, call.get("axis", -1))
    axis = call.get("axis", 1) % x.dim()
    return apply(x.reshape(math.prod(x.shape[:axis]), -1), 1).reshape(x.shape)


def _channels(parameter: Tensor, rank: int) -> Tensor:
    return parameter.reshape(-1, *[1] * (rank - 2))


@kernel("BatchNormalization")
def _batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> object:
    """In training mode by the statistics of the batch, and the running ones move; else by these.

    A file may say itself that it normalises by its batch: by an attribute, or, before opset 14, by asking for
    all five outputs.
    """
    epsilon, momentum = call.get("epsilon", 1e-5), call.get("momentum", 0.9)
    if call.get("spatial", 1) == 0:
        raise call.unsupported("statistics for each position")
    if call.get("training_mode", 0) or call.outputs == 5:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        own_var, own_mean = torch.var_mean(x, axes, correction=0)
        y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
        moved = [old * momentum + new * (1 - momentum) for old, new in ((mean, own_mean), (var, own_var))]
        return y, *moved, own_mean, torch.rsqrt(own_var + epsilon)
    if call.outputs > 1:
        raise call.unsupported("statistics as outputs")
    return F.batch_norm(x, mean, var, scale, bias, call.training, 1 - momentum, epsilon)


@kernel("LayerNormalization")
def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> object:
    axis, epsilon = call.get("axis", -1) % x.dim(), call.get("epsilon", 1e-5)
    shape = list(x.shape[axis:])
    if list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        y = F.layer_norm(x, shape, scale, bias, epsilon)
    else:
        y = F.layer_norm(x, shape, None, None, epsilon) * scale
        y = y if bias is None else y + bias
    if call.outputs == 1:
        return y
    var, mean = torch.var_mean(x, list(range(axis, x.dim())), correction=0, keepdim=True)
    return y, mean, torch.rsqrt(var + epsilon)


@kernel("RMSNormalization")
def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    axes = list(range(call.get("axis", -1) % x.dim(), x.dim()))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    inverse = torch.rsqrt(wide.square().mean(axes, keepdim=True) + call.get("epsilon", 1e-5))
    return (wide * inverse).to(x.dtype) * scale


@kernel("InstanceNormalization")
def _instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    y = F.layer_norm(x, list(x.shape[2:]), None, None, call.get("epsilon", 1e-5))
    return y * _channels(scale, x.dim()) + _channels(bias, x.dim())


@kernel("GroupNormalization")
def _group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Scale and bias are of each group before opset 21, of each channel since."""
    groups = call.get("num_groups")
    lines = x.reshape(x.shape[0], groups, -1)
    y = F.layer_norm(lines, [lines.shape[2]], None, None, call.get("epsilon", 1e-5)).reshape(x.shape)
    if call.opset < 21:
        scale, bias = (p.repeat_interleave(x.shape[1] // groups) for p in (scale, bias))
    return y * _channels(scale, x.dim()) + _channels(bias, x.dim())


@kernel("MeanVarianceNormalization")
def _mean_variance_norm(call: Call, x: Tensor) -> Tensor:
    axes = [axis for axis in call.get("axes", (0, 2, 3)) if axis < x.dim()]
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(var) + 1e-9)


@kernel("LpNormalization")
def _lp_norm(call: Call, x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, call.get("p", 2), call.get("axis", -1), keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


@kernel("LRN")
def _lrn(call: Call, x: Tensor) -> Tensor:
    size, alpha, beta = call.get("size"), call.get("alpha", 1e-4), call.get("beta", 0.75)
    squares = x.square().reshape(x.shape[0], 1, x.shape[1], -1)
    before = (size - 1) // 2
    padded = F.pad(squares, [0, 0, before, size - 1 - before])
    means = F.avg_pool2d(padded, [size, 1], 1).reshape(x.shape)
    divisor: Tensor = (call.get("bias", 1.0) + alpha * means).pow(beta)
    return x / divisor
