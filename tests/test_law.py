"""Laws of every prune, on real networks of several exporters: pruned = masked, and nothing else changes.

The mutation tests break a rewrite on purpose, always into a valid graph that runs, and the law must notice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from zoo import (
    CNNS,
    analyse,
    cut_wrongly,
    informative,
    operands,
    prune_checked,
    random_plan,
    run,
    text_model,
    zoo_path,
    zoo_structure,
)

from onnx_mdp.analysis.structure import Dimension, Structure
from onnx_mdp.errors import VerificationError
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.numerics.double_precision import run_in_double
from onnx_mdp.pipeline import analyze
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.reports.documents import verify_document
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery import verification
from onnx_mdp.surgery.masking import masked_model
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import TOLERANCE, Evidence, require, verify

# In these a sigmoid of a large factor, or a product with a tiny one, amplifies the rounding of float32.
ILL_CONDITIONED = (
    "detect/yunet_n_dynamic.onnx",
    "ocr/ppocrv4_det.onnx",
    "ocr/ppocrv4_rec.onnx",
    "seg/agllnet_256_tf2onnx.onnx",
)
LONG = ("seg/agllnet_256_tf2onnx.onnx",)
QUICK = (
    "cifar10/mlperf_resnet8_tf2onnx.onnx",
    "cifar10/resnet20.onnx",
    "detect/fastestdet.onnx",
    "detect/ultraface_rfb320.onnx",
    "imagenet/mobilenet_v1_0.5_160_tf2onnx.onnx",
    "imagenet/squeezenet1.1.onnx",
    "ocr/ppocr_mobile_v2_cls.onnx",
)
ALL = [pytest.param(n, marks=[pytest.mark.zoo, *([pytest.mark.slow] if n in LONG else [])]) for n in CNNS]
SOME = [pytest.param(n, marks=[pytest.mark.zoo, *([] if n in QUICK else [pytest.mark.slow])]) for n in CNNS]

CATALOG = (
    "resnet18_small",
    "resnet50_small",
    "mobilenet_v1_small",
    "mobilenet_v2_small",
    "efficientnet_b0_small",
    "cifar_resnet8_small",
    "cifar_resnet8_pad_small",
)
# The exporter on torch.export takes about ten seconds a model, so by default it runs on one only.
EXPORTS = [
    *(pytest.param(n, "torchscript", id=f"{n}-torchscript") for n in CATALOG),
    *(
        pytest.param(n, "dynamo", id=f"{n}-dynamo", marks=[] if n == CATALOG[-1] else [pytest.mark.slow])
        for n in CATALOG
    ),
]

Exported = Callable[..., Path]


# -- (a) pruned = masked ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_pruned_equals_masked_on_the_zoo(name: str) -> None:
    model, structure = zoo_structure(name)
    assert structure.graph.unsupported == {}
    informed = False
    for seed, least in ((1, 0.5), (2, 0.8)):
        plan = random_plan(structure, np.random.default_rng(seed), least=least)
        pruned, evidence = prune_checked(model, structure, plan)
        informed |= informative(pruned, structure)
        if name not in ILL_CONDITIONED:
            assert evidence.worst <= 1e-5
    assert informed, "the pruned models are constant, which proves nothing"


@pytest.mark.parametrize(("name", "exporter"), EXPORTS)
@pytest.mark.parametrize("dynamic_batch", [False, True], ids=["static", "dynamic"])
def test_pruned_equals_masked_on_exports(
    name: str, exporter: str, dynamic_batch: bool, exported: Exported
) -> None:
    model, structure = analyse(exported(name, exporter, dynamic_batch=dynamic_batch))
    assert structure.graph.unsupported == {}
    frozen = [d.name for d in structure.dimensions if d.frozen is not None]
    assert len(frozen) == 1, "all but the classes can be pruned"
    for seed in (1, 2):
        plan = random_plan(structure, np.random.default_rng(seed), least=0.3)
        pruned, evidence = prune_checked(model, structure, plan)
        assert evidence.worst <= 1e-5
        assert evidence.inputs_tried == (5 if dynamic_batch else 4)
        assert informative(pruned, structure)


def test_a_plan_cuts_exactly_the_rows_and_columns_it_names() -> None:
    """Known without labels or masks: the weights that numpy slices by hand."""
    model, structure = analyse(chain())
    pruned = rewrite(structure, PruningPlan(keep={"conv_0": (0, 2, 5)}))
    before = {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value}
    after = {n: v.const_value.numpy() for n, v in pruned.graph.initializers.items() if v.const_value}
    rows = [0, 2, 5]
    assert np.array_equal(after["a"], before["a"][rows])
    assert np.array_equal(after["b"], before["b"][rows])
    assert np.array_equal(after["c"], before["c"][:, rows])
    assert np.array_equal(after["d"], before["d"])


def chain() -> onnx.ModelProto:
    return text_model(
        """(float[1,3,8,8] x) => (float[1,4,8,8] y) <
            float[8,3,3,3] a, float[8] b, float[4,8,1,1] c, float[4] d> {
            t = Conv<pads=[1,1,1,1]>(x, a, b)
            u = Relu(t)
            y = Conv(u, c, d)
        }"""
    )


@pytest.mark.parametrize("name", ["resnet18_small", "mobilenet_v2_small", "cifar_resnet8_pad_small"])
def test_pruned_equals_masked_to_rounding_in_float64(name: str, exported: Exported) -> None:
    model, structure = analyse(exported(name))
    plan = random_plan(structure, np.random.default_rng(5), least=0.3)
    pair = (masked_model(model, structure, plan), rewrite(structure, plan))
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    (expected,), (actual,) = (run_in_double(m, {"image": image}) for m in pair)
    assert expected.dtype == np.float64
    assert np.abs(actual - expected).max() <= 1e-9 * np.abs(expected).max()


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "shape"),
    [("detect/yunet_n_dynamic.onnx", (1, 3, 64, 64)), ("ocr/ppocrv4_det.onnx", (1, 3, 64, 64))],
)
def test_the_law_holds_in_float64_where_float32_saturates(name: str, shape: tuple[int, ...]) -> None:
    (key,) = zoo_structure(name)[1].shadow.inputs
    model, structure = analyse(zoo_path(name), {key: shape})
    feed = {key: np.random.default_rng(0).standard_normal(shape)}
    for seed, least in ((1, 0.5), (2, 0.8)):
        plan = random_plan(structure, np.random.default_rng(seed), least=least)
        pair = (masked_model(model, structure, plan), rewrite(structure, plan))
        expected, actual = (run_in_double(m, feed) for m in pair)
        for a, e in zip(actual, expected, strict=True):
            assert e.dtype == np.float64
            assert np.abs(a - e).max() <= 1e-9 * np.abs(e).max()


@pytest.mark.zoo
@pytest.mark.slow
def test_the_law_holds_in_float32_on_inputs_in_the_range_of_images() -> None:
    """Normal noise drives the outputs to 10⁵, where float32 is coarse; images in [0, 1] do not."""
    model, structure = zoo_structure("seg/agllnet_256_tf2onnx.onnx")
    ((key, shape),) = structure.shadow.inputs.items()
    feed = {key: np.random.default_rng(0).random(shape).astype(np.float32)}
    plan = random_plan(structure, np.random.default_rng(1), least=0.5)
    (expected,), (actual,) = (
        run(masked_model(model, structure, plan), feed),
        run(rewrite(structure, plan), feed),
    )
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


# -- (b) an empty plan changes nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_an_empty_plan_keeps_every_weight_bit_for_bit(name: str) -> None:
    model, structure = zoo_structure(name)
    pruned, evidence = prune_checked(model, structure, PruningPlan(keep={}))
    # What was fused is fused again, but the masked model is split: the same up to rounding.
    assert evidence.worst <= (1e-6 if structure.shadow.split else 0)
    kept = {n: v.const_value.tobytes() for n, v in pruned.graph.initializers.items() if v.const_value}
    for key, value in structure.shadow.unsplit.graph.initializers.items():
        assert value.const_value is not None
        assert kept[key] == value.const_value.tobytes()
    floats = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and list(v.uses())]
    for value in floats:
        if value.name in kept and value.const_value is not None:
            assert kept[value.name] == value.const_value.tobytes()


# -- (c) the pruned model has the same structure, with smaller sizes ----------------------------------------


def kept_heads(structure: Structure, plan: PruningPlan, dimension: Dimension) -> tuple[int, ...]:
    """Which heads of a width stay; a dimension that is no width has one row."""
    if dimension.heads is None:
        return (0,)
    return plan.keep.get(structure.dimensions[dimension.heads].name, tuple(range(dimension.rows)))


def sizes(structure: Structure, plan: PruningPlan) -> dict[str, int]:
    return {
        d.name: len(plan.keep.get(d.name, d.units)) // d.rows * len(kept_heads(structure, plan, d))
        for d in structure.dimensions
    }


@pytest.mark.parametrize("name", SOME)
def test_the_pruned_model_has_the_same_dimensions_with_the_kept_sizes(name: str) -> None:
    _, structure = zoo_structure(name)
    # A depthwise convolution of one channel is a plain convolution, so two units stay at least.
    plan = random_plan(structure, np.random.default_rng(3), blocks=False, fewest=2)
    _, again = analyse(rewrite(structure, plan), CNNS[name])
    assert {d.name: len(d.units) for d in again.dimensions} == sizes(structure, plan)
    assert {d.name: d.frozen is None for d in again.dimensions} == {
        d.name: d.frozen is None for d in structure.dimensions
    }
    assert [b.name for b in again.blocks] == [b.name for b in structure.blocks]


# -- (d) plans compose --------------------------------------------------------------------------------------


def composed(structure: Structure, first: PruningPlan, second: PruningPlan) -> PruningPlan:
    """The plan that keeps, of what ``first`` keeps, what ``second`` keeps."""
    keep = dict(first.keep)
    for dimension in structure.dimensions:
        if dimension.name in second.keep:
            units = first.keep.get(dimension.name, tuple(range(len(dimension.units))))
            heads, size = kept_heads(structure, first, dimension), dimension.count
            alive = [unit for unit in units if unit // size in heads]
            chosen = [alive[i] for i in second.keep[dimension.name]]
            # A head that is gone has as many units as the others, whichever they are.
            gone = (h for h in range(dimension.rows) if h not in heads)
            chosen += [h * size + i for h in gone for i in range(len(chosen) // len(heads))]
            keep[dimension.name] = tuple(sorted(chosen))
    return PruningPlan(keep=keep, removed_blocks=(*first.removed_blocks, *second.removed_blocks))


def weights(model: ir.Model) -> list[tuple[str, int, bytes]]:
    return [operand for operand in operands(model) if " float" in operand[0]]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("name", SOME)
def test_two_prunes_are_one_prune(name: str) -> None:
    _, structure = zoo_structure(name)
    rng = np.random.default_rng(4)
    first = random_plan(structure, rng, blocks=False, least=0.6, fewest=2)
    _, between = analyse(rewrite(structure, first), CNNS[name])
    second = random_plan(between, rng, least=0.6)
    twice = rewrite(between, second)
    once = rewrite(structure, composed(structure, first, second))
    assert weights(twice) == weights(once)
    # A shape that is computed at run time is corrected by one Where for each prune.
    assert [o for o in operators(twice) if o != "Where"] == [o for o in operators(once) if o != "Where"]
    feed = random_feeds(open_session(model_bytes(once), Runtime()), structure.shadow.inputs, 0)
    for a, b in zip(run(twice, feed), run(once, feed), strict=True):
        assert np.array_equal(a, b)


# -- (e) symbolic dimensions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "exporter"), EXPORTS)
def test_a_batch_is_as_good_as_single_images(name: str, exporter: str, exported: Exported) -> None:
    model, structure = analyse(exported(name, exporter, dynamic_batch=True))
    pruned = rewrite(structure, random_plan(structure, np.random.default_rng(6), least=0.3))
    assert [str(v.shape) for v in pruned.graph.inputs] == [str(v.shape) for v in model.graph.inputs]
    assert pruned.graph.inputs[0].shape is not None
    assert not isinstance(pruned.graph.inputs[0].shape[0], int)
    shape = (3, *structure.shadow.inputs["image"][1:])
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (batch,) = run(pruned, {"image": images})
    singles = np.concatenate([run(pruned, {"image": image[None]})[0] for image in images])
    assert batch.shape[0] == 3
    assert np.abs(batch - singles).max() <= 1e-5 * np.abs(singles).max()


@pytest.mark.parametrize(("sizes", "rows"), [("0, -1", 4), ("64, 72", 64)])
def test_of_a_batch_a_few_rows_are_verified_where_the_file_runs_so_few(
    sizes: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Reshape may hold the batch where the input promises any."""
    model = load_model(
        text_model(
            "(float[N,3,6,6] x) => (float[N,5] y)"
            f" <float[8,3,3,3] w, int64[2] to = {{{sizes}}}, float[72,5] v>"
            "{ a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)  b = Relu(a)"
            "  c = Reshape(b, to)  y = MatMul(c, v) }"
        )
    )
    structure = analyze(model, {}, 64)
    seen: list[int] = []
    drawn = verification.random_feeds

    def counted(inputs: object, shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
        seen.append(shapes["x"][0])
        return drawn(inputs, shapes, seed)

    monkeypatch.setattr(verification, "random_feeds", counted)
    images = np.random.default_rng(0).standard_normal((64, 3, 6, 6)).astype(np.float32)
    plan = PruningPlan(keep={structure.dimensions[structure.prunable[0]].name: (0, 2, 5)})
    evidence = verify(model, structure, rewrite(structure, plan), plan, feeds=[{"x": images}])
    assert evidence.verified
    assert evidence.inputs_tried == (6 if rows == 4 else 5)
    assert {n for n in seen if n not in (4, 8)} == (set() if rows == 4 else {64, 128})


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("detect/yunet_n_dynamic.onnx", (2, 3, 64, 160)),
        ("ocr/ppocrv4_det.onnx", (2, 3, 64, 160)),
        ("ocr/ppocrv4_rec.onnx", (2, 3, 48, 160)),
        ("cifar10/resnet20.onnx", (5, 3, 32, 32)),
        ("imagenet/tf_efficientnet_lite0_dynamo.onnx", (2, 3, 224, 224)),
    ],
)
def test_other_image_sizes_still_run(name: str, shape: tuple[int, ...]) -> None:
    model, structure = zoo_structure(name)
    plan = random_plan(structure, np.random.default_rng(7), least=0.8, blocks=False)
    pruned = rewrite(structure, plan)
    (key,) = structure.shadow.inputs
    feed = {key: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    expected, actual = run(masked_model(model, structure, plan), feed), run(pruned, feed)
    assert [a.shape for a in actual] == [e.shape for e in expected]
    for a, e in zip(actual, expected, strict=True):
        assert np.abs(a - e).max() <= (5e-2 if name in ILL_CONDITIONED else 1e-5) * np.abs(e).max()


# -- (f) what stays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_the_checker_passes_and_the_signature_stays(name: str) -> None:
    model, structure = zoo_structure(name)
    plan = random_plan(structure, np.random.default_rng(8))
    pruned = ir.to_proto(rewrite(structure, plan))
    onnx.checker.check_model(pruned, full_check=True)
    original = ir.to_proto(model)
    weights = {w.name for w in original.graph.initializer}
    assert [v for v in pruned.graph.input] == [v for v in original.graph.input if v.name not in weights]
    assert list(pruned.graph.output) == list(original.graph.output)
    assert list(pruned.opset_import) == list(original.opset_import)
    known = {n.name for n in original.graph.node}
    for node in pruned.graph.node:
        stem, _, made = node.name.rpartition("/")
        # A fused projection becomes one for each part, named after the nodes that it is made of.
        split = bool(structure.shadow.split) and stem in known and made[:-1] in ("part_", "target_")
        assert node.name in known or made.startswith("pruned_") or split


def test_names_metadata_and_doc_strings_stay() -> None:
    original = chain()
    original.producer_name, original.producer_version, original.domain = "maker", "1.2", "org.example"
    original.model_version, original.doc_string = 7, "of the model"
    original.graph.doc_string = "of the graph"
    helper.set_model_props(original, {"classes": "cat,dog"})
    for holder in (original.graph, original.graph.node[0]):
        entry = holder.metadata_props.add()
        entry.key, entry.value = "where", "here"
    original.graph.node[0].doc_string = "of the node"
    original.graph.initializer[0].doc_string = "of the weight"
    _, structure = analyse(original)
    pruned = ir.to_proto(rewrite(structure, PruningPlan(keep={"conv_0": (1, 3)})))
    before, after = onnx.ModelProto(), onnx.ModelProto()
    before.CopyFrom(original)
    after.CopyFrom(pruned)
    for proto in (before, after):
        del proto.graph.value_info[:]
    notes, kept_notes = ({w.name: w.doc_string for w in p.graph.initializer} for p in (before, after))
    assert kept_notes == notes
    for proto in (before, after):
        del proto.graph.initializer[:]
        for node in proto.graph.node:  # an empty domain and none at all are the same
            node.ClearField("domain")
    assert str(after) == str(before)


# -- (g) every block, alone ---------------------------------------------------------------------------------


def branch_zeroed(model: ir.Model, output: str, branch: str) -> onnx.ModelProto:
    """The original with zeros on the branch side of one Add, made without the package."""
    proto = onnx.ModelProto.FromString(model_bytes(model))
    zero = numpy_helper.from_array(np.zeros((), np.float32), "the_zero")
    proto.graph.initializer.append(zero)
    index = next(i for i, n in enumerate(proto.graph.node) if output in n.output)
    joint = proto.graph.node[index]
    joint.input[list(joint.input).index(branch)] = "zeroed"
    proto.graph.node.insert(index, helper.make_node("Mul", [branch, "the_zero"], ["zeroed"]))
    return proto


@pytest.mark.parametrize("name", SOME)
def test_removing_a_block_is_zeroing_its_branch(name: str) -> None:
    model, structure = zoo_structure(name)
    feed = random_feeds(open_session(model_bytes(model), Runtime()), structure.shadow.inputs, 0)
    dense = run(model, feed)
    for block in structure.blocks:
        pruned = rewrite(structure, PruningPlan(keep={}, removed_blocks=(block.name,)))
        output = structure.shadow.operations[block.joint].outputs[0]
        expected, actual = run(branch_zeroed(model, output, block.branch), feed), run(pruned, feed)
        for a, e in zip(actual, expected, strict=True):
            assert np.abs(a - e).max() <= 1e-6 * np.abs(e).max()
        assert any(np.abs(a - d).max() > 0 for a, d in zip(actual, dense, strict=True))
        assert len(pruned.graph) <= len(structure.shadow.model.graph) - len(block.operations)


# -- (h) the law notices ------------------------------------------------------------------------------------

RESIDUAL = """(float[1,3,8,8] x) => (float[1,10] y) <
        float[8,3,3,3] w0, float[8] b0, float[6,8,1,1] w1, float[6] b1, float[6,1,3,3] w2, float[6] b2,
        float[8,6,1,1] w3, float[8] b3, float[8,8,1,1] w4, float[8] b4, float[8,8,1,1] w5, float[8] b5,
        float[8] scale, float[8] shift, float[8] mean, float[8] var, float[10,8] w6, float[10] b6> {
    t0 = Conv<pads=[1,1,1,1]>(x, w0, b0)
    r0 = Relu(t0)
    t1 = Conv(r0, w1, b1)
    s1 = Sigmoid(t1)
    t2 = Conv<pads=[1,1,1,1], group=6>(s1, w2, b2)
    t3 = Conv(t2, w3, b3)
    a1 = Add(r0, t3)
    t4 = Conv(a1, w4, b4)
    r4 = Relu(t4)
    n4 = BatchNormalization(r4, scale, shift, mean, var)
    t5 = Conv(n4, w5, b5)
    a2 = Add(t5, a1)
    p = GlobalAveragePool(a2)
    f = Flatten(p)
    y = Gemm<transB=1>(f, w6, b6)
}"""


def noticed(model: ir.Model, structure: Structure, broken: ir.Model, plan: PruningPlan) -> bool:
    """Whether ``broken``, a valid model that runs, fails the law and is refused."""
    onnx.checker.check_model(model_bytes(broken), full_check=True)
    run(broken, random_feeds(open_session(model_bytes(model), Runtime()), structure.shadow.inputs, 0))
    evidence = verify(model, structure, broken, plan)
    if evidence.verified:
        return False
    with pytest.raises(VerificationError, match="masked original"):
        require(evidence)
    return True


def sites(structure: Structure) -> list[tuple[int, int, int]]:
    """(operation, slot, axis) of every initializer axis that can be cut."""
    prunable = {unit for i in structure.prunable for unit in structure.dimensions[i].units}
    return [(s.operation, s.slot, s.axis) for s in structure.graph.sites if prunable & set(s.labels.tolist())]


SITES = range(len(sites(analyse(text_model(RESIDUAL))[1])))


@pytest.mark.parametrize("which", SITES)
def test_every_wrongly_cut_weight_is_noticed(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each initializer axis in turn: as many indices as planned, but the wrong ones."""
    model, structure = analyse(text_model(RESIDUAL))
    keep = {structure.dimensions[i].name: (0, 1, 4) for i in structure.prunable}
    plan = PruningPlan(keep=keep)
    assert len(keep) == 3
    broken = cut_wrongly(monkeypatch, structure, plan, sites(structure)[which])
    assert operands(broken) != operands(rewrite(structure, plan))
    assert noticed(model, structure, broken, plan)


@pytest.mark.zoo
@pytest.mark.parametrize("name", QUICK)
def test_a_wrongly_cut_weight_of_a_real_network_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, structure = zoo_structure(name)
    rng = np.random.default_rng(9)
    plan = random_plan(structure, rng, blocks=False, least=0.8)
    removed = removed_classes(plan, structure)
    inward = [s for s in structure.graph.sites if s.role == "in" and removed[s.labels].any()]
    site = inward[int(rng.integers(len(inward)))]
    broken = cut_wrongly(monkeypatch, structure, plan, (site.operation, site.slot, site.axis))
    assert noticed(model, structure, broken, plan)


def test_a_changed_bias_is_noticed() -> None:
    model, structure = analyse(text_model(RESIDUAL))
    plan = PruningPlan(keep={structure.dimensions[i].name: (1, 3) for i in structure.prunable})
    broken = rewrite(structure, plan)
    bias = broken.graph.initializers["b1"]
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() + np.asarray([0, 0.05], np.float32), name="b1")
    assert noticed(model, structure, broken, plan)


def test_split_sizes_in_the_wrong_order_are_noticed() -> None:
    proto = text_model(
        """(float[1,3,8,8] x) => (float[1,4,8,8] y) <
            float[8,3,1,1] a, int64[2] s = {4, 4}, float[4,8,1,1] c> {
            t = Conv(x, a)
            u, v = Split<axis=1>(t, s)
            p = Sigmoid(u)
            q = Relu(v)
            j = Concat<axis=1>(p, q)
            y = Conv(j, c)
        }"""
    )
    model, structure = analyse(proto)
    first, second = (structure.dimensions[i].name for i in structure.prunable)
    plan = PruningPlan(keep={first: (0,), second: (1, 2, 3)})
    broken = rewrite(structure, plan)
    prune_checked(model, structure, plan)
    split = next(n for n in broken.graph if n.op_type == "Split")
    operand = split.inputs[1]
    assert operand is not None
    assert operand.const_value is not None
    assert operand.const_value.numpy().tolist() == [1, 3]
    operand.const_value = ir.tensor(np.asarray([3, 1], np.int64), name=operand.name)
    assert noticed(model, structure, broken, plan)


def test_a_removed_block_with_another_shortcut_is_noticed() -> None:
    model, structure = analyse(text_model(RESIDUAL))
    _, second = structure.blocks
    plan = PruningPlan(keep={}, removed_blocks=(second.name,))
    prune_checked(model, structure, plan)
    broken = rewrite(structure, plan)
    values = {v.name: v for node in broken.graph for v in node.outputs}
    pool = next(n for n in broken.graph if n.op_type == "GlobalAveragePool")
    assert pool.inputs[0] is values["a1"]
    pool.replace_input_with(0, values["r0"])
    assert noticed(model, structure, broken, plan)


def test_a_removed_block_too_many_or_too_few_is_noticed() -> None:
    model, structure = analyse(text_model(RESIDUAL))
    first, second = (PruningPlan(keep={}, removed_blocks=(b.name,)) for b in structure.blocks)
    assert noticed(model, structure, rewrite(structure, first), second)
    assert noticed(model, structure, rewrite(structure, first), PruningPlan(keep={}))
    assert noticed(model, structure, rewrite(structure, PruningPlan(keep={})), first)


def test_a_model_that_does_not_run_is_refused() -> None:
    model, structure = analyse(text_model(RESIDUAL))
    plan = PruningPlan(keep={"conv_0": (0, 1, 2)})
    broken = rewrite(structure, plan)
    weight = broken.graph.initializers["w1"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy()[:, :2], name="w1")
    weight.shape = ir.Shape([6, 2, 1, 1])
    with pytest.raises(VerificationError, match=r"does not (load|run)"):
        verify(model, structure, broken, plan)


def test_another_signature_is_refused() -> None:
    model, structure = analyse(text_model(RESIDUAL))
    plan = PruningPlan(keep={})
    renamed = rewrite(structure, plan)
    renamed.graph.inputs[0].name = "picture"
    with pytest.raises(VerificationError, match="inputs or outputs"):
        verify(model, structure, renamed, plan)


def test_require_accepts_what_is_verified() -> None:
    model, structure = analyse(text_model(RESIDUAL))
    evidence = verify(model, structure, rewrite(structure, PruningPlan(keep={})), PruningPlan(keep={}))
    assert isinstance(evidence, Evidence)
    require(evidence)


DEAD = """
(float[1, 4, 6, 6] x) => (float[1, 5] y, float[1, 3] flat)
<
    float[6, 4, 1, 1] w1,
    float[6] low = {-1e6, -1e6, -1e6, -1e6, -1e6, -1e6},
    float[5, 6] w2,
    float[3, 6] w3
>
{
    h = Conv(x, w1)
    p = GlobalAveragePool(h)
    f = Flatten(p)
    y = Gemm<transB=1>(f, w2)
    dead = Add(f, low)
    r = Relu(dead)
    flat = Gemm<transB=1>(r, w3)
}"""


def test_an_output_that_no_input_changes_is_reported() -> None:
    """All units behind the Relu are off: whatever is cut there, the output stays the same."""
    model, structure = analyse(text_model(DEAD))
    plan = PruningPlan(keep={structure.dimensions[structure.prunable[0]].name: (0, 2, 3)})
    evidence = verify(model, structure, rewrite(structure, plan), plan)
    assert evidence.verified
    assert evidence.constant == ("flat",)
    assert verify_document(evidence, None)["constant_outputs"] == ["flat"]


@pytest.mark.zoo
def test_float64_decides_where_the_rounding_of_float32_hides_the_law() -> None:
    model, structure = zoo_structure("ocr/ppocrv4_rec.onnx")
    plan = random_plan(structure, np.random.default_rng(11), least=0.2)
    evidence = verify(model, structure, rewrite(structure, plan), plan)
    assert evidence.worst > TOLERANCE
    assert evidence.judged is not None
    assert evidence.judged.startswith("compared in float64")
    assert evidence.verified
