"""Staircases of all shape keys from windows and whole models at once.

The time of a window is the sum of its terms, plus what crosses its border, plus a call::

    t = Σ_terms f_key(a, b) + Σ_borders r_border·⌈c/B⌉ + call

and that of a whole model is the same without borders, with a call of its own. Staircases `f`, border costs
`r` and calls are non-negative and found by one least squares of relative errors. Whole models count most, for
they are what is asked for; windows tell apart what whole models only show together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MeasurementError
from onnx_mdp.tables.cost_terms import CostTerm, Layer, held
from onnx_mdp.tables.lut_records import Run
from onnx_mdp.tables.memory import UNREADABLE
from onnx_mdp.tables.nonnegative import nonnegative_least_squares
from onnx_mdp.tables.staircases import COEFFICIENTS, features
from onnx_mdp.tables.variants import variant_of_run

__all__ = ["WindowFit", "fit_windows"]

_WHOLE_WEIGHT = 30.0
_SHORTEST = 0.3  # of the median window: below, errors count as those of this one
_ROUNDS = 3

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WindowFit:
    """Coefficients by shape key, as `features` takes them, and the milliseconds of calling a whole model.

    ``predicted`` and ``measured`` are the milliseconds of the whole variants, the unpruned model first.
    """

    coefficients: Mapping[str, tuple[float, ...]]
    call_ms: float
    predicted: Vector
    measured: Vector


def fit_windows(structure: Structure, terms: Sequence[CostTerm], runs: Sequence[Run], step: int) -> WindowFit:
    """Fit ``runs`` of `compiled_profiling`, in the order of their numbers, at the granularity ``step``.

    Raises:
        MeasurementError: the runs came from another store and are not such.
    """
    try:
        return _fit(structure, terms, runs, step)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MeasurementError(UNREADABLE) from error


def _fit(structure: Structure, terms: Sequence[CostTerm], runs: Sequence[Run], step: int) -> WindowFit:
    keys = {key: COEFFICIENTS * i for i, key in enumerate(dict.fromkeys(term.key for term in terms))}
    names = dict.fromkeys(str(b[0]) for run in runs for b in run.payload.get("borders", ()))
    borders = {name: COEFFICIENTS * len(keys) + i for i, name in enumerate(names)}
    whole = np.asarray(["kept" in run.payload for run in runs])
    design = np.zeros((len(runs), COEFFICIENTS * len(keys) + len(borders) + 2))
    for row, run in zip(design, runs, strict=True):
        layers = _whole(structure, terms, run) if "kept" in run.payload else run.payload["terms"]
        for key, a, b in layers:
            if key in keys:
                row[keys[key] : keys[key] + COEFFICIENTS] += features(key, a, b, step)
        for name, channels in run.payload.get("borders", ()):
            row[borders[name]] += -(-channels // step)
        row[-1 if "kept" in run.payload else -2] = 1.0
    ms = np.asarray([run.plain_ms for run in runs])
    found = _solve(design, ms, whole)
    coefficients = {key: tuple(found[i : i + COEFFICIENTS].tolist()) for key, i in keys.items()}
    return WindowFit(coefficients, float(found[-1]), (design @ found)[whole], ms[whole])


def _whole(structure: Structure, terms: Sequence[CostTerm], run: Run) -> list[Layer]:
    """The layers of a whole variant."""
    variant = variant_of_run(structure, run)
    return held(structure, terms, variant.kept, variant.removed_blocks)


def _solve(design: npt.NDArray[np.float64], ms: Vector, whole: npt.NDArray[np.bool_]) -> Vector:
    """Weighted by relative error; windows that fit badly count less in each of three rounds."""
    span = np.where(design.max(0) > 0, design.max(0), 1.0)
    typical = float(np.median(ms[~whole])) if (~whole).any() else float(np.median(ms))
    base = np.where(whole, _WHOLE_WEIGHT, 1.0) / np.maximum(ms, _SHORTEST * typical)
    weight, found = base, np.zeros(design.shape[1])
    for _ in range(_ROUNDS):
        found = nonnegative_least_squares(design / span * weight[:, None], ms * weight) / span
        errors = np.abs(design @ found / ms - 1.0)
        limit = 2.0 * float(np.median(errors[~whole])) + 1e-3 if (~whole).any() else np.inf
        weight = base * np.where(whole, 1.0, np.sqrt(np.minimum(1.0, limit / np.maximum(errors, 1e-9))))
    return found
