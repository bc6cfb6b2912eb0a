"""Plans that benchmarks share: solved ones and random ones; what nobody would choose obeys the law too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.scoring import Criterion, score
from onnx_mdp.plan import PruningPlan
from onnx_mdp.planning.formulation import to_ns
from onnx_mdp.planning.programs import Programs
from onnx_mdp.planning.solution_plan import plan_from_choice
from onnx_mdp.tables.latency import LatencyTable, predict_ms
from onnx_mdp.tables.variants import full_variant

__all__ = ["Planned", "random_plan", "solved_plans"]


@dataclass(frozen=True, slots=True)
class Planned:
    """One plan: ``predicted`` is its share of the predicted latency, ``importance`` of the importance."""

    criterion: str
    ratio: float
    plan: PruningPlan
    predicted: float
    importance: float


def solved_plans(
    structure: Structure,
    table: LatencyTable,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]],
    criteria: Sequence[str | Criterion],
    ratios: Sequence[float],
) -> Iterator[Planned]:
    """The best plan by each criterion at each ratio of the predicted latency.

    Raises:
        UsageError: no plan reaches a ratio.
    """
    base_ms = predict_ms(table, structure, full_variant(structure))
    for criterion in criteria:
        importance = score(structure, criterion, feeds)
        programs = Programs(structure, importance, table)
        for ratio in ratios:
            answer = programs.solve(to_ns(ratio * base_ms))
            found = answer.solution
            if found.choice is None:
                raise UsageError(f"no plan reaches {ratio:g} of the latency; choose a larger ratio")
            plan = plan_from_choice(structure, answer.formulation, importance, found.choice)
            yield Planned(importance.criterion, ratio, plan, found.cost_ns * 1e-6 / base_ms, found.value)


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
