"""From sums of layers to milliseconds of whole models, by a few whole models measured beside each other.

Of the unpruned model and of pruned variants, some held out and some profiled, whole latencies are measured
interleaved, without the profiler. They say how slow the machine was in each profiled run, what weights cost
that are read from memory, and the affine map from sums of terms to milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.tables.cost_terms import CostTerm, Layer, held
from onnx_mdp.tables.lut_records import Run
from onnx_mdp.tables.memory import UNPRICED, Memory
from onnx_mdp.tables.memory_fit import fit_memory, sum_ms
from onnx_mdp.tables.staircases import Staircases, affine
from onnx_mdp.tables.variants import (
    LEAST_LEVEL,
    Variant,
    full_variant,
    measure_models,
    plan_of_variant,
    spread_variant,
    variant_of_run,
    whole_model,
)
from onnx_mdp.tables.window_fit import WindowFit

__all__ = [
    "Calibration",
    "Progress",
    "Subject",
    "calibrate_in_place",
    "calibrate_windows",
    "own_coefficients",
]

# Of the unpruned latency, of variants to calibrate with: relative errors are largest where little is left.
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8)
_BESIDE_PROFILED = (0.05, 0.1, 0.15, 0.8)  # most profiled variants lie between
_DRAWN = 200  # to find variants of these shares among
_CALIBRATION_S = 10.0
_GROUPS = 2

Progress = Callable[[str, int, int], None]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The affine map to whole-model milliseconds and how well it was known.

    ``median_error`` and ``worst_error`` are relative errors on the held-out variants when only the unpruned
    model sets the scale; ``noise`` is the split-half error F of their measurement. ``cache_mb`` and
    ``ms_per_mb`` (before the map) are those of `Memory`. ``shares`` are the latencies of the profiled
    variants, or of their primitives, as shares of the unpruned one's, which is first; none where no layers
    were profiled.
    """

    scale: float
    offset_ms: float
    base_ms: float
    median_error: float
    worst_error: float
    noise: float
    cache_mb: float = 1.0
    ms_per_mb: float = 0.0
    shares: tuple[float, ...] = ()

    @property
    def memory(self) -> Memory:
        """Where weights are read from."""
        return Memory(self.cache_mb, self.ms_per_mb)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and a device: what a table is built for."""

    structure: Structure
    terms: tuple[CostTerm, ...]
    choices: Mapping[int, tuple[int, ...]]
    step: int
    runtime: Runtime
    seed: int
    progress: Progress

    def layers(self, variant: Variant) -> list[Layer]:
        """What a variant takes time for."""
        return held(self.structure, self.terms, variant.kept, variant.removed_blocks)


def calibrate_in_place(subject: Subject, runs: Sequence[Run], related: Sequence[Run]) -> Calibration:
    """Calibrate by held-out variants and by those of the profiled ``runs``, the unpruned one first."""
    draft = own_coefficients(Staircases((*runs, *related), subject.step), subject.terms)
    held_out = _held_out(
        subject, _BESIDE_PROFILED, lambda layers: sum_ms(draft, UNPRICED, layers, subject.step)
    )
    profiled = [variant_of_run(subject.structure, run) for run in runs[1:]]
    base_ms, ratios, noise = _beside_the_unpruned(subject, held_out + profiled)
    shares = _of_primitives(runs) or (1.0, *ratios[len(held_out) :])
    staircases = Staircases((*runs, *related), subject.step, shares)
    wholes = [subject.layers(v) for v in (full_variant(subject.structure), *held_out, *profiled)]
    measured = base_ms * np.asarray([1.0, *ratios])
    memory = fit_memory(staircases, wholes, measured, subject.step)
    coefficients = own_coefficients(staircases, subject.terms, memory)
    predicted = np.asarray([sum_ms(coefficients, memory, layers, subject.step) for layers in wholes])
    scale, offset_ms = affine(predicted, measured)
    errors = _errors(predicted, measured, len(held_out))
    return Calibration(scale, offset_ms, base_ms, *errors, noise, memory.cache_mb, memory.ms_per_mb, shares)


def _of_primitives(runs: Sequence[Run]) -> tuple[float, ...]:
    """Shares that were measured with the primitives themselves, which are not all of a model."""
    shares = [run.payload.get("share") for run in runs]
    known = [float(share) for share in shares if isinstance(share, (int, float)) and share > 0]
    return tuple(known) if len(known) == len(runs) else ()


def calibrate_windows(subject: Subject, fit: WindowFit) -> Calibration:
    """Calibrate by held-out variants and by the whole ones of a fit, which were not seen by a profiler."""

    def predict(layers: Sequence[Layer]) -> float:
        return fit.call_ms + sum_ms(fit.coefficients, UNPRICED, layers, subject.step)

    held_out = _held_out(subject, _SHARES, predict)
    base_ms, ratios, noise = _beside_the_unpruned(subject, held_out)
    wholes = [subject.layers(v) for v in (full_variant(subject.structure), *held_out)]
    predicted = np.asarray([predict(layers) for layers in wholes])
    measured = base_ms * np.asarray([1.0, *ratios])
    now = base_ms / fit.measured[0]
    scale, offset_ms = affine(
        np.concatenate([predicted, fit.predicted]), np.concatenate([measured, now * fit.measured])
    )
    errors = _errors(predicted, measured, len(held_out))
    return Calibration(scale, offset_ms + scale * fit.call_ms, base_ms, *errors, noise)


def own_coefficients(
    staircases: Staircases, terms: Sequence[CostTerm], memory: Memory = UNPRICED
) -> Mapping[str, tuple[float, ...]]:
    """What is fitted for the layers of a model, whatever a related one has besides."""
    keys = {term.key for term in terms}
    return {key: c for key, c in staircases.fit(memory).items() if key.partition("|")[0] in keys}


def _held_out(
    subject: Subject, shares: Sequence[float], predict: Callable[[Sequence[Layer]], float]
) -> list[Variant]:
    """Of many variants those that are predicted to take the ``shares`` of the unpruned latency."""
    rng = np.random.default_rng([subject.seed, 2**31])
    pool = [_of_any_scale(subject, rng) for _ in range(_DRAWN)]
    base = predict(subject.layers(full_variant(subject.structure)))
    expected = np.asarray([predict(subject.layers(variant)) for variant in pool]) / base
    nearest = [int(np.abs(expected - share).argmin()) for share in shares]
    return [pool[n] for n in dict.fromkeys(nearest)]  # a small model has few variants


def _of_any_scale(subject: Subject, rng: np.random.Generator) -> Variant:
    """A variant that takes from a few percent to nearly all of the unpruned latency."""
    level = float(np.exp(rng.uniform(np.log(LEAST_LEVEL), 0.0)))
    return spread_variant(subject.structure, subject.choices, rng, level, rng.choice([0.0, 0.3, 0.6]))


def _beside_the_unpruned(subject: Subject, variants: Sequence[Variant]) -> tuple[float, list[float], float]:
    """The unpruned latency, that of each variant as a share of it, and the largest noise of a group.

    The groups are small, for all models of one are in memory at the same time.
    """
    structure = subject.structure
    base, ratios, timings = whole_model(structure, PruningPlan(keep={})), [0.0] * len(variants), []
    for number in range(min(_GROUPS, len(variants))):
        plans = [plan_of_variant(structure, variant) for variant in variants[number::_GROUPS]]
        timing = measure_models(
            [base, *(whole_model(structure, plan) for plan in plans)],
            structure.shadow.inputs,
            subject.runtime,
            seed=subject.seed + number,
            budget_s=_CALIBRATION_S / _GROUPS,
            on_round=partial(_tell, subject.progress, number),
        )
        ratios[number::_GROUPS] = [ms / timing.ms[0] for ms in timing.ms[1:]]
        timings.append(timing)
    return timings[0].ms[0], ratios, max(timing.noise for timing in timings)


def _tell(progress: Progress, group: int, done: int, total: int) -> None:
    progress("calibrate", group * total + done, _GROUPS * total)


def _errors(predicted: Vector, measured: Vector, held_out: int) -> tuple[float, float]:
    """The median and the worst error of the models after the unpruned one, which sets the scale."""
    errors = np.abs(predicted[1:] / measured[1:] * (measured[0] / predicted[0]) - 1.0)[:held_out]
    return float(np.median(errors)), float(errors.max())
