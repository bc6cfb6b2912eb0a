"""Every operator rule, in the smallest model that uses it: the law holds and the right units can go.

A rule that freezes everything satisfies the law, so each case also says how many units of each dimension
can be removed. ``RULES_TESTED`` has a case for every registered rule; ``TRAPS`` are graphs that real
exporters write and that broke a pruner once.
"""

# ruff: noqa: E501 - ONNX text is clearer in long lines than cut in the middle of a node
from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from zoo import analyse, informative, operands, prune_checked, random_plan, text_model

from onnx_mdp.analysis.labels import keep_vector
from onnx_mdp.analysis.operator_coverage import operators_document
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.numerics.double_precision import run_in_double
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.rules import RULES, Rule
from onnx_mdp.running.computation import Computation
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery.masking import masked_model
from onnx_mdp.surgery.rewriting import rewrite


@dataclass(frozen=True, slots=True)
class Case:
    """ONNX text and the number of units of each prunable dimension, in graph order.

    ``unsupported`` names the operators that the analysis must report, ``shapes`` binds symbolic sizes.
    """

    text: str
    widths: tuple[int, ...]
    opset: int = 17
    unsupported: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def between(body: str, widths: tuple[int, ...] = (8,), opset: int = 17, weights: str = "") -> Case:
    """``body`` makes ``u`` out of ``t``, between two convolutions of 8 channels."""
    text = f"""(float[1,3,6,6] x) => (float[1,4,6,6] y) <float[8,3,1,1] a, float[8] b, float[4,8,1,1] c{weights}> {{
        t = Conv(x, a, b)
        {body}
        y = Conv(u, c)
    }}"""
    return Case(text, widths, opset)


def two(body: str, widths: tuple[int, ...] = (8,), opset: int = 18) -> Case:
    """``body`` makes ``u`` out of ``t`` and ``v``, two convolutions of 8 channels each."""
    return between(f"v = Conv(x, a2, b2)\n{body}", widths, opset, ", float[8,3,1,1] a2, float[8] b2")


def tail(
    body: str, widths: tuple[int, ...], channels: int, size: str = "6,6", opset: int = 17, w: str = ""
) -> Case:
    """``body`` makes ``u`` of ``channels`` channels out of ``t``; the output is a convolution of it."""
    return Case(
        f"""(float[1,3,6,6] x) => (float[1,4,{size}] y) <
            float[8,3,1,1] a, float[8] b, float[4,{channels},1,1] c{w}> {{
            t = Conv(x, a, b)
            {body}
            y = Conv(u, c)
        }}""",
        widths,
        opset,
    )


def dense(
    body: str, features: int, widths: tuple[int, ...] = (8,), opset: int = 17, weights: str = ""
) -> Case:
    """``body`` makes the matrix ``u`` of ``features`` columns out of ``t``; the output is a Gemm of it."""
    return Case(
        f"""(float[1,3,7,7] x) => (float[1,4] y) <
            float[8,3,1,1] a, float[8] b, float[4,{features}] c, float[4] d{weights}> {{
            t = Conv(x, a, b)
            {body}
            y = Gemm<transB=1>(u, c, d)
        }}""",
        widths,
        opset,
    )


BOUNDED = "s = Sigmoid(t)\n"
POSITIVE = "s = Softplus(t)\n"

# Four of 36 places, by the mean over the channels, in BODY; as detectors choose their queries.
BEST_PLACES = """(float[1,3,6,6] x) => (float[1,4,2,2] y) <
    float[8,3,1,1] a, float[8,3,1,1] a2, float[4,8,1,1] c, float[8,16,1,1] c2, int64[3] m = {1, 8, 36},
    int64[1] k = {4}, int64[1] one = {1}, int64[3] s = {1, 8, 4}, int64[4] o = {1, 8, 2, 2}, int64[4] o2 = {1, 16, 2, 2}> {
    t = Conv(x, a)
    h = Reshape(t, m)
    g = ReduceMean<axes=[1], keepdims=0>(h)
    b, p = TopK(g, k)
    q = Unsqueeze(p, one)
    j = Expand(q, s)
    BODY
    y = Conv(u, c)
}"""

UNARY = {
    **{
        name: between(f"u = {name}(t)")
        for name in [
            "Abs",
            "Atan",
            "Asinh",
            "Ceil",
            "Celu",
            "Clip",
            "Cos",
            "Elu",
            "Erf",
            "Exp",
            "Floor",
            "HardSigmoid",
            "HardSwish",
            "Identity",
            "LeakyRelu",
            "Neg",
            "Relu",
            "Round",
            "Selu",
            "Shrink",
            "Sigmoid",
            "Sign",
            "Sin",
            "Softplus",
            "Softsign",
            "Tanh",
            "ThresholdedRelu",
            "Cosh",
            "Sinh",
        ]
    },
    **{name: between(f"{BOUNDED}u = {name}(s)") for name in ("Acos", "Asin", "Atanh", "Tan")},
    **{name: between(f"{POSITIVE}u = {name}(s)") for name in ("Log", "Sqrt", "Reciprocal")},
    "Acosh": between("s = Exp(t)\nz = Add(s, one)\nu = Acosh(z)", weights=", float one = {1}"),
    "Cast": between("i = Cast<to=6>(t)\nu = Cast<to=1>(i)"),
    "CastLike": between("u = CastLike(t, one)", weights=", float one = {1}"),
    "Gelu": between("u = Gelu(t)", opset=20),
    "Mish": between("u = Mish(t)", opset=18),
    "Swish": between("u = Swish(t)", opset=24),
    "Not": between("r = Relu(t)\nz = Cast<to=9>(r)\nn = Not(z)\nu = Cast<to=1>(n)"),
    "BitwiseNot": between("i = Cast<to=6>(t)\nn = BitwiseNot(i)\nu = Cast<to=1>(n)", opset=18),
    "IsInf": between("r = Relu(t)\nl = Log(r)\nz = IsInf(l)\nu = Cast<to=1>(z)"),
    "IsNaN": between("l = Log(t)\nz = IsNaN(l)\nu = Cast<to=1>(z)"),
    "Dropout": between("u = Dropout(t)"),
}

LOGIC = "p = Cast<to=9>(r)\nr2 = Relu(v)\nq = Cast<to=9>(r2)\n"
INTEGER = "i = Cast<to=6>(t)\nj = Cast<to=6>(v)\n"
UNSIGNED = "i0 = Abs(t)\nj0 = Abs(v)\ni = Cast<to=12>(i0)\nj = Cast<to=12>(j0)\n"

BINARY = {
    **{name: two(f"u = {name}(t, v)") for name in ["Add", "Sub", "Mul", "Min", "Max", "Sum", "Mean"]},
    "Div": two("s = Softplus(v)\nu = Div(t, s)"),
    "Pow": two("s = Softplus(t)\nu = Pow(s, v)"),
    "Mod": two("s = Softplus(v)\nu = Mod<fmod=1>(t, s)"),
    "PRelu": between("u = PRelu(t, slope)", weights=", float[8,1,1] slope"),
    "Where": two("z = Less(t, v)\nu = Where(z, t, v)"),
    **{
        name: two(f"i = Round(t)\nj = Round(v)\nz = {name}(i, j)\nu = Cast<to=1>(z)")
        for name in ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]
    },
    **{
        name: two(f"r = Relu(t)\n{LOGIC}z = {name}(p, q)\nu = Cast<to=1>(z)") for name in ["And", "Or", "Xor"]
    },
    "BitShift": two(f'{UNSIGNED}z = BitShift<direction="LEFT">(i, j)\nu = Cast<to=1>(z)'),
    **{
        name: two(f"{INTEGER}z = {name}(i, j)\nu = Cast<to=1>(z)")
        for name in ["BitwiseAnd", "BitwiseOr", "BitwiseXor"]
    },
}

SYMBOLIC_SHAPE = """(float[N,3,6,6] x) => (float[N,36,4] y) <
        float[8,3,1,1] a, float[8] b, float[8,4] c, int64[2] rest = {8, 36}, int64 zero = {0}, int64[1] first = {0}> {
    t = Conv(x, a, b)
    s = Shape(t)
    n = Gather(s, zero)
    n1 = Unsqueeze(n, first)
    target = Concat<axis=0>(n1, rest)
    r = Reshape(t, target)
    u = Transpose<perm=[0,2,1]>(r)
    y = MatMul(u, c)
}"""

NORMALISATION = {
    **{name: between(f"u = {name}<axis=-1>(t)") for name in ("Softmax", "LogSoftmax", "Hardmax")},
    "BatchNormalization": between(
        "u = BatchNormalization(t, scale, shift, mean, variance)",
        weights=", float[8] scale, float[8] shift, float[8] mean, float[8] variance",
    ),
    "InstanceNormalization": between(
        "u = InstanceNormalization(t, scale, shift)", weights=", float[8] scale, float[8] shift"
    ),
    "GroupNormalization": between(
        "u = GroupNormalization<num_groups=2>(t, scale, shift)",
        (2, 8),
        21,
        ", float[8] scale, float[8] shift",
    ),
}

MOVEMENT = {
    "Reshape": dense("u = Reshape(t, s)", 8 * 49, weights=", int64[2] s = {1, 392}"),
    "Flatten": dense("u = Flatten(t)", 8 * 49),
    "Squeeze": dense("p = GlobalAveragePool(t)\nu = Squeeze(p, axes)", 8, weights=", int64[2] axes = {2, 3}"),
    "Unsqueeze": tail(
        "p = ReduceMean<axes=[2, 3], keepdims=0>(t)\nq = Unsqueeze(p, axes)\nu = Mul(t, q)",
        (8,),
        8,
        w=", int64[2] axes = {2, 3}",
    ),
    "Transpose": between("h = Transpose<perm=[0,2,3,1]>(t)\nr = Relu(h)\nu = Transpose<perm=[0,3,1,2]>(r)"),
    "Slice": tail(
        "p = Slice(t, zero, four, one)\nq = Slice(t, four, end, one)\nr = Sigmoid(p)\nu = Concat<axis=1>(q, r)",
        (4, 4),
        8,
        w=", int64[1] zero = {0}, int64[1] four = {4}, int64[1] one = {1}, int64[1] end = {9223372036854775807}",
    ),
    "Split": tail(
        "p, q = Split<axis=1>(t, s)\nr = Sigmoid(p)\nu = Concat<axis=1>(q, r)",
        (3, 5),
        8,
        w=", int64[2] s = {3, 5}",
    ),
    "SplitToSequence": tail(
        "q = SplitToSequence<axis=1>(t, s)\nu = SequenceAt(q, zero)",
        (),
        4,
        w=", int64 s = {4}, int64 zero = {0}",
    ),
    "Gather": tail("u = Gather<axis=1>(t, i)", (5, 3), 3, w=", int64[3] i = {1, 3, 5}"),
    "GatherND": dense(
        "h = Transpose<perm=[0,2,3,1]>(t)\ng = GatherND<batch_dims=1>(h, i)\nm = ReduceMean<axes=[1], keepdims=0>(g)\n"
        "u = Relu(m)",
        8,
        weights=", int64[1,3,2] i = {0, 1, 2, 3, 6, 6}",
    ),
    "GridSample": between("u = GridSample(t, g)", weights=", float[1,6,6,2] g"),
    "Concat": tail("r = Sigmoid(t)\nu = Concat<axis=1>(t, r)", (8,), 16),
    "Expand": tail("p = GlobalAveragePool(t)\nu = Expand(p, s)", (8,), 8, w=", int64[4] s = {1, 8, 6, 6}"),
    "Tile": tail("u = Tile(t, r)", (8,), 8, "12,6", w=", int64[4] r = {1, 1, 2, 1}"),
    "Pad": tail(
        "p = Pad(t, pads)\nv = Conv(t, e)\nu = Add(p, v)",
        (8, 4),
        12,
        w=", int64[8] pads = {0, 1, 0, 0, 0, 3, 0, 0}, float[12,8,1,1] e",
    ),
    "DepthToSpace": tail("u = DepthToSpace<blocksize=2>(t)", (2,), 2, "12,12"),
    "SpaceToDepth": tail("u = SpaceToDepth<blocksize=2>(t)", (8,), 32, "3,3"),
    "Resize": tail("u = Resize(t, , scales)", (8,), 8, "12,12", w=", float[4] scales = {1.0, 1.0, 2.0, 2.0}"),
    "Upsample": tail(
        "u = Upsample(t, scales)", (8,), 8, "12,12", 9, w=", float[4] scales = {1.0, 1.0, 2.0, 2.0}"
    ),
    "Shape": Case(SYMBOLIC_SHAPE, (8,)),
    "Size": between(
        "n = Size(t)\nf = Cast<to=1>(n)\ns = Sqrt(f)\nu = Div(t, s)",
    ),
}

CONTRACTION = {
    "Conv": tail(
        "v = Conv<pads=[1,1,1,1]>(t, e, f)\nu = Relu(v)", (8, 6), 6, w=", float[6,8,3,3] e, float[6] f"
    ),
    "ConvTranspose": tail(
        "v = ConvTranspose<strides=[2,2]>(t, e, f)\nu = Relu(v)",
        (8, 6),
        6,
        "12,12",
        w=", float[8,6,2,2] e, float[6] f",
    ),
    "Gemm": dense(
        "p = GlobalAveragePool(t)\nf = Flatten(p)\ng = Gemm<alpha=0.5, beta=2.0>(f, e, h)\nu = Sigmoid(g)",
        6,
        (8, 6),
        weights=", float[8,6] e, float[1,6] h",
    ),
    "MatMul": dense(
        "p = GlobalMaxPool(t)\nf = Flatten(p)\nm = MatMul(f, e)\nu = Sigmoid(m)",
        6,
        (8, 6),
        weights=", float[8,6] e",
    ),
    **{
        name: tail(f"m = {name}<axes=[1]>(t)\nr = Sigmoid(m)\nu = Mul(t, r)", (8,), 8)
        for name in [
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceL1",
            "ReduceL2",
            "ReduceSumSquare",
            "ReduceLogSumExp",
        ]
    },
    "ReduceLogSum": tail(
        "p = Softplus(t)\nm = ReduceLogSum<axes=[1]>(p)\nr = Sigmoid(m)\nu = Mul(t, r)", (8,), 8
    ),
    "ReduceProd": tail("p = Sigmoid(t)\nm = ReduceProd<axes=[1]>(p)\nr = Add(m, m)\nu = Mul(t, r)", (8,), 8),
    "ReduceSum": tail(
        "m = ReduceSum(t, axes)\nr = Sigmoid(m)\nu = Mul(t, r)", (8,), 8, w=", int64[1] axes = {1}"
    ),
    **{
        name: tail(f"u = {name}(t)", (8,), 8, "1,1")
        for name in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
    },
    **{
        name: tail(f"u = {name}<kernel_shape=[2,2], strides=[2,2]>(t)", (8,), 8, "3,3")
        for name in ("MaxPool", "AveragePool", "LpPool")
    },
}

NHWC = "n = Transpose<perm=[0,2,3,1]>(t)\n{body}\nu = Transpose<perm=[0,3,1,2]>(m)"
FILLED = {
    "ConstantOfShape": Case(
        """(float[N,3,6,6] x) => (float[N,4] y) <
            float[8,3,1,1] a, float[8] b, float[8,4] c, int64[1] first = {0}, int64[1] second = {1}, int64[1] eight = {8}> {
            t = Conv(x, a, b)
            p = GlobalAveragePool(t)
            f = Flatten(p)
            s = Shape(x)
            n = Slice(s, first, second)
            o = Concat<axis=0>(n, eight)
            z = ConstantOfShape<value = float[1] {0.5}>(o)
            u = Mul(f, z)
            y = MatMul(u, c)
        }""",
        (8,),
    ),
}
UNIT_STATISTICS = {
    "LayerNormalization": between(
        NHWC.format(body="m = LayerNormalization(n, g, h)"), weights=", float[8] g, float[8] h"
    ),
    "RMSNormalization": between(
        NHWC.format(body="m = RMSNormalization(n, g)"), opset=23, weights=", float[8] g"
    ),
}

# 8 channels as 2 heads of width 4, and 36 positions as tokens; more in test_attention.py.
TOKENS = "f = Reshape(t, s)\nh = Transpose<perm=[0,2,1]>(f)\n{body}\nn = Transpose<perm=[0,2,1]>(m)\nu = Reshape(n, back)"
SIZES = ", int64[3] s = {1, 8, 36}, int64[4] back = {1, 8, 6, 6}"
ATTENTION = {
    "Attention": between(
        TOKENS.format(
            body="q = MatMul(h, wq)\nk = MatMul(h, wk)\nm = Attention<q_num_heads=2, kv_num_heads=2>(q, k, h)"
        ),
        (2, 8, 8),
        23,
        SIZES + ", float[8,8] wq, float[8,8] wk",
    ),
    "RotaryEmbedding": between(
        TOKENS.format(body="m = RotaryEmbedding<num_heads=2>(h, cos, sin)"),
        (2,),
        23,
        SIZES + ", float[1,36,2] cos, float[1,36,2] sin",
    ),
}

HW = ", int64[1] rest = {-1}, int64[4] wide = {1, 8, 6, 6}"
SELECTION = {
    "CumSum": between("u = CumSum(t, two)", weights=", int64 two = {2}"),
    "TopK": tail(
        "p, i = TopK<axis=2>(t, four)\nj = Cast<to=1>(i)\nq = Mul(j, small)\nu = Add(p, q)",
        (8,),
        8,
        "4,6",
        w=", int64[1] four = {4}, float small = {0.1}",
    ),
    **{
        name: tail(
            f"p = {name}<axis=2>(t)\nq = Cast<to=1>(p)\nr = Mul(q, small)\nu = Sin(r)",
            (8,),
            8,
            "1,6",
            w=", float small = {0.1}",
        )
        for name in ("ArgMax", "ArgMin")
    },
    "OneHot": tail(
        "p = ArgMax<axis=2, keepdims=0>(t)\nu = OneHot<axis=2>(p, six, values)",
        (8,),
        8,
        w=", int64 six = {6}, float[2] values = {0.5, 2.0}",
    ),
    "Trilu": between("u = Trilu<upper=0>(t)"),
    "EyeLike": dense(
        "p = ReduceMean<axes=[0, 1], keepdims=0>(t)\ne = EyeLike(p)\nm = Mul(t, e)\nn = GlobalAveragePool(m)\nu = Flatten(n)",
        8,
    ),
    "ReverseSequence": between(
        "h = Transpose<perm=[2,0,1,3]>(t)\nr = ReverseSequence(h, four)\nu = Transpose<perm=[1,2,0,3]>(r)",
        weights=", int64[1] four = {4}",
    ),
    "Compress": tail(
        "z = Cast<to=9>(mask)\nu = Compress<axis=3>(t, z)",
        (8,),
        8,
        "6,3",
        w=", float[6] mask = {1, 0, 1, 0, 0, 1}",
    ),
    "CenterCropPad": tail(
        "u = CenterCropPad<axes=[2,3]>(t, s)", (8,), 8, "4,8", 18, w=", int64[2] s = {4, 8}"
    ),
    "RoiAlign": tail(
        "u = RoiAlign<output_height=3, output_width=3, sampling_ratio=2>(t, rois, zero)",
        (8,),
        8,
        "3,3",
        w=", float[1,4] rois = {0.5, 0.5, 4.0, 5.0}, int64[1] zero = {0}",
    ),
    "MaxRoiPool": tail(
        "u = MaxRoiPool<pooled_shape=[2,2]>(t, rois)",
        (8,),
        8,
        "2,2",
        w=", float[1,5] rois = {0.0, 0.5, 0.5, 4.0, 5.0}",
    ),
    "GatherElements": tail(
        "m = ReduceMean<axes=[1]>(t)\np, i = TopK<axis=2>(m, four)\nj = Expand(i, s)\nu = GatherElements<axis=2>(t, j)",
        (8,),
        8,
        "4,6",
        w=", int64[1] four = {4}, int64[4] s = {1, 8, 4, 6}",
    ),
    **{
        name: two(
            "w = MaxPool<kernel_shape=[3,1], strides=[3,1]>(v)\ni = Expand(rows, wide)\nu = "
            f"{name}<axis=2>(t, i, w)",
            (8,),
            opset,
        )
        for name, opset in (("ScatterElements", 18), ("Scatter", 9))
    },
    "ScatterND": dense(
        "h = Transpose<perm=[0,2,3,1]>(t)\nw = Slice(h, zero, one, second)\nq = Relu(w)\n"
        "g = ScatterND(h, i, q)\nm = ReduceMean<axes=[1, 2], keepdims=0>(g)\nu = Relu(m)",
        8,
        weights=", int64[1] zero = {0}, int64[1] one = {1}, int64[1] second = {1}, int64[1,1,2] i = {0, 3}",
    ),
    "Col2Im": tail(
        "v = Conv(t, e)\nr = Reshape(v, s)\nu = Col2Im<strides=[2,2]>(r, size, block)",
        (8, 3),
        3,
        "12,12",
        18,
        w=", float[12,8,1,1] e, int64[3] s = {1, 12, 36}, int64[2] size = {12, 12}, int64[2] block = {2, 2}",
    ),
}
OTHERS = {
    "Einsum": between(
        'v = Einsum<equation="nchw,ck->nkhw">(t, e)\nu = Relu(v)', (8, 8), weights=", float[8,8] e"
    ),
    "LpNormalization": between("u = LpNormalization<axis=1, p=2>(t)"),
    "MeanVarianceNormalization": between("u = MeanVarianceNormalization<axes=[0,2,3]>(t)"),
    "LRN": between("p = Relu(t)\nu = LRN<size=3>(p)", ()),
    **{
        name: dense(
            "h = Transpose<perm=[0,2,3,1]>(t)\nr = Reshape(h, s)\ng = Transpose<perm=[1,0,2]>(r)\n"
            f"k, l = {name}<hidden_size=5>(g, e, f)\nu = Squeeze(l, zero)",
            5,
            weights=f", int64[3] s = {{1, 49, 8}}, int64[1] zero = {{0}}, float[1,{gates * 5},8] e, float[1,{gates * 5},5] f",
        )
        for name, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4))
    },
}
MICROSOFT = {
    **{f"com.microsoft::{name}": between(f"u = com.microsoft.{name}(t)") for name in ("Gelu", "QuickGelu")},
    **{
        f"com.microsoft::{name}": between(
            f"h = Transpose<perm=[0,2,3,1]>(t)\nv = com.microsoft.{name}(h, e)\nu = Transpose<perm=[0,3,1,2]>(v)",
            weights=", float[8] e",
        )
        for name in ("BiasGelu", "FastGelu")
    },
}
NEWEST = {
    "BitCast": between("i = BitCast<to=6>(t)\nu = BitCast<to=1>(i)", opset=26),
    "CumProd": between("u = CumProd(t, two)", opset=26, weights=", int64 two = {2}"),
    "TensorScatter": two("u = TensorScatter<axis=2>(t, v)", opset=24),
}

ONE_SCALE = ", float s = {0.1}, uint8 z = {120}"
SCALES = ", float[8] vars, int8[8] z = {1, 2, 3, 4, 5, 6, 7, 8}"
QUANTIZED = {
    "QuantizeLinear": between(
        "q = QuantizeLinear(t, s, z)\nu = DequantizeLinear(q, s, z)", weights=ONE_SCALE
    ),
    "DequantizeLinear": between(
        "q = QuantizeLinear(t, vars, z)\nu = DequantizeLinear<axis=1>(q, vars, z)", weights=SCALES
    ),
    "ConvInteger": between(
        "d, e, f = DynamicQuantizeLinear(t)\ng = ConvInteger(d, w8, f)\nu = Cast<to=1>(g)",
        (),
        weights=f", uint8[8,8,1,1] w8 = {{{', '.join('12345678' * 8)}}}",
    ),
    "MatMulInteger": Case(
        f"""(float[2,3] x) => (float[2,4] y) <float[3,8] a, uint8[8,4] w8 = {{{", ".join("12345678" * 4)}}}> {{
            t = MatMul(x, a)
            d, e, f = DynamicQuantizeLinear(t)
            g = MatMulInteger(d, w8, f)
            h = Cast<to=1>(g)
            y = Mul(h, e)
        }}""",
        (),
    ),
    "DynamicQuantizeLinear": between("d, e, f = DynamicQuantizeLinear(t)\nu = DequantizeLinear(d, e, f)", ()),
}

RULES_TESTED: dict[str, Case] = {
    **UNARY,
    **BINARY,
    **NORMALISATION,
    **MOVEMENT,
    **CONTRACTION,
    **FILLED,
    **UNIT_STATISTICS,
    **ATTENTION,
    **SELECTION,
    **OTHERS,
    **MICROSOFT,
    **NEWEST,
    **QUANTIZED,
}

GROUPED = """(float[1,3,6,6] x) => (float[1,4,{size}] y) <
        float[8,3,1,1] a, float[8] b, float[{w}] e, float[{out}] f, float[4,{out},1,1] c> {{
    t = Conv(x, a, b)
    v = {op}(t, e, f)
    u = Relu(v)
    y = Conv(u, c)
}}"""


def grouped(op: str, weight: str, channels: int, widths: tuple[int, ...], size: str = "6,6") -> Case:
    return Case(GROUPED.format(op=op, w=weight, out=channels, size=size), widths)


TRAPS: dict[str, Case] = {
    "layer norm written out": between(
        NHWC.format(
            body="a1 = ReduceMean<axes=[-1]>(n)\na2 = Sub(n, a1)\na3 = Mul(a2, a2)\na4 = ReduceMean<axes=[-1]>(a3)\n"
            "a5 = Add(a4, eps)\na6 = Sqrt(a5)\na7 = Div(a2, a6)\na8 = Mul(a7, g)\nm = Add(a8, h)"
        ),
        weights=", float[8] g, float[8] h, float eps = {0.001}",
    ),
    "RMS norm written out": between(
        NHWC.format(
            body="a3 = Pow(n, two)\na4 = ReduceMean<axes=[-1]>(a3)\na5 = Add(a4, eps)\na6 = Sqrt(a5)\na7 = Div(n, a6)\n"
            "m = Mul(a7, g)"
        ),
        weights=", float[8] g, float eps = {0.001}, float two = {2.0}",
    ),
    "group norm of one group": between(
        "u = GroupNormalization<num_groups=1>(t, g, h)", (8,), 21, ", float[8] g, float[8] h"
    ),
    "group norm of groups of one": between(
        "u = GroupNormalization<num_groups=8>(t, g, h)", (8,), 21, ", float[8] g, float[8] h"
    ),
    "two group norms of different groups": between(
        "m = GroupNormalization<num_groups=4>(t, g, h)\nu = GroupNormalization<num_groups=2>(m, g, h)",
        (2,),
        21,
        ", float[8] g, float[8] h",
    ),
    "group norm without the operator": between(
        "m0 = Reshape(t, s)\nm1 = InstanceNormalization(m0, ones, zeros)\nm2 = Reshape(m1, back)\nm3 = Mul(m2, g)\n"
        "u = Add(m3, h)",
        (2, 8),
        weights=", int64[3] s = {0, 2, -1}, int64[4] back = {1, 8, 6, 6}, float[2] ones, float[2] zeros, "
        "float[8,1,1] g, float[8,1,1] h",
    ),
    "groups that hold a constant at other places": tail(
        "j = Concat<axis=1>(t, e, t)\nr = Reshape(j, s)\ni = InstanceNormalization(r, g, h)\nu = Reshape(i, z)",
        (),
        18,
        w=", float[1,2,6,6] e, int64[3] s = {1, 2, 324}, int64[4] z = {1, 18, 6, 6}, float[2] g, float[2] h",
    ),
    "statistics over groups, and over what is alike in them": tail(
        "r = Reshape(t, s)\ni = InstanceNormalization(r, g, h)\nu = ReduceMean<axes=[1], keepdims=0>(i)",
        (),
        4,
        w=", int64[5] s = {0, 2, 4, 6, 6}, float[2] g, float[2] h",
    ),
    "layer norm over groups and their widths": between(
        "m0 = Reshape(t, s)\nm1 = InstanceNormalization(m0, ones, zeros)\nm2 = Reshape(m1, back)\n"
        + NHWC.replace("(t)", "(m2)").format(body="m = LayerNormalization(n, g, h)"),
        (2, 8),
        weights=", int64[3] s = {0, 2, -1}, int64[4] back = {1, 8, 6, 6}, float[2] ones, float[2] zeros, "
        "float[8] g, float[8] h",
    ),
    "group norm of one group without the operator": between(
        "m0 = Reshape(t, s)\nm1 = InstanceNormalization(m0, ones, zeros)\nm2 = Reshape(m1, back)\nm3 = Mul(m2, g)\n"
        "u = Add(m3, h)",
        (8,),
        weights=", int64[3] s = {0, 1, -1}, int64[4] back = {1, 8, 6, 6}, float[1] ones, float[1] zeros, "
        "float[8,1,1] g, float[8,1,1] h",
    ),
    "group norm without the operator, of any image size": Case(
        """(float[N,3,H,W] x) => (float[N,4,H,W] y) <float[8,3,1,1] a, float[8] b, float[4,8,1,1] c,
            int64[3] s = {0, 2, -1}, float[2] ones, float[2] zeros, float[8,1,1] g, float[8,1,1] h> {
            t = Conv(x, a, b)
            m0 = Reshape(t, s)
            m1 = InstanceNormalization(m0, ones, zeros)
            back = Shape(t)
            m2 = Reshape(m1, back)
            m3 = Mul(m2, g)
            u = Add(m3, h)
            y = Conv(u, c)
        }""",
        (2, 8),
        shapes={"x": (1, 3, 6, 6)},
    ),
    "instance norm over channels of a transposed tensor": between(
        "n = Transpose<perm=[0,2,3,1]>(t)\nm = InstanceNormalization(n, g, h)\nu = Transpose<perm=[0,3,1,2]>(m)",
        weights=", float[6] g, float[6] h",
    ),
    "layer norm over channels and positions": between(
        "u = LayerNormalization<axis=1>(t, g)", weights=", float[8,6,6] g"
    ),
    "layer norm over positions only": between(
        "u = LayerNormalization<axis=2>(t, g)", weights=", float[6,6] g"
    ),
    "layer norm with its statistics read": between(
        NHWC.format(body="l, mean, deviation = LayerNormalization(n, g)\nm = Add(l, mean)"),
        (),
        weights=", float[8] g",
    ),
    "a weight shared by readers of different widths": two(
        "m = Conv(t, e)\nn = Conv(v, e)\nr = Sigmoid(n)\nu = Concat<axis=1>(m, r)", (8, 8, 4, 4)
    ),
    "Identity of an initializer": between(
        "e2 = Identity(e)\nf2 = Identity(f)\nm = Conv(t, e2, f2)\nn = Conv(m, e2, f)\nu = Relu(n)",
        (8, 8, 8),
        weights=", float[8,8,1,1] e, float[8] f",
    ),
    "a bias as operand 0": between("u = Add(e, t)", weights=", float[8,1,1] e"),
    "a bias of full rank": between("u = Mul(t, e)", weights=", float[1,8,6,6] e"),
    "a spatial constant stays whole": between("u = Mul(t, e)", weights=", float[6,6] e"),
    "a scalar constant stays": between("u = Mul(e, t)", weights=", float[1] e"),
    "PRelu with one slope": between("u = PRelu(t, e)", weights=", float[1] e"),
    "depthwise": grouped("Conv<pads=[1,1,1,1], group=8>", "8,1,3,3", 8, (8,)),
    "depthwise with multiplier 2": grouped("Conv<pads=[1,1,1,1], group=8>", "16,1,3,3", 16, (8,)),
    "a grouped convolution": grouped("Conv<group=2>", "6,4,1,1", 6, (4, 3)),
    "a grouped convolution of equal widths": grouped("Conv<group=4>", "8,2,1,1", 8, (2, 2)),
    "ConvTranspose, depthwise": grouped("ConvTranspose<group=8, strides=[2,2]>", "8,1,2,2", 8, (8,), "12,12"),
    "ConvTranspose, depthwise, multiplier 2": grouped(
        "ConvTranspose<group=8, strides=[2,2]>", "8,2,2,2", 16, (8,), "12,12"
    ),
    "ConvTranspose, grouped": grouped("ConvTranspose<group=2, strides=[2,2]>", "8,3,2,2", 6, (4, 3), "12,12"),
    "ConvTranspose of one channel": Case(
        """(float[1,1,6,6] x) => (float[1,4,6,6] y) <float[1,8,1,1] a, float[8] b, float[4,8,1,1] c> {
            t = ConvTranspose(x, a, b)
            u = Relu(t)
            y = Conv(u, c)
        }""",
        (8,),
    ),
    "Conv of one channel": Case(
        """(float[1,1,6,6] x) => (float[1,4,6,6] y) <float[8,1,1,1] a, float[8] b, float[4,8,1,1] c> {
            t = Conv(x, a, b)
            u = Relu(t)
            y = Conv(u, c)
        }""",
        (8,),
    ),
    "channel shuffle": between(
        "p = Reshape(t, s)\nq = Transpose<perm=[0,2,1,3,4]>(p)\nu = Reshape(q, z)",
        (4,),
        weights=", int64[5] s = {1, 2, 4, 6, 6}, int64[4] z = {1, -1, 6, 6}",
    ),
    "option-A shortcut": tail(
        "p = Slice(t, o, e, ax, st)\nq = Pad(p, pads)\nv = Conv<strides=[2,2]>(t, w)\nu = Add(v, q)",
        (8, 4),
        12,
        "3,3",
        w=", int64[2] o = {0, 0}, int64[2] e = {9999, 9999}, int64[2] ax = {2, 3}, int64[2] st = {2, 2}, "
        "int64[8] pads = {0, 2, 0, 0, 0, 2, 0, 0}, float[12,8,1,1] w",
    ),
    "Pad with a constant that is not 0": tail(
        "p = Pad(t, pads, one)\nu = Relu(p)",
        (8, 2),
        10,
        w=", int64[8] pads = {0, 2, 0, 0, 0, 0, 0, 0}, float one = {1}",
    ),
    "Pad with axes": tail(
        "p = Pad(t, pads, one, ax)\nu = Relu(p)",
        (8, 2),
        10,
        opset=18,
        w=", int64[2] pads = {2, 0}, float one = {1}, int64[1] ax = {-3}",
    ),
    "Pad by reflection of positions": tail(
        'u = Pad<mode="reflect">(t, pads)', (8,), 8, "8,8", w=", int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}"
    ),
    "Pad by reflection of channels": tail(
        'u = Pad<mode="reflect">(t, pads)', (), 10, w=", int64[8] pads = {0, 1, 0, 0, 0, 1, 0, 0}"
    ),
    "overlapping slices": tail(
        "p = Slice(t, o, five, ax)\nq = Slice(t, three, e, ax)\nu = Concat<axis=-3>(p, q)",
        (3, 2, 3),
        10,
        w=", int64[1] o = {0}, int64[1] three = {3}, int64[1] five = {-3}, int64[1] e = {2147483647}, int64[1] ax = {-3}",
    ),
    "every second channel": tail(
        "u = Slice(t, o, e, ax, st)",
        (),
        4,
        w=", int64[1] o = {0}, int64[1] e = {9}, int64[1] ax = {1}, int64[1] st = {2}",
    ),
    "channels reversed": tail(
        "u = Slice(t, o, e, ax, st)",
        (),
        8,
        w=", int64[1] o = {-1}, int64[1] e = {-9999}, int64[1] ax = {1}, int64[1] st = {-1}",
    ),
    "Slice of channels and positions": tail(
        "u = Slice(t, o, e, ax)",
        (2, 6),
        6,
        "4,6",
        w=", int64[2] o = {1, 2}, int64[2] e = {5, 8}, int64[2] ax = {2, 1}",
    ),
    "slices of one channel": tail(
        "p = Slice(t, o, one, ax)\nr = Sigmoid(p)\nq = Slice(t, one, e, ax)\nu = Concat<axis=1>(q, r)",
        (7,),
        8,
        w=", int64[1] o = {0}, int64[1] one = {1}, int64[1] e = {8}, int64[1] ax = {1}",
    ),
    "Split into single channels": Case(
        """(float[1,3,6,6] x) => (float[1,4,6,6] y) <
            float[2,3,1,1] a, float[2] b, float[4,2,1,1] c, int64[2] s = {1, 1}> {
            t = Conv(x, a, b)
            p, q = Split<axis=1>(t, s)
            r = Sigmoid(p)
            u = Concat<axis=1>(q, r)
            y = Conv(u, c)
        }""",
        (),
    ),
    "Gather of single channels": tail(
        "p = Gather<axis=1>(t, i)\nq = Gather<axis=1>(t, j)\nr = Sigmoid(p)\nu = Concat<axis=1>(q, r)",
        (6,),
        2,
        w=", int64[1] i = {1}, int64[1] j = {2}",
    ),
    "Split without sizes": tail(
        "p, q = Split<axis=-3>(t)\nr = Sigmoid(p)\nu = Concat<axis=1>(q, r)", (4, 4), 8
    ),
    "Split with num_outputs": tail(
        "p, q = Split<axis=1, num_outputs=2>(t)\nr = Sigmoid(p)\nu = Concat<axis=1>(q, r)",
        (4, 4),
        8,
        opset=18,
    ),
    "Split with an attribute": tail(
        "p, q = Split<axis=1, split=[3, 5]>(t)\nr = Sigmoid(p)\nu = Concat<axis=1>(q, r)", (3, 5), 8, opset=11
    ),
    "Gather with negative indices": tail("u = Gather<axis=1>(t, i)", (2, 6), 2, w=", int64[2] i = {-1, 0}"),
    "Gather with repeated indices": tail("u = Gather<axis=-3>(t, i)", (6,), 3, w=", int64[3] i = {0, 2, 0}"),
    "Gather of scattered places from a flat tensor": tail(
        "f = Reshape(t, s)\nu = Gather(f, i)",
        (8,),
        8,
        "2,2",
        w=", int64[1] s = {-1}, int64[1,8,2,2] i = {"
        + ", ".join(str(36 * c + p) for c in range(8) for p in (0, 5, 30, 35))
        + "}",
    ),
    "Gather of channels in two rows": tail(
        "g = Gather<axis=1>(t, i)\nu = Reshape(g, s)",
        (2, 4),
        4,
        w=", int64[2,2] i = {0, 3, 6, 7}, int64[4] s = {1, -1, 6, 6}",
    ),
    "Gather by indices that the batch gives": Case(
        """(float[N,3,6,6] x) => (float[N,M] y) <float[8,3,1,1] a, float[1,1] c, int64[1] flat = {-1}, int64 zero = {0},
            int64 one = {1}, int64[2] row = {1, -1}, int64[2] column = {-1, 1}> {
            t = Conv(x, a)
            p = GlobalAveragePool(t)
            f = Reshape(p, flat)
            s = Shape(x)
            n = Gather(s, zero)
            i = Range(zero, n, one)
            g = Gather(f, i)
            k = Reshape(g, column)
            m = MatMul(k, c)
            y = Reshape(m, row)
        }""",
        (),
    ),
    "GatherND of channels": dense(
        "g = GatherND<batch_dims=1>(t, i)\nu = Relu(g)",
        3,
        (),
        weights=", int64[1,3,3] i = {0, 1, 2, 3, 6, 6, 7, 0, 0}",
    ),
    "GridSample by a computed grid of two channels": Case(
        """(float[1,3,6,6] x) => (float[1,4,6,6] y) <float[8,3,1,1] a, float[2,3,1,1] b, float[4,8,1,1] c> {
            t = Conv(x, a)
            g = Conv(x, b)
            h = Transpose<perm=[0,2,3,1]>(g)
            u = GridSample(t, h)
            y = Conv(u, c)
        }""",
        (),
    ),
    "a table that the batch repeats": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) <float[8,3,1,1] a, float[1,8,1,1] e, float[4,8,1,1] c,
            int64[1] o = {0}, int64[1] one = {1}, int64[3] rest = {8, 1, 1}> {
            t = Conv(x, a)
            s = Shape(x)
            n = Slice(s, o, one)
            target = Concat<axis=0>(n, rest)
            g = Expand(e, target)
            u = Add(t, g)
            y = Conv(u, c)
        }""",
        (8,),
    ),
    "a table that the batch repeats, labelled along another axis": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) <float[8,3,1,1] a, float[1,8,6,6] e, float[4,8,1,1] c,
            int64[1] o = {0}, int64[1] one = {1}, int64[3] rest = {8, 6, 6}> {
            t = Conv(x, a)
            s = Shape(x)
            n = Slice(s, o, one)
            target = Concat<axis=0>(n, rest)
            g = Expand(e, target)
            u = Add(g, t)
            y = Conv(u, c)
        }""",
        (8,),
    ),
    "an activation that is expanded before it is multiplied": between(
        "p = ReduceMean<axes=[1]>(t)\ns = Shape(t)\nq = Expand(p, s)\nu = Mul(t, q)"
    ),
    "an activation that is expanded, of fewer axes": between(
        "p = ReduceMean<axes=[0, 1], keepdims=0>(t)\nq = Expand(p, s)\nu = Mul(t, q)",
        weights=", int64[3] s = {8, 6, 6}",
    ),
    "an activation that is expanded for two readers": between(
        "p = ReduceMean<axes=[1]>(t)\ns = Shape(t)\nq = Expand(p, s)\nm = Mul(t, q)\nu = Add(m, q)", ()
    ),
    "Gather of one position": dense(
        "p = GlobalAveragePool(t)\nq = Gather<axis=3>(p, o)\nu = Gather<axis=2>(q, o)",
        8,
        weights=", int64 o = {0}",
    ),
    "Gather with a scalar on channels": dense(
        "p = Gather<axis=1>(t, i)\nu = Reshape(p, s)",
        49,
        (7,),
        weights=", int64 i = {3}, int64[2] s = {1, 49}",
    ),
    "squeeze and excitation": between(
        "p = GlobalAveragePool(t)\nh = Conv(p, e, f)\nr = Relu(h)\ng = Conv(r, i, j)\ns = Sigmoid(g)\nu = Mul(t, s)",
        (8, 2),
        weights=", float[2,8,1,1] e, float[2] f, float[8,2,1,1] i, float[8] j",
    ),
    "squeeze and excitation by Gemm": between(
        "p = ReduceMean<axes=[2,3], keepdims=0>(t)\nh = Gemm(p, e)\nr = Relu(h)\ng = MatMul(r, i)\ns = Sigmoid(g)\n"
        "q = Reshape(s, z)\nu = Mul(q, t)",
        (8, 2),
        weights=", float[8,2] e, float[2,8] i, int64[4] z = {-1, 8, 1, 1}",
    ),
    "attention over positions": between(
        "m = ReduceMean<axes=[1]>(t)\nn = ReduceMax<axes=[1]>(t)\nj = Concat<axis=1>(m, n)\n"
        "h = Conv<pads=[1,1,1,1]>(j, e)\ns = Sigmoid(h)\nu = Mul(t, s)",
        weights=", float[1,2,3,3] e",
    ),
    "ReduceMean without keepdims, axes as input": between(
        "m = ReduceMean<keepdims=0>(t, ax)\nn = Unsqueeze(m, ax)\nu = Sub(t, n)",
        opset=18,
        weights=", int64[1] ax = {1}",
    ),
    "ReduceMean over all axes": between("m = ReduceMean(t)\nu = Sub(t, m)"),
    "ReduceSum of nothing": between(
        "u = ReduceSum<noop_with_empty_axes=1>(t, ax)", weights=", int64[0] ax = {}"
    ),
    "NHWC": Case(
        """(float[1,6,6,3] x) => (float[1,6,6,4] y) <float[8,3,1,1] a, float[8] e, float[8,4] c> {
            n = Transpose<perm=[0,3,1,2]>(x)
            t = Conv(n, a)
            h = Transpose<perm=[0,2,3,1]>(t)
            s = Add(h, e)
            r = Clip(s)
            y = MatMul(r, c)
        }""",
        (8,),
    ),
    "Flatten of NHWC": dense("h = Transpose<perm=[0,2,3,1]>(t)\nu = Flatten(h)", 8 * 49),
    "Resize with sizes": tail("u = Resize(t, , , s)", (8,), 8, "9,9", w=", int64[4] s = {1, 8, 9, 9}"),
    "Resize with axes": tail(
        "u = Resize<axes=[2, 3]>(t, , , s)", (8,), 8, "9,9", opset=18, w=", int64[2] s = {9, 9}"
    ),
    "Resize with a region (opset 11)": tail(
        "u = Resize(t, roi, scales)",
        (8,),
        8,
        "12,12",
        11,
        w=", float[0] roi = {}, float[4] scales = {1.0, 1.0, 2.0, 2.0}",
    ),
    "Resize of channels": tail("u = Resize(t, , , s)", (), 16, w=", int64[4] s = {1, 16, 6, 6}"),
    "Resize to the size of another tensor": Case(
        """(float[N,3,H,W] x) => (float[N,4,H,W] y) <float[8,3,1,1] a, float[8,8,1,1] b, float[4,16,1,1] c,
            int64[1] o = {0}, int64[1] two = {2}, int64[1] four = {4}, float[0] none = {}> {
            t = Conv(x, a)
            p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t)
            v = Conv(p, b)
            sv = Shape(v)
            st = Shape(t)
            nc = Slice(sv, o, two)
            hw = Slice(st, two, four)
            size = Concat<axis=0>(nc, hw)
            r = Resize(v, none, none, size)
            u = Concat<axis=1>(r, t)
            y = Conv(u, c)
        }""",
        (8, 8),
        shapes={"x": (1, 3, 6, 6)},
    ),
    "opset 9 forms": Case(
        """(float[1,3,6,6] x) => (float[1,4] y) <float[8,3,1,1] a, float[8] b, float[4,8] e, float[4] f> {
            t = Conv(x, a, b)
            k = Clip<min=-1.0, max=1.0>(t)
            p = Slice<axes=[1], starts=[0], ends=[4]>(k)
            q = Slice<axes=[1], starts=[4], ends=[2147483647]>(k)
            z = Pad<pads=[0,2,0,0,0,2,0,0]>(p)
            d = Dropout<ratio=0.5>(q)
            j = Concat<axis=1>(d, p)
            s = Add(z, j)
            m = ReduceMean<axes=[2], keepdims=0>(s)
            n = Unsqueeze<axes=[3]>(m)
            g = GlobalAveragePool(n)
            h = Squeeze<axes=[2,3]>(g)
            y = Gemm<transB=1>(h, e, f)
        }""",
        (2, 2),
        9,
    ),
    "Softmax over all channels (opset 11)": between("u = Softmax(t)", (), 11),
    "Softmax over channels": between("u = Softmax<axis=1>(t)", ()),
    "Reshape that copies and infers": dense(
        "r = Reshape(t, s)\nm = ReduceMean<axes=[2], keepdims=0>(r)\nu = Reshape(m, z)",
        8,
        weights=", int64[3] s = {0, -1, 49}, int64[2] z = {0, 0}",
    ),
    "Reshape that infers positions": dense(
        "r = Reshape(t, s)\nm = ReduceMean<axes=[2], keepdims=0>(r)\nu = Identity(m)",
        8,
        weights=", int64[3] s = {1, 8, -1}",
    ),
    "Reshape with allowzero": dense(
        "u = Reshape<allowzero=1>(t, s)", 8 * 49, weights=", int64[2] s = {1, 392}"
    ),
    "Reshape that merges positions first": dense(
        "h = Transpose<perm=[0,2,3,1]>(t)\nr = Reshape(h, s)\nm = ReduceMean<axes=[1], keepdims=0>(r)\nu = Relu(m)",
        8,
        weights=", int64[3] s = {1, 49, 8}",
    ),
    "Reshape with a symbolic batch and an inferred rest": Case(
        """(float[N,3,7,7] x) => (float[N,4] y) <
            float[8,3,1,1] a, float[392,4] c, int64 zero = {0}, int64[1] first = {0}, int64[1] rest = {-1}> {
            t = Conv(x, a)
            s = Shape(t)
            n = Gather(s, zero)
            n1 = Unsqueeze(n, first)
            target = Concat<axis=0>(n1, rest)
            r = Reshape(t, target)
            y = MatMul(r, c)
        }""",
        (8,),
    ),
    "Reshape to the computed shape of another tensor": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) <
            float[8,3,1,1] a, float[8,8,1,1] b, float[4,8,1,1] c, int64[2] flat = {0, -1}> {
            t = Conv(x, a)
            v = Conv(t, b)
            f = Reshape(v, flat)
            s = Shape(t)
            u = Reshape(f, s)
            y = Conv(u, c)
        }""",
        (8, 8),
    ),
    "Expand to the computed shape of another tensor": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) <float[8,3,1,1] a, float[8,8,1,1] b, float[4,8,1,1] c> {
            t = Conv(x, a)
            v = Conv(t, b)
            p = GlobalAveragePool(v)
            s = Shape(t)
            u = Expand(p, s)
            y = Conv(u, c)
        }""",
        (8, 8),
    ),
    "batch folded into channels": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) <
            float[8,3,1,1] a, float[4,8,1,1] c, int64[4] fold = {1, -1, 6, 6}, int64[4] back = {-1, 8, 6, 6}> {
            t = Conv(x, a)
            f = Reshape(t, fold)
            r = Relu(f)
            u = Reshape(r, back)
            y = Conv(u, c)
        }""",
        (8,),
    ),
    "a scale computed from a static shape": between(
        "s = Shape(t)\nn = Gather(s, one)\nf = Cast<to=1>(n)\nq = Sqrt(f)\nu = Div(t, q)",
        weights=", int64 one = {1}",
    ),
    "a scale computed from a symbolic shape": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) <float[8,3,1,1] a, float[4,8,1,1] c, int64 one = {1}> {
            t = Conv(x, a)
            s = Shape(t)
            n = Gather(s, one)
            f = Cast<to=1>(n)
            q = Sqrt(f)
            u = Div(t, q)
            y = Conv(u, c)
        }""",
        (8,),
    ),
    "a scale computed from a symbolic size": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) <float[8,3,1,1] a, float[8,8,1,1] b, float[4,8,1,1] c> {
            t = Conv(x, a)
            v = Conv(t, b)
            n = Size(v)
            f = Cast<to=1>(n)
            q = Sqrt(f)
            u = Div(v, q)
            y = Conv(u, c)
        }""",
        (8,),
    ),
    "DepthToSpace CRD": tail('u = DepthToSpace<blocksize=2, mode="CRD">(t)', (2,), 2, "12,12"),
    "pixel shuffle by Reshape and Transpose": tail(
        "v = Conv(t, e)\nr = Reshape(v, s)\np = Transpose<perm=[0,1,4,2,5,3]>(r)\nu = Reshape(p, z)",
        (8, 3),
        3,
        "12,12",
        w=", float[12,8,1,1] e, int64[6] s = {1, 3, 2, 2, 6, 6}, int64[4] z = {1, 3, 12, 12}",
    ),
    "Focus slices": Case(
        """(float[1,3,6,6] x) => (float[1,4,3,3] y) <float[8,3,1,1] a, float[4,16,1,1] c,
            int64[1] o = {0}, int64[1] one = {1}, int64[1] e = {9999}, int64[1] ax = {2}, int64[1] st = {2}> {
            t = Conv(x, a)
            p = Slice(t, o, e, ax, st)
            q = Slice(t, one, e, ax, st)
            j = Concat<axis=1>(p, q)
            k = MaxPool<kernel_shape=[1,2], strides=[1,2]>(j)
            y = Conv(k, c)
        }""",
        (8,),
    ),
    "TopK over channels": tail("u, i = TopK<axis=1>(t, four)", (), 4, w=", int64[1] four = {4}"),
    "a sum over channels, by the arg of the largest": tail("p = ArgMax<axis=1>(t)\nu = Cast<to=1>(p)", (), 1),
    "elements gathered over channels": tail(
        "u = GatherElements<axis=1>(t, j)", (), 1, "1,1", w=", int64[1,1,1,1] j = {3}"
    ),
    "a mean repeated for all channels": between(
        "p = ReduceMean<axes=[1]>(t)\nq = Tile(p, r)\nu = Mul(t, q)", weights=", int64[4] r = {1, 8, 1, 1}"
    ),
    "one channel repeated for all channels": between(
        "p = Slice(t, three, four, one)\nq = Tile(p, r)\nu = Mul(t, q)",
        (7,),
        weights=", int64[4] r = {1, 8, 1, 1}, int64[1] three = {3}, int64[1] four = {4}, int64[1] one = {1}",
    ),
    "Einsum attention": between(
        TOKENS.format(
            body="q0 = MatMul(h, wq)\nk0 = MatMul(h, wk)\nv0 = MatMul(h, wv)\nq = Reshape(q0, parts)\nk = Reshape(k0, parts)\n"
            'v = Reshape(v0, parts)\ns0 = Einsum<equation="bqhd,bkhd->bhqk">(q, k)\np = Softmax(s0)\n'
            'm0 = Einsum<equation="bhqk,bkhd->bqhd">(p, v)\nm = Reshape(m0, whole)'
        ),
        (8, 2, 8, 8),
        weights=SIZES
        + ", float[8,8] wq, float[8,8] wk, float[8,8] wv, int64[4] parts = {1, 36, 2, 4}, int64[3] whole = {1, 36, 8}",
    ),
    "Einsum by weights of heads": between(
        TOKENS.format(
            body='q = Einsum<equation="btd,dhk->bthk">(h, e)\nr = Relu(q)\nm = Einsum<equation="...hk,hkd->...d">(r, g)'
        ),
        (8, 4, 8),
        weights=SIZES + ", float[8,2,4] e, float[2,4,8] g",
    ),
    "Einsum that scales channels": between(
        'u = Einsum<equation="nchw,c->nchw">(t, e)', weights=", float[8] e"
    ),
    "Einsum that sums": dense('u = Einsum<equation="nchw->nc">(t)', 8),
    "Einsum that sums channels": between(
        'p = Einsum<equation="nchw->nhw">(t)\nq = Unsqueeze(p, one)\nr = Sigmoid(q)\nu = Mul(t, r)',
        weights=", int64[1] one = {1}",
    ),
    "Einsum of a diagonal": dense('u = Einsum<equation="nchh->nc">(t)', 8, ()),
    "two branches added": two("r = Relu(t)\nu = Add(v, r)", (8,)),
    "a sum with a graph input": Case(
        """(float[1,8,6,6] x) => (float[1,4,6,6] y) <float[8,8,1,1] a, float[4,8,1,1] c> {
            t = Conv(x, a)
            u = Add(t, x)
            y = Conv(u, c)
        }""",
        (),
    ),
    "a sum with a concatenation": two(
        "g = Conv(x, e)\nj = Concat<axis=1>(t, v)\ns = Add(g, j)\nu = Conv(s, f)",
        (8, 8, 8),
    ),
    "a tensor added to itself": between("u = Add(t, t)"),
    "channels joined with constants": tail("u = Concat<axis=1>(t, e)", (8,), 10, w=", float[1,2,6,6] e"),
    "positions joined": two(
        "j = Concat<axis=2>(t, v)\nu = MaxPool<kernel_shape=[2,1], strides=[2,1]>(j)", (8,)
    ),
    "positions joined with a constant": tail(
        "u = Concat<axis=2>(e, t)", (8,), 8, "8,6", w=", float[1,8,2,6] e"
    ),
    "Where with a constant mask": two("z = Cast<to=9>(e)\nu = Where(z, t, v)", (8,)),
    "Where with a mask of positions": between(
        "m = ReduceMean<axes=[1]>(t)\nz = Less(m, o)\nu = Where(z, t, o)", weights=", float o = {0}"
    ),
    "Tile of channels": tail("u = Tile(t, r)", (), 16, w=", int64[4] r = {1, 2, 1, 1}"),
    "GatherElements at constant places": tail(
        "j = Expand(i, s)\nu = GatherElements<axis=3>(t, j)",
        (8,),
        8,
        "6,2",
        w=", int64[1,1,6,2] i = {0, 1, 2, 3, 4, 5, 5, 4, 3, -2, 1, 0}, int64[4] s = {1, 8, 6, 2}",
    ),
    "places that TopK chose in each channel": tail(
        "s = Sigmoid(t)\nv, i = TopK<axis=3, largest=0>(s, k)\nu = GatherElements<axis=-1>(t, i)",
        (8,),
        8,
        "6,2",
        w=", int64[1] k = {2}",
    ),
    "the best places": Case(
        BEST_PLACES.replace("BODY", "r = GatherElements<axis=2>(h, j)\nu = Reshape(r, o)"), (8,)
    ),
    "the best places of two tensors by the same indices": Case(
        BEST_PLACES.replace(
            "BODY",
            "v = Conv(x, a2)\nw = Reshape(v, m)\nr = GatherElements<axis=2>(h, j)\nl = GatherElements<axis=2>(w, j)\n"
            "n = Concat<axis=1>(r, l)\nd = Reshape(n, o2)\nu = Conv(d, c2)",
        ),
        (8, 8, 8),
    ),
    "places for fewer channels": tail(
        "u = GatherElements<axis=3>(t, i)", (), 1, "6,1", w=", int64[1,1,6,1] i = {0, 1, 2, 3, 4, 5}"
    ),
    "places of a tensor that is not pruned": tail(
        "s = Sigmoid(t)\nv, i = TopK<axis=3>(s, k)\nu = GatherElements<axis=3>(e, i)",
        (8,),
        8,
        "6,2",
        w=", int64[1] k = {2}, float[1,8,6,6] e",
    ),
    "outer product of two widths": dense(
        "p = GlobalAveragePool(t)\ni = Reshape(p, s)\nj = Reshape(p, z)\nm = Mul(i, j)\nu = Flatten(m)",
        64,
        (),
        weights=", int64[3] s = {1, 8, 1}, int64[3] z = {1, 1, 8}",
    ),
    "a channel convolution (ECA)": between(
        "p = GlobalAveragePool(t)\ni = Reshape(p, s)\nk = Conv<pads=[1,1]>(i, e)\ng = Sigmoid(k)\nj = Reshape(g, z)\n"
        "u = Mul(t, j)",
        (),
        weights=", int64[3] s = {1, 1, 8}, int64[4] z = {1, 8, 1, 1}, float[1,1,3] e",
    ),
    "a weight matrix on the left": Case(
        """(float[1,5,6] x) => (float[1,4,6] y) <float[8,5] a, float[4,8] c> {
            t = MatMul(a, x)
            u = Relu(t)
            y = MatMul(c, u)
        }""",
        (8,),
    ),
    "a weight that is transposed at run time": dense(
        "p = GlobalAveragePool(t)\nf = Flatten(p)\nw = Transpose(e)\nm = MatMul(f, w)\nu = Sigmoid(m)",
        6,
        (8, 6),
        weights=", float[6,8] e",
    ),
    "a product of weights": dense(
        "p = GlobalAveragePool(t)\nf = Flatten(p)\nw = MatMul(e, h)\nu = MatMul(f, w)",
        6,
        (5,),
        weights=", float[8,5] e, float[5,6] h",
    ),
    "Gemm with an activation as bias": dense(
        "p = GlobalAveragePool(t)\nf = Flatten(p)\ng = Gemm(f, e)\nk = Relu(g)\nl = Gemm(f, h)\ni = Relu(l)\n"
        "u = Gemm(k, o, i)",
        6,
        (8, 5, 6),
        weights=", float[8,5] e, float[8,6] h, float[5,6] o",
    ),
    "Conv with a computed bias": tail(
        "p = GlobalAveragePool(t)\nf = Flatten(p)\ng = Gemm(f, e)\nz = Reshape(g, s)\nu = Conv(t, h, z)",
        (8,),
        6,
        w=", float[8,6] e, float[6,8,1,1] h, int64[1] s = {-1}",
    ),
    "Conv with a computed weight": tail(
        "p = GlobalAveragePool(t)\nf = Flatten(p)\ng = Gemm(f, e)\nz = Reshape(g, s)\nu = Conv(t, z)",
        (),
        6,
        w=", float[8,48] e, int64[4] s = {6, 8, 1, 1}",
    ),
    "BatchNormalization of a matrix": dense(
        "p = GlobalAveragePool(t)\nf = Flatten(p)\nu = BatchNormalization(f, scale, shift, mean, variance)",
        8,
        weights=", float[8] scale, float[8] shift, float[8] mean, float[8] variance",
    ),
    "one dimension": Case(
        """(float[1,3,9] x) => (float[1,4,9] y) <float[8,3,3] a, float[8] b, float[4,8,1] c> {
            t = Conv<pads=[1,1]>(x, a, b)
            u = Relu(t)
            y = Conv(u, c)
        }""",
        (8,),
    ),
    "three dimensions": Case(
        """(float[1,3,4,4,4] x) => (float[1,4,4,4,4] y) <float[8,3,1,1,1] a, float[8] b, float[4,8,1,1,1] c> {
            t = Conv(x, a, b)
            u = Relu(t)
            y = Conv(u, c)
        }""",
        (8,),
    ),
    "an operator without a rule": Case(
        """(float[1,3,6,6] x) => (float[1,4,6,6] y) <
            float[8,3,1,1] a, float[8,8,1,1] b, float[8,8,1,1] e, float[4,8,1,1] c, int64 zero = {0}> {
            t = Conv(x, a)
            v = Conv(t, b)
            q = SequenceConstruct(v)
            w = SequenceAt(q, zero)
            r = Conv(w, e)
            u = Relu(r)
            y = Conv(u, c)
        }""",
        (8, 8),
        unsupported=("SequenceConstruct",),
    ),
    "an operator of another domain": Case(
        """(float[1,3,6,6] x) => (float[1,4,6,6] y) <
            float[8,3,1,1] a, float[8,8,1,1] b, float[8,8,1,1] e, float[4,8,1,1] c> {
            t = Conv(x, a)
            v = Conv(t, b)
            w = com.microsoft.SampleOp(v)
            r = Conv(w, e)
            u = Relu(r)
            y = Conv(u, c)
        }""",
        (8, 8),
        unsupported=("com.microsoft::SampleOp",),
    ),
    "a standard name in another domain": Case(
        """(float[1,3,6,6] x) => (float[1,4,6,6] y) <float[8,3,1,1] a, float[8,8,1,1] b, float[4,8,1,1] c> {
            t = Conv(x, a)
            v = com.microsoft.Trilu(t)
            w = Conv(v, b)
            u = Relu(w)
            y = Conv(u, c)
        }""",
        (8,),
        unsupported=("com.microsoft::Trilu",),
    ),
    "an unknown operator on unprunable data": Case(
        """(float[1,3,6,6] x) => (float[1,4,6,6] y) <float[8,3,1,1] a, float[4,8,1,1] c, int64 one = {1}> {
            w = CumSum(x, one)
            t = Conv(w, a)
            u = Relu(t)
            y = Conv(u, c)
        }""",
        (8,),
    ),
    "a branch that reads what is prunable outside": Case(
        """(float[1,3,6,6] x) => (float[1,4,6,6] y) <
            float[8,3,1,1] a, float[8,8,1,1] b, float[4,8,1,1] c, float half = {0.0}> {
            t = Conv(x, a)
            v = Conv(t, b)
            m = ReduceMax<keepdims=0>(x)
            z = Less(m, half)
            w = If(z) <
                then_branch = one () => (float[1,8,6,6] p) { p = Relu(v) },
                else_branch = other () => (float[1,8,6,6] q) { q = Sigmoid(v) }
            >
            u = Relu(w)
            y = Conv(u, c)
        }""",
        (8,),
        unsupported=("If",),
    ),
}
# These bodies need weights that the template does not declare.
ROWS = ", int64[1,1,2,1] rows = {0, 3}, int64[4] wide = {1, 8, 2, 6}"
MORE_WEIGHTS = {
    "a weight shared by readers of different widths": ", float[4,8,1,1] e",
    "a sum with a concatenation": ", float[16,3,1,1] e, float[8,16,1,1] f",
    "Where with a constant mask": ", float[1,8,1,1] e",
    "ScatterElements": ROWS,
    "Scatter": ROWS,
}
ALL: dict[str, Case] = {**RULES_TESTED, **TRAPS}
IN_DOUBLE = (
    "Conv",
    "ConvTranspose",
    "ReduceMean",
    "depthwise with multiplier 2",
    "channel shuffle",
    "squeeze and excitation",
    "option-A shortcut",
    "Flatten of NHWC",
)


def model_of(name: str) -> onnx.ModelProto:
    case = ALL[name]
    text = case.text.replace("float[8] b2", "float[8] b2" + MORE_WEIGHTS.get(name, ""))
    domains = {"com.microsoft": 1} if "com.microsoft" in text else {}
    model = text_model(text, case.opset, domains=domains)
    for initializer in model.graph.initializer:
        if initializer.name == "variance":
            positive = np.abs(onnx.numpy_helper.to_array(initializer)) + np.float32(0.5)
            initializer.CopyFrom(onnx.numpy_helper.from_array(positive, "variance"))
    return model


def test_every_rule_has_a_case() -> None:
    assert set(RULES_TESTED) == set(RULES)


@pytest.mark.parametrize("rule", dict.fromkeys(RULES.values()), ids=lambda rule: rule.__name__)
def test_a_rule_that_freezes_says_so(rule: Rule) -> None:
    source = inspect.getsource(rule)
    freezes = any(f"state.{verb}(" in source for verb in ("freeze", "freeze_inputs"))
    described = "Frozen: " in (inspect.getdoc(rule) or "")
    assert described or not freezes, (
        "its docstring is its line in the table of operators: end it with 'Frozen: …'"
    )


@pytest.mark.parametrize("name", RULES_TESTED)
def test_the_case_of_a_rule_uses_it(name: str) -> None:
    used = {
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in model_of(name).graph.node
    }
    assert name in used


@pytest.mark.parametrize("name", ALL)
def test_the_law_holds_and_the_right_units_can_go(name: str) -> None:
    case = ALL[name]
    model, structure = analyse(model_of(name), case.shapes)
    assert tuple(structure.graph.unsupported) == case.unsupported
    assert tuple(len(structure.dimensions[i].units) for i in structure.prunable) == case.widths
    rng = np.random.default_rng(0)
    for plan in [random_plan(structure, rng) for _ in range(3)]:
        pruned, evidence = prune_checked(model, structure, plan)
        assert evidence.worst <= 1e-5
    assert informative(pruned, structure)
    for index in structure.prunable:
        dimension = structure.dimensions[index]
        last = tuple(row * dimension.count + dimension.count - 1 for row in range(dimension.rows))
        single = PruningPlan(keep={dimension.name: last})
        pruned, _ = prune_checked(model, structure, single)
        assert operands(pruned) != operands(rewrite(structure, PruningPlan(keep={})))


def kept_part(value: np.ndarray, structure: Structure, name: str, removed: np.ndarray) -> np.ndarray:
    """What stays of a tensor; heads first, because in each of them other widths may stay."""
    labels = structure.graph.tensors.get(name)
    if labels is None:
        return value
    first = structure.graph.head_axis(name) or 0
    mask = np.moveaxis(np.broadcast_to(keep_vector(labels, removed), value.shape), first, 0)
    extents = [int(structure.graph.keep(name, axis, removed).sum()) for axis in range(value.ndim)]
    extents.insert(0, extents.pop(first))
    return np.moveaxis(np.moveaxis(value, first, 0)[mask].reshape(extents), 0, first)


@pytest.mark.parametrize("name", RULES_TESTED)
def test_a_pruned_operator_is_the_operator_on_pruned_tensors(name: str) -> None:
    model, structure = analyse(model_of(name), ALL[name].shapes)
    plan = random_plan(structure, np.random.default_rng(3), blocks=False)
    removed = removed_classes(plan, structure)
    names = [o for operation in structure.shadow.operations for o in operation.outputs if o]
    pair = [
        Computation(m, names)
        for m in (masked_model(model, structure, plan), rewrite(structure, plan, split=True))
    ]
    feeds = random_feeds(pair[0].inputs, structure.shadow.inputs, 0)
    masked, pruned = (dict(zip(names, computation.run(names, feeds), strict=True)) for computation in pair)
    for tensor in (
        n for n in names if isinstance(masked[n], np.ndarray) and n not in structure.shadow.independent
    ):
        expected, actual = kept_part(masked[tensor], structure, tensor, removed), pruned[tensor]
        assert expected.shape == actual.shape, tensor
        scale = np.abs(np.nan_to_num(expected, posinf=0, neginf=0)).max(initial=1e-3)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * scale, err_msg=tensor)


FORMS = [
    (row["operator"], version)
    for row in operators_document()["operators"]
    for version in row["versions"]
    if not row["domain"]
]


def in_form(name: str, version: int) -> onnx.ModelProto | None:
    """The case of a rule in an opset whose form of the operator is ``version``, where the text is valid."""
    for opset in range(max(7, version), 27):
        if onnx.defs.get_schema(name, opset).since_version == version:
            with contextlib.suppress(onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
                return text_model(ALL[name].text, opset)
    return None


WITHOUT_KERNEL = (("GlobalLpPool", 22), ("MaxRoiPool", 22), ("RoiAlign", 22))  # in ONNX Runtime


@pytest.mark.slow
def test_every_form_of_an_operator_is_pruned_alike() -> None:
    tried = 0
    for name, version in FORMS:
        model = in_form(name, version)
        if model is None or (name, version) in WITHOUT_KERNEL:
            continue
        tried += 1
        loaded, structure = analyse(model, ALL[name].shapes)
        assert tuple(len(structure.dimensions[i].units) for i in structure.prunable) == ALL[name].widths
        prune_checked(loaded, structure, random_plan(structure, np.random.default_rng(0)))
    assert tried > 0.85 * len(FORMS)


@pytest.mark.parametrize("name", IN_DOUBLE)
def test_the_law_holds_to_rounding_in_float64(name: str) -> None:
    model, structure = analyse(model_of(name))
    (key, shape), *_ = structure.shadow.inputs.items()
    feed = {key: np.random.default_rng(0).standard_normal(shape)}
    plan = random_plan(structure, np.random.default_rng(1))
    pair = (masked_model(model, structure, plan), rewrite(structure, plan))
    expected, actual = (next(iter(run_in_double(m, feed))) for m in pair)
    assert expected.dtype == np.float64
    assert np.abs(actual - expected).max() <= 1e-9 * np.abs(expected).max()
