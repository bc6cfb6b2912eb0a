"""Reports: documents that keep their contract, tables and figures that survive hostile names."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console
from zoo import analyse, random_plan, text_model, zoo_structure

from onnx_mdp.analysis.binding import bind_shapes
from onnx_mdp.analysis.shadow import prepare
from onnx_mdp.analysis.structure import Structure, macs
from onnx_mdp.model_io import parameter_count
from onnx_mdp.plan import PruningPlan
from onnx_mdp.reports.documents import analyze_document, frozen_operators, plan_totals, shares
from onnx_mdp.reports.figures import structure_svg
from onnx_mdp.reports.frozen_parts import frozen_parts
from onnx_mdp.reports.report import analysis_table, plan_table, printable
from onnx_mdp.rules import RULES
from onnx_mdp.surgery.rewriting import rewrite

RESIDUAL = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[1,3,4,4] x) => (float[1,5] logits) {
    a = Conv(x, stem_w, stem_b)
    s = Relu(a)
    b = Conv(s, up_w, up_b)
    r = Relu(b)
    c = Conv(r, down_w, down_b)
    j = Add(c, s)
    p = GlobalAveragePool(j)
    f = Flatten(p)
    logits = Gemm<transB=1>(f, fc_w, fc_b)
}
"""
# params: stem 12 + 4, up 24 + 6, down 24 + 4, fc 20 + 5; MACs: 16 · 12, 16 · 24, 16 · 24, 20.
PARAMS, MACS = 99, 980
HOSTILE = (
    "\x1b[31mred\x07",
    "[red]bold[/nope]",
    "$x$ and $\\frac$",
    "<script>alert(1)</script>&",
    "a\u202eb\nc",
)


def residual(names: tuple[str, ...] = (), inner: int = 6) -> Structure:
    """Stem, one residual block, and a classifier; nodes are named ``names`` in order, then by operator."""
    shapes = {
        **{"stem_w": (4, 3, 1, 1), "stem_b": (4,), "up_w": (inner, 4, 1, 1), "up_b": (inner,)},
        **{"down_w": (4, inner, 1, 1), "down_b": (4,), "fc_w": (5, 4), "fc_b": (5,)},
    }
    proto = onnx.parser.parse_model(RESIDUAL)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    for number, node in enumerate(proto.graph.node):
        node.name = names[number] if number < len(names) else f"{node.op_type}_{number}"
    return analyse(proto)[1]


def shown(renderable: object, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def plans(structure: Structure) -> list[PruningPlan]:
    rng = np.random.default_rng(7)
    keep = {}
    for index in structure.prunable:
        units = len(structure.dimensions[index].units)
        kept = rng.choice(units, rng.integers(1, units), replace=False)
        keep[structure.dimensions[index].name] = tuple(sorted(kept.tolist()))
    blocks = tuple(block.name for block in structure.blocks)
    return [PruningPlan(keep={}), PruningPlan(keep=keep), PruningPlan(keep=keep, removed_blocks=blocks)]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


# The JSON document


def test_the_analysis_has_exactly_the_keys_of_the_contract():
    document = analyze_document(residual())
    assert set(document) == {
        *("schema_version", "inputs", "params", "macs", "dimensions", "blocks"),
        *("frozen", "frozen_ops", "states", "prunable_params_share", "prunable_macs_share"),
    }
    keys = {"name", "kind", "size", "step", "heads", "frozen", "frozen_by", "members"}
    keys |= {"share_params", "share_macs"}
    assert all(set(entry) == keys for entry in document["dimensions"])
    assert all(set(m) == {"tensor", "axis"} for entry in document["dimensions"] for m in entry["members"])
    assert [set(block) for block in document["blocks"]] == [{"name", "kind", "nodes", "removable"}]


def test_the_analysis_survives_json_and_is_the_same_each_time():
    first, second = analyze_document(residual()), analyze_document(residual())
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert json.dumps(first) == json.dumps(second)


def test_shares_are_those_counted_by_hand():
    document = analyze_document(residual())
    assert (document["params"], document["macs"]) == (PARAMS, MACS)
    assert document["inputs"] == {"x": [1, 3, 4, 4]}
    found = {e["name"]: (e["size"], e["share_params"], e["share_macs"]) for e in document["dimensions"]}
    assert found == {
        "Conv_0": (4, 88 / PARAMS, MACS / MACS),
        "Conv_2": (6, 54 / PARAMS, 768 / MACS),
        "Gemm_8": (5, 25 / PARAMS, 20 / MACS),
    }
    assert document["prunable_params_share"] == 94 / PARAMS
    assert document["prunable_macs_share"] == 1.0
    assert document["blocks"][0]["nodes"] == ["Conv_2", "Relu_3", "Conv_4"]


def test_prunable_shares_lie_between_the_largest_and_the_sum_of_their_parts():
    structure = residual()
    part = shares(structure)
    for each, together in ((part.params, part.prunable_params), (part.macs, part.prunable_macs)):
        own = [each[index] for index in structure.prunable]
        assert max(own) <= together <= min(1.0, math.fsum(own))
        assert all(0 <= share <= 1 for share in each)


def test_an_operator_without_a_rule_names_the_dimensions_that_it_freezes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(RULES, "GlobalAveragePool")
    structure = residual()
    assert frozen_operators(structure) == {"GlobalAveragePool": ("Conv_0",)}
    assert analyze_document(structure)["frozen_ops"] == {"GlobalAveragePool": ["Conv_0"]}
    assert "No rule for operator GlobalAveragePool; it freezes Conv_0." in shown(analysis_table(structure))


FROZEN = """(float[1,3,6,6] x) => (float[1,4,6,6] y) <
        float[8,3,1,1] a, float[4,8,1,1] b, float[6,8,1,1] c, float[4,10,1,1] e> {
    t = Conv(x, a)
    s = Conv(t, b)
    v = Softmax<axis=1>(s)
    w = Conv(t, c)
    n = LRN<size=3>(w)
    j = Concat<axis=1>(v, n)
    y = Conv(j, e)
}"""


def test_frozen_parts_name_the_operator_and_what_they_hold_the_most_first():
    structure = analyse(text_model(FROZEN))[1]
    parts = frozen_parts(structure)
    assert [(p.operator, p.nodes, p.dimensions, p.params, p.macs) for p in parts] == [
        ("LRN", ("lrn_4",), ("conv_3",), 6 * 8, 36 * 6 * 8),
        (None, (), ("conv_6",), 4 * 10, 36 * 4 * 10),
        ("Softmax", ("softmax_2",), ("conv_1",), 4 * 8, 36 * 4 * 8),
    ]
    times = {1: 7.0, 3: 2.0}
    first = frozen_parts(structure, times)[0]
    assert (first.operator, first.ms) == ("Softmax", 7.0)
    table = shown(analysis_table(structure, times))
    assert table.index("softmax_2") < table.index("lrn_4")
    assert "7.000" in table
    entry = next(d for d in analyze_document(structure)["dimensions"] if d["name"] == "conv_1")
    assert entry["frozen_by"] == {"operator": "Softmax", "node": "softmax_2"}


def assert_totals_are_those_of_the_rewritten_model(structure: Structure, plan: PruningPlan):
    pruned = rewrite(structure, plan)
    totals = plan_totals(structure, plan)
    assert totals.params == (parameter_count(structure.shadow.model), parameter_count(pruned))
    shapes = bind_shapes(pruned, structure.shadow.inputs)
    assert totals.macs == (macs(structure.shadow), macs(prepare(pruned, shapes)))


@pytest.mark.parametrize("number", range(3))
def test_totals_are_those_of_the_rewritten_model(number: int):
    structure = residual()
    assert_totals_are_those_of_the_rewritten_model(structure, plans(structure)[number])


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", ["cifar10/resnet20.onnx", "detect/yunet_n_dynamic.onnx", "detect/fastestdet.onnx"]
)
def test_totals_are_those_of_the_rewritten_zoo_model(name: str):
    structure = zoo_structure(name)[1]
    assert_totals_are_those_of_the_rewritten_model(
        structure, random_plan(structure, np.random.default_rng(3))
    )


# Tables


def test_every_prunable_dimension_and_block_is_in_the_tables():
    structure = residual()
    tables = shown(analysis_table(structure)), *(shown(plan_table(structure, p)) for p in plans(structure))
    for table in tables:
        assert all(structure.dimensions[index].name in table for index in structure.prunable)
    assert all(block.name in tables[0] and block.name in tables[-1] for block in structure.blocks)


def test_frozen_dimensions_are_counted_by_reason():
    table = shown(analysis_table(residual()))
    assert "graph output logits" in table
    assert (
        "2 of 3 dimensions prunable: 94.9 % of 99 parameters, 100.0 % of 980 MACs; 1 removable block."
        in table
    )


def test_the_plan_table_says_what_stays():
    structure = residual()
    plan = PruningPlan(
        keep={"Conv_0": (0, 2, 3)}, removed_blocks=(structure.blocks[0].name,), predicted_ms=1.25
    )
    table = shown(plan_table(structure, plan, {"Conv_0": (2.0, 1.5)}))
    stem, inner = (next(line for line in table.splitlines() if name in line) for name in ("Conv_0", "Conv_2"))
    assert "4 → 3" in stem
    assert "75.0 %" in stem
    assert "2 → 1.5" in stem
    assert "6 → 0" in inner
    assert "removed" in inner
    assert "2 of 2 prunable dimensions cut, 10 → 3 channels; 1 of 1 block removed." in table
    assert "Predicted 1.25 ms." in table


@pytest.mark.parametrize("kept", [1, 999, 1000])
def test_a_bar_is_neither_empty_nor_full_unless_the_dimension_is(kept: int):
    table = shown(plan_table(residual(inner=1000), PruningPlan(keep={"Conv_2": tuple(range(kept))})))
    line = next(line for line in table.splitlines() if "Conv_2" in line)
    assert ("████████" in line) == (kept == 1000)
    assert any(c in line for c in "▏▎▍▌▋▊▉█")


def test_long_names_break_at_separators_and_stay_whole():
    name = "/features/features.17/conv/conv.0/conv.0.0/branch/Conv"
    table = shown(analysis_table(residual((name,))), width=80)
    lines = [line.strip().split("  ")[0] for line in table.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("/features/"))
    assert lines[start] + lines[start + 1] == name
    assert lines[start].endswith("/")
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_plain_text_in_tables(name: str):
    structure = residual(tuple(f"{name}{number}" for number in range(9)))
    plan = PruningPlan(keep={}, removed_blocks=(structure.blocks[0].name,))
    for table in (shown(analysis_table(structure)), shown(plan_table(structure, plan))):
        assert printable(name) in table
        assert all(c.isprintable() for c in table.replace("\n", ""))


# The figure


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_plain_text_in_the_figure(name: str):
    structure = residual((name,))
    svg = structure_svg(structure, plans(structure)[1])
    assert printable(name) in texts(svg)
    assert not [e for e in ET.fromstring(svg).iter() if e.tag.endswith("script")]
    assert all(c.isprintable() for c in svg.replace("\n", ""))


def test_a_name_in_another_script_needs_no_font():
    svg = structure_svg(residual(("卷积层",)), PruningPlan(keep={}))
    assert "卷积层" in texts(svg)


def test_the_figure_is_reproducible_whatever_the_users_style():
    structure = residual()
    plan = plans(structure)[1]
    first = structure_svg(structure, plan)
    with matplotlib.rc_context({"text.usetex": True, "savefig.bbox": "tight", "font.size": 30}):
        assert structure_svg(residual(), plan) == first
    assert "<dc:date>" not in first


def test_the_figure_names_every_layer_with_its_widths():
    structure = residual()
    plan = PruningPlan(keep={"Conv_0": (1, 3)}, removed_blocks=(structure.blocks[0].name,))
    found = texts(structure_svg(structure, plan))
    layers = found[found.index("cannot be pruned") + 1 :]
    assert layers == ["Conv_0", "4 → 2", "Conv_2", "6 → 0", "Conv_4", "4 → 0", "Gemm_8", "5"]
    assert found[0] == "4 layers: 19 → 7 output channels (37 %)"


def test_reports_do_not_import_matplotlib_until_a_figure_is_drawn():
    code = "import sys; from onnx_mdp.reports import figures, report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
