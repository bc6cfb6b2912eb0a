"""Non-negative staircase functions of two widths, fitted to what was measured.

For every shape key the time of a term is fitted as

    t(a, b) = c0 + c1·⌈a/B⌉ + c2·⌈b/B⌉ + c3·⌈a/B⌉·⌈b/B⌉ + c4·max(0, m - 1) + c5·max(0, w - 1)²

where ``a`` and ``b`` are the widths read and made and B is the provider's granularity; m and w are the
megabytes of the feature maps read and made and of the weights. About one stays in the cache of a core: wide
layers cost up to a third more than their narrow variants say. What weights cost beyond it grows with the
whole model, and so with their square. Where heads are an axis of their own, ``b`` counts them one by one, the
width ``a`` of query and key, which products sum over, counts half blocks, and megabytes are left out.
The fit is monotone in both widths by construction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from onnx_mdp.errors import MeasurementError
from onnx_mdp.tables.cost_terms import HEADS, SUMMED_HEADS
from onnx_mdp.tables.lut_records import Run
from onnx_mdp.tables.nonnegative import nonnegative_least_squares

__all__ = ["COEFFICIENTS", "UNREADABLE", "affine", "features", "fit_runs", "regime"]

COEFFICIENTS = 6  # of a shape key
UNREADABLE = "the store holds measurements of this model that this version cannot read: choose another store"
_CACHED_MB = 1.0
_BYTES = 4  # of an element; half as much in float16 moves the threshold, and the fit with it
_PROFILER_LIMIT_MS = 6e-3  # the profiler adds 2 to 5 microseconds to each runtime node


def features(key: str, a: float, b: float, step: int) -> tuple[float, float, float, float, float, float]:
    """What the coefficients of a key are multiplied with, at the widths ``a`` read and ``b`` made."""
    if f'"kind":"{SUMMED_HEADS}"' in key:
        u, v = -(-a // max(1.0, step / 2)), b
    elif f'"kind":"{HEADS}"' in key:
        u, v = -(-a // step), b
    else:
        u, v = -(-a // step), -(-b // step)
    read, made, weight = _channel_mb(key)
    reads, makes = _padded(a, step), _padded(b, step)
    maps, weights = read * reads + made * makes, weight * reads * makes
    return (1.0, u, v, u * v, max(0.0, maps - _CACHED_MB), max(0.0, weights - _CACHED_MB) ** 2)


def _padded(channels: float, step: int) -> float:
    return channels if channels < step else -(-channels // step) * step


@lru_cache(maxsize=4096)
def _channel_mb(key: str) -> tuple[float, float, float]:
    """Megabytes of a channel read, of one made, and of the weights between two.

    An operation on each channel alone makes as many as it reads, and its key has the width made only.
    """
    try:
        described = json.loads(key)
        shapes = [described.get(name, []) for name in ("in", "out")]
        read, made = (1e-6 * _BYTES * math.prod(abs(size) for size in shape) for shape in shapes)
        weight = 1e-6 * _BYTES * math.prod(described["weight"]) if "weight" in described else 0.0
        kind = described.get("kind", "")
        if not math.isfinite(read + made + weight):
            raise ValueError("sizes without end")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MeasurementError(UNREADABLE) from error
    if kind in (HEADS, SUMMED_HEADS):
        return 0.0, 0.0, 0.0
    return (0.0, read + made, 0.0) if kind in ("depthwise", "moves") else (read, made, weight)


def regime(key: str, a: float, b: float, step: int) -> str:
    """Keys fall apart where the runtime takes another kernel: few inputs, or unaligned widths."""
    if '"op":"Conv"' not in key:
        return key
    if 1 < a < step:
        return f"{key}|a={a:g}"
    return f"{key}|odd" if (a > 1 and a % 4) or b % 4 else key


def fit_runs(runs: Sequence[Run], step: int) -> dict[str, tuple[float, ...]]:
    """Coefficients by key, with the profiler's inflation removed and one drift factor for each run.

    Raises:
        MeasurementError: the runs came from another store, and their keys are none of ours.
    """
    inflation = float(np.median([(run.sum_ms - run.plain_ms) / run.nodes for run in runs]))
    inflation = min(max(inflation, 0.0), _PROFILER_LIMIT_MS)
    rows: dict[str, list[tuple[int, tuple[float, ...], float]]] = {}
    for number, run in enumerate(runs):
        for sample in run.samples:
            ms = max(sample.ms - inflation * sample.count, 0.1 * sample.ms)
            row = (number, features(sample.key, sample.a, sample.b, step), ms)
            for key in {sample.key, regime(sample.key, sample.a, sample.b, step)}:
                rows.setdefault(key, []).append(row)
    drift = np.ones(len(runs))
    for _ in range(3):
        fits = {key: _fit_one(found, drift) for key, found in rows.items()}
        drift = _drift(rows, fits, len(runs))
    return {key: _fit_one(found, drift) for key, found in rows.items()}


def _fit_one(
    rows: Sequence[tuple[int, tuple[float, ...], float]], drift: npt.NDArray[np.float64]
) -> tuple[float, ...]:
    """Non-negative least squares of relative errors, reweighted once against outliers."""
    design = np.asarray([row[1] for row in rows])
    observed = np.asarray([row[2] / drift[row[0]] for row in rows])
    span = np.where(design.max(0) > 0.0, design.max(0), 1.0)
    weight = 1.0 / np.maximum(observed, 0.1 * np.median(observed))
    system, target = design / span * weight[:, None], observed * weight
    solution = nonnegative_least_squares(system, target)
    residual = np.abs(system @ solution - target)
    trust = np.sqrt(np.minimum(1.0, (3.0 * np.median(residual) + 1e-4) / np.maximum(residual, 1e-9)))
    solution = nonnegative_least_squares(system * trust[:, None], target * trust)
    return tuple((solution / span).tolist())


def _drift(
    rows: Mapping[str, Sequence[tuple[int, tuple[float, ...], float]]],
    fits: Mapping[str, tuple[float, ...]],
    count: int,
) -> npt.NDArray[np.float64]:
    """The factor by which each run was slow: the weighted median of observed over fitted."""
    pairs: list[list[tuple[float, float]]] = [[] for _ in range(count)]
    for key, found in rows.items():
        for number, row, ms in found:
            fitted = float(np.dot(fits[key], row))
            pairs[number].append((ms / max(fitted, 1e-9), fitted))
    factors = np.asarray([_weighted_median(found) for found in pairs])
    return np.asarray(factors / np.median(factors))


def _weighted_median(pairs: Sequence[tuple[float, float]]) -> float:
    ordered = sorted(pairs)
    weights = np.cumsum([weight for _, weight in ordered])
    return ordered[int(np.searchsorted(weights, weights[-1] / 2))][0]


def affine(predicted: npt.NDArray[np.float64], measured: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Scale and offset that minimise relative errors; the offset is what a call costs, and never negative."""
    system = np.stack([predicted, np.ones_like(predicted)], 1) / measured[:, None]
    scale, offset = nonnegative_least_squares(system, np.ones_like(predicted)).tolist()
    return scale, offset
