"""Laws of every prune on transformers of both exporters: dimensions of all five kinds, blocks, the split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from zoo import analyse, cut_wrongly, informative, operands, prune_checked, random_plan, run

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import VerificationError
from onnx_mdp.model_io import model_bytes
from onnx_mdp.plan import PruningPlan
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import require, verify

Exported = Callable[..., Path]

# Kind, units (in each head), heads of all prunable dimensions, in graph order.
DIMENSIONS = {
    "deit_micro": """embedding 24 x1
        heads 3 x1, qk 8 x3, value 8 x3, mlp 96 x1
        heads 3 x1, qk 8 x3, value 8 x3, mlp 96 x1""",
    "deit_distilled_micro": """embedding 32 x1
        heads 4 x1, qk 8 x4, value 8 x4, mlp 128 x1
        heads 4 x1, qk 8 x4, value 8 x4, mlp 128 x1""",
    "vit_micro": """embedding 32 x1
        heads 4 x1, qk 8 x4, value 8 x4, mlp 128 x1
        heads 4 x1, qk 8 x4, value 8 x4, mlp 128 x1""",
    "convnext_micro": """embedding 8 x1, mlp 32 x1, embedding 16 x1, mlp 64 x1, mlp 64 x1""",
    "swin_micro": """embedding 16 x1
        heads 2 x1, qk 8 x2, value 8 x2, mlp 64 x1
        heads 2 x1, qk 8 x2, value 8 x2, mlp 64 x1
        embedding 32 x1
        heads 4 x1, qk 8 x4, value 8 x4, mlp 128 x1
        heads 4 x1, qk 8 x4, value 8 x4, mlp 128 x1""",
    "pvt_micro": """embedding 16 x1
        heads 2 x1, qk 8 x2, value 8 x2, channel 16 x1, mlp 128 x1
        embedding 24 x1
        heads 3 x1, qk 8 x3, value 8 x3, mlp 192 x1
        heads 3 x1, qk 8 x3, value 8 x3, mlp 192 x1""",
    "detr_micro": """channel 8 x1, channel 8 x1, channel 8 x1, embedding 32 x1
        heads 4 x1, qk 8 x4, value 8 x4, mlp 48 x1
        heads 4 x1, qk 8 x4, value 8 x4, mlp 48 x1
        embedding 32 x1
        heads 4 x1, qk 8 x4, value 8 x4
        heads 4 x1, qk 8 x4, value 8 x4, mlp 48 x1
        heads 4 x1, qk 8 x4, value 8 x4
        heads 4 x1, qk 8 x4, value 8 x4, mlp 48 x1
        channel 32 x1""",
}
BLOCKS = {
    "deit_micro": "attention mlp " * 2,
    "deit_distilled_micro": "attention mlp " * 2,
    "vit_micro": "attention mlp " * 2,
    "convnext_micro": "conv " * 3,
    "swin_micro": "attention mlp " * 4,
    "pvt_micro": "attention conv " * 3,
    # The first decoder layer attends to constants alone: what it is added to is no ancestor of it.
    "detr_micro": "attention mlp attention mlp attention mlp attention attention mlp",
}
FUSED = {"deit_micro": 2, "deit_distilled_micro": 2, "swin_micro": 4, "pvt_micro": 3}
# The exporter on torch.export takes seconds a model, and a symbolic batch doubles what verification runs.
QUICK = ("deit_micro", "vit_micro")
EXPORTS = [
    pytest.param(
        name,
        exporter,
        dynamic,
        id=f"{name}-{exporter}-{'dynamic' if dynamic else 'static'}",
        marks=[] if name in QUICK or (exporter, dynamic) == ("torchscript", False) else [pytest.mark.slow],
    )
    for name in DIMENSIONS
    for exporter in ("torchscript", "dynamo")
    for dynamic in (False, True)
]


def golden(structure: Structure) -> list[str]:
    found = [structure.dimensions[i] for i in structure.prunable]
    return [f"{d.kind} {d.count} x{d.rows}" for d in found]


@pytest.mark.parametrize(("name", "exporter", "dynamic"), EXPORTS)
def test_every_kind_of_dimension_is_found(
    name: str, exporter: str, dynamic: bool, exported: Exported
) -> None:
    _, structure = analyse(exported(name, exporter, dynamic_batch=dynamic))
    assert structure.graph.unsupported == {}
    wanted = [part.strip() for part in DIMENSIONS[name].replace("\n", ",").split(",")]
    if name == "detr_micro" and not dynamic:  # each reader of the learned queries may keep other columns
        wanted[12:16] = ["channel 32 x1", *wanted[13:16], "channel 32 x1", "channel 32 x1", wanted[12]]
    assert golden(structure) == wanted
    assert [block.kind for block in structure.blocks] == BLOCKS[name].split()
    assert {d.frozen for d in structure.dimensions} == {None, "graph output logits"}
    for index in structure.prunable:
        dimension = structure.dimensions[index]
        if name != "detr_micro":
            assert (dimension.block is None) == (dimension.kind == "embedding")


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 20), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("name", "exporter", "dynamic"), EXPORTS)
def test_pruned_equals_masked_under_random_plans(
    name: str, exporter: str, dynamic: bool, seeds: range, exported: Exported
) -> None:
    model, structure = analyse(exported(name, exporter, dynamic_batch=dynamic))
    informed = 0
    for seed in seeds:
        plan = random_plan(structure, np.random.default_rng(seed), least=0.2, blocks=seed % 2 == 1)
        pruned, evidence = prune_checked(model, structure, plan)
        assert evidence.worst <= 1e-5
        assert evidence.inputs_tried == (5 if dynamic else 4)
        informed += informative(pruned, structure)
    assert informed >= len(seeds) // 2


@pytest.mark.parametrize(("name", "exporter", "dynamic"), EXPORTS)
def test_removing_a_block_is_zeroing_its_branch(
    name: str, exporter: str, dynamic: bool, exported: Exported
) -> None:
    model, structure = analyse(exported(name, exporter, dynamic_batch=dynamic))
    image = {"image": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)}
    dense = run(model, image)
    for block in structure.blocks:
        pruned = rewrite(structure, PruningPlan(keep={}, removed_blocks=(block.name,)))
        output = structure.shadow.operations[block.joint].outputs[0]
        proto = onnx.ModelProto.FromString(model_bytes(model))
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "the_zero"))
        index = next(i for i, n in enumerate(proto.graph.node) if output in n.output)
        joint = proto.graph.node[index]
        joint.input[list(joint.input).index(block.branch)] = "zeroed"
        proto.graph.node.insert(index, helper.make_node("Mul", [block.branch, "the_zero"], ["zeroed"]))
        (expected,), (actual,) = run(proto, image), run(pruned, image)
        assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()
        assert np.abs(actual - dense[0]).max() > 0


@pytest.mark.parametrize(("name", "exporter", "dynamic"), EXPORTS)
def test_a_batch_is_as_good_as_single_images(
    name: str, exporter: str, dynamic: bool, exported: Exported
) -> None:
    model, structure = analyse(exported(name, exporter, dynamic_batch=dynamic))
    pruned = rewrite(structure, random_plan(structure, np.random.default_rng(6), least=0.3, blocks=False))
    assert [str(v.shape) for v in pruned.graph.inputs] == [str(v.shape) for v in model.graph.inputs]
    if dynamic:
        images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
        (batch,) = run(pruned, {"image": images})
        singles = np.concatenate([run(pruned, {"image": image[None]})[0] for image in images])
        assert np.abs(batch - singles).max() <= 1e-5 * np.abs(singles).max()


@pytest.mark.parametrize(("name", "exporter", "dynamic"), EXPORTS)
def test_splitting_fused_projections_changes_no_output(
    name: str, exporter: str, dynamic: bool, exported: Exported
) -> None:
    model, structure = analyse(exported(name, exporter, dynamic_batch=dynamic))
    assert len(structure.shadow.split) == FUSED.get(name, 0)
    images = np.random.default_rng(0).standard_normal((3 if dynamic else 1, 3, 32, 32)).astype(np.float32)
    (before,), (after,) = (run(m, {"image": images}) for m in (model, structure.shadow.model))
    assert np.abs(after - before).max() <= 1e-6 * np.abs(before).max()


@pytest.mark.parametrize(
    ("exporter", "dynamic"), [("torchscript", False), ("torchscript", True), ("dynamo", True)]
)
def test_the_attention_of_torch_is_split(exporter: str, dynamic: bool, tmp_path: Path) -> None:
    """``nn.MultiheadAttention``, as in torchvision's ViT, moves its parts through axes of extent 1."""
    torch = pytest.importorskip("torch")
    from models.export import export_module

    class Network(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 24, 8, 8)
            self.attention = torch.nn.MultiheadAttention(24, 3, batch_first=True)
            self.head = torch.nn.Linear(24, 5)

        def forward(self, image: Any) -> Any:
            x = self.patches(image).flatten(2).transpose(1, 2)
            mixed, _ = self.attention(x, x, x, need_weights=False)
            return self.head((x + mixed).mean(1))

    torch.manual_seed(0)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it has no ONNX form
    try:
        path = export_module(Network(), (3, 32, 32), tmp_path / "model.onnx", exporter, dynamic)  # type: ignore[arg-type]
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    model, structure = analyse(path)
    assert len(structure.shadow.split) == 1
    assert golden(structure) == ["channel 24 x1", "heads 3 x1", "qk 8 x3", "value 8 x3"]
    for seed in range(8):
        _, evidence = prune_checked(model, structure, random_plan(structure, np.random.default_rng(seed)))
        assert evidence.worst <= 1e-5


GROUPED = [
    pytest.param("expand", "torchscript", 17, id="expand-torchscript-17"),
    pytest.param("repeat", "torchscript", 17, id="repeat-torchscript-17"),
    *(
        pytest.param(form, "dynamo", opset, id=f"{form}-dynamo-{opset}", marks=pytest.mark.slow)
        for form in ("expand", "repeat", "gqa")
        for opset in (18, 23)
    ),
]


@pytest.mark.parametrize(("form", "exporter", "opset"), GROUPED)
def test_a_key_head_goes_with_its_group_of_query_heads(
    form: str, exporter: str, opset: int, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    from models.export import export_module

    class Network(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 32, 8, 8)
            self.query, self.mixed = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
            self.key, self.value = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16)
            self.head = torch.nn.Linear(32, 5)

        def forward(self, image: Any) -> Any:
            x = self.patches(image).flatten(2).transpose(1, 2)
            batch, tokens, _ = x.shape
            layers = (self.query, self.key, self.value)
            q, k, v = (layer(x).view(batch, tokens, -1, 8).transpose(1, 2) for layer in layers)
            if form == "expand":
                wide = (batch, 2, 2, tokens, 8)
                k, v = (t[:, :, None].expand(wide).reshape(batch, 4, tokens, 8) for t in (k, v))
            elif form == "repeat":
                k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            attend = torch.nn.functional.scaled_dot_product_attention
            out = attend(q, k, v, enable_gqa=True) if form == "gqa" else attend(q, k, v)
            return self.head((x + self.mixed(out.transpose(1, 2).reshape(x.shape))).mean(1))

    torch.manual_seed(0)
    path = export_module(Network(), (3, 32, 32), tmp_path / "model.onnx", exporter, True, opset=opset)  # type: ignore[arg-type]
    model, structure = analyse(path)
    assert golden(structure) == ["channel 32 x1", "heads 2 x1", "qk 8 x2", "value 8 x2"]
    for seed in range(8):
        _, evidence = prune_checked(model, structure, random_plan(structure, np.random.default_rng(seed)))
        assert evidence.worst <= 1e-5


def test_a_file_that_a_runtime_optimised_says_so(exported: Exported, tmp_path: Path) -> None:
    """Its fused operators are frozen, and what is around them is still pruned by the law."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that such a file fits one machine
    onnxruntime.InferenceSession(exported("vit_micro"), options, providers=["CPUExecutionProvider"])
    model, structure = analyse(tmp_path / "optimised.onnx")
    assert structure.graph.unsupported
    for operator, reason in structure.graph.unsupported.items():
        assert operator.startswith("com.microsoft::")
        assert "prune the file from before" in reason
    assert structure.prunable
    for seed in range(4):
        prune_checked(model, structure, random_plan(structure, np.random.default_rng(seed), least=0.2))


@pytest.mark.parametrize("name", DIMENSIONS)
def test_the_pruned_model_has_the_same_dimensions_with_the_kept_sizes(name: str, exported: Exported) -> None:
    _, structure = analyse(exported(name))
    plan = random_plan(structure, np.random.default_rng(3), blocks=False, fewest=2, least=0.3)
    _, again = analyse(rewrite(structure, plan))
    kept = {i: len(plan.keep.get(d.name, d.units)) // d.rows for i, d in enumerate(structure.dimensions)}
    assert [d.count for d in again.dimensions] == list(kept.values())
    assert [(d.kind, d.frozen) for d in again.dimensions] == [
        (d.kind, d.frozen) for d in structure.dimensions
    ]
    assert len(again.blocks) == len(structure.blocks)


def _inward_sites(structure: Structure) -> list[tuple[int, int, int]]:
    return [(s.operation, s.slot, s.axis) for s in structure.graph.sites if s.role in ("in", "out")]


@pytest.mark.parametrize("which", range(1, 26, 3))
def test_a_wrongly_cut_weight_is_noticed(
    which: int, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many indices as planned, but the wrong ones, along one axis of one weight at a time."""
    model, structure = analyse(exported("deit_micro"))
    plan = random_plan(structure, np.random.default_rng(4), blocks=False, least=0.4)
    broken = cut_wrongly(monkeypatch, structure, plan, _inward_sites(structure)[which])
    if operands(broken) == operands(rewrite(structure, plan)):
        pytest.skip("the plan leaves this axis as it is")
    evidence = verify(model, structure, broken, plan)
    assert not evidence.verified
    with pytest.raises(VerificationError, match="masked original"):
        require(evidence)


def test_widths_that_are_shuffled_between_heads_are_noticed(exported: Exported) -> None:
    """Equal counts, valid shapes, a model that runs: the query of one head meets the key of another."""
    model, structure = analyse(exported("vit_micro"))
    dimension = next(
        structure.dimensions[i] for i in structure.prunable if structure.dimensions[i].kind == "qk"
    )
    keep = tuple(row * 8 + unit for row in range(4) for unit in ((row, row + 2, row + 4)))
    plan = PruningPlan(keep={dimension.name: keep})
    pruned, _ = prune_checked(model, structure, plan)
    weight = next(
        pruned.graph.initializers[m.tensor] for m in dimension.members if m.role == "out" and m.axis == 1
    )
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    weight.const_value = ir.tensor(np.roll(array, 3, axis=1), name=weight.name)
    assert not verify(model, structure, pruned, plan).verified
