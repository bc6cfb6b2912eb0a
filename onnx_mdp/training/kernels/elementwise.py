"""Kernels that compute position by position: activations, arithmetic, comparisons, casts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_mdp.training.kernels.registry import Call, kernel

__all__ = ["DTYPES"]

DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    16: torch.bfloat16,
}

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "com.microsoft::Gelu": F.gelu,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
_VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
}


@kernel(*_UNARY)
def _unary(call: Call, x: Tensor) -> Tensor:
    return _UNARY[call.operator](x)


@kernel(*_BINARY)
def _binary(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return _BINARY[call.operator](x, y)


@kernel(*_VARIADIC)
def _variadic(call: Call, *operands: Tensor) -> Tensor:
    return functools.reduce(_VARIADIC[call.operator], operands)


@kernel("Mean")
def _mean(call: Call, *operands: Tensor) -> Tensor:
    return functools.reduce(torch.add, operands) / len(operands)


@kernel("Identity")
def _identity(call: Call, x: Tensor) -> Tensor:
    return x


@kernel("Div")
def _div(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@kernel("Mod")
def _mod(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if call.get("fmod", 0) else torch.remainder(x, y)


@kernel("Pow", host=(1,))
def _pow(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """A single number as the exponent stays on the CPU: squares and roots have faster forms."""
    if y.numel() == 1 and y.device.type == "cpu" and y.dim() <= x.dim():
        return torch.pow(x, y.item()).to(x.dtype)
    return torch.pow(x, y.to(x.device)).to(x.dtype)


@kernel("BitShift")
def _bit_shift(call: Call, x: Tensor, y: Tensor) -> Tensor:
    left = call.get("direction") == "LEFT"
    shift = torch.bitwise_left_shift if left else torch.bitwise_right_shift
    return shift(x.to(torch.int64), y.to(torch.int64)).to(x.dtype)


@kernel("PRelu")
def _prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@kernel("Where")
def _where(call: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


@kernel("Clip", host=(1, 2))
def _clip(call: Call, x: Tensor, least: Tensor | None = None, most: Tensor | None = None) -> Tensor:
    low = call.get("min") if least is None else least.item()
    high = call.get("max") if most is None else most.item()
    return x if low is None and high is None else torch.clamp(x, low, high)


@kernel("LeakyRelu")
def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.get("alpha", 0.01))


@kernel("Elu")
def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.get("alpha", 1.0))


@kernel("Celu")
def _celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.get("alpha", 1.0))


@kernel("Selu")
def _selu(call: Call, x: Tensor) -> Tensor:
    alpha = call.get("alpha", 1.67326319217681884765625)
    return F.elu(x, alpha) * float(call.get("gamma", 1.05070102214813232421875))


@kernel("HardSigmoid")
def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return torch.clamp(call.get("alpha", 0.2) * x + call.get("beta", 0.5), 0, 1)


@kernel("ThresholdedRelu")
def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.get("alpha", 1.0), x, 0)


@kernel("Shrink")
def _shrink(call: Call, x: Tensor) -> Tensor:
    bias, limit = float(call.get("bias", 0.0)), float(call.get("lambd", 0.5))
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, 0)).to(x.dtype)


@kernel("Gelu")
def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.get("approximate", "none"))


@kernel("com.microsoft::BiasGelu")
def _bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@kernel("com.microsoft::FastGelu")
def _fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@kernel("Swish")
def _swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(float(call.get("alpha", 1.0)) * x)


@kernel("com.microsoft::QuickGelu")
def _quick_gelu(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.get("alpha", 1.702) * x)


@kernel("IsInf")
def _is_inf(call: Call, x: Tensor) -> Tensor:
    positive = torch.isposinf(x) & bool(call.get("detect_positive", 1))
    return positive | (torch.isneginf(x) & bool(call.get("detect_negative", 1)))


@kernel("Cast")
def _cast(call: Call, x: Tensor) -> Tensor:
    if call.get("to") not in DTYPES:
        raise call.unsupported(f"a target of type {call.get('to')}")
    return x.to(DTYPES[call.get("to")])


@kernel("CastLike")
def _cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@kernel("BitCast")
def _bit_cast(call: Call, x: Tensor) -> Tensor:
    return x.contiguous().view(DTYPES[call.get("to")])


@kernel("Dropout", host=(1, 2))
def _dropout(call: Call, x: Tensor, ratio: Tensor | None = None, *mode: Tensor | None) -> object:
    """The identity; drops in training mode, where the network had it and its file kept it."""
    share = float(ratio) if ratio is not None else float(call.get("ratio", 0.5))
    y = F.dropout(x, share, call.training)
    return (y, torch.ones_like(x, dtype=torch.bool)) if call.outputs > 1 else y
