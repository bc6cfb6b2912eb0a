"""Non-negative staircase functions of two widths, fitted to what was measured.

For every shape key the time of a term is fitted as

    t(a, b) = c0 + c1·⌈a/B⌉ + c2·⌈b/B⌉ + c3·⌈a/B⌉·⌈b/B⌉

where ``a`` and ``b`` are the widths read and made and B is the provider's granularity. In products of heads,
``b`` counts heads one by one, and the width ``a`` of query and key, which is summed over, counts half blocks.
The fit is monotone in both widths by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from onnx_mdp.tables.cost_terms import HEADS, SUMMED_HEADS
from onnx_mdp.tables.lut_records import Run
from onnx_mdp.tables.nonnegative import nonnegative_least_squares

__all__ = ["affine", "features", "fit_runs", "regime"]

_PROFILER_LIMIT_MS = 6e-3  # the profiler adds 2 to 5 microseconds to each runtime node


def features(key: str, a: float, b: float, step: int) -> tuple[float, float, float, float]:
    if f'"kind":"{SUMMED_HEADS}"' in key:
        u, v = -(-a // max(1.0, step / 2)), b
    elif f'"kind":"{HEADS}"' in key:
        u, v = -(-a // step), b
    else:
        u, v = -(-a // step), -(-b // step)
    return (1.0, u, v, u * v)


def regime(key: str, a: float, b: float, step: int) -> str:
    """Keys fall apart where the runtime takes another kernel: few inputs, or unaligned widths."""
    if '"op":"Conv"' not in key:
        return key
    if 1 < a < step:
        return f"{key}|a={a:g}"
    return f"{key}|odd" if (a > 1 and a % 4) or b % 4 else key


def fit_runs(runs: Sequence[Run], step: int) -> dict[str, tuple[float, ...]]:
    """Coefficients by key, with the profiler's inflation removed and one drift factor for each run."""
    inflation = float(np.median([(run.sum_ms - run.plain_ms) / run.nodes for run in runs]))
    inflation = min(max(inflation, 0.0), _PROFILER_LIMIT_MS)
    rows: dict[str, list[tuple[int, tuple[float, ...], float]]] = {}
    for number, run in enumerate(runs):
        for sample in run.samples:
            ms = max(sample.ms - inflation * sample.count, 0.2 * sample.ms)
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
    span = design.max(0)
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
    """Scale and offset that minimise relative errors.

    Small models run in warmer caches than the sum of their parts says, so the offset may be negative, but
    not by more than half of the fastest measurement: every plan must cost something.
    """
    system = np.stack([predicted, np.ones_like(predicted)], 1) / measured[:, None]
    least = -0.5 * float(measured.min())
    scale, above = nonnegative_least_squares(system, 1.0 - least * system[:, 1]).tolist()
    return scale, least + above
