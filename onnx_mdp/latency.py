"""Structure to latency table: profile random variants in place, fit staircases, calibrate on whole models.

For every shape key the time of a term is fitted, with non-negative coefficients, as

    t(a, b) = c0 + c1·⌈a/B⌉ + c2·⌈b/B⌉ + c3·⌈a/B⌉·⌈b/B⌉

where ``a`` and ``b`` are the widths read and made and B is the provider's granularity. In products of heads,
``b`` counts heads one by one, and the width ``a`` of query and key, which is summed over, counts half blocks.
The table is the fit evaluated at every choice: full in both widths, and monotone by construction. An affine
map, fitted to the unpruned model and four held-out variants, turns sums of terms into milliseconds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.cost_terms import HEADS, SUMMED_HEADS, CostTerm, cost_terms, width
from onnx_mdp.granularity import granularity, unit_choices
from onnx_mdp.large_models import LargeModel, for_session
from onnx_mdp.lut_store import LutStore, Run
from onnx_mdp.model_io import topology_hash
from onnx_mdp.nonnegative import nonnegative_least_squares
from onnx_mdp.placement import open_placed
from onnx_mdp.plan import PruningPlan, kept_count
from onnx_mdp.profiling import profile_variant
from onnx_mdp.rewriting import rewrite
from onnx_mdp.runtime import Runtime, context
from onnx_mdp.structure import Structure
from onnx_mdp.timing import Timing, measure, random_feeds

__all__ = [
    "VARIANTS",
    "Calibration",
    "LatencyTable",
    "Variant",
    "build_table",
    "full_variant",
    "measure_models",
    "plan_of_variant",
    "predict_ms",
    "random_variant",
    "table_key",
    "term_ms",
    "variant_of_plan",
]

VARIANTS = 16
_PROFILER_LIMIT_MS = 6e-3  # the profiler adds 2 to 5 microseconds to each runtime node
_QUANTILES = (0.05, 0.35, 0.65, 0.95)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """How many units each dimension keeps (a width: in each head), and which blocks are gone."""

    kept: Mapping[int, int]
    removed_blocks: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Calibration:
    """The affine map to whole-model milliseconds and how well it was known.

    ``median_error`` and ``worst_error`` are relative errors on the held-out variants when only the unpruned
    model sets the scale; ``noise`` is the split-half error F of their measurement.
    """

    scale: float
    offset_ms: float
    base_ms: float
    median_error: float
    worst_error: float
    noise: float


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Fitted coefficients by shape key, and their calibration, for one model on one device."""

    context: Mapping[str, str | int]
    key: str
    granularity: int
    terms: tuple[CostTerm, ...]
    coefficients: Mapping[str, tuple[float, ...]]
    calibration: Calibration
    choices: Mapping[int, tuple[int, ...]]
    measured: int
    seconds: float

    @property
    def base_ms(self) -> float:
        """Latency of the unpruned model when the table was calibrated."""
        return self.calibration.base_ms


def build_table(
    structure: Structure,
    runtime: Runtime,
    store: LutStore,
    *,
    variants: int = VARIANTS,
    seed: int = 0,
    max_choices: int = 16,
    progress: Progress = lambda stage, done, total: None,
) -> LatencyTable:
    """Measure what the store does not hold yet, and fit.

    Every profiled variant is committed at once: an interrupted call goes on where it stopped.

    Raises:
        MeasurementError: ONNX Runtime cannot run or profile a variant.
    """
    started = time.perf_counter()
    where = context(runtime)
    step = granularity(runtime, store)
    choices = {i: unit_choices(structure.dimensions[i], step, max_choices) for i in structure.prunable}
    terms = cost_terms(structure)
    key = table_key(structure)
    known = {run.variant for run in store.runs(where, key) if run.seed == seed}
    missing = [v for v in range(variants) if v not in known]
    for done, number in enumerate(missing):
        progress("profile", done, len(missing))
        store.add_run(where, key, _profile(structure, terms, choices, runtime, number, seed))
    if missing:
        progress("profile", len(missing), len(missing))
    runs = tuple(run for run in store.runs(where, key) if run.seed == seed and run.variant < variants)
    coefficients = _fit(runs, step)
    # A calibration belongs to one fit: other seeds or counts of variants have other coefficients.
    fit = f"{key}.{seed}.{variants}"
    saved = store.get_calibration(where, fit)
    if saved is None or missing or not saved.keys() >= set(Calibration.__slots__):
        draft = LatencyTable(where, key, step, terms, coefficients, _IDENTITY, choices, len(missing), 0.0)
        calibration = _calibrate(structure, draft, runtime, seed, progress)
        store.put_calibration(where, fit, _payload(calibration))
    else:
        calibration = Calibration(**{name: float(saved[name]) for name in Calibration.__slots__})
    spent = time.perf_counter() - started
    return LatencyTable(where, key, step, terms, coefficients, calibration, choices, len(missing), spent)


_IDENTITY = Calibration(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _payload(calibration: Calibration) -> dict[str, Any]:
    return {name: getattr(calibration, name) for name in Calibration.__slots__}


def table_key(structure: Structure) -> str:
    """What a table is valid for: the topology of the normalised model at its bound shapes, and its states."""
    text = f"{topology_hash(structure.shadow.model)} {sorted(structure.shadow.inputs.items())}"
    if structure.shadow.states:
        text += f" {sorted(structure.shadow.states.items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    spread: bool = False,
    drop: float = 0.0,
) -> Variant:
    """Independent random widths from ``choices``; ``spread`` adds one common level to all of them.

    Each width is a uniform share in [low, high] of the full one, rounded up to a choice; with ``spread``
    the shares scatter around a level drawn first. Each block is removed with probability ``drop``.
    """
    level = rng.uniform(low, high) if spread else None
    kept = dict(full_variant(structure).kept)
    for index, options in choices.items():
        share = rng.uniform(low, high) if level is None else np.clip(level * rng.uniform(0.5, 1.6), 0.02, 1.0)
        wanted = share * structure.dimensions[index].count
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


def variant_of_plan(structure: Structure, plan: PruningPlan) -> Variant:
    """The widths and blocks of a plan."""
    kept = {i: kept_count(plan, structure, i) for i in range(len(structure.dimensions))}
    return Variant(kept, frozenset(plan.removed_blocks))


def _profile(
    structure: Structure,
    terms: Sequence[CostTerm],
    choices: Mapping[int, Sequence[int]],
    runtime: Runtime,
    number: int,
    seed: int,
) -> Run:
    """Profile variant ``number``: 0 is the unpruned model, 1 the smallest, the others are random."""
    rng = np.random.default_rng([seed, number])
    if number == 0:
        variant = full_variant(structure)
    elif number == 1:
        variant = random_variant(structure, choices, rng, low=0.0, high=1e-9)
    else:
        variant = random_variant(structure, choices, rng)
    model = rewrite(structure, plan_of_variant(structure, variant), split=True)
    probe = open_placed(for_session(model), runtime, structure.shadow.inputs)
    feeds = random_feeds(probe, structure.shadow.inputs, seed)
    first = measure([probe], [feeds], rounds=4, threads=runtime.threads, on_cpu=runtime.on_cpu).ms[0]
    runs = 6 if first > 25 else 12 if first > 8 else 24
    return profile_variant(
        structure, terms, model, variant.kept, runtime, variant=number, seed=seed, runs=runs
    )


def _features(key: str, a: float, b: float, step: int) -> tuple[float, float, float, float]:
    if f'"kind":"{SUMMED_HEADS}"' in key:
        u, v = -(-a // max(1.0, step / 2)), b
    elif f'"kind":"{HEADS}"' in key:
        u, v = -(-a // step), b
    else:
        u, v = -(-a // step), -(-b // step)
    return (1.0, u, v, u * v)


def _regime(key: str, a: float, b: float, step: int) -> str:
    """Keys fall apart where the runtime takes another kernel: few inputs, or unaligned widths."""
    if '"op":"Conv"' not in key:
        return key
    if 1 < a < step:
        return f"{key}|a={a:g}"
    return f"{key}|odd" if (a > 1 and a % 4) or b % 4 else key


def _fit(runs: Sequence[Run], step: int) -> dict[str, tuple[float, ...]]:
    """Coefficients by key, with the profiler's inflation removed and one drift factor for each run."""
    inflation = float(np.median([(run.sum_ms - run.plain_ms) / run.nodes for run in runs]))
    inflation = min(max(inflation, 0.0), _PROFILER_LIMIT_MS)
    rows: dict[str, list[tuple[int, tuple[float, ...], float]]] = {}
    for number, run in enumerate(runs):
        for sample in run.samples:
            ms = max(sample.ms - inflation * sample.count, 0.2 * sample.ms)
            row = (number, _features(sample.key, sample.a, sample.b, step), ms)
            for key in {sample.key, _regime(sample.key, sample.a, sample.b, step)}:
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
    features = np.asarray([row[1] for row in rows])
    observed = np.asarray([row[2] / drift[row[0]] for row in rows])
    span = features.max(0)
    weight = 1.0 / np.maximum(observed, 0.1 * np.median(observed))
    system, target = features / span * weight[:, None], observed * weight
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
        for number, features, ms in found:
            fitted = float(np.dot(fits[key], features))
            pairs[number].append((ms / max(fitted, 1e-9), fitted))
    factors = np.asarray([_weighted_median(found) for found in pairs])
    return np.asarray(factors / np.median(factors))


def _weighted_median(pairs: Sequence[tuple[float, float]]) -> float:
    ordered = sorted(pairs)
    weights = np.cumsum([weight for _, weight in ordered])
    return ordered[int(np.searchsorted(weights, weights[-1] / 2))][0]


def term_ms(table: LatencyTable, term: CostTerm, a: float, b: float) -> float:
    """Calibrated milliseconds of one term at the widths ``a`` and ``b``."""
    fitted = table.coefficients.get(_regime(term.key, a, b, table.granularity)) or table.coefficients.get(
        term.key
    )
    if fitted is None:  # never seen in a profile: the runtime removed it
        return 0.0
    return table.calibration.scale * float(np.dot(fitted, _features(term.key, a, b, table.granularity)))


def predict_ms(table: LatencyTable, structure: Structure, variant: Variant) -> float:
    """Predicted latency of a variant in the machine state of the calibration."""
    gone = {
        index
        for block in structure.blocks
        if block.name in variant.removed_blocks
        for index in (*block.operations, block.joint)
    }
    total = table.calibration.offset_ms
    for term in table.terms:
        if term.operation not in gone:
            total += term_ms(table, term, width(term.reads, variant.kept), width(term.makes, variant.kept))
    return total


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


def _calibrate(
    structure: Structure, draft: LatencyTable, runtime: Runtime, seed: int, progress: Progress
) -> Calibration:
    rng = np.random.default_rng([seed, 2**31])
    pool = [
        random_variant(structure, draft.choices, rng, low=0.05, spread=True, drop=rng.choice([0.0, 0.4]))
        for _ in range(64)
    ]
    pool.sort(key=lambda variant: predict_ms(draft, structure, variant))
    chosen = [full_variant(structure), *(pool[int(q * (len(pool) - 1))] for q in _QUANTILES)]
    plans = [plan_of_variant(structure, variant) for variant in chosen]
    models = [for_session(rewrite(structure, plan, split=True)) for plan in plans]
    timing = measure_models(
        models,
        structure.shadow.inputs,
        runtime,
        seed=seed,
        on_round=lambda done, total: progress("calibrate", done, total),
    )
    predicted = np.asarray([predict_ms(draft, structure, v) for v in chosen])
    measured = np.asarray(timing.ms)
    errors = np.abs(predicted[1:] / measured[1:] * (measured[0] / predicted[0]) - 1.0)
    scale, offset = _affine(predicted, measured)
    return Calibration(
        scale=scale,
        offset_ms=offset,
        base_ms=float(measured[0]),
        median_error=float(np.median(errors)),
        worst_error=float(errors.max()),
        noise=timing.noise,
    )


def _affine(predicted: npt.NDArray[np.float64], measured: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Scale and offset that minimise relative errors.

    Small models run in warmer caches than the sum of their parts says, so the offset may be negative, but
    not by more than half of the fastest measurement: every plan must cost something.
    """
    system = np.stack([predicted, np.ones_like(predicted)], 1) / measured[:, None]
    least = -0.5 * float(measured.min())
    scale, above = nonnegative_least_squares(system, 1.0 - least * system[:, 1]).tolist()
    return scale, least + above
