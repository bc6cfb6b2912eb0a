"""Small networks as exporters other than torch's spell them, at the opsets that these exporters write.

Imitations, made by hand from files of the development zoo and of old tutorials: transpositions around every
layer, padding in nodes of its own, activations written out, weights in nodes or among the inputs.
"""

# ruff: noqa: E501 - ONNX text is clearer in long lines than cut in the middle of a node
from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
from onnx import helper

__all__ = ["WILD", "weights_among_inputs", "weights_in_nodes"]


def _clip(name: str, source: str, high: int, opset: int) -> str:
    if opset < 11:
        return f"{name} = Clip<min=0.0, max={high}.0>({source})"
    return f"{name} = Clip({source}, zero, high{high})"


def _pad(name: str, source: str, amounts: str, opset: int) -> str:
    return f"{name} = Pad<pads=[{amounts}]>({source})" if opset < 11 else f"{name} = Pad({source}, pads)"


def _mean(name: str, source: str, axes: str, keep: int, opset: int) -> str:
    if opset < 18:
        return f"{name} = ReduceMean<axes=[{axes}], keepdims={keep}>({source})"
    return f"{name} = ReduceMean<keepdims={keep}>({source}, axes_{axes.replace(',', '_')})"


_BOUNDS = ", float zero = {0.0}, float high6 = {6.0}"
_AXES = ", int64[2] axes_1_2 = {1, 2}, int64[1] axes_2 = {2}"


def tf2onnx_mobilenet(opset: int) -> str:
    """NHWC in and out, a Pad before each strided convolution, ReLU6 by Clip, the mean over NHWC, MatMul and Add."""
    return f"""(float[1,16,16,3] image) => (float[1,7] probabilities) <float[8,3,3,3] w0, float[8] b0, float[8,1,3,3] w1, float[8] b1, float[12,8,1,1] w2, float[12] b2,
        float[24,12,1,1] w3, float[24] b3, float[24,1,3,3] w4, float[24] b4, float[12,24,1,1] w5, float[12] b5, float[12,7] w6, float[7] b6{_BOUNDS}{_AXES}, int64[8] pads = {{0,0,0,0,0,0,1,1}}> {{
        t0 = Transpose<perm=[0,3,1,2]>(image)
        {_pad("p0", "t0", "0,0,0,0,0,0,1,1", opset)}
        c0 = Conv<strides=[2,2]>(p0, w0, b0) {_clip("r0", "c0", 6, opset)}
        {_pad("p1", "r0", "0,0,0,0,0,0,1,1", opset)}
        c1 = Conv<group=8, strides=[2,2]>(p1, w1, b1) {_clip("r1", "c1", 6, opset)}
        c2 = Conv(r1, w2, b2)
        c3 = Conv(c2, w3, b3) {_clip("r3", "c3", 6, opset)}
        c4 = Conv<group=24, pads=[1,1,1,1]>(r3, w4, b4) {_clip("r4", "c4", 6, opset)}
        c5 = Conv(r4, w5, b5)
        sum = Add(c5, c2)
        back = Transpose<perm=[0,2,3,1]>(sum)
        {_mean("m", "back", "1,2", 0, opset)}
        d = MatMul(m, w6) logits = Add(d, b6) probabilities = Softmax(logits)
    }}"""


def keras_cnn(opset: int) -> str:
    """Every layer between two transpositions; BatchNorm as a product and a sum in NHWC; Concat over the last axis."""
    return f"""(float[N,12,12,3] input_1) => (float[N,5] dense) <float[8,3,3,3] w0, float[8] g0, float[8] h0, float[6,8,3,3] w1, float[1,1,1,6] h1, float[6,8,1,1] w2, float[6] h2,
        float[10,12,1,1] w3, float[10] h3, float[10,5] w4, float[5] h4{_AXES}> {{
        t0 = Transpose<perm=[0,3,1,2]>(input_1) c0 = Conv<auto_pad="SAME_UPPER">(t0, w0) n0 = Transpose<perm=[0,2,3,1]>(c0)
        m0 = Mul(n0, g0) a0 = Add(m0, h0) r0 = Relu(a0)
        t1 = Transpose<perm=[0,3,1,2]>(r0) c1 = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(t1, w1) n1 = Transpose<perm=[0,2,3,1]>(c1)
        a1 = Add(n1, h1) r1 = LeakyRelu<alpha=0.3>(a1)
        t2 = Transpose<perm=[0,3,1,2]>(r0) q2 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t2) c2 = Conv(q2, w2, h2) n2 = Transpose<perm=[0,2,3,1]>(c2) r2 = Elu(n2)
        j = Concat<axis=3>(r1, r2)
        t3 = Transpose<perm=[0,3,1,2]>(j) c3 = Conv(t3, w3) n3 = Transpose<perm=[0,2,3,1]>(c3) a3 = Add(n3, h3) r3 = Softplus(a3)
        {_mean("m", "r3", "1,2", 0, opset)}
        d = MatMul(m, w4) dense = Add(d, h4)
    }}"""


def paddle_mobilenet(opset: int) -> str:
    """Hard-swish in four nodes, a gate with HardSigmoid, BatchNorm beside convolutions, a shape chain before the classifier."""
    swish = [
        f"a{i} = Add(n{i}, three) {_clip(f'k{i}', f'a{i}', 6, opset)} m{i} = Mul(n{i}, k{i}) s{i} = Div(m{i}, six)"
        for i in range(3)
    ]
    return f"""(float[N,3,16,16] x) => (float[N,6] softmax_0) <float[8,3,3,3] w0, float[8] g0, float[8] h0, float[8] e0, float[8] var0, float[8,1,3,3] w1, float[8] g1, float[8] h1, float[8] e1, float[8] var1,
        float[4,8,1,1] u1, float[4] u2, float[8,4,1,1] u3, float[8] u4, float[12,8,1,1] w2, float[12] g2, float[12] h2, float[12] e2, float[12] var2, float[12,6] w3, float[6] b3{_BOUNDS},
        float three = {{3.0}}, float six = {{6.0}}, int64[1] first = {{0}}, int64[1] second = {{1}}, int64[1] rest = {{-1}}> {{
        c0 = Conv<strides=[2,2], pads=[1,1,1,1], dilations=[1,1], group=1, kernel_shape=[3,3]>(x, w0)
        n0 = BatchNormalization<epsilon=0.00001, momentum=0.9>(c0, g0, h0, e0, var0) {swish[0]}
        c1 = Conv<group=8, pads=[1,1,1,1]>(s0, w1) n1 = BatchNormalization<epsilon=0.00001, momentum=0.9>(c1, g1, h1, e1, var1) {swish[1]}
        p1 = GlobalAveragePool(s1) f1 = Conv(p1, u1, u2) f2 = Relu(f1) f3 = Conv(f2, u3, u4) f4 = HardSigmoid<alpha=0.2, beta=0.5>(f3) f5 = Mul(s1, f4)
        c2 = Conv(f5, w2) n2 = BatchNormalization<epsilon=0.00001, momentum=0.9>(c2, g2, h2, e2, var2) {swish[2]}
        p2 = GlobalAveragePool(s2) sh = Shape(p2) s = Slice{"<starts=[0], ends=[1]>(sh)" if opset < 10 else "(sh, first, second)"} target = Concat<axis=0>(s, rest) flat = Reshape(p2, target)
        d = MatMul(flat, w3) z = Add(d, b3) softmax_0 = Softmax<axis=-1>(z)
    }}"""


def torch_one_detector(opset: int) -> str:
    """As torch 1.2 wrote: BatchNorm kept, Upsample by constant scales, Shape, Gather and Concat before each Reshape, two outputs."""
    grown = (
        'v = Upsample<mode="nearest">(r2, scales)'
        if opset < 10
        else 'v = Resize<mode="nearest">(r2, scales)'
        if opset < 11
        else 'v = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(r2, none, scales)'
    )
    unsqueezed = "b1 = Unsqueeze<axes=[0]>(b0)" if opset < 13 else "b1 = Unsqueeze(b0, front)"
    return f"""(float[N,3,16,16] input) => (float[N,p,2] scores, float[N,q,4] boxes) <float[8,3,3,3] w0, float[8] g0, float[8] h0, float[8] e0, float[8] var0, float[8,8,3,3] w1, float[8] g1, float[8] h1, float[8] e1, float[8] var1,
        float[12,8,3,3] w2, float[12] b2, float[8,20,1,1] w3, float[8] b3, float[4,8,3,3] w4, float[4] d4, float[8,8,3,3] w5, float[8] d5, float[4] scales = {{1.0, 1.0, 2.0, 2.0}}, float[0] none,
        int64 zero = {{0}}, int64[1] front = {{0}}, int64[1] rest = {{-1}}, int64[1] two = {{2}}, int64[1] four = {{4}}> {{
        c0 = Conv<pads=[1,1,1,1], strides=[2,2]>(input, w0) n0 = BatchNormalization(c0, g0, h0, e0, var0) r0 = Relu(n0)
        c1 = Conv<pads=[2,2,2,2], dilations=[2,2]>(r0, w1) n1 = BatchNormalization(c1, g1, h1, e1, var1) a1 = Add(n1, r0) r1 = Relu(a1)
        c2 = Conv<pads=[1,1,1,1], strides=[2,2]>(r1, w2, b2) r2 = Relu(c2)
        {grown} j = Concat<axis=1>(v, r1) c3 = Conv(j, w3, b3) r3 = Relu(c3)
        c4 = Conv<pads=[1,1,1,1]>(r3, w4, d4) t4 = Transpose<perm=[0,2,3,1]>(c4)
        c5 = Conv<pads=[1,1,1,1]>(r3, w5, d5) t5 = Transpose<perm=[0,2,3,1]>(c5)
        sh = Shape(t4) b0 = Gather<axis=0>(sh, zero) {unsqueezed}
        to4 = Concat<axis=0>(b1, rest, two) v4 = Reshape(t4, to4) scores = Softmax<axis=2>(v4)
        to5 = Concat<axis=0>(b1, rest, four) boxes = Reshape(t5, to5)
    }}"""


def darknet(opset: int) -> str:
    """Leaky ReLU, a pool of stride 1, a route over two scales, and an output of each."""
    grown = (
        'v = Upsample<mode="nearest">(r3, scales)'
        if opset < 10
        else 'v = Resize<mode="nearest">(r3, scales)'
        if opset < 11
        else 'v = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(r3, , scales)'
    )
    return f"""(float[1,3,16,16] data) => (float[1,9,4,4] large, float[1,9,8,8] small) <float[8,3,3,3] w0, float[8] b0, float[12,8,3,3] w1, float[12] b1, float[16,12,3,3] w2, float[16] b2,
        float[9,16,1,1] w3, float[9] b3, float[6,16,1,1] w4, float[6] b4, float[9,18,1,1] w5, float[9] b5, float[4] scales = {{1.0, 1.0, 2.0, 2.0}}> {{
        c0 = Conv<pads=[1,1,1,1]>(data, w0, b0) l0 = LeakyRelu<alpha=0.1>(c0) p0 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(l0)
        c1 = Conv<pads=[1,1,1,1]>(p0, w1, b1) l1 = LeakyRelu<alpha=0.1>(c1) p1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(l1)
        c2 = Conv<pads=[1,1,1,1]>(p1, w2, b2) l2 = LeakyRelu<alpha=0.1>(c2) p2 = MaxPool<kernel_shape=[2,2], strides=[1,1], pads=[0,0,1,1]>(l2)
        large = Conv(p2, w3, b3)
        c3 = Conv(l2, w4, b4) r3 = LeakyRelu<alpha=0.1>(c3) {grown}
        route = Concat<axis=1>(v, l1) small = Conv(route, w5, b5)
    }}"""


def unet(opset: int) -> str:
    """Transposed convolutions, skips that are cropped by Slice, PRelu with a slope for each channel, a Sigmoid at the end."""
    if opset < 10:
        crop = "k = Slice<axes=[2,3], starts=[1,1], ends=[9,9]>(r0)"
    else:
        crop = "k = Slice(r0, starts, ends, axes)"
    return f"""(float[1,3,10,10] x) => (float[1,1,8,8] mask) <float[8,3,3,3] w0, float[8] b0, float[8,1,1] s0, float[12,8,3,3] w1, float[12] b1, float[12,1,1] s1, float[12,6,2,2] w2, float[6] b2,
        float[8,14,3,3] w3, float[8] b3, float[1,8,1,1] w4, float[1] b4, int64[2] starts = {{1,1}}, int64[2] ends = {{9,9}}, int64[2] axes = {{2,3}}> {{
        c0 = Conv<pads=[1,1,1,1]>(x, w0, b0) r0 = PRelu(c0, s0) {crop}
        p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(k) c1 = Conv<pads=[1,1,1,1]>(p, w1, b1) r1 = PRelu(c1, s1)
        u = ConvTranspose<strides=[2,2]>(r1, w2, b2) j = Concat<axis=1>(k, u)
        c3 = Conv<pads=[1,1,1,1]>(j, w3, b3) r3 = Relu(c3) c4 = Conv(r3, w4, b4) mask = Sigmoid(c4)
    }}"""


def tf_attention(opset: int) -> str:
    """A layer of a transformer as tf2onnx flattens it: two-dimensional products between Reshapes, the norm written out."""
    squeeze = _mean("m", "h", "2", 1, opset), _mean("v", "q2", "2", 1, opset)
    return f"""(float[1,6,8] tokens) => (float[1,6,8] y) <float[8,12] wq, float[12] bq, float[8,12] wk, float[8,12] wv, float[12] bv, float[12,8] wo, float[8] bo, float[8,16] w1, float[16] b1, float[16,8] w2,
        float[8] gain, float[8] shift, float half = {{0.5}}, float root = {{1.41421356}}, float one = {{1.0}}, float tiny = {{0.000001}}, float scale = {{0.5}}, int64[2] flat8 = {{-1,8}}, int64[2] flat12 = {{-1,12}}, int64[2] flat16 = {{-1,16}}, int64[4] heads = {{1,6,3,4}},
        int64[3] whole = {{1,6,8}}, int64[3] wide = {{1,6,16}}{_AXES}, float[8,8] we, float[8,8] wy> {{
        e0 = Reshape(tokens, flat8) e1 = MatMul(e0, we) h0 = Reshape(e1, whole)
        x2 = Reshape(h0, flat8)
        q0 = MatMul(x2, wq) q1 = Add(q0, bq) q3 = Reshape(q1, heads) q = Transpose<perm=[0,2,1,3]>(q3) qs = Mul(q, scale)
        k0 = MatMul(x2, wk) k1 = Reshape(k0, heads) k = Transpose<perm=[0,2,3,1]>(k1)
        v0 = MatMul(x2, wv) v1 = Add(v0, bv) v2 = Reshape(v1, heads) vv = Transpose<perm=[0,2,1,3]>(v2)
        s = MatMul(qs, k) p = Softmax<axis=3>(s) o0 = MatMul(p, vv) o1 = Transpose<perm=[0,2,1,3]>(o0) o2 = Reshape(o1, flat12)
        o3 = MatMul(o2, wo) o4 = Add(o3, bo) o = Reshape(o4, whole) h = Add(o, h0)
        {squeeze[0]} d = Sub(h, m) q2 = Mul(d, d) {squeeze[1]} ve = Add(v, tiny) sd = Sqrt(ve) rs = Reciprocal(sd) gs = Mul(rs, gain) n1 = Mul(h, gs) n2 = Mul(m, gs) n3 = Sub(shift, n2) n = Add(n1, n3)
        f0 = Reshape(n, flat8) f1 = MatMul(f0, w1) f2 = Add(f1, b1) g0 = Div(f2, root) g1 = Erf(g0) g2 = Add(g1, one) g3 = Mul(f2, half) g4 = Mul(g3, g2)
        z0 = MatMul(g4, w2) z1 = Reshape(z0, whole) z = Add(z1, h)
        y0 = Reshape(z, flat8) y1 = MatMul(y0, wy) y = Reshape(y1, whole)
    }}"""


def mxnet(opset: int) -> str:
    """A pre-activation block with Dropout and Flatten, and Gemm on either side of the nonlinearity."""
    return """(float[1,3,12,12] data) => (float[1,5] fc) <float[8,3,3,3] w0, float[8] g0, float[8] h0, float[8] e0, float[8] var0, float[8,8,3,3] w1, float[8] g1, float[8] h1, float[8] e1, float[8] var1, float[8,8,3,3] w2,
        float[10,288] w3, float[10] b3, float[5,10] w4, float[5] b4> {
        c0 = Conv<pads=[1,1,1,1]>(data, w0) n0 = BatchNormalization(c0, g0, h0, e0, var0) r0 = Relu(n0)
        c1 = Conv<pads=[1,1,1,1]>(r0, w1) n1 = BatchNormalization(c1, g1, h1, e1, var1) r1 = Relu(n1)
        c2 = Conv<pads=[1,1,1,1]>(r1, w2) s = Add(c2, c0) a = Relu(s)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) d = Dropout(p) f = Flatten(d)
        i = Gemm<transB=1>(f, w3, b3) t = Tanh(i) fc = Gemm<transB=1>(t, w4, b4)
    }"""


def weights_in_nodes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Every initializer as a Constant node, as Paddle's exporter writes it."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    body = [*nodes, *proto.graph.node]
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(body)
    return proto


def weights_among_inputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    """IR version 3, in which every initializer is an input of the graph, too."""
    proto.ir_version = 3
    proto.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in proto.graph.initializer
    )
    return proto


def _as_it_is(proto: onnx.ModelProto) -> onnx.ModelProto:
    return proto


Finish = Callable[[onnx.ModelProto], onnx.ModelProto]
WILD: Mapping[str, tuple[Callable[[int], str], Finish, tuple[int, ...]]] = {
    "tf2onnx_mobilenet": (tf2onnx_mobilenet, _as_it_is, (9, 11, 13, 18)),
    "keras_cnn": (keras_cnn, _as_it_is, (9, 11, 15)),
    "paddle_mobilenet": (paddle_mobilenet, weights_in_nodes, (9, 11, 12)),
    "torch_one_detector": (torch_one_detector, weights_among_inputs, (9, 10, 11)),
    "darknet": (darknet, _as_it_is, (9, 10, 13)),
    "unet": (unet, _as_it_is, (9, 11, 21)),
    "tf_attention": (tf_attention, _as_it_is, (13, 18)),
    "mxnet": (mxnet, weights_among_inputs, (9,)),
}
"""Text by opset, what is done to the parsed model, and the opsets; see the functions."""
