"""Kernels of layers with a weight: convolutions, matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_mdp.training.kernels.registry import Call, kernel

__all__ = ["pad_space", "padding"]

Pairs = list[tuple[int, int]]

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "Clip": lambda x, low, high: torch.clamp(x, low, high),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}


def padding(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Pairs:
    """What a layer pads each spatial axis with, before and behind."""
    mode = call.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [(0, 0)] * len(kernel)
    if mode == "NOTSET":
        pads = call.get("pads") or [0] * (2 * len(kernel))
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    pairs = []
    for size, extent, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        outputs = -(-size // stride)
        total = max(0, (outputs - 1) * stride + (extent - 1) * dilation + 1 - size)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if mode == "SAME_UPPER" else (more, less))
    return pairs


def pad_space(x: Tensor, pairs: Pairs, value: float = 0.0) -> Tensor:
    """Pad (or, where negative, crop) the last axes of ``x``."""
    if not any(low or high for low, high in pairs):
        return x
    return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=value)


def _geometry(call: Call, rank: int) -> tuple[list[int], list[int]]:
    return list(call.get("strides") or [1] * rank), list(call.get("dilations") or [1] * rank)


@kernel("Conv")
def _conv(call: Call, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    extents = w.shape[2:]
    strides, dilations = _geometry(call, len(extents))
    pairs = padding(call, x.shape[2:], extents, strides, dilations)
    if not 1 <= len(extents) <= 3:
        raise call.unsupported(f"{len(extents)} spatial axes")
    pads = [low for low, _ in pairs]
    if any(low != high for low, high in pairs):
        x, pads = pad_space(x, pairs), [0] * len(extents)
    y: Tensor = _CONV[len(extents) - 1](x, w, b, strides, pads, dilations, call.get("group", 1))
    return y


@kernel("ConvTranspose")
def _conv_transpose(call: Call, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    extents, sizes = w.shape[2:], x.shape[2:]
    rank = len(extents)
    strides, dilations = _geometry(call, rank)
    more = list(call.get("output_padding") or [0] * rank)
    whole = [
        (size - 1) * stride + (extent - 1) * dilation + 1 + extra
        for size, stride, extent, dilation, extra in zip(
            sizes, strides, extents, dilations, more, strict=True
        )
    ]
    wanted = call.get("output_shape")
    mode = call.get("auto_pad", "NOTSET")
    if wanted is None and mode.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    if wanted is None:
        pairs = padding(call, sizes, extents, strides, dilations)
    else:
        totals = [full - size for full, size in zip(whole, wanted[-rank:], strict=True)]
        pairs = [
            (total // 2, total - total // 2) if mode == "SAME_UPPER" else (total - total // 2, total // 2)
            for total in totals
        ]
    transpose, group = _CONV_TRANSPOSE[rank - 1], call.get("group", 1)
    if all(low == high >= 0 for low, high in pairs):
        pads = [low for low, _ in pairs]
        y: Tensor = transpose(x, w, b, strides, pads, more, group, dilations)
        return y
    y = transpose(x, w, b, strides, [0] * rank, more, group, dilations)
    if b is not None and any(amount < 0 for pair in pairs for amount in pair):
        raise call.unsupported("a larger output than its input reaches")
    return pad_space(y, [(-low, -high) for low, high in pairs])


@kernel("MatMul")
def _matmul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


@kernel("Gemm")
def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    a = a.t() if call.get("transA", 0) else a
    if call.get("transB", 0) and alpha == beta == 1 and (c is None or c.shape == b.shape[:1]):
        return F.linear(a, b, c)
    y = torch.matmul(a, b.t() if call.get("transB", 0) else b)
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


@kernel("Einsum")
def _einsum(call: Call, *operands: Tensor) -> Tensor:
    return torch.einsum(call.get("equation").replace(" ", ""), *operands)


def _activated(call: Call, x: Tensor, numbers: Sequence[float]) -> Tensor:
    name = call.get("activation") or ""
    if name and name not in _ACTIVATIONS:
        raise call.unsupported(f"the activation {name}")
    return _ACTIVATIONS[name](x, *numbers) if name else x


@kernel("com.microsoft::FusedConv")
def _fused_conv(
    call: Call, x: Tensor, w: Tensor, b: Tensor | None = None, more: Tensor | None = None
) -> Tensor:
    y = _conv(call, x, w, b)
    return _activated(call, y if more is None else y + more, call.get("activation_params") or ())


@kernel("com.microsoft::FusedGemm")
def _fused_gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    given = (call.get("activation_alpha"), call.get("activation_beta"))
    return _activated(call, _gemm(call, a, b, c), [number for number in given if number is not None])


@kernel("com.microsoft::FusedMatMul")
def _fused_matmul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    if call.get("transBatchA", 0) or call.get("transBatchB", 0):
        raise call.unsupported("transposed batches")
    x = x.mT if call.get("transA", 0) and x.dim() > 1 else x
    y = y.mT if call.get("transB", 0) and y.dim() > 1 else y
    return torch.matmul(x, y) * float(call.get("alpha", 1.0))
