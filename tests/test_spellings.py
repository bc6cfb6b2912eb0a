"""One computation in the spellings of exporters, at the opsets that have them: the same widths can go.

Norms, activations and attention scales are written out of small operators before the opset that has one for
them, and by frameworks that never use it. No spelling is recognised; each must come out of the general rules.
"""

# ruff: noqa: E501 - ONNX text is clearer in long lines than cut in the middle of a node
from __future__ import annotations

import numpy as np
import pytest
from zoo import analyse, informative, prune_checked, random_plan, text_model

OPSETS = (13, 15, 17, 18, 20, 21, 23)
# {mean:a} is a mean of a over the last axis, spelled as the opset wants it.
CENTRE = "m = {mean:t} d = Sub(t, m) "
NORMS = {
    "layer norm by Pow": CENTRE
    + "s = Pow(d, two) v = {mean:s} e = Add(v, tiny) r = Sqrt(e) n = Div(d, r) g = Mul(n, gain) u = Add(g, shift)",
    "layer norm by a product": CENTRE
    + "s = Mul(d, d) v = {mean:s} e = Add(tiny, v) r = Sqrt(e) i = Reciprocal(r) n = Mul(d, i) g = Mul(n, gain) u = Add(g, shift)",
    "layer norm by the mean of squares": "m = {mean:t} q = Mul(t, t) a = {mean:q} b = Mul(m, m) v = Sub(a, b) e = Add(v, tiny) r = Sqrt(e) "
    "c = Sub(t, m) n = Div(c, r) u = Mul(gain, n)",
    "layer norm by a scale and a shift for each token": CENTRE
    + "s = Mul(d, d) v = {mean:s} e = Add(v, tiny) r = Sqrt(e) i = Reciprocal(r) k = Mul(i, gain) a = Mul(t, k) b = Mul(m, k) c = Sub(shift, b) u = Add(a, c)",
    "RMS norm by Pow": "s = Pow(t, two) v = {mean:s} e = Add(v, tiny) r = Sqrt(e) n = Div(t, r) u = Mul(n, gain)",
    "RMS norm by a product": "s = Mul(t, t) v = {mean:s} e = Add(v, tiny) r = Sqrt(e) i = Reciprocal(r) n = Mul(t, i) u = Mul(gain, n)",
    "RMS norm by a negative power": "s = Mul(t, t) v = {mean:s} e = Add(v, tiny) i = Pow(e, minus) n = Mul(i, t) u = Mul(n, gain)",
}
TANH = "b = Mul(cubic, a) c = Add(t, b) d = Mul(c, slope) e = Tanh(d) f = Add(e, one) g = Mul(t, f) u = Mul(g, half)"
GELUS = {
    "by Erf": "a = Div(t, root) b = Erf(a) c = Add(b, one) d = Mul(t, c) u = Mul(d, half)",
    "by Erf, the half first": "h = Mul(half, t) a = Mul(t, inverse) b = Erf(a) c = Add(one, b) u = Mul(h, c)",
    "by Tanh of a power": "a = Pow(t, three) " + TANH,
    "by Tanh of products": "q = Mul(t, t) a = Mul(q, t) " + TANH,
    "by Sigmoid": "a = Mul(t, quick) b = Sigmoid(a) u = Mul(t, b)",
}
OPERATORS = {
    "LayerNormalization": (17, "u = LayerNormalization(t, gain, shift)"),
    "Gelu": (20, "u = Gelu(t)"),
    "Gelu by Tanh": (20, 'u = Gelu<approximate="tanh">(t)'),
    "RMSNormalization": (23, "u = RMSNormalization(t, gain)"),
}
ROOT = "f = Cast<to=1>(w) r = Sqrt(f) "
WIDTH = "sh = Shape(q) w = Gather(sh, last) "
SCALES = {
    "Div by the root of a width": WIDTH + ROOT + "z = Div(s0, r)",
    "Mul with the inverse root": WIDTH + ROOT + "i = Reciprocal(r) z = Mul(s0, i)",
    "a width from a Slice": "sh = Shape(q) w = Slice(sh, last, end) "
    + ROOT
    + "i = Div(one, r) z = Mul(i, s0)",
    "Pow of the width": WIDTH + "f = Cast<to=1>(w) i = Pow(f, minus) z = Mul(s0, i)",
    "a constant": "z = Mul(s0, half)",
}
WEIGHTS = (
    "float[6,8] w1, float[8,6] w2, float[8] gain, float[8] shift, float two = {2.0}, float three = {3.0}, float tiny = {0.00001},"
    "float minus = {-0.5}, float one = {1.0}, float half = {0.5}, float root = {1.41421356}, float inverse = {0.70710678},"
    "float cubic = {0.044715}, float slope = {0.79788456}, float quick = {1.702}, int64[1] last = {-1}, int64[1] end = {9999}"
)


def spelled(body: str, opset: int) -> str:
    for name in "tsqa":
        axes = f"ReduceMean({name}, last)" if opset >= 18 else f"ReduceMean<axes=[-1]>({name})"
        body = body.replace(f"{{mean:{name}}}", axes)
    return (
        f"(float[1,5,6] x) => (float[1,5,6] y) <{WEIGHTS}> {{ t = MatMul(x, w1) {body} y = MatMul(u, w2) }}"
    )


UNITS = [
    pytest.param(body, opset, id=f"{name}-{opset}")
    for name, body in {**NORMS, **GELUS}.items()
    for opset in OPSETS
] + [
    pytest.param(body, opset, id=f"{name}-{opset}")
    for name, (first, body) in OPERATORS.items()
    for opset in OPSETS
    if opset >= first
]


@pytest.mark.parametrize(("body", "opset"), UNITS)
def test_units_pass_a_norm_or_an_activation(body: str, opset: int) -> None:
    model, structure = analyse(text_model(spelled(body, opset), opset))
    assert [len(structure.dimensions[i].units) for i in structure.prunable] == [8]
    for seed in range(4):
        plan = random_plan(structure, np.random.default_rng(seed), fewest=2)
        pruned, evidence = prune_checked(model, structure, plan)
        assert evidence.worst <= 1e-5
        assert informative(pruned, structure)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", SCALES)
def test_the_scale_of_the_scores_stays(name: str, opset: int) -> None:
    text = f"""(float[1,5,6] x) => (float[1,5,6] y) <{WEIGHTS}, float[6,12] wq, float[6,12] wk, float[6,12] wv,
            float[12,6] wo, int64[4] split = {{1,5,3,4}}, int64[3] merge = {{1,5,12}}> {{
        q0 = MatMul(x, wq) q1 = Reshape(q0, split) q = Transpose<perm=[0,2,1,3]>(q1)
        k0 = MatMul(x, wk) k1 = Reshape(k0, split) k = Transpose<perm=[0,2,3,1]>(k1)
        v0 = MatMul(x, wv) v1 = Reshape(v0, split) v = Transpose<perm=[0,2,1,3]>(v1)
        s0 = MatMul(q, k) {SCALES[name]}
        p = Softmax<axis=-1>(z) o0 = MatMul(p, v) o1 = Transpose<perm=[0,2,1,3]>(o0) o = Reshape(o1, merge)
        y = MatMul(o, wo)
    }}"""
    model, structure = analyse(text_model(text, opset))
    found = [structure.dimensions[i] for i in structure.prunable]
    assert [(d.kind, d.count, d.rows) for d in found] == [("heads", 3, 1), ("qk", 4, 3), ("value", 4, 3)]
    for seed in range(4):
        _, evidence = prune_checked(model, structure, random_plan(structure, np.random.default_rng(seed)))
        assert evidence.worst <= 1e-5
