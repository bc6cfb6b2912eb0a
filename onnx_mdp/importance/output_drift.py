"""Importance by measurement: how far the outputs move when units of one dimension, or one block, are gone.

For each dimension the model is pruned to a few widths, units in order of a cheaper score, and run on
calibration inputs. The relative drift of its outputs,

    D = Σ‖y − y₀‖² / Σ‖y₀ − mean(y₀)‖²      (averaged over outputs),

is interpolated between these widths; the greatest convex minorant makes the score of a unit, its step of D,
fall with its rank. A block is worth its own drift: inner units only refine what is lost before that.
Forward runs only: no gradients, no labels, no torch. Where weights will be refitted, D is that of models
whose layers near the cut were, on other inputs than it is measured on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.states import kept_feeds, kept_part
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.concurrency import in_order
from onnx_mdp.large_models import for_session
from onnx_mdp.numerics.precision import in_float32, widened
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.repairing.nearby import refitted_nearby
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.surgery.rewriting import rewrite

__all__ = ["block_drifts", "model_drift", "unit_steps"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]
Feeds = Sequence[Mapping[str, npt.NDArray[Any]]]
Progress = Callable[[str, int, int], None]

_FEEDS = 16
_FITTED = 32  # inputs at most that weights are refitted on
_SHARES = (0.1, 0.45, 0.85)  # of the units kept; the curve is steepest at small widths
_TIE = 1e-6  # keeps the order of the cheaper score within a step


def unit_steps(
    structure: Structure,
    order: Mapping[int, npt.NDArray[np.int64]],
    feeds: Feeds,
    progress: Progress,
    *,
    refitted: bool = False,
) -> dict[int, Vector]:
    """The step of D that each unit is worth, ``float64[units]`` by dimension.

    ``order``, ``int64[rows, count]``, ranks the units of each dimension, the most important first; the units
    of equal rank in different heads share a step.
    """
    cuts = [(index, kept) for index, rank in order.items() for kept in _widths(rank.shape[1])]
    plans = []
    for index, kept in cuts:
        units = tuple(sorted(order[index][:, :kept].reshape(-1).tolist()))
        plans.append(PruningPlan(keep={structure.dimensions[index].name: units}))
    drifts = _drifts(_Drift(structure, feeds, refitted), plans, partial(progress, "score"))
    curves = {index: {rank.shape[1]: 0.0} for index, rank in order.items()}
    for (index, kept), drift in zip(cuts, drifts, strict=True):
        curves[index][kept] = drift
    steps: dict[int, Vector] = {}
    for index, rank in order.items():
        rows, count = rank.shape
        steps[index] = np.empty(rows * count)
        steps[index][rank] = _steps(curves[index]) * (1.0 - _TIE * np.arange(count) / count) / rows
    return steps


def block_drifts(
    structure: Structure, feeds: Feeds, progress: Progress, *, refitted: bool = False
) -> dict[str, float]:
    """D of the model without each removable block."""
    names = [block.name for block in structure.blocks]
    plans = [PruningPlan(keep={}, removed_blocks=(name,)) for name in names]
    drifts = _drifts(_Drift(structure, feeds, refitted), plans, partial(progress, "score blocks"))
    return dict(zip(names, drifts, strict=True))


def model_drift(
    structure: Structure, plan: PruningPlan, models: Sequence[ir.Model], feeds: Feeds
) -> tuple[float, ...]:
    """D of each of several models that have the shapes that a plan leaves, whatever their weights."""
    drift = _Drift(structure, feeds)
    return tuple(drift.between(model, removed_classes(plan, structure)) for model in models)


def _widths(count: int) -> list[int]:
    """The widths at which a dimension of so many units is measured."""
    return sorted({max(1, round(share * count)) for share in _SHARES} - {count})


def _drifts(drift: _Drift, plans: Sequence[PruningPlan], progress: Callable[[int, int], None]) -> list[float]:
    """D of each plan."""
    found = []
    progress(0, len(plans))
    for each in in_order(drift.of, plans):
        found.append(each)
        progress(len(found), len(plans))
    return found


def _steps(curve: Mapping[int, float]) -> Vector:
    """Differences of the greatest convex minorant of D over the kept count, one for each rank.

    Units below the smallest measured width take its slope: D of no units at all is never asked for.
    """
    points = [(float(k), curve[k]) for k in sorted(curve)]
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    steps = np.zeros(int(points[-1][0]))
    for left, right in itertools.pairwise(hull):
        steps[int(left[0]) : int(right[0])] = max(0.0, -_slope(left, right))
    steps[: int(hull[0][0])] = steps[int(hull[0][0])] if hull[0][0] < len(steps) else 0.0
    return steps


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


class _Drift:
    """Runs pruned models on the same inputs and compares their outputs with the unpruned model's."""

    def __init__(self, structure: Structure, feeds: Feeds, refitted: bool = False) -> None:
        count = min(_FEEDS, len(feeds) // 2 if refitted else len(feeds))
        places = np.unique(np.linspace(0, len(feeds) - 1, count).round().astype(int))
        self.structure = structure
        self.names = structure.shadow.outputs
        self.feeds = [feeds[place] for place in places]
        others = [feed for place, feed in enumerate(feeds) if place not in set(places.tolist())]
        self.fitting = others[:_FITTED] if refitted else []
        self.reference = self._run(structure.shadow.model, self.feeds)

    def of(self, plan: PruningPlan) -> float:
        """D of the model that a plan makes."""
        model = rewrite(self.structure, plan)
        if self.fitting:
            model = refitted_nearby(self.structure, plan, model, self.fitting)
        return self.between(model, removed_classes(plan, self.structure))

    def between(self, model: ir.Model, removed: npt.NDArray[np.bool_]) -> float:
        """D of a model that lacks the removed classes."""
        feeds = [kept_feeds(self.structure, feed, removed) for feed in self.feeds]
        results = self._run(model, feeds)
        kept = [self._kept(name, y, removed) for name, y in zip(self.names, self.reference, strict=True)]
        drifts = [
            _relative(_lines(before), _lines(after)) for before, after in zip(kept, results, strict=True)
        ]
        return float(np.mean(drifts))

    def _kept(self, name: str, outputs: Sequence[Array], removed: npt.NDArray[np.bool_]) -> list[Array]:
        """What a pruned model has of an output, for each input."""
        if name not in self.structure.shadow.states.values():
            return list(outputs)
        return [kept_part(self.structure.graph, name, output, removed) for output in outputs]

    def _run(self, model: ir.Model, feeds: Feeds) -> list[Sequence[Array]]:
        """Each output for each input."""
        session = open_session(for_session(in_float32(model)), Runtime())
        return list(zip(*(session.run(None, widened(feed)) for feed in feeds), strict=True))


def _lines(outputs: Sequence[Array]) -> Vector:
    return np.stack([np.asarray(output, np.float64).ravel() for output in outputs])


def _relative(before: Vector, after: Vector) -> float:
    spread = float(((before - before.mean(0)) ** 2).sum())
    if spread <= 0:  # one sample, or a constant output
        spread = float((before**2).sum())
    return float(((after - before) ** 2).sum()) / max(spread, 1e-30)
