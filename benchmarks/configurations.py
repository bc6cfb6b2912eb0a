"""Heterogeneous configurations, on which tables are judged: uniform ones flatter every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.measuring import GROUP_S, Ratios, measured_ratios
from benchmarks.model_files import model_path
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.pipeline import analyze
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.runtime import InferenceSession, Runtime
from onnx_mdp.running.timing import Feeds, random_feeds
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.granularity import unit_choices
from onnx_mdp.tables.variants import Variant, full_variant, plan_of_variant

__all__ = [
    "configuration_choices",
    "drawn_configurations",
    "heterogeneous_variant",
    "measured_configurations",
    "opened_variants",
]

_LEVELS = (0.25, 0.5, 0.8)
_STAGE_FACTORS = (0.3, 0.6, 1.0, 1.6, 2.0)
_DROPS = (0.0, 0.3, 0.6)
_MOST_CHOICES = 16


def configuration_choices(structure: Structure, step: int) -> dict[int, tuple[int, ...]]:
    """The widths of each dimension that configurations are drawn from."""
    return {i: unit_choices(structure.dimensions[i], step, _MOST_CHOICES) for i in structure.prunable}


def drawn_configurations(
    structure: Structure, choices: Mapping[int, Sequence[int]], count: int, seed: int
) -> list[Variant]:
    """Configurations that no table was fitted to."""
    rng = np.random.default_rng([seed, 7])
    return [heterogeneous_variant(structure, choices, rng) for _ in range(count)]


def measured_configurations(
    structure: Structure,
    variants: Sequence[Variant],
    runtime: Runtime,
    seed: int,
    *,
    budget_s: float = GROUP_S,
    on_group: Callable[[int, int], None] = lambda done, total: None,
) -> Ratios:
    """Measure configurations beside the unpruned model, all with their projections split.

    The file that a prune writes has them fused again wherever a plan allows it, which changes its latency by
    up to 3 % in either direction; that is left to the closed loop.
    """
    return measured_ratios(
        model_bytes(rewrite(structure, PruningPlan(keep={}), split=True)),
        structure,
        [plan_of_variant(structure, variant) for variant in variants],
        runtime,
        seed=seed,
        budget_s=budget_s,
        split=True,
        on_group=on_group,
    )


def opened_variants(
    name: str, count: int, runtime: Runtime, step: int, seed: int
) -> list[tuple[InferenceSession, Feeds]]:
    """Sessions and feeds of an unpruned model and of ``count`` random variants in multiples of ``step``."""
    structure = analyze(load_model(model_path(name)), {})
    rng, choices = np.random.default_rng(seed), configuration_choices(structure, step)
    variants = [heterogeneous_variant(structure, choices, rng) for _ in range(count)]
    plans = [PruningPlan(keep={}), *(plan_of_variant(structure, variant) for variant in variants)]
    shapes = structure.shadow.inputs
    sessions = [open_placed(model_bytes(rewrite(structure, plan)), runtime, shapes) for plan in plans]
    return [(session, random_feeds(session, shapes, seed)) for session in sessions]


def heterogeneous_variant(
    structure: Structure, choices: Mapping[int, Sequence[int]], rng: np.random.Generator
) -> Variant:
    """A common level, times one factor for each resolution, times a little noise for each dimension."""
    level, drop = rng.choice(_LEVELS), rng.choice(_DROPS)
    factors: dict[tuple[int, ...], float] = {}
    kept = dict(full_variant(structure).kept)
    for index, options in choices.items():
        stage = _resolution(structure, index)
        factor = factors.setdefault(stage, float(rng.choice(_STAGE_FACTORS)))
        share = min(1.0, max(0.05, level * factor * rng.uniform(0.8, 1.25)))
        wanted = share * structure.dimensions[index].count
        kept[index] = next((k for k in options if k >= wanted), options[-1])
    gone = frozenset(b.name for b in structure.blocks if rng.random() < drop)
    return Variant(kept, gone)


def _resolution(structure: Structure, index: int) -> tuple[int, ...]:
    producer = structure.shadow.operations[structure.dimensions[index].producer]
    return structure.shadow.shapes[producer.outputs[0]][2:]
