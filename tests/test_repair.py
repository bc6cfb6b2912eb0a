"""Repair before training: laws of the methods, on small networks with random and with trained weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from command_line import Outcome, patiently
from threadpoolctl import threadpool_info, threadpool_limits
from zoo import analyse, text_model

import onnx_mdp
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UnsupportedModelError, UsageError
from onnx_mdp.large_models import for_session, save_model
from onnx_mdp.model_io import clone, content_hash, load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.plan import PruningPlan, plan_json, removed_classes
from onnx_mdp.repairing import least_squares
from onnx_mdp.repairing.layer_samples import inputs_at, outputs_at, store_matrix, weight_matrix
from onnx_mdp.repairing.linear_layers import Layer, linear_layers, numbers, store
from onnx_mdp.repairing.repair import METHODS, repair
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.shapes_data import shapes
from onnx_mdp.surgery.changed_weights import mark_weights
from onnx_mdp.surgery.rewriting import rewrite

DEMO = Path(onnx_mdp.__file__).parent / "demo_model" / "shapes_resnet.onnx"

# A normalisation in the file, grouped and depthwise layers, a sum, layers without a bias, Gemm and MatMul.
NET = """
(float[2,3,8,8] x) => (float[2,4] y, float[2,5] z)
<float[16,3,3,3] w0, float[16] b0, float[12,16,3,3] w1, float[12] s1, float[12] h1, float[12] m1,
 float[12] var1, float[12,1,3,3] w2, float[16,12,1,1] w3, float[16] b3, float[20,8,1,1] w4,
 float[8,20,1,1] w5, float[6,8] w6, float[6] b6, float[6,4] w7, float[4] b7, float[5,6] w8>
{
  a0 = Conv <pads: ints = [1,1,1,1]> (x, w0, b0)
  a = Relu (a0)
  b0_ = Conv <pads: ints = [1,1,1,1]> (a, w1)
  b1 = BatchNormalization (b0_, s1, h1, m1, var1)
  b = Relu (b1)
  c0 = Conv <pads: ints = [1,1,1,1], group: int = 12> (b, w2)
  c1 = Sigmoid (c0)
  c = Conv (c1, w3, b3)
  d = Add (a, c)
  e0 = Conv <group: int = 2> (d, w4)
  e = Relu (e0)
  f0 = Conv (e, w5)
  f = GlobalAveragePool (f0)
  g = Flatten (f)
  h0 = Gemm <transB: int = 1> (g, w6, b6)
  h = Relu (h0)
  y0 = MatMul (h, w7)
  y = Add (b7, y0)
  z = Gemm <transB: int = 1> (h, w8)
}
"""
# Nothing pads, so that a shift is as good at each place.
PLAIN = """
(float[1,3,6,6] x) => (float[1,4,2,2] y)
<float[16,3,3,3] w0, float[16] b0, float[12,16,1,1] w1, float[4,12,3,3] w2, float[4] b2>
{
  a0 = Conv (x, w0, b0)
  a = Relu (a0)
  c = Conv (a, w1)
  y = Conv (c, w2, b2)
}
"""
SUMS = """
(float[1,8,4,4] x) => (float[1,8,4,4] y)
<float[12,8,1,1] w0, float[12] b0, float[8,12,1,1] w1, float[8] b1>
{
  a0 = Conv (x, w0, b0)
  a = Relu (a0)
  c = Conv (a, w1, b1)
  y = Add (x, c)
}
"""
# A normalisation of two layers at once, and a weight and a bias that two layers share.
SHARED = """
(float[1,3,6,6] x) => (float[1,4,6,6] y, float[1,4,3,3] z)
<float[8,3,1,1] w0, float[8] b0, float[8,3,3,3] w1, float[16] s, float[16] h, float[16] m, float[16] var,
 float[8,16,1,1] w2, float[8] b2, float[8,16,3,3] w3, float[4,8,1,1] w4,
 float least = {-1}, float most = {2}>
{
  a0 = Conv (x, w0, b0)
  a1 = Conv <pads: ints = [1,1,1,1]> (x, w1, b0)
  a2 = Concat <axis: int = 1> (a0, a1)
  a3 = BatchNormalization (a2, s, h, m, var)
  a = Relu (a3)
  b0_ = Conv (a, w2, b2)
  b = Relu (b0_)
  y = Conv (b, w4)
  c0 = Conv <pads: ints = [1,1,1,1], strides: ints = [2,2]> (a, w3)
  c = Clip (c0, least, most)
  z = Conv (c, w4)
}
"""
TEXTS = {"net": NET, "plain": PLAIN, "sums": SUMS, "shared": SHARED}
FREE, POSITIVE = (-np.inf, np.inf), (0.0, np.inf)
BOUNDS = {
    "net": {FREE, POSITIVE},
    "plain": {FREE, POSITIVE},
    "sums": {FREE, POSITIVE},
    "shared": {FREE, POSITIVE, (-1.0, 2.0)},
}
Feeds = list[dict[str, npt.NDArray[np.float32]]]


def case(text: str, share: float = 0.6) -> tuple[Structure, PruningPlan, ir.Model, Feeds]:
    """A structure, a plan that keeps a share of each dimension, what it leaves, and inputs."""
    _, structure = analyse(text_model(text, seed=3))
    rng = np.random.default_rng(5)
    keep: dict[str, tuple[int, ...]] = {}
    for dimension in (structure.dimensions[index] for index in structure.prunable):
        size = max(1, round(share * len(dimension.units)))
        if size < len(dimension.units):
            keep[dimension.name] = tuple(sorted(rng.choice(len(dimension.units), size, False).tolist()))
    shape = structure.shadow.inputs["x"]
    feeds = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(8)]
    plan = PruningPlan(keep=keep)
    return structure, plan, rewrite(structure, plan), feeds


def values(model: ir.Model, feeds: Feeds, names: list[str]) -> dict[str, npt.NDArray[Any]]:
    """Inner tensors over all inputs."""
    session = open_session(for_session(model, names), Runtime(), optimize=False)
    found = zip(*(session.run(names, feed) for feed in feeds), strict=True)
    return {name: np.concatenate(arrays) for name, arrays in zip(names, found, strict=True)}


def weights_of(model: ir.Model) -> dict[str, npt.NDArray[Any]]:
    return {name: v.const_value.numpy() for name, v in model.graph.initializers.items() if v.const_value}


def signature(model: ir.Model) -> Any:
    """All of a model but the numbers in its weights."""
    weights = {name: (v.dtype, tuple(v.shape or ())) for name, v in model.graph.initializers.items()}
    nodes = [
        (n.name, n.op_type, [v.name for v in n.inputs if v], [v.name for v in n.outputs]) for n in model.graph
    ]
    ends = [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
    return weights, nodes, ends, dict(model.opset_imports), model.ir_version


@pytest.mark.parametrize("text", TEXTS)
def test_absorbing_makes_the_means_those_of_the_original(text: str) -> None:
    structure, plan, slim, feeds = case(TEXTS[text])
    repaired = repair(structure, plan, slim, feeds, ["bias"])
    layers, others = linear_layers(structure, repaired.model, removed_classes(plan, structure))
    assert not others
    names = [layer.target for layer in layers]
    wanted, found = values(structure.shadow.model, feeds, names), values(repaired.model, feeds, names)
    before = values(slim, feeds, names)
    moved = 0.0
    for layer in layers:
        axes = tuple(a for a in range(wanted[layer.target].ndim) if a != layer.axis)
        mean = wanted[layer.target].mean(axes)[layer.kept]
        scale = float(np.abs(wanted[layer.target]).max())
        assert np.abs(found[layer.target].mean(axes) - mean).max() < 1e-5 * scale, layer.name
        moved = max(moved, float(np.abs(before[layer.target].mean(axes) - mean).max()) / scale)
    assert moved > 1e-2


def test_what_is_absorbed_first_is_the_mean_of_the_removed_units() -> None:
    structure, plan, slim, feeds = case(PLAIN)
    repaired = repair(structure, plan, slim, feeds, ["bias"])
    layers, _ = linear_layers(structure, slim, removed_classes(plan, structure))
    weight = weights_of(structure.shadow.model)["w1"][:, :, 0, 0]
    a = values(structure.shadow.model, feeds, ["a"])["a"].mean((0, 2, 3))
    gone = ~layers[0].kept
    expected = (weight[:, gone] @ a[gone])[layers[1].kept]
    assert np.allclose(weights_of(repaired.model)["w1__bias"], expected, atol=1e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_statistics_are_made_those_of_the_original(text: str) -> None:
    structure, plan, slim, feeds = case(TEXTS[text])
    repaired = repair(structure, plan, slim, feeds, ["bn"])
    layers, _ = linear_layers(structure, repaired.model, removed_classes(plan, structure))
    names = [layer.own for layer in layers]
    wanted, found = values(structure.shadow.model, feeds, names), values(repaired.model, feeds, names)
    before = values(slim, feeds, names)
    moved = 0.0
    for layer in layers:
        axes = tuple(a for a in range(wanted[layer.own].ndim) if a != layer.axis)
        deviation = wanted[layer.own].std(axes)[layer.kept]
        ratio = deviation / before[layer.own].std(axes)
        within = (ratio < 1.9) & (ratio > 0.55)  # others move as far as they may
        assert np.allclose(found[layer.own].std(axes)[within], deviation[within], rtol=1e-4), layer.name
        moved = max(moved, float(np.abs(ratio - 1)[within].max(initial=0.0)))
    assert moved > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", TEXTS)
def test_nothing_but_numbers_changes(text: str, method: str) -> None:
    structure, plan, slim, feeds = case(TEXTS[text])
    repaired = repair(structure, plan, slim, feeds, [method])
    assert content_hash(repaired.model) != content_hash(slim)
    made = {name for name in repaired.model.graph.initializers if name not in slim.graph.initializers}
    assert all(name.endswith("__bias") for name in made)
    before, after = signature(slim), signature(repaired.model)
    for name in made:
        del after[0][name]
        for node in after[1]:
            node[2][:] = [value for value in node[2] if value != name]
    assert before == after


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", TEXTS)
def test_where_nothing_is_removed_nothing_changes(text: str, method: str) -> None:
    structure, _, _, feeds = case(TEXTS[text])
    whole = rewrite(structure, PruningPlan(keep={}))
    repaired = repair(structure, PruningPlan(keep={}), whole, feeds, [method])
    before = weights_of(whole)
    for name, array in weights_of(repaired.model).items():
        assert np.allclose(array, before[name], atol=1e-6 * np.abs(before[name]).max(initial=0.0)), name


def test_what_is_shared_stays_and_the_report_says_so() -> None:
    structure, _, _, feeds = case(SHARED)
    whole, plan = rewrite(structure, PruningPlan(keep={})), PruningPlan(keep={})
    found = {report.layer: report.kept for report in repair(structure, plan, whole, feeds, ["bias"]).layers}
    assert {name: why for name, why in found.items() if why and "shared" in why} == {
        "y": "its weight is shared",
        "z": "its weight is shared",
        "a0": "its bias is shared",
        "a1": "its bias is shared",
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_repair_is_deterministic(method: str) -> None:
    structure, plan, slim, feeds = case(NET)
    first, second = (repair(structure, plan, slim, feeds, [method]) for _ in range(2))
    assert content_hash(first.model) == content_hash(second.model)
    assert first.layers == second.layers


def test_the_model_that_is_repaired_stays_as_it_was() -> None:
    structure, plan, slim, feeds = case(NET)
    before = content_hash(slim)
    repair(structure, plan, slim, feeds, list(METHODS))
    assert content_hash(slim) == before


def test_refusals_say_what_to_do() -> None:
    structure, plan, slim, feeds = case(SUMS)
    with pytest.raises(UsageError, match="unknown repair 'glue'; choose none, or of bias, bn, lstsq"):
        repair(structure, plan, slim, feeds, ["glue"])
    with pytest.raises(UsageError, match="pass --data"):
        repair(structure, plan, slim, [], ["bias"])
    casts = "h = Cast <to: int = 10> (x)\n  i = Cast <to: int = 1> (h)\n  a0 = Conv (i, w0, b0)"
    _, structure = analyse(text_model(SUMS.replace("a0 = Conv (x, w0, b0)", casts), seed=3))
    with pytest.raises(UnsupportedModelError, match="only models in float32"):
        repair(structure, plan, slim, feeds, ["bias"])


def demo_plan(share: float) -> tuple[Structure, PruningPlan]:
    """The demo model, and a plan that keeps the first units of each dimension."""
    structure = analyze(load_model(DEMO), {})
    sizes = {structure.dimensions[i].name: structure.dimensions[i].count for i in structure.prunable}
    keep = {name: tuple(range(max(1, round(share * size)))) for name, size in sizes.items()}
    return structure, PruningPlan(keep=keep)


@pytest.mark.slow
def test_the_commands_mark_what_they_repaired(run: Callable[..., Outcome], tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", image=shapes(16, 7)[0])
    structure, plan = demo_plan(0.9)
    Path("slim.plan.json").write_text(plan_json(plan))
    save_model(rewrite(structure, plan), Path("slim.onnx"))
    asked = (str(DEMO), "slim.onnx", "slim.plan.json", "--data", "inputs.npz")
    repaired = run("repair", *asked, "-o", "better.onnx", "--repair", "bn,lstsq", "--json")
    assert repaired.code == 0, repaired.err
    drifts = repaired.document["output_drifts"]
    assert drifts[2] < drifts[0]
    checked = run("verify", str(DEMO), "better.onnx", "slim.plan.json", "--json")
    assert checked.code == 0
    assert checked.document["verified"]
    assert checked.document["weights"]["how"] == "repaired: bn, lstsq"
    assert 0 < checked.document["weights"]["changed"] <= checked.document["weights"]["total"]
    line = run("verify", str(DEMO), "better.onnx", "slim.plan.json").out
    assert "repaired: bn, lstsq" in line
    assert "which the law does not cover" in line
    assert run("verify", str(DEMO), "slim.onnx", "slim.plan.json", "--json").document["weights"] is None
    again = run("repair", *asked, "-o", "again.onnx", "--repair", "bn,lstsq")
    assert again.code == 0
    assert Path("again.onnx").read_bytes() == Path("better.onnx").read_bytes()


def test_a_marked_file_with_another_graph_fails(run: Callable[..., Outcome]) -> None:
    (structure, right), (_, wrong) = demo_plan(0.8), demo_plan(0.7)
    slim = rewrite(structure, right)
    mark_weights(slim, "fine-tuned")
    save_model(slim, Path("slim.onnx"))
    Path("right.json").write_text(plan_json(right))
    Path("wrong.json").write_text(plan_json(wrong))
    assert run("verify", str(DEMO), "slim.onnx", "right.json").code == 0
    failed = run("verify", str(DEMO), "slim.onnx", "wrong.json")
    assert failed.code == 1
    assert "other nodes or shapes than the plan leaves" in failed.err


@pytest.mark.slow
def test_prune_repairs_once_the_law_was_verified(run: Callable[..., Outcome], tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", image=shapes(32, 7)[0])
    command = ("prune", str(DEMO), "--target-ratio", "0.7", "-o", "slim.onnx", "--repair", "lstsq")
    refused = run(*command)
    assert refused.code == 2
    assert "--repair needs calibration inputs" in refused.err
    refused = run(*command[:-2], "--criterion", "refit", "--data", "inputs.npz")
    assert refused.code == 2
    assert "pass --repair lstsq too" in refused.err
    pruned = patiently(lambda: run(*command, "--criterion", "drift", "--data", "inputs.npz", "--json"))
    assert pruned.code == 0, pruned.err
    before, after = pruned.document["repair"]["output_drifts"]
    assert after < before
    assert "`onnx-mdp repair`" in run("apply", str(DEMO), "slim.plan.json", "-o", "plain.onnx").err
    asked = (str(DEMO), "plain.onnx", "slim.plan.json", "--data", "inputs.npz", "-o", "again.onnx")
    assert run("repair", *asked, "--repair", "lstsq").code == 0
    assert Path("again.onnx").read_bytes() == Path("slim.onnx").read_bytes()
    planned = patiently(lambda: run(*command, "--data", "inputs.npz", "--overwrite", "--json"))
    assert planned.code == 0, planned.err
    assert "units are ranked by what the repair leaves" in planned.err
    assert json.loads(Path("slim.plan.json").read_text())["provenance"]["criterion"] == "refit"
    assert planned.document["repair"]["output_drifts"][-1] < 1.2 * after


FORMS = {
    "plain": ("Conv (x, w, b)", "float[1,6,9,7] x", "float[8,6,1,1] w, float[8] b"),
    "padded": ("Conv <pads: ints = [1,0,2,1]> (x, w, b)", "float[2,6,9,7] x", "float[8,6,3,2] w, float[8] b"),
    "strided": (
        "Conv <strides: ints = [2,3], dilations: ints = [2,1]> (x, w, b)",
        "float[1,6,9,7] x",
        "float[8,6,3,2] w, float[8] b",
    ),
    "same": (
        'Conv <auto_pad = "SAME_UPPER", strides: ints = [2,2]> (x, w, b)',
        "float[1,6,9,8] x",
        "float[8,6,3,3] w, float[8] b",
    ),
    "lower": (
        'Conv <auto_pad = "SAME_LOWER", strides: ints = [2,2]> (x, w, b)',
        "float[1,6,9,8] x",
        "float[8,6,2,4] w, float[8] b",
    ),
    "grouped": ("Conv <group: int = 2> (x, w, b)", "float[2,6,9,7] x", "float[8,3,3,3] w, float[8] b"),
    "depthwise": ("Conv <group: int = 6> (x, w, b)", "float[2,6,9,7] x", "float[12,1,3,3] w, float[12] b"),
    "one axis": ("Conv <pads: ints = [1,1]> (x, w, b)", "float[2,6,9] x", "float[8,6,3] w, float[8] b"),
    "gemm": ("Gemm <transB: int = 1> (x, w, b)", "float[5,6] x", "float[8,6] w, float[8] b"),
    "gemm as stored": ("Gemm (x, w, b)", "float[5,6] x", "float[6,8] w, float[1,8] b"),
    "matmul": ("MatMul (x, w)", "float[2,5,6] x", "float[6,8] w"),
    "matmul, left": ("MatMul (w, x)", "float[2,6,5] x", "float[8,6] w"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_a_matrix_product(form: str) -> None:
    node, data, weights = FORMS[form]
    axes = ",".join("abcd"[: data.count(",") + 1])
    text = f"({data}) => (float[{axes}] y)\n<{weights}>\n{{\n  y = {node}\n}}"
    _, structure = analyse(text_model(text))
    model = rewrite(structure, PruningPlan(keep={}))
    (layer,), _ = linear_layers(structure, model, np.zeros(structure.graph.classes, np.bool_))
    shape = structure.shadow.inputs["x"]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    y = values(model, [{"x": x}], ["y"])["y"]
    extents = np.moveaxis(y, layer.axis, -1).shape[:-1]
    places = np.random.default_rng(2).permutation(int(np.prod(extents)))[:5]
    product = inputs_at(layer, x, extents, places) @ weight_matrix(layer).transpose(0, 2, 1)
    found = np.concatenate(list(product), 1) + layer.offset
    assert np.allclose(found, outputs_at(layer, y, places), atol=1e-5)
    before = weights_of(model)["w"]
    store_matrix(layer, weight_matrix(layer))
    assert np.array_equal(weights_of(model)["w"], before)


@pytest.mark.parametrize("text", TEXTS)
def test_no_refit_is_worse_on_its_own_layer(text: str) -> None:
    structure, plan, slim, feeds = case(TEXTS[text])
    repaired = repair(structure, plan, slim, feeds, ["lstsq"])
    reports = {report.layer: report for report in repaired.layers if report.kept is None}
    layers, _ = linear_layers(structure, repaired.model, removed_classes(plan, structure))

    def error(model: ir.Model, layer: Layer) -> float:
        wanted = values(structure.shadow.model, feeds[4:5], [layer.target])[layer.target]
        found = values(model, feeds[4:5], [layer.target])[layer.target]
        wanted = wanted.compress(layer.kept, layer.axis)
        return float(((found.clip(*layer.bounds) - wanted.clip(*layer.bounds)) ** 2).sum())

    assert {layer.bounds for layer in layers} == BOUNDS[text]
    for layer in (layer for layer in layers if layer.name in reports):
        back = clone(repaired.model)
        norm = layer.normalization
        for value in (layer.weight, layer.bias, norm and norm.bias):
            if value is not None:
                held = slim.graph.initializers.get(value.name)
                zero = np.zeros_like(value.const_value.numpy())
                store(back.graph.initializers[value.name], zero if held is None else numbers(held))
        assert error(repaired.model, layer) < error(back, layer), layer.name
        assert reports[layer.name].after < reports[layer.name].before
    assert reports


def test_units_that_others_can_replace_are_not_missed() -> None:
    structure, _, _, feeds = case(PLAIN)
    model = structure.shadow.model
    for name in ("w0", "b0"):
        array = weights_of(model)[name].copy()
        array[8:] = array[:8]
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    plan = PruningPlan(keep={structure.dimensions[0].name: tuple(range(8))})
    slim = rewrite(structure, plan)
    repaired = repair(structure, plan, slim, feeds, ["lstsq"])
    wanted, before, after = (values(m, feeds, ["y"])["y"] for m in (model, slim, repaired.model))
    assert np.abs(before - wanted).max() > 0.1 * np.abs(wanted).max()
    assert np.abs(after - wanted).max() < 1e-3 * np.abs(wanted).max()


@pytest.mark.parametrize(("large", "inside"), [(10**9, {1}), (0, {2})])
def test_only_large_products_take_several_threads(
    large: int, inside: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    structure, plan, slim, feeds = case(PLAIN)
    used: list[int] = []
    gather = least_squares._gather

    def threads() -> list[int]:
        return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]

    def watched(*arguments: Any) -> Any:
        used.extend(threads())
        return gather(*arguments)

    monkeypatch.setattr(least_squares, "_LARGE", large)
    monkeypatch.setattr(least_squares, "_gather", watched)
    with threadpool_limits(2, user_api="blas"):
        repair(structure, plan, slim, feeds, ["lstsq"])
        assert set(used) == inside
        assert set(threads()) == {2}


def test_more_inputs_are_more_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    structure, plan, slim, feeds = case(PLAIN)
    for name, number in (("_ROWS", 1), ("_ROWS_FOR_EACH", 0), ("_ROWS_OF_EACH", 5)):
        monkeypatch.setattr(least_squares, name, number)
    drawn: list[int] = []
    gather = least_squares._gather

    def watched(*arguments: Any) -> Any:
        parts = gather(*arguments)
        drawn.append(sum(part.x.shape[1] for part in parts))
        return parts

    monkeypatch.setattr(least_squares, "_gather", watched)
    for count in (4, 8):
        drawn.clear()
        repair(structure, plan, slim, feeds[:count], ["lstsq"])
        assert drawn
        assert min(drawn) == 4 * count  # of the last layer, which has 4 places
        assert max(drawn) == 6 * count
