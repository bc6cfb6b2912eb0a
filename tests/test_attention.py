"""Attention in its smallest forms: which heads and widths can go, and that the law holds where they do.

Each case is one product of query, key and value as some exporter writes it. What cannot be pruned with units
of its own in every head is coupled over the heads, never wrong and never an error.
"""

# ruff: noqa: E501 - ONNX text is clearer in long lines than cut in the middle of a node
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
from zoo import analyse, informative, prune_checked, random_plan, run, text_model

from onnx_mdp.analysis.structure import Dimension, Structure, extent, macs
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.scoring import activation
from onnx_mdp.plan import PruningPlan, kept_count, kept_units, removed_classes
from onnx_mdp.planning.resources import mac_products
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.cost_terms import width

WEIGHTS = (
    "float[6,12] wq, float[12] bq, float[6,12] wk, float[12] bk, float[6,12] wv, float[12] bv, float[12,6] wo, "
    "int64[4] split = {1,5,3,4}, int64[3] merge = {1,5,12}, float scale = {0.5}"
)
QUERY = "q0 = MatMul(x, wq) q1 = Add(bq, q0) q2 = Reshape(q1, split) q = Transpose<perm=[0,2,1,3]>(q2)\n"
KEY = "k0 = MatMul(x, wk) k1 = Add(bk, k0) k2 = Reshape(k1, split) k = Transpose<perm=[0,2,3,1]>(k2)\n"
VALUE = "v0 = MatMul(x, wv) v1 = Add(bv, v0) v2 = Reshape(v1, split) v = Transpose<perm=[0,2,1,3]>(v2)\n"
SCORES = "s0 = MatMul(q, k) s1 = Mul(s0, scale) s = Softmax<axis=-1>(s1)\n"
MIX = "o0 = MatMul(s, v) o1 = Transpose<perm=[0,2,1,3]>(o0) o = Reshape(o1, merge)\n"
OUT = "y = MatMul(o, wo)"


@dataclass(frozen=True, slots=True)
class Case:
    """ONNX text, and (kind, units in each head, heads) of each prunable dimension, in graph order."""

    body: str
    found: tuple[tuple[str, int, int], ...]
    weights: str = ""
    opset: int = 18

    def text(self) -> str:
        weights = WEIGHTS + (f", {self.weights}" if self.weights else "")
        return f"(float[1,5,6] x) => (float[1,5,6] y) <{weights}> {{ {self.body} }}"

    def model(self) -> onnx.ModelProto:
        return text_model(self.text(), opset=self.opset)


FUSED = (
    "p0 = MatMul(x, w36) p1 = Add(p0, b36) p2 = Reshape(p1, five) p = Transpose<perm=[2,0,3,1,4]>(p2)\n"
    "q = Gather<axis=0>(p, zero) k0 = Gather<axis=0>(p, one) k = Transpose<perm=[0,1,3,2]>(k0) v = Gather<axis=0>(p, two)\n"
)
FUSED_WEIGHTS = "float[6,36] w36, float[36] b36, int64[5] five = {1,5,3,3,4}, int64 zero = {0}, int64 one = {1}, int64 two = {2}"
FULL = (("heads", 3, 1), ("qk", 4, 3), ("value", 4, 3))
COUPLED = (("qk", 4, 1), ("value", 4, 1))
CASES = {
    "separate projections": Case(QUERY + KEY + VALUE + SCORES + MIX + OUT, FULL),
    "a bias for each head": Case(
        QUERY + KEY + VALUE + "s0 = MatMul(q, k) s1 = Add(table, s0) s = Softmax(s1)\n" + MIX + OUT,
        FULL,
        "float[1,3,5,5] table",
    ),
    "a mask shared by heads": Case(
        QUERY + KEY + VALUE + "s0 = MatMul(q, k) s1 = Where(mask, s0, low) s = Softmax(s1)\n" + MIX + OUT,
        FULL,
        "bool[1,1,1,5] mask = {1,1,1,1,0}, float low = {-100.0}",
    ),
    "heads folded with the batch": Case(
        "q0 = MatMul(x, wq) q1 = Reshape(q0, folded) q = Transpose<perm=[1,0,2]>(q1)\n"
        "k0 = MatMul(x, wk) k1 = Reshape(k0, folded) k = Transpose<perm=[1,2,0]>(k1)\n"
        "v0 = MatMul(x, wv) v1 = Reshape(v0, folded) v = Transpose<perm=[1,0,2]>(v1)\n"
        + SCORES
        + "o0 = MatMul(s, v)\n"
        "o1 = Transpose<perm=[1,0,2]>(o0) o = Reshape(o1, merge)\n" + OUT,
        FULL,
        "int64[3] folded = {5,3,4}",
    ),
    "key transposed through three axes": Case(
        QUERY
        + "k0 = MatMul(x, wk) k1 = Reshape(k0, split) k2 = Transpose<perm=[0,2,1,3]>(k1) k3 = Reshape(k2, three)\n"
        "k4 = Transpose<perm=[0,2,1]>(k3) k = Reshape(k4, four)\n" + VALUE + SCORES + MIX + OUT,
        FULL,
        "int64[3] three = {-1,5,4}, int64[4] four = {1,3,4,5}",
    ),
    "scale computed from the width of a head": Case(
        QUERY
        + "h = Shape(q) d = Gather(h, last) f = Cast<to=1>(d) r = Sqrt(f) z = Div(q, r)\n"
        + KEY
        + VALUE
        + "s0 = MatMul(z, k) s = Softmax(s0)\n"
        + MIX
        + OUT,
        FULL,
        "int64[1] last = {3}",
    ),
    "one head": Case(
        "q = MatMul(x, wq) k0 = MatMul(x, wk) k = Transpose<perm=[0,2,1]>(k0) v = MatMul(x, wv)\n"
        + SCORES
        + "o = MatMul(s, v)\n"
        + OUT,
        (("qk", 12, 1), ("value", 12, 1)),
    ),
    "grouped queries": Case(
        "q0 = MatMul(x, wq) q1 = Reshape(q0, four) q = Transpose<perm=[0,2,1,3]>(q1)\n"
        "k0 = MatMul(x, wk2) k1 = Reshape(k0, two) k2 = Transpose<perm=[0,2,3,1]>(k1) k3 = Unsqueeze(k2, place)\n"
        "k4 = Expand(k3, wide) k = Reshape(k4, many)\n"
        "v0 = MatMul(x, wv2) v1 = Reshape(v0, two) v2 = Transpose<perm=[0,2,1,3]>(v1) v3 = Unsqueeze(v2, place)\n"
        "v4 = Expand(v3, tall) v = Reshape(v4, rows)\n" + SCORES + MIX + OUT,
        (("heads", 2, 1), ("qk", 3, 2), ("value", 3, 2)),
        "float[6,6] wk2, float[6,6] wv2, int64[4] four = {1,5,4,3}, int64[4] two = {1,5,2,3}, int64[1] place = {2},"
        "int64[5] wide = {1,2,2,3,5}, int64[4] many = {1,4,3,5}, int64[5] tall = {1,2,2,5,3}, int64[4] rows = {1,4,5,3}",
    ),
    "a query that cannot be pruned": Case(
        "q0 = Concat<axis=2>(x, x) q1 = Reshape(q0, split) q = Transpose<perm=[0,2,1,3]>(q1)\n"
        + KEY
        + VALUE
        + SCORES
        + MIX
        + OUT,
        (("value", 4, 3),),
    ),
    "one key and value for all heads": Case(
        QUERY
        + "k0 = MatMul(x, w4) k1 = Transpose<perm=[0,2,1]>(k0) k = Unsqueeze(k1, one)\n"
        + "v0 = MatMul(x, w5) v = Unsqueeze(v0, one)\n"
        + SCORES
        + MIX
        + OUT,
        COUPLED,
        "float[6,4] w4, float[6,4] w5, int64[1] one = {1}",
    ),
    "query normalised with one scale for all heads": Case(
        QUERY
        + "n = LayerNormalization(q, gain, shift)\n"
        + KEY
        + VALUE
        + "s0 = MatMul(n, k) s = Softmax(s0)\n"
        + MIX
        + OUT,
        COUPLED,
        "float[4] gain, float[4] shift",
    ),
    "widths before heads": Case(
        "q0 = MatMul(x, wq) q1 = Reshape(q0, minor) q = Transpose<perm=[0,3,1,2]>(q1)\n"
        + KEY
        + VALUE
        + SCORES
        + MIX
        + OUT,
        COUPLED,
        "int64[4] minor = {1,5,4,3}",
    ),
    "half of each head": Case(
        QUERY
        + "a, b = Split<axis=3, num_outputs=2>(q) c = Neg(b) r = Concat<axis=3>(c, a)\n"
        + KEY
        + VALUE
        + "s0 = MatMul(r, k) s = Softmax(s0)\n"
        + MIX
        + OUT,
        (("qk", 2, 1), ("qk", 2, 1), ("value", 4, 1)),
    ),
    "one projection, cut into parts inside of each head": Case(  # LeViT
        "p0 = MatMul(x, wide3) p1 = Add(p0, bias3) p = Reshape(p1, inner) q1, k1, v1 = Split<axis=3>(p, parts)\n"
        "q = Transpose<perm=[0,2,1,3]>(q1) k = Transpose<perm=[0,2,3,1]>(k1) v = Transpose<perm=[0,2,1,3]>(v1)\n"
        + SCORES
        + "o0 = MatMul(s, v) o1 = Transpose<perm=[0,2,1,3]>(o0) o = Reshape(o1, six)\n"
        + "y = MatMul(o, wo3)",
        (("qk", 2, 1), ("value", 3, 1)),
        "float[6,21] wide3, float[21] bias3, int64[4] inner = {1,5,3,7}, int64[3] parts = {2,2,3}, int64[3] six = {1,5,9}, float[9,6] wo3",
    ),
    "one projection, whose parts have another reader": Case(
        FUSED
        + SCORES
        + MIX
        + "h = ReduceMean<keepdims=0>(p, all) o2 = Add(o, h)\n"
        + OUT.replace("(o,", "(o2,"),
        (("heads", 3, 1), ("qk", 4, 3)),
        FUSED_WEIGHTS + ", int64[5] all = {0,1,2,3,4}",
    ),
    "heads and widths picked by one table": Case(
        "q0 = MatMul(x, wq) q1 = Transpose<perm=[0,2,1]>(q0) q2 = Gather<axis=1>(q1, places) q = Transpose<perm=[0,1,3,2]>(q2)\n"
        + KEY
        + VALUE
        + SCORES
        + MIX
        + OUT,
        (("qk", 4, 1), ("value", 4, 3)),
        "int64[3,4] places = {0,1,2,3,4,5,6,7,8,9,10,11}",
    ),
    "heads that are mixed": Case(
        QUERY + KEY + VALUE + "s0 = MatMul(q, k) s1 = Conv(s0, talk) s = Softmax(s1)\n" + MIX + OUT,
        (("heads", 3, 1), ("qk", 4, 3), ("heads", 3, 1), ("value", 4, 3)),
        "float[3,3,1,1] talk",
    ),
    "fixed scores that all heads share": Case(
        VALUE + "s0 = MatMul(x, wide) s = Softmax(s0)\n" + MIX + OUT,
        (("heads", 3, 1), ("value", 4, 3)),
        "float[6,5] wide",
    ),
    "fixed scores for each head": Case(
        VALUE
        + "s0 = Transpose<perm=[0,2,1]>(x) s1 = Reshape(s0, each) s2 = Concat<axis=3>(s1, s1, s1) s3 = Slice(s2, from, to, last)\n"
        "s4 = Concat<axis=1>(s3, s3) s5 = Slice(s4, from, heads, second) s = Softmax(s5)\n" + MIX + OUT,
        (("value", 4, 3),),
        "int64[4] each = {1,3,5,2}, int64[1] from = {0}, int64[1] to = {5}, int64[1] last = {3}, int64[1] heads = {3}, int64[1] second = {1}",
    ),
    "learned queries": Case(
        "q0 = MatMul(learned, wq) q1 = Add(bq, q0) q2 = Reshape(q1, split) q = Transpose<perm=[0,2,1,3]>(q2)\n"
        + KEY
        + VALUE
        + SCORES
        + MIX
        + OUT,
        (("channel", 6, 1), *FULL),
        "float[1,5,6] learned",
    ),
    "normalised query by its length": Case(
        QUERY
        + "l = ReduceL2(q, last) n = Div(q, l)\n"
        + KEY
        + VALUE
        + "s0 = MatMul(n, k) s = Softmax(s0)\n"
        + MIX
        + OUT,
        FULL,
        "int64[1] last = {-1}",
    ),
    "normalised query, its length expanded": Case(
        QUERY
        + "l = ReduceL2(q, last) f = Shape(q) e = Expand(l, f) n = Div(q, e)\n"
        + KEY
        + VALUE
        + "s0 = MatMul(n, k) s = Softmax(s0)\n"
        + MIX
        + OUT,
        FULL,
        "int64[1] last = {-1}",
    ),
    "a gate for each head": Case(
        QUERY
        + KEY
        + VALUE
        + SCORES
        + "g0 = MatMul(x, wg) g1 = Sigmoid(g0) g2 = Transpose<perm=[0,2,1]>(g1) g = Unsqueeze(g2, last)\n"
        "m0 = MatMul(s, v) o0 = Mul(m0, g) o1 = Transpose<perm=[0,2,1,3]>(o0) o = Reshape(o1, merge)\n" + OUT,
        FULL,
        "float[6,3] wg, int64[1] last = {-1}",
    ),
}

# The operator of opset 23: keys are not transposed, and heads × width may come as one axis.
KEY_23 = "k0 = MatMul(x, wk) k1 = Add(bk, k0) k2 = Reshape(k1, split) k = Transpose<perm=[0,2,1,3]>(k2)\n"
MIX_23 = "o1 = Transpose<perm=[0,2,1,3]>(o0) o = Reshape(o1, merge)\n"
FLAT = "q0 = MatMul(x, wq) q = Add(bq, q0) k0 = MatMul(x, wk) k = Add(bk, k0) v0 = MatMul(x, wv) v = Add(bv, v0)\n"
NARROW = "q = MatMul(x, wq) k = MatMul(x, wk2) v = MatMul(x, wv2)\n"
TURNED = "float[1,5,2] cos, float[1,5,2] sin"
GROUPED_23 = (("heads", 2, 1), ("qk", 3, 2), ("value", 3, 2))
OPERATOR = {
    "heads apart": Case(QUERY + KEY_23 + VALUE + "o0 = Attention(q, k, v)\n" + MIX_23 + OUT, FULL),
    "heads and widths in one axis": Case(
        FLAT + "o = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v)\n" + OUT, FULL
    ),
    "a scale, a soft cap and causal": Case(
        FLAT
        + "o = Attention<q_num_heads=3, kv_num_heads=3, scale=0.3, softcap=2.0, is_causal=1>(q, k, v)\n"
        + OUT,
        FULL,
    ),
    "a table for each head": Case(
        FLAT + "o = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v, table)\n" + OUT,
        FULL,
        "float[1,3,5,5] table",
    ),
    "a table of three axes": Case(
        QUERY + KEY_23 + VALUE + "o0 = Attention(q, k, v, table)\n" + MIX_23 + OUT,
        FULL,
        "float[3,5,5] table",
        24,
    ),
    "a mask that all heads share": Case(
        FLAT + "o = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v, mask)\n" + OUT,
        FULL,
        "bool[5,5] mask = {1,0,1,1,0,1,1,1,1,0,1,1,1,1,0,1,1,1,1,0,1,1,1,1,1}",
    ),
    "a table that is computed for each head": Case(
        FLAT
        + "t0 = MatMul(x, wt) t1 = Transpose<perm=[0,2,1]>(t0) t = Unsqueeze(t1, two)\n"
        + "o = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v, u)\n".replace(
            "(q, k, v, u)", "(q, k, v, e)"
        ).replace("o = ", "e = Expand(t, five) o = ")
        + OUT,
        FULL,
        "float[6,3] wt, int64[1] two = {2}, int64[4] five = {1,3,5,5}",
    ),
    "a table that the input gives": Case(
        FLAT
        + "t0 = Transpose<perm=[0,2,1]>(x) t1 = Slice(t0, from, heads, second) t2 = Unsqueeze(t1, two) t = Expand(t2, five)\n"
        + "o = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v, t)\n"
        + OUT,
        (("qk", 4, 3), ("value", 4, 3)),
        "int64[1] from = {0}, int64[1] heads = {3}, int64[1] second = {1}, int64[1] two = {2}, int64[4] five = {1,3,5,5}",
    ),
    "one head for the operator": Case(
        FLAT + "o = Attention<q_num_heads=1, kv_num_heads=1>(q, k, v)\n" + OUT,
        (("qk", 12, 1), ("value", 12, 1)),
    ),
    "two query heads for each key head": Case(
        NARROW + "o = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)\n" + OUT,
        GROUPED_23,
        "float[6,6] wk2, float[6,6] wv2",
    ),
    "two query heads for each key head, apart": Case(
        "q0 = MatMul(x, wq) q1 = Reshape(q0, four) q = Transpose<perm=[0,2,1,3]>(q1)\n"
        "k0 = MatMul(x, wk2) k1 = Reshape(k0, pair) k = Transpose<perm=[0,2,1,3]>(k1)\n"
        "v0 = MatMul(x, wv2) v1 = Reshape(v0, pair) v = Transpose<perm=[0,2,1,3]>(v1)\n"
        "o0 = Attention(q, k, v, table)\n" + MIX_23 + OUT,
        GROUPED_23,
        "float[6,6] wk2, float[6,6] wv2, int64[4] four = {1,5,4,3}, int64[4] pair = {1,5,2,3}, float[1,4,5,5] table",
    ),
    "one key head for all": Case(
        "q = MatMul(x, wq) k = MatMul(x, w4) v = MatMul(x, w5)\n"
        "o = Attention<q_num_heads=3, kv_num_heads=1>(q, k, v)\n" + OUT,
        COUPLED,
        "float[6,4] w4, float[6,4] w5",
    ),
    "query and key turned by their place": Case(
        QUERY
        + KEY_23
        + VALUE
        + "qr = RotaryEmbedding(q, cos, sin) kr = RotaryEmbedding(k, cos, sin)\n"
        + "o0 = Attention(qr, kr, v)\n"
        + MIX_23
        + OUT,
        (("heads", 3, 1), ("value", 4, 3)),
        TURNED,
    ),
    "query and key turned, heads and widths in one axis": Case(
        FLAT
        + "qr = RotaryEmbedding<num_heads=3, interleaved=1>(q, cos, sin) kr = RotaryEmbedding<num_heads=3>(k, cos, sin)\n"
        + "o = Attention<q_num_heads=3, kv_num_heads=3>(qr, kr, v)\n"
        + OUT,
        (("heads", 3, 1), ("value", 4, 3)),
        TURNED,
    ),
    "a query for the operator that cannot be pruned": Case(
        "q = Concat<axis=2>(x, x) k = MatMul(x, wk) v = MatMul(x, wv)\n"
        "o = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v)\n" + OUT,
        (("value", 4, 3),),
    ),
    "scores that are given away": Case(
        QUERY + KEY_23 + VALUE + "o0, pk, pv = Attention(q, k, v, , past, past)\n"
        "p = ReduceSum<keepdims=0>(pk) o2 = Add(o0, p)\n" + MIX_23.replace("(o0)", "(o2)") + OUT,
        (),
        "float[1,3,2,4] past",
    ),
}
CASES |= {name: replace(case, opset=max(23, case.opset)) for name, case in OPERATOR.items()}


def prunable(structure: Structure) -> list[Dimension]:
    return [structure.dimensions[i] for i in structure.prunable]


@pytest.mark.parametrize("name", CASES)
def test_the_law_holds_and_the_right_widths_can_go(name: str) -> None:
    case = CASES[name]
    model, structure = analyse(case.model())
    assert structure.graph.unsupported == {}
    assert tuple((d.kind, d.count, d.rows) for d in prunable(structure)) == case.found
    for seed in range(8):
        pruned, evidence = prune_checked(
            model, structure, random_plan(structure, np.random.default_rng(seed))
        )
        assert evidence.worst <= 1e-5
    assert informative(pruned, structure)
    for dimension in prunable(structure):
        last = tuple(row * dimension.count + dimension.count - 1 for row in range(dimension.rows))
        pruned, _ = prune_checked(model, structure, PruningPlan(keep={dimension.name: last}))
        assert weights(pruned) != weights(rewrite(structure, PruningPlan(keep={})))


BATCHED = FUSED_WEIGHTS.replace("{1,5,3,3,4}", "{0,5,3,3,4}")
ASIDE = (
    "sh = Shape(p1) n = Slice(sh, from, minus) r = Concat<axis=0>(n, rest) p2 = Reshape(p1, r)\n"
    "p3 = Unsqueeze(p2, from) p4 = Transpose<perm=[3,1,2,0,4,5]>(p3) p5 = Squeeze(p4, third) p = Transpose<perm=[0,1,3,2,4]>(p5)\n"
)
SPLIT = {
    "transposed": (FUSED, BATCHED, 1),
    "measured, and moved through an axis of its own": (
        FUSED.replace("p2 = Reshape(p1, five) p = Transpose<perm=[2,0,3,1,4]>(p2)\n", ASIDE),
        BATCHED
        + ", int64[1] from = {0}, int64[1] minus = {-1}, int64[3] rest = {3,3,4}, int64[1] third = {3}",
        1,
    ),
    "its whole shape in use": (
        FUSED.replace(
            "q = ", "sh = Shape(p1) e = Expand(scale, sh) h = ReduceSum<keepdims=0>(e) q0 = "
        ).replace("(p, zero) k0", "(p, zero) q = Add(q0, h) k0"),
        BATCHED,
        0,
    ),
}


@pytest.mark.parametrize("name", SPLIT)
def test_a_projection_is_split_where_all_of_its_readers_select_one_part(name: str) -> None:
    body, declared, count = SPLIT[name]
    single = Case(body + SCORES + MIX + OUT, FULL, declared).text().replace("float[1,5,6]", "float[N,5,6]")
    model, structure = analyse(text_model(single.replace("merge = {1,", "merge = {0,"), 18))
    assert len(structure.shadow.split) == count
    assert tuple((d.kind, d.count, d.rows) for d in prunable(structure)) == FULL[: 2 + count]
    for seed in range(4):
        prune_checked(model, structure, random_plan(structure, np.random.default_rng(seed)))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("one projection")])
def test_a_projection_stays_fused_where_a_reader_needs_it_whole(name: str) -> None:
    assert analyse(CASES[name].model())[1].shadow.split == ()


@pytest.mark.parametrize("name", ["heads apart", "heads and widths in one axis"])
def test_the_operator_counts_as_what_it_stands_for(name: str) -> None:
    """Multiply-accumulates, as a number and by widths, and the activation scores of each unit."""
    _, whole = analyse(CASES[name].model())
    _, parts = analyse(CASES["separate projections"].model())
    assert macs(whole.shadow) == macs(parts.shadow)
    kept = dict(zip(whole.prunable, (2, 3, 1), strict=True))
    totals = [
        sum(p.unit * np.prod([width(e, kept) for e in p.extents]) for p in mac_products(structure))
        for structure in (whole, parts)
    ]
    assert totals[0] == totals[1] < macs(whole.shadow)
    feeds = [
        {"x": np.random.default_rng(seed).standard_normal((1, 5, 6)).astype(np.float32)} for seed in (0, 1)
    ]
    found = [activation(structure, feeds).classes for structure in (whole, parts)]
    for ours, theirs in zip(prunable(whole), prunable(parts), strict=True):
        assert np.allclose(found[0][list(ours.units)], found[1][list(theirs.units)], rtol=1e-5)


def test_a_scale_is_written_only_where_queries_become_narrower() -> None:
    model, structure = analyse(CASES["two query heads for each key head"].model())
    heads, width_, value = prunable(structure)
    for dimension, expected in ((heads, None), (value, None), (width_, 1 / np.sqrt(3))):
        last = tuple(row * dimension.count for row in range(dimension.rows))
        pruned, _ = prune_checked(model, structure, PruningPlan(keep={dimension.name: last}))
        (node,) = (n for n in pruned.graph if n.op_type == "Attention")
        scale = node.attributes["scale"].as_float() if "scale" in node.attributes else None
        assert scale == (None if expected is None else pytest.approx(expected))
        counts = [node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads")]
        assert counts == ([2, 1] if dimension is heads else [4, 2])


# Operators that ONNX Runtime makes of a graph and saves with its optimised model.
RUNTIME = {
    "MultiHeadAttention": "h = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v)",
    "Attention": "h = com.microsoft.Attention<num_heads=3>(q, w36, b36)",
    "SkipLayerNormalization": "h = com.microsoft.SkipLayerNormalization(q, k, gain, shift)",
}


@pytest.mark.parametrize("name", RUNTIME)
def test_what_a_runtime_fused_is_frozen_and_says_so(name: str) -> None:
    text = f"""(float[1,5,6] x) => (float[1,5,6] y) <{WEIGHTS}, float[12,36] w36, float[36] b36, float[12] gain,
            float[12] shift, float[12,12] w12> {{
        q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) {RUNTIME[name]}
        i = MatMul(h, w12) r = Relu(i) y = MatMul(r, wo)
    }}"""
    model, structure = analyse(text_model(text, 18, domains={"com.microsoft": 1}))
    assert tuple(structure.graph.unsupported) == (f"com.microsoft::{name}",)
    assert "prune the file from before" in structure.graph.unsupported[f"com.microsoft::{name}"]
    frozen = [d for d in structure.dimensions if d.frozen and "a runtime fused it" in d.frozen]
    assert {m.tensor for d in frozen for m in d.members} >= {"wq"}
    assert [(d.kind, d.count) for d in prunable(structure)][-1] == ("channel", 12)
    prune_checked(model, structure, random_plan(structure, np.random.default_rng(0)))


def weights(model: object) -> list[tuple[int, ...]]:
    values = model.graph.initializers.values()  # type: ignore[attr-defined]
    return sorted(tuple(v.const_value.shape) for v in values)


def plain() -> tuple[onnx.ModelProto, Structure]:
    return CASES["separate projections"].model(), analyse(CASES["separate projections"].model())[1]


def test_a_head_takes_its_query_key_value_and_output_along() -> None:
    model, structure = plain()
    heads = prunable(structure)[0]
    pruned = rewrite(structure, PruningPlan(keep={heads.name: (0, 2)}))
    kept = [0, 1, 2, 3, 8, 9, 10, 11]
    before = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    after = {n: v.const_value.numpy() for n, v in pruned.graph.initializers.items() if v.const_value}
    for name in ("wq", "wk", "wv"):
        assert np.array_equal(after[name], before[name][:, kept])
    for name in ("bq", "bk", "bv"):
        assert np.array_equal(after[name], before[name][kept])
    assert np.array_equal(after["wo"], before["wo"][kept])


def test_each_head_may_keep_other_widths_known_by_hand() -> None:
    model, structure = plain()
    _, width, _ = prunable(structure)
    assert width.kind == "qk"
    pruned = rewrite(structure, PruningPlan(keep={width.name: (0, 3, 4, 5, 9, 10)}))
    columns = [0, 3, 4, 5, 9, 10]
    before = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    after = {n: v.const_value.numpy() for n, v in pruned.graph.initializers.items() if v.const_value}
    assert np.array_equal(after["wq"], before["wq"][:, columns])
    assert np.array_equal(after["wk"], before["wk"][:, columns])
    assert np.array_equal(after["wv"], before["wv"])
    x = np.random.default_rng(0).standard_normal((1, 5, 6)).astype(np.float32)

    def heads(name: str, kept: list[int] | None) -> np.ndarray:
        made = x[0] @ before[f"w{name}"] + before[f"b{name}"]
        split = made.reshape(5, 3, 4).transpose(1, 0, 2)
        if kept is None:
            return split
        return np.stack([split[h][:, [c - 4 * h for c in kept if c // 4 == h]] for h in range(3)])

    scores = heads("q", columns) @ heads("k", columns).transpose(0, 2, 1) * 0.5
    attention = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = (attention @ heads("v", None)).transpose(1, 0, 2).reshape(5, 12) @ before["wo"]
    assert np.abs(run(pruned, {"x": x})[0][0] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_scale_keeps_its_value_when_heads_become_narrower() -> None:
    """A traced ``1/sqrt(width)`` would silently follow the pruned width."""
    model, structure = analyse(CASES["scale computed from the width of a head"].model())
    _, width, _ = prunable(structure)
    pruned, _ = prune_checked(model, structure, PruningPlan(keep={width.name: (0, 4, 8)}))
    assert "Shape" not in {node.op_type for node in pruned.graph}
    (scale,) = (n.inputs[1].const_value.numpy() for n in pruned.graph if n.op_type == "Div")
    assert scale == pytest.approx(2.0)


@pytest.mark.parametrize(
    "kept", [(0, 1, 4, 8), (0, 1, 4, 5), ()], ids=["unequal", "one head empty", "nothing"]
)
def test_a_plan_of_unequal_heads_is_refused(kept: tuple[int, ...]) -> None:
    _, structure = plain()
    _, width, _ = prunable(structure)
    with pytest.raises(UsageError, match=r"in its heads|at least one"):
        rewrite(structure, PruningPlan(keep={width.name: kept}))


def test_units_of_a_removed_head_need_no_name() -> None:
    model, structure = plain()
    heads, width, _ = prunable(structure)
    index = structure.index(width.name)
    short = PruningPlan(keep={heads.name: (1,), width.name: (5, 6)})
    long = PruningPlan(keep={heads.name: (1,), width.name: (0, 1, 2, 5, 6, 8)})
    assert kept_units(short, structure, index) == kept_units(long, structure, index) == (5, 6)
    assert kept_count(short, structure, index) == 2
    assert np.array_equal(removed_classes(short, structure), removed_classes(long, structure))
    prune_checked(analyse(model)[0], structure, short)


def test_extents_are_products_of_heads_and_widths() -> None:
    _, structure = plain()
    heads, width, _ = structure.prunable
    assert extent(structure, "q1", 2).terms == (((heads, width), 1),)
    assert extent(structure, "q", 1).terms == (((heads,), 1),)
    assert extent(structure, "q", 3).terms == (((width,), 1),)
    assert extent(structure, "s", 1).terms == (((heads,), 1),)
    assert extent(structure, "s", 3).terms == ()
