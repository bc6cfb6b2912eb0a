"""Random plans: what no solver would choose must obey the law as well."""

from __future__ import annotations

import numpy as np

from onnx_mdp.plan import PruningPlan
from onnx_mdp.structure import Structure

__all__ = ["random_plan"]


def random_plan(structure: Structure, seed: int) -> PruningPlan:
    """Random units, at least a fifth; one seed in two removes blocks, two in four fuse projections again."""
    rng = np.random.default_rng(seed)
    keep: dict[str, tuple[int, ...]] = {}
    alike: dict[tuple[int, int], int] = {}
    for dimension in (structure.dimensions[index] for index in structure.prunable):
        size = dimension.count
        count = int(rng.integers(max(1, round(0.2 * size)), size + 1))
        if dimension.heads is not None and seed // 2 % 2:
            count = alike.setdefault((dimension.heads, size), count)
        if count < size:
            drawn = [rng.choice(size, count, replace=False) + row * size for row in range(dimension.rows)]
            keep[dimension.name] = tuple(sorted(np.concatenate(drawn).tolist()))
    removed = tuple(b.name for b in structure.blocks if seed % 2 and rng.random() < 0.4)
    return PruningPlan(keep=keep, removed_blocks=removed)
