"""Non-negative staircase functions of two widths, fitted to what was measured.

For every shape key the time of a term is fitted as

    t(a, b) = c0 + c1·⌈a/B⌉ + c2·⌈b/B⌉ + c3·⌈a/B⌉·⌈b/B⌉ + c4·max(0, m - 1) + c5·max(0, w - 1)²

where ``a`` and ``b`` are the widths read and made and B is the provider's granularity; m and w are the
megabytes of the feature maps read and made and of the weights. About one stays in the cache of a core: wide
layers cost up to a third more than their narrow variants say. Where heads are an axis of their own, ``b``
counts them one by one, and the width ``a`` of query and key, which products sum over, counts half blocks.
The fit is monotone in both widths by construction. What weights cost beyond this depends on the whole model,
and is taken off before: see `memory`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_mdp.tables.cost_terms import HEADS, SUMMED_HEADS
from onnx_mdp.tables.lut_records import SMALLEST, Run
from onnx_mdp.tables.memory import UNPRICED, Memory, megabytes, total
from onnx_mdp.tables.nonnegative import nonnegative_least_squares

__all__ = ["COEFFICIENTS", "METHOD", "Staircases", "affine", "features", "height", "regime"]

COEFFICIENTS = 6  # of a shape key
METHOD = 2  # of fitting; a calibration that belongs to another is not used any more
_CACHED_MB = 1.0
_PROFILER_LIMIT_MS = 6e-3  # the profiler adds 2 to 5 microseconds to each runtime node
_PROFILER_SPREAD_MS = 1.5e-3  # a run in which the machine was slow says nothing of it
_RESOLUTION_MS = 1e-2  # it counts whole microseconds, beside what it adds: less is not known better
_ROUNDS = 3
_SMALLEST_DRIFT = 0.02  # at most; the smallest variant takes a tenth less than its layers do elsewhere

Vector = npt.NDArray[np.float64]
_Point = tuple[int, tuple[float, ...], float]  # the run, features, and the milliseconds


def features(key: str, a: float, b: float, step: int) -> tuple[float, float, float, float, float, float]:
    """What the coefficients of a key are multiplied with, at the widths ``a`` read and ``b`` made."""
    if f'"kind":"{SUMMED_HEADS}"' in key:
        u, v = -(-a // max(1.0, step / 2)), b
    elif f'"kind":"{HEADS}"' in key:
        u, v = -(-a // step), b
    else:
        u, v = -(-a // step), -(-b // step)
    maps, weights = megabytes(key, a, b, step)
    return (1.0, u, v, u * v, max(0.0, maps - _CACHED_MB), max(0.0, weights - _CACHED_MB) ** 2)


def regime(key: str, a: float, b: float, step: int) -> str:
    """Keys fall apart where the runtime does something else: few inputs, unaligned widths, a single head."""
    if f'"kind":"{HEADS}"' in key or f'"kind":"{SUMMED_HEADS}"' in key:
        return f"{key}|one" if b == 1 else key  # what reorders one head only copies it
    if '"op":"Conv"' not in key:
        return key
    if 1 < a < step:
        return f"{key}|a={a:g}"
    return f"{key}|odd" if (a > 1 and a % 4) or b % 4 else key


def height(
    coefficients: Mapping[str, tuple[float, ...]], key: str, a: float, b: float, step: int
) -> float | None:
    """What a fit says of one term; None where no profile showed it, for the runtime removed it."""
    fitted = coefficients.get(regime(key, a, b, step)) or coefficients.get(key)
    return None if fitted is None else float(np.dot(fitted, features(key, a, b, step)))


@dataclass(frozen=True, slots=True)
class _Row:
    """One measured term: its run, its key and that of its regime, features, time, and weights."""

    run: int
    keys: tuple[str, str]
    features: tuple[float, ...]
    ms: float
    weights_mb: float


class Staircases:
    """What several runs measured, to be fitted for any memory."""

    def __init__(self, runs: Sequence[Run], step: int, shares: Sequence[float] = ()) -> None:
        """Take off what the profiler added.

        ``shares`` are the latencies of the first runs' variants as shares of one of them, measured beside
        each other and without the profiler.

        Raises:
            MeasurementError: the runs came from another store, and their keys are none of ours.
        """
        added = _added_ms(runs)
        self._seen = np.asarray(
            [
                max(run.sum_ms - ms * run.nodes, 0.1 * run.sum_ms, 1e-9) / share
                for run, ms, share in zip(runs, added, shares, strict=False)
            ]
        )
        self._limit = np.asarray([_SMALLEST_DRIFT if run.variant == SMALLEST else np.inf for run in runs])
        self._touched = [total(((s.key, s.a, s.b) for s in run.samples), step) for run in runs]
        self._rows = [
            _Row(
                number,
                (sample.key, regime(sample.key, sample.a, sample.b, step)),
                features(sample.key, sample.a, sample.b, step),
                max(sample.ms - added[number] * sample.count, 0.1 * sample.ms),
                megabytes(sample.key, sample.a, sample.b, step).weights,
            )
            for number, run in enumerate(runs)
            for sample in run.samples
        ]

    def fit(self, memory: Memory = UNPRICED, drift: Vector | None = None) -> dict[str, tuple[float, ...]]:
        """Coefficients by key, without what weights take that are read again.

        ``drift`` says how slow the machine was in each run; by default it is found for this memory.
        """
        return _fits(self._by_key(memory), self.drift(memory) if drift is None else drift)

    def drift(self, memory: Memory = UNPRICED, *, rounds: int = _ROUNDS) -> Vector:
        """By which factor each run was slow: measured where shares are known, else fitted in some rounds.

        In the smallest variant every layer finds its inputs in the nearest cache, whenever it is measured: as
        drift this would be missing in all small models, so that little of it is believed where it is fitted.
        """
        known = len(self._seen)
        drift = np.ones(len(self._touched))
        drift[:known] = self._seen / np.median(self._seen) if known else 1.0
        if known == len(drift):
            return drift
        rows = self._by_key(memory)
        for _ in range(rounds):
            found = _drift(rows, _fits(rows, drift), len(drift))
            found /= np.median(found[:known] / drift[:known]) if known else np.median(found)
            drift[known:] = np.clip(found, 1.0 - self._limit, 1.0 + self._limit)[known:]
        return drift

    def error(self, fits: Mapping[str, tuple[float, ...]], memory: Memory, drift: Vector) -> float:
        """How far fits and memory are from the times of single terms, relative to their sum."""
        read = self._read(memory)
        apart = 0.0
        for row in self._rows:
            ms = np.dot(fits[row.keys[1]], row.features) + read[row.run] * row.weights_mb
            apart += abs(float(ms * drift[row.run]) - row.ms)
        return apart / sum(row.ms for row in self._rows)

    def _read(self, memory: Memory) -> list[float]:
        """Milliseconds for a megabyte of weights in each run."""
        return [memory.ms_per_mb * memory.share(touched) for touched in self._touched]

    def _by_key(self, memory: Memory) -> dict[str, list[_Point]]:
        read = self._read(memory)
        found: dict[str, list[_Point]] = {}
        for row in self._rows:
            ms = max(row.ms - read[row.run] * row.weights_mb, 0.1 * row.ms)
            for key in dict.fromkeys(row.keys):
                found.setdefault(key, []).append((row.run, row.features, ms))
        return found


def _added_ms(runs: Sequence[Run]) -> list[float]:
    """What the profiler added to each node: in each run its own, where that is near the usual."""
    own = np.asarray([(run.sum_ms - run.plain_ms) / run.nodes for run in runs])
    usual = min(max(float(np.median(own)), 0.0), _PROFILER_LIMIT_MS)
    near = max(usual - _PROFILER_SPREAD_MS, 0.0), usual + _PROFILER_SPREAD_MS
    return [float(ms) for ms in np.clip(own, *near)]


def _fits(rows: Mapping[str, Sequence[_Point]], drift: Vector) -> dict[str, tuple[float, ...]]:
    return {key: _fit_one(found, drift) for key, found in rows.items()}


def _fit_one(rows: Sequence[_Point], drift: Vector) -> tuple[float, ...]:
    """Non-negative least squares of relative errors, reweighted once against outliers."""
    design = np.asarray([row[1] for row in rows])
    observed = np.asarray([row[2] / drift[row[0]] for row in rows])
    span = np.where(design.max(0) > 0.0, design.max(0), 1.0)
    weight = 1.0 / np.maximum(observed, max(0.1 * float(np.median(observed)), _RESOLUTION_MS))
    system, target = design / span * weight[:, None], observed * weight
    solution = nonnegative_least_squares(system, target)
    residual = np.abs(system @ solution - target)
    trust = np.sqrt(np.minimum(1.0, (3.0 * np.median(residual) + 1e-4) / np.maximum(residual, 1e-9)))
    solution = nonnegative_least_squares(system * trust[:, None], target * trust)
    return tuple((solution / span).tolist())


def _drift(
    rows: Mapping[str, Sequence[_Point]],
    fits: Mapping[str, tuple[float, ...]],
    count: int,
) -> Vector:
    """The factor by which each run was slow: the weighted median of observed over fitted."""
    pairs: list[list[tuple[float, float]]] = [[] for _ in range(count)]
    for key, found in rows.items():
        for number, row, ms in found:
            fitted = float(np.dot(fits[key], row))
            pairs[number].append((ms / max(fitted, 1e-9), fitted))
    return np.asarray([_weighted_median(found) for found in pairs])


def _weighted_median(pairs: Sequence[tuple[float, float]]) -> float:
    ordered = sorted(pairs)
    weights = np.cumsum([weight for _, weight in ordered])
    return ordered[int(np.searchsorted(weights, weights[-1] / 2))][0]


def affine(predicted: Vector, measured: Vector) -> tuple[float, float]:
    """Scale and offset that minimise relative errors; the offset is what a call costs, and never negative."""
    system = np.stack([predicted, np.ones_like(predicted)], 1) / measured[:, None]
    scale, offset = nonnegative_least_squares(system, np.ones_like(predicted)).tolist()
    return scale, offset
