"""Laws of residual blocks: which are found, which exclude themselves, and that all can go at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from zoo import analyse, prune_checked, random_plan, run, text_model, zoo_structure

from onnx_mdp.plan import PruningPlan

WEIGHTS = "float[8,8,1,1] a, float[8,8,1,1] b, float[8,8,1,1] c, float[8,8,1,1] d"


def residual(body: str) -> str:
    return f"(float[1,8,6,6] x) => (float[1,8,6,6] y) <{WEIGHTS}> {{ {body} }}"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18_small", 5),
        ("resnet50_small", 12),
        # Narrow networks have equal widths in neighbouring stages; the full ones have 10 and 9 blocks.
        ("mobilenet_v2_small", 11),
        ("mobilenet_v1_small", 0),
        ("efficientnet_b0_small", 11),
        ("cifar_resnet8_small", 1),
    ],
)
def test_known_networks(name: str, count: int, exported: Callable[..., Path]) -> None:
    model, structure = analyse(exported(name))
    assert len(structure.blocks) == count
    assert {b.kind for b in structure.blocks} <= {"conv"}
    everything = PruningPlan(keep={}, removed_blocks=tuple(b.name for b in structure.blocks))
    prune_checked(model, structure, everything)


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar10/resnet20.onnx", 7),  # the two option-A shortcuts are computed
        ("imagenet/mobilenet_v2_tv.onnx", 10),
        ("imagenet/mobilenet_v1_0.5_160_tf2onnx.onnx", 0),
        ("imagenet/squeezenet1.1.onnx", 0),
    ],
)
def test_known_files(name: str, count: int) -> None:
    assert len(zoo_structure(name)[1].blocks) == count


def test_a_block_says_where_it_begins_and_ends() -> None:
    _, structure = analyse(
        text_model(residual("r = Relu(x) p = Conv(r, a) q = Conv(p, b) s = Add(q, r) y = Conv(s, c)"))
    )
    (block,) = structure.blocks
    operations = structure.shadow.operations
    assert operations[block.joint].op_type == "Add"
    assert (block.shortcut, block.branch) == ("r", "q")
    assert [operations[i].outputs[0] for i in block.operations] == ["p", "q"]
    inner = next(d for d in structure.dimensions if d.producer == block.operations[0])
    assert inner.block == block.name


@pytest.mark.parametrize(
    "body",
    [
        "r = Relu(x) p = Conv(r, a) q = Conv(r, b) s = Add(p, q) y = Conv(s, c)",
        "r = Relu(x) p = Sigmoid(r) s = Add(p, r) y = Conv(s, c)",
        "r = Relu(x) p = Conv(r, a) s = Mul(p, r) y = Conv(s, c)",
        "r = Relu(x) s = Add(r, r) y = Conv(s, c)",
    ],
    ids=["computed shortcut", "no weight", "not a sum", "itself"],
)
def test_what_is_no_block(body: str) -> None:
    _, structure = analyse(text_model(residual(body)))
    assert structure.blocks == ()


def test_a_branch_that_is_an_output_is_no_block() -> None:
    text = f"""(float[1,8,6,6] x) => (float[1,8,6,6] y, float[1,8,6,6] p) <{WEIGHTS}> {{
        p = Conv(x, a) s = Add(p, x) y = Conv(s, c)
    }}"""
    assert analyse(text_model(text))[1].blocks == ()


def test_a_branch_read_elsewhere_keeps_what_is_read() -> None:
    body = "r = Relu(x) p = Conv(r, a) q = Conv(p, b) s = Add(q, r) t = Add(s, p) y = Conv(t, c)"
    model, structure = analyse(text_model(residual(body)))
    block = next(b for b in structure.blocks if b.shortcut == "r" and b.branch == "q")
    assert [structure.shadow.operations[i].outputs[0] for i in block.operations] == ["q"]
    prune_checked(model, structure, PruningPlan(keep={}, removed_blocks=(block.name,)))


def test_of_nested_blocks_the_inner_is_found() -> None:
    body = (
        "r = Relu(x) p = Conv(r, a) q = Conv(p, b) s = Add(q, p) k = Conv(s, d) t = Add(k, r) y = Conv(t, c)"
    )
    model, structure = analyse(text_model(residual(body)))
    assert [b.shortcut for b in structure.blocks] == ["p"]
    prune_checked(model, structure, PruningPlan(keep={}, removed_blocks=(structure.blocks[0].name,)))


def test_blocks_never_overlap_and_any_subset_can_go() -> None:
    body = (
        "r = Relu(x) p = Conv(r, a) s = Add(p, r) q = Conv(s, b) t = Add(s, q) k = Conv(t, d) u = Add(k, t) "
        "y = Conv(u, c)"
    )
    model, structure = analyse(text_model(residual(body)))
    assert len(structure.blocks) == 3
    for choice in range(8):
        removed = tuple(b.name for i, b in enumerate(structure.blocks) if choice >> i & 1)
        prune_checked(model, structure, PruningPlan(keep={}, removed_blocks=removed))


def test_a_block_that_makes_the_graph_output_keeps_its_name() -> None:
    model, structure = analyse(
        text_model(residual("p = Conv(x, a) q = Relu(p) k = Conv(q, b) y = Add(k, x)"))
    )
    (block,) = structure.blocks
    pruned, _ = prune_checked(model, structure, PruningPlan(keep={}, removed_blocks=(block.name,)))
    image = np.random.default_rng(0).standard_normal((1, 8, 6, 6)).astype(np.float32)
    assert np.array_equal(run(pruned, {"x": image})[0], image)
    assert len(pruned.graph) == 1


def test_a_removed_block_takes_its_weights_along() -> None:
    body = "r = Relu(x) p = Conv(r, a) q = Conv(p, b) s = Add(q, r) y = Conv(s, c)"
    model, structure = analyse(text_model(residual(body)))
    pruned, _ = prune_checked(
        model, structure, PruningPlan(keep={}, removed_blocks=(structure.blocks[0].name,))
    )
    assert set(pruned.graph.initializers) == {"c"}


def test_blocks_and_units_go_together() -> None:
    body = (
        "r = Conv(x, d) p = Conv(r, a) q = Relu(p) k = Conv(q, b) s = Add(k, r) t = Sigmoid(s) y = Conv(t, c)"
    )
    model, structure = analyse(text_model(residual(body)))
    for seed in range(6):
        plan = random_plan(structure, np.random.default_rng(seed), blocks=False)
        both = PruningPlan(keep=plan.keep, removed_blocks=(structure.blocks[0].name,))
        prune_checked(model, structure, both)
