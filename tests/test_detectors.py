"""Laws of every prune on detectors and a segmenter: shared heads, joined maps, norms over channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from zoo import analyse, cut_wrongly, informative, prune_checked, random_plan

from onnx_mdp.analysis.structure import Extent, Structure, extent
from onnx_mdp.plan import PruningPlan
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import verify

Exported = Callable[..., Path]

# Prunable and all dimensions, and blocks; only what the outputs are made of is frozen.
FOUND: Mapping[str, tuple[int, int, int]] = {
    "ssd512_small": (21, 26, 0),
    "yolov8n_small": (59, 62, 6),
    "retinanet_small": (63, 68, 12),
    "unet_small": (22, 23, 0),
}
# The exporter on torch.export takes seconds a model.
EXPORTS = [
    pytest.param(
        name,
        exporter,
        dynamic,
        id=f"{name}-{exporter}-{'dynamic' if dynamic else 'static'}",
        marks=[] if (exporter, dynamic) in quick else [pytest.mark.slow],
    )
    for name, quick in {
        "ssd512_small": [("torchscript", False)],
        "yolov8n_small": [("torchscript", False)],
        "retinanet_small": [("torchscript", False)],
        "unet_small": [("torchscript", True)],
    }.items()
    for exporter in ("torchscript", "dynamo")
    for dynamic in (False, True)
]


@pytest.mark.parametrize(("name", "exporter", "dynamic"), EXPORTS)
def test_pruned_equals_masked_and_almost_all_can_be_pruned(
    name: str, exporter: str, dynamic: bool, exported: Exported, request: pytest.FixtureRequest
) -> None:
    model, structure = analyse(exported(name, exporter, dynamic_batch=dynamic))
    assert structure.graph.unsupported == {}
    assert (len(structure.prunable), len(structure.dimensions), len(structure.blocks)) == FOUND[name]
    reasons = {d.frozen for d in structure.dimensions if d.frozen}
    assert {reason.split(" '")[0] for reason in reasons} <= {"graph output logits", "Softmax"}
    informed = 0
    plans = 6 if request.node.get_closest_marker("slow") else 2
    for seed in range(plans):
        plan = random_plan(structure, np.random.default_rng(seed), least=0.2, blocks=seed % 2 == 1)
        pruned, evidence = prune_checked(model, structure, plan)
        assert evidence.worst <= 1e-5
        assert evidence.inputs_tried == (5 if dynamic else 4)
        informed += informative(pruned, structure)
    assert informed >= plans - 1


def readers(structure: Structure, tensor: str) -> list[str]:
    """The dimensions that a weight makes, one for each of its readers."""
    return [
        d.name
        for d in structure.dimensions
        if any(m.tensor == tensor and (m.role, m.axis) == ("out", 0) for m in d.members)
    ]


@pytest.mark.parametrize("alike", [True, False])
def test_a_head_is_shared_as_long_as_its_levels_keep_the_same(alike: bool, exported: Exported) -> None:
    """Each level may keep other units; a weight is stored once for all levels that keep the same ones."""
    model, structure = analyse(exported("retinanet_small"))
    levels = readers(structure, "scores.conv1.weight")
    assert len(levels) == 5
    pyramid = [d.name for d in structure.dimensions if "pyramid" in d.name]
    keep = dict.fromkeys(pyramid, (0, 3, 5, 6, 8, 9, 11, 12))
    keep |= {name: (0, 2, 3 if alike else 4 + level, 15) for level, name in enumerate(levels)}
    pruned, _ = prune_checked(model, structure, PruningPlan(keep=keep))
    copies = [name for name in pruned.graph.initializers if name.startswith("scores.conv1.weight")]
    assert len(copies) == (1 if alike else 5)


def test_maps_that_are_joined_keep_what_each_of_them_keeps(exported: Exported) -> None:
    """In C2f one map is split and concatenated again, its second half once more for each shortcut."""
    _, structure = analyse(exported("yolov8n_small", dynamic_batch=True))
    first, second = (structure.index(f"/stages.1/c2f/enter/conv/Conv{end}") for end in ("", "#2"))
    (joined,) = (op for op in structure.shadow.operations if op.name == "/stages.1/c2f/Concat")
    wide = extent(structure, joined.outputs[0], 1)
    assert wide == Extent(fixed=0, terms=(((first,), 1), ((second,), 3)))


def test_groups_of_a_norm_keep_as_many_channels_each(exported: Exported) -> None:
    model, structure = analyse(exported("unet_small"))
    widths = [d for d in structure.dimensions if d.heads is not None]
    assert {structure.dimensions[d.heads or 0].kind for d in widths} == {"groups"}
    assert [(d.rows, d.count) for d in widths] == [(4, n) for n in (2, 2, 4, 4, 8, 8, 4, 4, 2, 2)]
    keep = {d.name: tuple(row * d.count + (row % d.count) for row in range(4)) for d in widths}
    prune_checked(model, structure, PruningPlan(keep=keep))


@pytest.mark.parametrize("name", ["ssd512_small", "unet_small"])
def test_a_parameter_of_a_norm_that_is_cut_wrongly_is_noticed(
    name: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learnt scale of the L2 norm, and the scale of a group norm."""
    model, structure = analyse(exported(name))
    norms = [s for s in structure.graph.sites if structure.shadow.operations[s.operation].op_type == "Mul"]
    plan = random_plan(structure, np.random.default_rng(1), blocks=False, least=0.4)
    site = norms[0]
    broken = cut_wrongly(monkeypatch, structure, plan, (site.operation, site.slot, site.axis))
    assert verify(model, structure, rewrite(structure, plan), plan).verified
    assert not verify(model, structure, broken, plan).verified
