"""Random valid ONNX graphs: operators × spellings × shapes × topologies × opsets, of a few thousand numbers.

Every choice is a call ``pick(n)`` that returns one of ``0 … n - 1``, so that a random generator can drive
it, or hypothesis, which shrinks towards 0: the simplest choice stands first. A step takes a tensor and
returns another, or None where it does not apply. Steps that ONNX's shape inference refuses are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["OPSETS", "random_model"]

OPSETS = (17, 9, 11, 12, 13, 15, 18, 20, 21, 22, 23, 24)
Pick = Callable[[int], int]
Step = Callable[["Graph", str], "str | None"]
_LARGEST = 2048  # elements of a tensor between steps


@dataclass
class Graph:
    """A graph under construction; shapes are those of a batch of one."""

    pick: Pick
    opset: int
    rng: np.random.Generator
    symbolic: tuple[str, ...] = ()
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    pool: list[str] = field(default_factory=list)
    domains: set[str] = field(default_factory=set)
    largest: int = _LARGEST

    def choose(self, *options: Any) -> Any:
        """One of the options, the first the simplest."""
        return options[self.pick(len(options))]

    def chance(self, n: int) -> bool:
        """True once in ``n``."""
        return self.pick(n) == n - 1

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(d.dim_value for d in self.types[name].tensor_type.shape.dim)

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """An initializer, or now and then the output of a Constant node."""
        array = np.asarray(value, dtype)
        name = f"c{len(self.types)}"
        self.types[name] = helper.make_tensor_type_proto(
            helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        self.constants[name] = array
        if self.chance(9):
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        return name

    def ints(self, *values: int) -> str:
        """An int64 operand."""
        return self.constant(values, np.int64)

    def weight(self, *shape: int) -> str:
        """He-normal; sometimes a weight of this shape that exists already."""
        if self.chance(7):
            same = [n for n, a in self.constants.items() if a.shape == shape and a.dtype == np.float32]
            if same:
                return same[-1]
        fan = max(1, math.prod(shape[1:]) if len(shape) > 1 else 1)
        return self.constant(self.rng.standard_normal(shape) * math.sqrt(2 / fan))

    def near_one(self, *shape: int) -> str:
        """A scale that may be divided by."""
        return self.constant(self.rng.uniform(0.5, 1.5, shape))

    def op(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; its output, or the list of these."""
        names = [f"t{len(self.types)}_{place}" for place in range(outputs)]
        node = helper.make_node(
            op_type,
            list(inputs),
            names,
            name=f"{op_type.lower()}_{len(self.nodes)}",
            domain=domain,
            **attributes,
        )
        if domain:
            self.domains.add(domain)
            made = {name: self.types[inputs[0]] for name in names}
        else:
            known = {n: self.types[n] for n in inputs if n}
            data = {n: numpy_helper.from_array(self.constants[n], n) for n in known if n in self.constants}
            made = onnx.shape_inference.infer_node_outputs(
                onnx.defs.get_schema(op_type, self.opset),
                node,
                known,
                data,
                opset_imports=[helper.make_opsetid("", self.opset)],
                ir_version=8,
            )
        for name in names:
            dims = made[name].tensor_type.shape.dim
            sizes = [d.dim_value for d in dims]
            if (
                not all(d.HasField("dim_value") for d in dims)
                or math.prod(sizes) > self.largest
                or 0 in sizes
            ):
                raise onnx.shape_inference.InferenceError("no size, too large or empty")
        self.types.update({name: made[name] for name in names})
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def along(self, op_type: str, x: str, axes: Sequence[int], since: int, **attributes: Any) -> str:
        """An operator whose axes became an input in opset ``since``."""
        if self.opset >= since:
            return self.op(op_type, x, self.ints(*axes), **attributes)
        return self.op(op_type, x, axes=list(axes), **attributes)

    def squeeze(self, x: str, *axes: int) -> str:
        return self.along("Squeeze", x, axes, 13)

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.along("Unsqueeze", x, axes, 13)

    def reduce(self, kind: str, x: str, axes: Sequence[int], keep: int = 1) -> str:
        return self.along(kind, x, axes, 13 if kind == "ReduceSum" else 18, keepdims=keep)

    def reshape(self, x: str, *shape: int) -> str:
        """To a target that is written out, copies with 0, infers with -1, or computes the batch at run time.

        A file that promises any height and writes it out in a target would break its promise.
        """
        target, before = list(shape), self.shape(x)
        if "H" in self.symbolic and shape[-2:] != (1, 1):
            raise onnx.shape_inference.InferenceError("would fix a symbolic size")
        form = self.pick(4)
        if self.symbolic:
            form = self.choose(1, 2, 3)
        if form == 1 and before[:1] == shape[:1]:
            target[0] = 0
        elif form == 2:
            target[self.pick(len(target)) if not self.symbolic else 0] = -1
        elif form == 3 and before[:1] == shape[:1]:
            size = self.op("Shape", x)
            first = self.op("Gather", size, self.constant(0, np.int64), axis=0)
            batch = self.unsqueeze(first, 0)
            joined = self.op("Concat", batch, self.ints(*shape[1:]), axis=0)
            self.constants_of(joined, shape)
            return self.op("Reshape", x, joined)
        return self.op("Reshape", x, self.ints(*target))

    def constants_of(self, name: str, value: Sequence[int]) -> None:
        """Tell shape inference what a computed operand is; it stays computed."""
        self.constants[name] = np.asarray(value, np.int64)

    def cut(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        if self.opset < 10:
            if step != 1:
                raise onnx.shape_inference.InferenceError("no steps yet")
            return self.op("Slice", x, axes=[axis], starts=[start], ends=[stop])
        return self.op("Slice", x, self.ints(start), self.ints(stop), self.ints(axis), self.ints(step))

    def split(self, x: str, axis: int, sizes: Sequence[int]) -> list[str]:
        equal = len(set(sizes)) == 1
        if self.opset < 13:
            return self.op("Split", x, outputs=len(sizes), axis=axis, split=list(sizes))
        if equal and self.chance(2):
            count = {"num_outputs": len(sizes)} if self.opset >= 18 else {}
            return self.op("Split", x, outputs=len(sizes), axis=axis, **count)
        return self.op("Split", x, self.ints(*sizes), outputs=len(sizes), axis=axis)

    def gathered(self, x: str, axis: int, indices: Any) -> str:
        return self.op("Gather", x, self.constant(indices, np.int64), axis=axis)

    def linear(self, x: str, features: int, bias: bool | None = None) -> str:
        """``x W + b`` over the last axis, in one of its spellings."""
        rank, inside = len(self.shape(x)), self.shape(x)[-1]
        form = self.pick(3)
        if form == 1 and rank == 2:
            return gemm(self, x, features)
        if form == 2:
            y = self.op("MatMul", x, self.op("Transpose", self.weight(features, inside), perm=[1, 0]))
        else:
            y = self.op("MatMul", x, self.weight(inside, features))
        if bias is False or (bias is None and self.chance(3)):
            return y
        b = self.weight(features)
        return self.op("Add", *([y, b] if self.chance(2) else [b, y]))

    def convolve(self, x: str, features: int, kernel: int = 1) -> str:
        """A plain convolution that keeps the size."""
        w = self.weight(features, self.shape(x)[1], kernel, kernel)
        bias = [] if self.chance(3) else [self.weight(features)]
        return self.op("Conv", x, w, *bias, pads=[kernel // 2] * 4, kernel_shape=[kernel] * 2)


def gemm(g: Graph, x: str, features: int) -> str:
    rows, inside = g.shape(x)
    attributes: dict[str, Any] = {}
    if g.chance(2):
        w, attributes["transB"] = g.weight(features, inside), 1
    else:
        w = g.weight(inside, features)
    if g.chance(5):
        x, attributes["transA"] = g.op("Transpose", x, perm=[1, 0]), 1
    if g.chance(3):
        attributes["alpha"] = 0.5
    if g.chance(3):
        attributes["beta"] = 2.0
    bias = g.choose((features,), None, (1, features), (rows, features), (1,), (rows, 1))
    if bias is None and g.opset < 11:
        bias = (features,)
    return g.op("Gemm", x, w, *([] if bias is None else [g.weight(*bias)]), **attributes)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# Steps on images [1, channels, height, width].


def conv(g: Graph, x: str) -> str:
    channels = g.shape(x)[1]
    out = g.choose(4, 6, 8, 3, 2, 1)
    groups = g.choose(*divisors(channels)) if g.chance(2) else 1
    out = -(-out // groups) * groups
    kernel, dilation, stride = g.choose(1, 3, 2), g.choose(1, 1, 2), g.choose(1, 1, 2)
    pad = (kernel - 1) * dilation // 2
    w = g.weight(out, channels // groups, kernel, g.choose(kernel, 1))
    bias = [] if g.chance(3) else [g.weight(out)]
    pads = {"auto_pad": "SAME_UPPER"} if g.chance(6) and dilation == 1 else {"pads": [pad] * 4}
    return g.op("Conv", x, w, *bias, group=groups, strides=[stride] * 2, dilations=[dilation] * 2, **pads)


def conv_transpose(g: Graph, x: str) -> str:
    channels = g.shape(x)[1]
    groups = g.choose(*divisors(channels)) if g.chance(2) else 1
    out = g.choose(4, 3, 2, 1)
    kernel, stride = g.choose((2, 2), (3, 1), (1, 1))
    w = g.weight(channels, out, kernel, kernel)
    bias = [] if g.chance(3) else [g.weight(out * groups)]
    return g.op(
        "ConvTranspose", x, w, *bias, group=groups, strides=[stride] * 2, pads=[(kernel - stride) // 2] * 4
    )


def batch_norm(g: Graph, x: str) -> str:
    c = g.shape(x)[1]
    return g.op("BatchNormalization", x, g.near_one(c), g.weight(c), g.weight(c), g.near_one(c))


def instance_norm(g: Graph, x: str) -> str:
    c = g.shape(x)[1]
    return g.op("InstanceNormalization", x, g.near_one(c), g.weight(c), epsilon=1e-3)


def group_norm(g: Graph, x: str) -> str:
    _, c, height, width = g.shape(x)
    groups = g.choose(*divisors(c))
    if g.opset >= 21 and g.chance(2):
        return g.op("GroupNormalization", x, g.near_one(c), g.weight(c), num_groups=groups, epsilon=1e-3)
    parts = g.reshape(x, 1, groups, c // groups * height * width)
    y = g.op("InstanceNormalization", parts, g.near_one(groups), g.weight(groups), epsilon=1e-3)
    y = g.reshape(y, 1, c, height, width)
    if g.chance(3):
        return y
    return g.op("Add", g.op("Mul", y, g.near_one(c, 1, 1)), g.weight(c, 1, 1))


def layer_norm(g: Graph, x: str, axes: Sequence[int] = (-1,)) -> str:
    """Over the last axes, by the operator or written out; ``axes`` are listed from the back."""
    shape = [g.shape(x)[axis] for axis in axes]
    if g.opset >= 17 and g.chance(2):
        bias = [] if g.chance(3) else [g.weight(*shape)]
        return g.op("LayerNormalization", x, g.near_one(*shape), *bias, axis=axes[0], epsilon=1e-3)
    if g.opset >= 23 and g.chance(2):
        return g.op("RMSNormalization", x, g.near_one(*shape), axis=axes[0], epsilon=1e-3)
    centred = x if g.chance(3) else g.op("Sub", x, g.reduce("ReduceMean", x, axes))
    square = g.op("Pow", centred, g.constant(2.0)) if g.chance(2) else g.op("Mul", centred, centred)
    variance = g.op("Add", g.reduce("ReduceMean", square, axes), g.constant(1e-3))
    root = g.op("Sqrt", variance)
    y = g.op("Mul", centred, g.op("Reciprocal", root)) if g.chance(2) else g.op("Div", centred, root)
    return g.op("Add", g.op("Mul", y, g.near_one(*shape)), g.weight(*shape))


def channel_norm(g: Graph, x: str) -> str:
    if g.chance(3):
        return layer_norm(g, x, (-3, -2, -1))
    return g.op("Transpose", layer_norm(g, g.op("Transpose", x, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2])


def activate(g: Graph, x: str) -> str:
    kind = g.choose(
        *"Relu Sigmoid Tanh LeakyRelu Softplus Abs Neg Identity Elu Erf Clip HardSigmoid Silu".split()
    )
    if kind == "Silu":
        return g.op("Mul", x, g.op(g.choose("Sigmoid", "HardSigmoid"), x))
    if kind == "Clip":
        if g.opset < 11:
            return g.op("Clip", x, min=-1.0, max=1.0)
        return g.op("Clip", x, g.constant(-1.0), *([] if g.chance(2) else [g.constant(1.0)]))
    return g.op(kind, x)


def with_constant(g: Graph, x: str) -> str:
    shape = g.shape(x)
    keep = g.pick(2 ** len(shape))
    sizes = [n if keep >> place & 1 else 1 for place, n in enumerate(reversed(shape))][::-1]
    while sizes and sizes[0] == 1 and g.chance(2):
        sizes = sizes[1:]
    kind = g.choose("Add", "Mul", "Sub", "Div", "Max", "PRelu")
    if kind == "Div":
        return g.op("Div", x, g.near_one(*sizes))
    value = g.weight(*sizes)
    first = kind != "PRelu" and g.chance(2)
    return g.op(kind, *([value, x] if first else [x, value]))


def combine(g: Graph, x: str, y: str) -> str:
    kind = g.choose("Add", "Mul", "Sub", "Max", "Min", "Div", "Where")
    if kind == "Div":
        return g.op("Div", x, g.op("Add", g.op("Sigmoid", y), g.constant(0.5)))
    if kind == "Where":
        return g.op("Where", g.op("Less", x, g.constant(0.1)), x, y)
    return g.op(kind, *([y, x] if g.chance(2) else [x, y]))


def join(g: Graph, x: str) -> str | None:
    """Another tensor that broadcasts against this one; without one, a convolution of this one."""

    def fits(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return len(a) <= len(b) and all(m in (1, n) for m, n in zip(a[::-1], b[::-1], strict=False))

    others = [n for n in g.pool if n != x and fits(g.shape(n), g.shape(x))]
    if others and not g.chance(3):
        return combine(g, x, g.choose(*others[::-1]))
    if len(g.shape(x)) != 4:
        return combine(g, x, g.linear(x, g.shape(x)[-1]))
    return combine(g, x, g.convolve(x, g.choose(g.shape(x)[1], 1)))


def residual(g: Graph, x: str) -> str:
    inner = activate(g, g.convolve(x, g.choose(4, 6, 1), g.choose(1, 3)))
    branch = g.convolve(inner, g.shape(x)[1])
    return g.op("Add", *([branch, x] if g.chance(2) else [x, branch]))


def gate(g: Graph, x: str) -> str:
    """Squeeze and excitation, with convolutions or with matrices."""
    c = g.shape(x)[1]
    form = g.pick(3)
    s = g.reduce("ReduceMean", x, (2, 3), int(form == 1)) if form else g.op("GlobalAveragePool", x)
    if form == 2:
        s = g.op(g.choose("Sigmoid", "HardSigmoid"), g.linear(g.op("Relu", g.linear(s, 3)), c))
        s = g.unsqueeze(s, 2, 3) if g.chance(2) else g.reshape(s, 1, c, 1, 1)
    else:
        s = g.op("Sigmoid", g.convolve(g.op("Relu", g.convolve(s, g.choose(3, 1))), c))
    return g.op("Mul", *([s, x] if g.chance(2) else [x, s]))


def concat(g: Graph, x: str) -> str:
    shape = g.shape(x)
    axis = g.choose(1, 1, 1, 2)

    def fits(n: str) -> bool:
        return len(g.shape(n)) == 4 and all(
            a == b for i, (a, b) in enumerate(zip(g.shape(n), shape, strict=True)) if i != axis
        )

    parts = [x]
    for _ in range(1 + g.pick(2)):
        form = g.pick(4)
        others = [n for n in g.pool if fits(n)]
        if form == 1 and others:
            parts.append(g.choose(*others))
        elif form == 2:
            parts.append(activate(g, x))
        elif form == 3 and not g.symbolic:
            parts.append(g.weight(*[2 if i == axis else n for i, n in enumerate(shape)]))
        else:
            parts.append(g.convolve(x, g.choose(3, 4) if axis == 1 else shape[1]))
    if g.chance(3):
        parts.reverse()
    return g.op("Concat", *parts, axis=g.choose(axis, axis - 4) if g.opset >= 11 else axis)


def parts_of(g: Graph, x: str) -> str | None:
    """Split, and go on with a part, all of them in another order, or a sum."""
    c = g.shape(x)[1]
    if c < 2:
        return None
    count = g.choose(*[d for d in divisors(c) if d > 1])
    sizes = [c // count] * count
    if g.chance(2):
        first = 1 + g.pick(c - 1)
        sizes = [first, c - first]
    parts = g.split(x, 1, sizes)
    g.pool += parts
    form = g.pick(3)
    if form == 0:
        return parts[-1]
    parts[0] = activate(g, parts[0])
    if form == 1 and len(set(sizes)) == 1:
        return g.op("Add", parts[0], parts[1])
    return g.op("Concat", *parts[::-1], axis=1)


def slices(g: Graph, x: str) -> str:
    axis = g.choose(1, 1, 2, 3)
    n = g.shape(x)[axis]
    start = g.pick(n)
    stop = g.choose(n, 2**31 - 1, start + 1 + g.pick(n - start))
    step = g.choose(1, 1, 2)
    return g.cut(x, axis, g.choose(start, start - n), stop, step)


def gather(g: Graph, x: str) -> str:
    axis = g.choose(1, 1, 2)
    n = g.shape(x)[axis]
    form = g.pick(4)
    if form == 0:
        return g.gathered(x, axis, g.rng.permutation(n))
    if form == 1:
        return g.gathered(x, axis, g.rng.integers(-n if g.opset >= 11 else 0, n, 1 + g.pick(4)))
    if form == 2:
        return g.unsqueeze(g.gathered(x, axis, g.pick(n)), axis)
    return g.reduce("ReduceMax", g.gathered(x, axis, g.rng.integers(0, n, (2, 3))), (axis,), 0)


def shuffle(g: Graph, x: str) -> str:
    _, c, height, width = g.shape(x)
    groups = g.choose(*divisors(c))
    y = g.reshape(x, 1, groups, c // groups, height, width)
    y = g.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    if g.chance(4):
        y = activate(g, y)
    return g.reshape(y, 1, c, height, width)


def windows(g: Graph, x: str) -> str | None:
    """Windows of positions, reduced or laid into the channels."""
    _, c, height, width = g.shape(x)
    if height % 2 or width % 2:
        return None
    y = g.reshape(x, 1, c, height // 2, 2, width // 2, 2)
    form = g.pick(3)
    if form == 0:
        return g.reduce(g.choose("ReduceMean", "ReduceMax"), y, (3, 5), 0)
    order = [0, 3, 5, 1, 2, 4] if form == 1 else [0, 1, 3, 5, 2, 4]
    return g.reshape(g.op("Transpose", y, perm=order), 1, 4 * c, height // 2, width // 2)


def pad(g: Graph, x: str) -> str:
    before = [0, g.choose(0, 0, 1, 2), g.choose(0, 1), 0]
    after = [0, g.choose(0, 1, 3, 0), 0, g.choose(0, 1, -1)]
    mode = g.choose("constant", "constant", "reflect", "edge")
    if mode != "constant":
        before[1] = after[1] = 0
    if g.opset < 11:
        return g.op("Pad", x, mode=mode, pads=before + after)
    if g.opset >= 18 and g.chance(2):
        return g.op("Pad", x, g.ints(before[1], after[1]), "", g.ints(1), mode=mode)
    value = [g.constant(0.5)] if mode == "constant" and g.chance(2) else []
    return g.op("Pad", x, g.ints(*before, *after), *value, mode=mode)


def depth_and_space(g: Graph, x: str) -> str | None:
    _, c, height, width = g.shape(x)
    if c % 4 == 0:
        mode = {"mode": g.choose("DCR", "CRD")} if g.opset >= 11 else {}
        return g.op("DepthToSpace", x, blocksize=2, **mode)
    return g.op("SpaceToDepth", x, blocksize=2) if height % 2 == width % 2 == 0 else None


def resize(g: Graph, x: str) -> str:
    scales = g.constant([1, 1, 2, 2])
    mode = {"mode": g.choose("nearest", "linear")}
    if g.opset < 10:
        return g.op("Upsample", x, scales, **mode)
    if g.opset < 11:
        return g.op("Resize", x, scales, **mode)
    none = g.constant([]) if g.opset < 13 else ""
    if g.chance(2):
        shape = g.shape(x)
        return g.op(
            "Resize",
            x,
            none,
            none if g.opset < 13 else "",
            g.ints(*shape[:2], *(2 * n for n in shape[2:])),
            **mode,
        )
    return g.op("Resize", x, none, scales, **mode)


def pool(g: Graph, x: str) -> str:
    kind = g.choose("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool")
    if kind.startswith("Global"):
        return g.op(kind, x)
    pads = {"pads": [0, 0, 1, 1]} if g.chance(3) else {}
    ceil = {"ceil_mode": 1} if g.chance(4) and g.opset >= 10 and kind != "LpPool" else {}
    return g.op(kind, x, kernel_shape=[2, 2], strides=[g.choose(2, 1)] * 2, **pads, **ceil)


REDUCTIONS = "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare".split()


def reduce(g: Graph, x: str) -> str:
    """Over any axes, and back by broadcasting."""
    kind, rank = g.choose(*REDUCTIONS), len(g.shape(x))
    chosen = 1 + g.pick(2**rank - 1)
    axes = [axis for axis in range(rank) if chosen >> axis & 1]
    if g.chance(4):
        small = g.op(kind, x, keepdims=1)
    else:
        small = g.reduce(
            kind, x, axes if g.chance(2) else [a - rank for a in axes] if g.opset >= 11 else axes
        )
    if g.chance(3) and len(g.shape(small)) == 4:
        return small
    return combine(g, x, g.op("Sigmoid", small))


def repeat(g: Graph, x: str) -> str:
    _, c, height, width = g.shape(x)
    form = g.pick(3)
    if form == 0:
        return g.op("Expand", g.op("GlobalAveragePool", x), g.ints(1, c, height, width))
    if form == 1:
        return g.op("Tile", x, g.ints(1, 1, 2, 1))
    return g.op("Tile", x, g.ints(1, 2, 1, 1))


def unknown(g: Graph, x: str) -> str:
    """An operator that has no rule (a sequence of one tensor), or is seldom seen, or of another domain."""
    form = g.pick(4)
    if form == 0 and g.opset >= 11:
        y, sequence = f"t{len(g.types)}_0", f"t{len(g.types)}_sequence"
        g.nodes.append(helper.make_node("SequenceConstruct", [x], [sequence], name=sequence))
        g.types[y] = g.types[x]
        g.nodes.append(helper.make_node("SequenceAt", [sequence, g.constant(0, np.int64)], [y], name=y))
        return y
    if form == 1 and g.opset >= 11:
        return g.op("CumSum", x, g.constant(g.choose(1, len(g.shape(x)) - 1), np.int64))
    if form == 2 and len(g.shape(x)) == 4:
        return g.op("LRN", x, size=3)
    return g.op("QuickGelu", x, domain="com.microsoft")


def softmax(g: Graph, x: str) -> str:
    return g.op("Softmax", x, axis=g.pick(len(g.shape(x))))


def to_tokens(g: Graph, x: str) -> str:
    _, c, height, width = g.shape(x)
    if g.chance(2):
        y = g.reshape(g.op("Transpose", x, perm=[0, 2, 3, 1]), 1, height * width, c)
    else:
        y = g.op("Transpose", g.reshape(x, 1, c, height * width), perm=[0, 2, 1])
    return y if g.shape(y)[1] <= 16 else g.cut(y, 1, 0, 8)


def to_row(g: Graph, x: str) -> str:
    if len(g.shape(x)) == 3:
        return g.reduce("ReduceMean", x, (1,), 0) if g.chance(2) else g.gathered(x, 1, 0)
    form = g.pick(3)
    if form == 0:
        return g.op("Flatten", g.op(g.choose("GlobalAveragePool", "GlobalMaxPool"), x))
    if form == 1:
        return g.squeeze(g.reduce("ReduceMean", x, (2, 3)), 2, 3)
    return g.op("Flatten", x)


# Steps on tokens [1, tokens, channels].


def linear(g: Graph, x: str) -> str:
    return g.linear(x, g.choose(4, 6, 8, 1))


def mlp(g: Graph, x: str) -> str:
    inner = g.linear(layer_norm(g, x) if g.chance(2) else x, g.choose(6, 8, 1))
    return g.op("Add", x, g.linear(activate(g, inner), g.shape(x)[-1]))


def embed(g: Graph, x: str) -> str:
    _, tokens, c = g.shape(x)
    if g.chance(2) and not g.symbolic:
        return g.op("Concat", g.weight(1, 1, c), x, axis=1)
    return g.op("Add", x, g.weight(*g.choose((1, tokens, c), (tokens, c), (1, 1, c))))


def attention(g: Graph, x: str) -> str:
    """Heads in one of the spellings of exporters."""
    _, tokens, c = g.shape(x)
    heads, width, value = g.choose(2, 1, 3, 4), g.choose(2, 4, 1), g.choose(2, 3, 1)
    source = layer_norm(g, x) if g.chance(2) else x
    if g.opset >= 23 and g.chance(2):
        served = g.choose(*divisors(heads))
        q, k, v = (g.linear(source, n) for n in (heads * width, served * width, served * value))
        mixed = g.op("Attention", q, k, v, q_num_heads=heads, kv_num_heads=served)
        return g.op("Add", x, g.linear(mixed, c))
    if g.chance(2):
        q, k, v = (_heads(g, g.linear(source, heads * n), heads, n) for n in (width, width, value))
    else:
        value = width
        q, k, v = _fused(g, source, heads, width)
    scale = g.constant(1 / math.sqrt(width))
    if g.chance(2):
        q, k = g.op("Mul", q, scale), g.op("Mul", k, scale)
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    if g.chance(2):
        scores = g.op(g.choose("Mul", "Div"), scores, scale)
    if g.chance(3):
        scores = g.op(
            "Add", scores, g.weight(*g.choose((tokens, tokens), (1, heads, tokens, tokens), (heads, 1, 1)))
        )
    axis = -1 if g.opset >= 11 else 3
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=axis), v)
    merged = g.reshape(g.op("Transpose", mixed, perm=[0, 2, 1, 3]), 1, tokens, heads * value)
    out = g.linear(merged, c)
    return out if g.chance(4) else g.op("Add", x, out)


def _heads(g: Graph, x: str, heads: int, width: int) -> str:
    tokens = g.shape(x)[1]
    return g.op("Transpose", g.reshape(x, 1, tokens, heads, width), perm=[0, 2, 1, 3])


def _fused(g: Graph, x: str, heads: int, width: int) -> list[str]:
    tokens, inside = g.shape(x)[1], heads * width
    both = g.linear(x, 3 * inside)
    form = g.pick(3)
    if form == 0:
        return [_heads(g, part, heads, width) for part in g.split(both, 2, [inside] * 3)]
    if form == 1:
        return [_heads(g, g.cut(both, 2, i * inside, (i + 1) * inside), heads, width) for i in range(3)]
    y = g.op("Transpose", g.reshape(both, 1, tokens, 3, heads, width), perm=[2, 0, 3, 1, 4])
    return [g.gathered(y, 0, i) for i in range(3)]


def to_image(g: Graph, x: str) -> str:
    _, tokens, c = g.shape(x)
    height = max(d for d in divisors(tokens) if d * d <= tokens)
    return g.reshape(g.op("Transpose", x, perm=[0, 2, 1]), 1, c, height, tokens // height)


# Steps on rows [1, channels].


def row_norm(g: Graph, x: str) -> str:
    return layer_norm(g, x) if g.chance(2) else batch_norm(g, x)


def spread(g: Graph, x: str) -> str:
    return g.unsqueeze(x, 2, 3) if g.chance(2) else g.reshape(x, *g.shape(x), 1, 1)


# Steps between ranks, and on groups [1, groups, channels, height, width].


def to_groups(g: Graph, x: str) -> str:
    _, c, height, width = g.shape(x)
    groups = g.choose(*divisors(c))
    return g.reshape(x, 1, groups, c // groups, height, width)


def from_groups(g: Graph, x: str) -> str:
    _, groups, c, height, width = g.shape(x)
    if g.chance(2):
        x, groups, c = g.op("Transpose", x, perm=[0, 2, 1, 3, 4]), c, groups
    return g.reshape(x, 1, groups * c, height, width)


def over_groups(g: Graph, x: str) -> str:
    """The groups end in a reduction, or one of them is taken."""
    axis = g.choose(1, 2)
    if g.chance(2):
        return g.reduce(g.choose(*REDUCTIONS), x, (axis,), 0)
    return g.gathered(x, axis, g.pick(g.shape(x)[axis]))


def to_heads(g: Graph, x: str) -> str:
    c = g.shape(x)[2]
    heads = g.choose(*divisors(c))
    return _heads(g, x, heads, c // heads)


def from_heads(g: Graph, x: str) -> str:
    _, heads, tokens, width = g.shape(x)
    return g.reshape(g.op("Transpose", x, perm=[0, 2, 1, 3]), 1, tokens, heads * width)


def product(g: Graph, x: str) -> str | None:
    """With another tensor, transposed if it must be; or with itself."""
    shape = g.shape(x)
    others = [n for n in g.pool if g.shape(n)[:-2] == shape[:-2] and shape[-1] in g.shape(n)[-2:]]
    y = g.choose(x, *others[::-1])
    if g.shape(y)[-2] != shape[-1] or g.chance(2):
        rank = len(shape)
        y = g.op("Transpose", y, perm=[*range(rank - 2), rank - 1, rank - 2])
    z = g.op("MatMul", x, y)
    return g.op("Softmax", z, axis=-1 if g.opset >= 11 else len(shape) - 1) if g.chance(2) else z


def turn(g: Graph, x: str) -> str:
    """Axes change places, the batch stays."""
    return g.op("Transpose", x, perm=[0, *(1 + g.rng.permutation(len(g.shape(x)) - 1)).tolist()])


def last_linear(g: Graph, x: str) -> str:
    return g.linear(x, g.choose(4, 2, 1))


def take(g: Graph, x: str) -> str:
    """A range along any axis but the batch, or the same indices twice."""
    axis = 1 + g.pick(len(g.shape(x)) - 1)
    n = g.shape(x)[axis]
    if g.chance(2):
        return g.op("Concat", x, activate(g, x), axis=axis)
    return g.cut(x, axis, g.pick(n), n)


ON_ANY = (activate, with_constant, join, reduce, layer_norm, softmax, take, unknown)
IMAGE: tuple[Step, ...] = (
    *(conv, activate, residual, with_constant, batch_norm, join, gate, concat, parts_of, slices, gather),
    *(shuffle, pad, conv_transpose, instance_norm, group_norm, channel_norm, windows, depth_and_space),
    *(resize, pool, reduce, repeat, unknown, softmax, to_tokens, to_row, conv, residual, to_tokens, turn),
    *(to_groups, from_heads, product, last_linear, layer_norm, take),
)
TOKENS: tuple[Step, ...] = (
    *(linear, mlp, attention, embed, to_image, to_row, attention, mlp, instance_norm, to_heads, product),
    *(turn, *ON_ANY),
)
ROWS: tuple[Step, ...] = (linear, activate, row_norm, with_constant, join, reduce, spread, take)
GROUPS: tuple[Step, ...] = (
    *(from_groups, over_groups, from_groups, instance_norm, last_linear, product, turn),
    *ON_ANY,
)
STEPS = {5: GROUPS, 4: IMAGE, 3: TOKENS, 2: ROWS}


def head(g: Graph, x: str) -> str:
    """What ends in an output: mostly a layer, without which nothing before it could go."""
    if g.chance(8):
        return activate(g, x)
    if len(g.shape(x)) == 5:
        x = g.reduce(g.choose("ReduceMean", "ReduceMax"), x, (2,), 0)
    return g.convolve(x, 3) if len(g.shape(x)) == 4 else g.linear(x, 3)


def random_model(pick: Pick) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """A graph of one to nine steps between an image and one or two outputs, and the shape of the image."""
    g = Graph(pick, OPSETS[pick(len(OPSETS))], np.random.default_rng(pick(1000)))
    side = g.choose(4, 6)
    g.symbolic = g.choose((), (), ("N",), ("N", "H", "W"))
    g.types["x"] = helper.make_tensor_type_proto(TensorProto.FLOAT, [1, 3, side, side])
    x = g.convolve("x", g.choose(4, 6, 8, 1), g.choose(1, 3))
    g.pool.append(x)
    for _ in range(1 + g.pick(9)):
        steps = STEPS[len(g.shape(x))]
        x = _stepped(g, steps[g.pick(len(steps))], x)
        if g.chance(4):
            x = g.choose(*g.pool[-3:][::-1])
    ends = [x] if not g.chance(3) else [x, g.choose(*g.pool[::-1])]
    g.largest *= 4  # a head is never refused
    outputs = list(dict.fromkeys(head(g, end) for end in ends))
    return _finished(g, outputs), g.shape("x")


def _stepped(g: Graph, step: Step, x: str) -> str:
    try:
        y = step(g, x)
    except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError):
        return x
    if y is None or len(g.shape(y)) not in STEPS:
        return x
    g.pool.append(y)
    return y


def _finished(g: Graph, outputs: Sequence[str]) -> onnx.ModelProto:
    made = {o for node in g.nodes for o in node.output}
    used = {i for node in g.nodes for i in node.input}
    first = (
        ["N", 3, "H", "W"]
        if "H" in g.symbolic
        else ["N", 3, *g.shape("x")[2:]]
        if g.symbolic
        else g.shape("x")
    )
    sizes = {n: [f"{n}_{a}" for a, _ in enumerate(g.shape(n))] if g.symbolic else g.shape(n) for n in outputs}
    graph = helper.make_graph(
        g.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, first)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes[n]) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in g.constants.items() if n in used and n not in made],
    )
    opsets = [helper.make_opsetid("", g.opset), *(helper.make_opsetid(d, 1) for d in sorted(g.domains))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
