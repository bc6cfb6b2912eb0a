"""Structure to latency table: profile random variants in place, fit staircases, calibrate on whole models.

The table is the fit evaluated at every choice: full in both widths, and monotone by construction. An affine
map, fitted to the unpruned model and eight held-out variants, turns sums of terms into milliseconds. What
weights cost that are read from memory again depends on the whole model: a table holds for one share of them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.large_models import LargeModel, for_session
from onnx_mdp.model_io import topology_hash
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.runtime import InferenceSession, Runtime, context
from onnx_mdp.running.timing import Feeds, random_feeds
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.compiled_profiling import group_count, group_of, profile_group
from onnx_mdp.tables.cost_terms import CostTerm, Layer, cost_terms, held
from onnx_mdp.tables.granularity import computed_in, granularity, unit_choices
from onnx_mdp.tables.lut_records import SMALLEST
from onnx_mdp.tables.lut_store import LutStore, Run
from onnx_mdp.tables.memory import UNPRICED, Megabytes, Memory, megabytes, total
from onnx_mdp.tables.memory_fit import fit_memory, sum_ms
from onnx_mdp.tables.profiling import profile_variant, shows_nodes
from onnx_mdp.tables.related import OWN_VARIANTS, Fit, related_runs
from onnx_mdp.tables.session import session
from onnx_mdp.tables.staircases import METHOD, Staircases, affine, height
from onnx_mdp.tables.variants import (
    LEAST_LEVEL,
    Variant,
    full_variant,
    measure_models,
    plan_of_variant,
    random_variant,
    spread_variant,
)
from onnx_mdp.tables.window_fit import WindowFit, fit_windows

__all__ = [
    "VARIANTS",
    "Calibration",
    "LatencyTable",
    "build_table",
    "predict_ms",
    "priced_at",
    "table_key",
    "term_ms",
    "touched",
    "valid_for",
]

VARIANTS = 8  # twice as many predict no better: what is left is one factor of the machine
# Of the unpruned latency, of variants to calibrate with: relative errors are largest where little is left.
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8)
_DRAWN = 200  # to find variants of these shares among
_CALIBRATION_S = 10.0
_GROUPS = 2

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The affine map to whole-model milliseconds and how well it was known.

    ``median_error`` and ``worst_error`` are relative errors on the held-out variants when only the unpruned
    model sets the scale; ``noise`` is the split-half error F of their measurement. ``cache_mb`` and
    ``ms_per_mb`` (before the map) are those of `Memory`.
    """

    scale: float
    offset_ms: float
    base_ms: float
    median_error: float
    worst_error: float
    noise: float
    cache_mb: float = 1.0
    ms_per_mb: float = 0.0

    @property
    def memory(self) -> Memory:
        """Where weights are read from."""
        return Memory(self.cache_mb, self.ms_per_mb)


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Fitted coefficients by shape key, and their calibration, for one model on one device.

    ``measured`` variants were profiled for it now; a related model had the share ``shared`` of its keys.
    Its terms are those of a model that reads the share ``reread`` of its weights from memory in each run:
    `build_table` takes that of the unpruned model, `valid_for` another.
    """

    context: Mapping[str, str | int]
    key: str
    granularity: int
    terms: tuple[CostTerm, ...]
    coefficients: Mapping[str, tuple[float, ...]]
    calibration: Calibration
    choices: Mapping[int, tuple[int, ...]]
    measured: int
    seconds: float
    shared: float = 0.0
    reread: float = 0.0

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

    Every profiled variant is committed at once: an interrupted call goes on where it stopped. Where a related
    model was profiled on this device, its runs join the fit, and few variants are profiled.

    Raises:
        MeasurementError: ONNX Runtime cannot run or profile a variant.
    """
    started = time.perf_counter()
    where = context(runtime)
    step = granularity(runtime, store, computed_in(structure))
    choices = {i: unit_choices(structure.dimensions[i], step, max_choices) for i in structure.prunable}
    terms = cost_terms(structure)
    key = table_key(structure)
    in_place = _in_place(structure, terms, runtime, store)
    fit = Fit(seed, variants, METHOD if in_place else 0)
    related = related_runs(store, where, key, terms, fit) if in_place else None
    if related is not None:
        count = min(OWN_VARIANTS, variants)
    else:
        count = variants if in_place else group_count(variants, runtime.provider)
    stored = {run.variant: run for run in store.runs(where, key) if run.seed == seed}
    missing = [v for v in range(count) if v not in stored]
    base = None if in_place or not missing else _opened(structure, runtime, seed)
    for done, number in enumerate(missing):
        progress("profile", done, len(missing))
        if base is None:
            measured: tuple[Run, ...] = (_profile(structure, terms, choices, runtime, number, seed),)
        else:
            base_ms = stored[0].plain_ms if number else None
            measured = profile_group(
                structure, terms, choices, runtime, base, group=number, seed=seed, base_ms=base_ms
            )
        for run in measured:
            store.add_run(where, key, replace(run, payload={**run.payload, "session": session()}))
            stored[run.variant] = run
    if missing:
        progress("profile", len(missing), len(missing))
    runs = tuple(run for number, run in sorted(stored.items()) if group_of(number) < count)
    windows, staircases = None, None
    if in_place:
        staircases = Staircases(runs + (related.runs if related else ()), step)
        coefficients = _own(staircases, terms)
    else:
        windows = fit_windows(structure, terms, runs, step)
        coefficients = windows.coefficients
    name = fit.name(key, related)
    saved = store.get_calibration(where, name)
    if saved is None or missing or not saved.keys() >= set(Calibration.__slots__):
        call = replace(_IDENTITY, offset_ms=windows.call_ms if windows else 0.0)
        draft = LatencyTable(where, key, step, terms, coefficients, call, choices, len(missing), 0.0)
        calibration = _calibrate(structure, draft, runtime, seed, progress, windows, staircases)
        store.put_calibration(where, name, _payload(calibration) | {"session": session()})
    else:
        calibration = Calibration(**{name: float(saved[name]) for name in Calibration.__slots__})
    if staircases is not None:
        coefficients = _own(staircases, terms, calibration.memory)
    spent = time.perf_counter() - started
    found = (where, key, step, terms, coefficients, calibration, choices, len(missing), spent)
    table = LatencyTable(*found, related.share if related else 0.0)
    return valid_for(table, structure, full_variant(structure))


_IDENTITY = Calibration(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _payload(calibration: Calibration) -> dict[str, Any]:
    return {name: getattr(calibration, name) for name in Calibration.__slots__}


def _own(
    staircases: Staircases, terms: Sequence[CostTerm], memory: Memory = UNPRICED
) -> Mapping[str, tuple[float, ...]]:
    """What is fitted for the layers of a model, whatever a related one has besides."""
    keys = {term.key for term in terms}
    return {key: c for key, c in staircases.fit(memory).items() if key.partition("|")[0] in keys}


def table_key(structure: Structure) -> str:
    """What a table is valid for: the topology of the normalised model at its bound shapes, and its states."""
    text = f"{topology_hash(structure.shadow.model)} {sorted(structure.shadow.inputs.items())}"
    if structure.shadow.states:
        text += f" {sorted(structure.shadow.states.items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_place(structure: Structure, terms: Sequence[CostTerm], runtime: Runtime, store: LutStore) -> bool:
    """Whether the profiler shows the times of single operations; asked once for each model and device.

    Providers that compile show one node, and others the time that it takes to start a node.
    """
    if runtime.provider == "CPUExecutionProvider":
        return True
    where, record = context(runtime), f"{table_key(structure)}.profiler"
    known = store.get_calibration(where, record)
    if known is None:
        model, kept = rewrite(structure, PruningPlan(keep={}), split=True), full_variant(structure).kept
        known = {"in_place": shows_nodes(structure, terms, model, kept, runtime)}
        store.put_calibration(where, record, known)
    return bool(known.get("in_place"))


def _opened(structure: Structure, runtime: Runtime, seed: int) -> tuple[InferenceSession, Feeds]:
    """A session of the unpruned model and its feeds."""
    model = _for_session(structure, PruningPlan(keep={}))
    session = open_placed(model, runtime, structure.shadow.inputs)
    return session, random_feeds(session, structure.shadow.inputs, seed)


def _profile(
    structure: Structure,
    terms: Sequence[CostTerm],
    choices: Mapping[int, Sequence[int]],
    runtime: Runtime,
    number: int,
    seed: int,
) -> Run:
    """Profile variant ``number``: 0 is the unpruned model, one the smallest, the others are random."""
    rng = np.random.default_rng([seed, number])
    if number == 0:
        variant = full_variant(structure)
    elif number == SMALLEST:
        variant = random_variant(structure, choices, rng, low=0.0, high=1e-9)
    else:
        variant = random_variant(structure, choices, rng)
    model = rewrite(structure, plan_of_variant(structure, variant), split=True)
    return profile_variant(structure, terms, model, variant.kept, runtime, variant=number, seed=seed)


def term_ms(table: LatencyTable, term: CostTerm, a: float, b: float) -> float:
    """Calibrated milliseconds of one term at the widths ``a`` and ``b``."""
    ms = height(table.coefficients, term.key, a, b, table.granularity)
    if ms is None:
        return 0.0
    again = table.reread and table.reread * megabytes(term.key, a, b, table.granularity).weights
    return table.calibration.scale * (ms + table.calibration.ms_per_mb * again)


def touched(table: LatencyTable, structure: Structure, variant: Variant) -> Megabytes:
    """Megabytes that each run of a variant reads and makes."""
    return total(_layers(structure, table.terms, variant), table.granularity)


def valid_for(table: LatencyTable, structure: Structure, variant: Variant) -> LatencyTable:
    """The table, for models that read as much of their weights from memory as a variant does."""
    return priced_at(table, table.calibration.memory.share(touched(table, structure, variant)))


def priced_at(table: LatencyTable, share: float) -> LatencyTable:
    """The table, for models that read a share of their weights from memory in each run."""
    return replace(table, reread=share)


def predict_ms(table: LatencyTable, structure: Structure, variant: Variant) -> float:
    """Predicted latency of a variant in the machine state of the calibration."""
    memory, layers = table.calibration.memory, _layers(structure, table.terms, variant)
    ms = sum_ms(table.coefficients, memory, layers, table.granularity)
    return table.calibration.offset_ms + table.calibration.scale * ms


def _layers(structure: Structure, terms: Sequence[CostTerm], variant: Variant) -> list[Layer]:
    return held(structure, terms, variant.kept, variant.removed_blocks)


def _of_any_scale(
    structure: Structure, choices: Mapping[int, Sequence[int]], rng: np.random.Generator
) -> Variant:
    """A variant that takes from a few percent to nearly all of the unpruned latency."""
    level = float(np.exp(rng.uniform(np.log(LEAST_LEVEL), 0.0)))
    return spread_variant(structure, choices, rng, level, rng.choice([0.0, 0.3, 0.6]))


def _calibrate(
    structure: Structure,
    draft: LatencyTable,
    runtime: Runtime,
    seed: int,
    progress: Progress,
    windows: WindowFit | None,
    staircases: Staircases | None,
) -> Calibration:
    """Measure the unpruned model and eight held-out variants, and fit memory and affine map.

    The whole variants of ``windows`` count as well, for they were not seen through a profiler.
    """
    rng = np.random.default_rng([seed, 2**31])
    pool = [full_variant(structure), *(_of_any_scale(structure, draft.choices, rng) for _ in range(_DRAWN))]
    expected = np.asarray([predict_ms(draft, structure, variant) for variant in pool])
    nearest = [int(np.abs(expected[1:] / expected[0] - share).argmin()) + 1 for share in _SHARES]
    picked = list(dict.fromkeys(nearest))  # a small model has few variants
    chosen = [pool[n] for n in (0, *picked)]
    base_ms, ratios, noise = _beside_the_unpruned(structure, chosen[1:], runtime, seed, progress)
    measured, memory = base_ms * np.asarray([1.0, *ratios]), UNPRICED
    predicted = expected[[0, *picked]]
    if staircases is not None:
        wholes = [_layers(structure, draft.terms, variant) for variant in chosen]
        memory = fit_memory(staircases, wholes, measured, draft.granularity)
        settled = replace(
            draft,
            coefficients=_own(staircases, draft.terms, memory),
            calibration=replace(draft.calibration, cache_mb=memory.cache_mb, ms_per_mb=memory.ms_per_mb),
        )
        predicted = np.asarray([predict_ms(settled, structure, variant) for variant in chosen])
    errors = np.abs(predicted[1:] / measured[1:] * (measured[0] / predicted[0]) - 1.0)
    if windows is None:
        scale, offset = affine(predicted, measured)
    else:
        now = measured[0] / windows.measured[0]
        scale, offset = affine(
            np.concatenate([predicted, windows.predicted]), np.concatenate([measured, now * windows.measured])
        )
    return Calibration(
        scale=scale,
        offset_ms=offset + scale * draft.calibration.offset_ms,
        base_ms=base_ms,
        median_error=float(np.median(errors)),
        worst_error=float(errors.max()),
        noise=noise,
        cache_mb=memory.cache_mb,
        ms_per_mb=memory.ms_per_mb,
    )


def _beside_the_unpruned(
    structure: Structure, variants: Sequence[Variant], runtime: Runtime, seed: int, progress: Progress
) -> tuple[float, list[float], float]:
    """The unpruned latency, that of each variant as a share of it, and the largest noise of a group.

    The groups are small, for all models of one are in memory at the same time.
    """
    base, ratios, timings = _for_session(structure, PruningPlan(keep={})), [0.0] * len(variants), []
    for number in range(min(_GROUPS, len(variants))):
        plans = [plan_of_variant(structure, variant) for variant in variants[number::_GROUPS]]
        timing = measure_models(
            [base, *(_for_session(structure, plan) for plan in plans)],
            structure.shadow.inputs,
            runtime,
            seed=seed + number,
            budget_s=_CALIBRATION_S / _GROUPS,
            on_round=partial(_tell, progress, number),
        )
        ratios[number::_GROUPS] = [ms / timing.ms[0] for ms in timing.ms[1:]]
        timings.append(timing)
    return timings[0].ms[0], ratios, max(timing.noise for timing in timings)


def _tell(progress: Progress, group: int, done: int, total: int) -> None:
    progress("calibrate", group * total + done, _GROUPS * total)


def _for_session(structure: Structure, plan: PruningPlan) -> bytes | LargeModel:
    return for_session(rewrite(structure, plan, split=True))
