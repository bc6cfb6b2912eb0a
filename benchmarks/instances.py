"""Seeded pruning problems with the structure of real networks and roofline latencies, without a model file.

Widths come in groups; importance is a cumulated, sorted lognormal score of every unit and every layer has a
random weight; latency is a tile-and-wave model of a GPU or a padded-vector model of a CPU with 1 % noise.
Identity blocks of the residual networks, and attention and MLP of the transformers, can be removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks.roofline import Device, Draft
from onnx_mdp.planning.problem import Block, Budget, Factor, PruningProblem

__all__ = ["INSTANCES", "bottleneck_resnet", "mobilenet_v2", "transformer", "with_budgets"]


def bottleneck_resnet(
    blocks: tuple[int, ...], group: int, device: Device, seed: int, batch: int = 128
) -> PruningProblem:
    """ResNet-50 and its deeper relatives: a stream a stage, two inner dimensions a block."""
    draft = Draft(device, np.random.default_rng(seed))
    rng = draft.rng
    before = draft.dimension("stem", 64, group)
    draft.cost((before,), draft.product(batch * 112**2, draft.widths(before), np.asarray(147.0)))
    draft.worth(before, rng.lognormal(0, 0.5))
    size = 56
    for stage, count in enumerate(blocks):
        stream = draft.dimension(f"stage{stage}", 256 * 2**stage, group)
        for index in range(count):
            first = index == 0
            source = before if first else stream
            small = size if stage == 0 or not first else size // 2
            name = f"stage{stage}.block{index}"
            inner = [
                draft.dimension(f"{name}.{which}", 64 * 2**stage, group, removable=not first)
                for which in "ab"
            ]
            weight = rng.lognormal(0, 0.7)
            draft.layer(source, inner[0], batch * size**2)
            draft.layer(inner[0], inner[1], batch * small**2, 3)
            draft.layer(inner[1], stream, batch * small**2)
            draft.worth(stream, 0.8 * weight, gate=inner[1])
            for variable in inner:
                draft.worth(variable, weight * rng.lognormal(0, 0.3))
            if first:
                draft.layer(source, stream, batch * small**2)
                draft.worth(stream, weight)
                size = small
            else:
                draft.blocks.append(Block(name, tuple(inner)))
        before = stream
    draft.cost((before,), draft.product(batch, np.asarray(1000.0), draft.widths(before)))
    return draft.problem()


def mobilenet_v2(group: int, device: Device, seed: int, batch: int = 128) -> PruningProblem:
    """Inverted residuals: a stream a stage, one expanded dimension a block."""
    draft = Draft(device, np.random.default_rng(seed))
    rng = draft.rng
    before = draft.dimension("stem", 32, group)
    draft.cost((before,), draft.product(batch * 112**2, draft.widths(before), np.asarray(27.0)))
    draft.worth(before, rng.lognormal(0, 0.5))
    size = 112
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
    for stage, (expansion, channels, count, stride) in enumerate((*stages, (6, 320, 1, 1))):
        stream = draft.dimension(f"stage{stage}", channels, group)
        for index in range(count):
            source = before if index == 0 else stream
            small = size // (stride if index == 0 else 1)
            weight = rng.lognormal(0, 0.7)
            if expansion == 1:
                draft.depthwise(source, batch * small**2)
                draft.layer(source, stream, batch * small**2)
                draft.worth(stream, weight)
            else:
                name = f"stage{stage}.block{index}"
                full = int(draft.widths(source)[-1]) * expansion
                inner = draft.dimension(name, full, group, removable=index > 0)
                draft.layer(source, inner, batch * size**2)
                draft.depthwise(inner, batch * small**2)
                draft.layer(inner, stream, batch * small**2)
                draft.worth(inner, 2 * weight)
                draft.worth(stream, 0.8 * weight, gate=inner)
                if index > 0:
                    draft.blocks.append(Block(name, (inner,)))
            size = small
        before = stream
    head = draft.dimension("head", 1280, group)
    draft.layer(before, head, batch * size**2)
    draft.cost((head,), draft.product(batch, np.asarray(1000.0), draft.widths(head)))
    draft.worth(head, rng.lognormal(0, 0.5))
    return draft.problem()


def transformer(
    depth: int, embed: int, heads: int, hidden: int, device: Device, seed: int, batch: int = 256
) -> PruningProblem:
    """A vision transformer: embedding, and heads, query/key, value and hidden widths of every layer."""
    draft = Draft(device, np.random.default_rng(seed))
    rng, rows, tokens = draft.rng, batch * 197, 197
    stream = draft.dimension("embedding", embed, 32)
    edge = draft.product(rows, draft.widths(stream), np.asarray(768.0))
    draft.cost((stream,), edge + draft.product(batch, np.asarray(1000.0), draft.widths(stream)))
    draft.worth(stream, 2.5 * depth)
    for layer in range(depth):
        weight = rng.lognormal(0, 0.5)
        head = draft.dimension(f"layer{layer}.heads", heads, 1, removable=True)
        query = draft.dimension(f"layer{layer}.query", 64, 8)
        value = draft.dimension(f"layer{layer}.value", 64, 8)
        mlp = draft.dimension(f"layer{layer}.mlp", hidden, 64, removable=True)
        e, h = draft.widths(stream), draft.widths(head)
        d, v = draft.widths(query), draft.widths(value)
        packed = h[:, None, None] * (2 * d[None, :, None] + v[None, None])
        draft.cost((stream, head, query, value), draft.product(rows, packed[None], e[:, None, None, None]))
        if draft.device != "params":
            padded = np.ceil(d / 16)[:, None] * 16 + np.ceil(v / 16)[None] * 16
            scores = batch * tokens**2 * (2 * padded / 3.5e7 + 6 / 7.5e5)
            draft.cost((head, query, value), h[:, None, None] * scores[None])
        joined = h[:, None] * v[None]
        draft.cost((head, value, stream), draft.product(rows, e[None, None], joined[..., None]))
        draft.layer(stream, mlp, rows)
        draft.layer(mlp, stream, rows)
        draft.worth(head, weight, sigma=0.8)
        draft.worth(query, 0.7 * weight, gate=head, sigma=0.8)
        draft.worth(value, 0.9 * weight, gate=head, sigma=0.8)
        draft.worth(mlp, 2 * weight * rng.lognormal(0, 0.3), sigma=0.8)
        draft.blocks += [Block(f"layer{layer}.attention", (head,)), Block(f"layer{layer}.mlp", (mlp,))]
    return draft.problem()


Builder = Callable[[Device, int], PruningProblem]

INSTANCES: dict[str, Builder] = {
    "resnet50 by 128": lambda device, seed: bottleneck_resnet((3, 4, 6, 3), 128, device, seed),
    "resnet50 by 32": lambda device, seed: bottleneck_resnet((3, 4, 6, 3), 32, device, seed),
    "resnet50 by 16": lambda device, seed: bottleneck_resnet((3, 4, 6, 3), 16, device, seed),
    "resnet50 by 8": lambda device, seed: bottleneck_resnet((3, 4, 6, 3), 8, device, seed),
    "mobilenet_v2 by 8": lambda device, seed: mobilenet_v2(8, device, seed),
    "deit_base": lambda device, seed: transformer(12, 768, 12, 3072, device, seed),
    "vit_large": lambda device, seed: transformer(24, 1024, 16, 4096, device, seed),
    "resnet152 by 8": lambda device, seed: bottleneck_resnet((3, 8, 36, 3), 8, device, seed),
}


def with_budgets(
    build: Builder, devices: tuple[Device, ...], limits: tuple[float, ...], seed: int
) -> PruningProblem:
    """The problem of the first device with the costs of the others as budgets, ``limits`` of their whole."""
    problem = build(devices[0], seed)
    budgets = []
    for device, limit in zip(devices[1:], limits, strict=True):
        other = build(device, seed)
        whole = other.evaluate(other.widest())[1]
        amounts = tuple(Factor(f.scope, f.cost_ns) for f in other.factors if f.cost_ns is not None)
        budgets.append(Budget(device, limit * whole, amounts))
    return replace(problem, budgets=tuple(budgets))
