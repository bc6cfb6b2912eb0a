"""Random slimmer variants of a model, and the time of many whole models beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MeasurementError
from onnx_mdp.large_models import LargeModel, for_session
from onnx_mdp.plan import PruningPlan, kept_count
from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.running.timing import Timing, measure, random_feeds
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.lut_records import Run
from onnx_mdp.tables.memory import UNREADABLE

__all__ = [
    "LEAST_LEVEL",
    "Variant",
    "full_variant",
    "measure_models",
    "plan_of_variant",
    "random_variant",
    "spread_variant",
    "variant_of_plan",
    "variant_of_run",
    "whole_model",
]

LEAST_LEVEL = 0.05  # of the widths of a variant


@dataclass(frozen=True, slots=True)
class Variant:
    """How many units each dimension keeps (a width: in each head), and which blocks are gone."""

    kept: Mapping[int, int]
    removed_blocks: frozenset[str] = frozenset()


def full_variant(structure: Structure) -> Variant:
    """The unpruned model."""
    return Variant({i: d.count for i, d in enumerate(structure.dimensions)})


def random_variant(
    structure: Structure,
    choices: Mapping[int, Sequence[int]],
    rng: np.random.Generator,
    *,
    low: float = 0.1,
    high: float = 1.0,
    drop: float = 0.0,
) -> Variant:
    """Independent random widths from ``choices``.

    Each width is a uniform share in [low, high] of the full one, rounded up to a choice. Each block is
    removed with probability ``drop``.
    """
    shares = {index: rng.uniform(low, high) for index in choices}
    return _variant(structure, choices, shares, drop, rng)


def spread_variant(
    structure: Structure,
    choices: Mapping[int, Sequence[int]],
    rng: np.random.Generator,
    level: float,
    drop: float,
) -> Variant:
    """Widths around one common level, a share of the full ones; ``drop`` as in `random_variant`."""
    shares = {index: np.clip(level * rng.uniform(0.5, 1.6), 0.02, 1.0) for index in choices}
    return _variant(structure, choices, shares, drop, rng)


def _variant(
    structure: Structure,
    choices: Mapping[int, Sequence[int]],
    shares: Mapping[int, float],
    drop: float,
    rng: np.random.Generator,
) -> Variant:
    kept = dict(full_variant(structure).kept)
    for index, options in choices.items():
        wanted = shares[index] * structure.dimensions[index].count
        kept[index] = next((k for k in options if k >= wanted), options[-1])
    gone = frozenset(b.name for b in structure.blocks if drop and rng.random() < drop)
    return Variant(kept, gone)


def plan_of_variant(structure: Structure, variant: Variant) -> PruningPlan:
    """A plan that keeps the first units of every dimension; good for timing, not for accuracy."""
    keep = {
        d.name: tuple(row * d.count + unit for row in range(d.rows) for unit in range(variant.kept[i]))
        for i, d in enumerate(structure.dimensions)
        if variant.kept[i] < d.count
    }
    return PruningPlan(keep=keep, removed_blocks=tuple(sorted(variant.removed_blocks)))


def whole_model(structure: Structure, plan: PruningPlan) -> bytes | LargeModel:
    """A model as the table sees it: fused projections are split."""
    return for_session(rewrite(structure, plan, split=True))


def variant_of_plan(structure: Structure, plan: PruningPlan) -> Variant:
    """The widths and blocks of a plan."""
    kept = {i: kept_count(plan, structure, i) for i in range(len(structure.dimensions))}
    return Variant(kept, frozenset(plan.removed_blocks))


def variant_of_run(structure: Structure, run: Run) -> Variant:
    """The variant that a run measured.

    Raises:
        MeasurementError: the run came from another store, and describes none of this model.
    """
    try:
        kept = {int(index): int(units) for index, units in run.payload["kept"].items()}
        removed = frozenset(map(str, run.payload.get("removed", ())))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MeasurementError(UNREADABLE) from error
    counts = {index: dimension.count for index, dimension in enumerate(structure.dimensions)}
    if kept.keys() != counts.keys() or not all(0 < kept[i] <= counts[i] for i in counts):
        raise MeasurementError(UNREADABLE)
    return Variant(kept, removed)


def measure_models(
    models: Sequence[bytes | LargeModel],
    shapes: Mapping[str, tuple[int, ...]],
    runtime: Runtime,
    *,
    seed: int = 0,
    budget_s: float = 10.0,
    on_round: Callable[[int, int], None] | None = None,
) -> Timing:
    """Interleaved, drift-corrected milliseconds of whole models."""
    sessions = [open_placed(data, runtime, shapes) for data in models]
    feeds = [random_feeds(session, shapes, seed) for session in sessions]
    return measure(
        sessions,
        feeds,
        budget_s=budget_s,
        seed=seed,
        threads=runtime.threads,
        on_cpu=runtime.on_cpu,
        on_round=on_round,
    )
