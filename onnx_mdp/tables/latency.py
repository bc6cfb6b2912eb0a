"""Structure to latency table: profile random variants in place, fit staircases, calibrate on whole models.

The table is the fit evaluated at every choice: full in both widths, and monotone by construction. An affine
map, fitted to whole models, turns sums of terms into milliseconds. What weights cost that are read from
memory again depends on the whole model: a table holds for one share of them.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.model_io import topology_hash
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.runtime import InferenceSession, Runtime, context
from onnx_mdp.running.timing import Feeds, random_feeds
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.calibrating import (
    Calibration,
    Progress,
    Subject,
    calibrate_in_place,
    calibrate_windows,
    own_coefficients,
)
from onnx_mdp.tables.compiled_profiling import group_count, group_of, profile_group
from onnx_mdp.tables.cost_terms import CostTerm, Layer, cost_terms, held
from onnx_mdp.tables.granularity import computed_in, granularity, unit_choices
from onnx_mdp.tables.lut_records import SMALLEST
from onnx_mdp.tables.lut_store import LutStore, Run
from onnx_mdp.tables.memory import Megabytes, megabytes, total
from onnx_mdp.tables.memory_fit import sum_ms
from onnx_mdp.tables.primitives import profile_primitives, shows_primitives
from onnx_mdp.tables.profiling import profile_variant, shows_nodes
from onnx_mdp.tables.related import OWN_VARIANTS, Fit, related_runs
from onnx_mdp.tables.session import session
from onnx_mdp.tables.staircases import METHOD, Staircases, height
from onnx_mdp.tables.variants import (
    Variant,
    full_variant,
    plan_of_variant,
    random_variant,
    whole_model,
)
from onnx_mdp.tables.window_fit import fit_windows

__all__ = [
    "VARIANTS",
    "LatencyTable",
    "build_table",
    "predict_ms",
    "priced_at",
    "table_key",
    "term_ms",
    "touched",
    "valid_for",
]

_NODES, _PRIMITIVES, _WINDOWS = "nodes", "primitives", "windows"
VARIANTS = 8  # twice as many predict no better: what is left is one factor of the machine


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
    way = _way(structure, terms, runtime, store)
    in_place = way != _WINDOWS
    runs_key = f"{key}.{way}" if way == _PRIMITIVES else key
    fit = Fit(seed, variants, METHOD if in_place else 0)
    related = related_runs(store, where, runs_key, terms, fit) if in_place else None
    if related is not None:
        count = min(OWN_VARIANTS, variants)
    else:
        count = variants if in_place else group_count(variants, runtime.provider)
    stored = {run.variant: run for run in store.runs(where, runs_key) if run.seed == seed}
    missing = [v for v in range(count) if v not in stored]
    base = None if in_place or not missing else _opened(structure, runtime, seed)
    for done, number in enumerate(missing):
        progress("profile", done, len(missing))
        if base is None:
            measured: tuple[Run, ...] = (_profile(structure, terms, choices, runtime, number, seed, way),)
        else:
            base_ms = stored[0].plain_ms if number else None
            measured = profile_group(
                structure, terms, choices, runtime, base, group=number, seed=seed, base_ms=base_ms
            )
        for run in measured:
            store.add_run(where, runs_key, replace(run, payload={**run.payload, "session": session()}))
            stored[run.variant] = run
    if missing:
        progress("profile", len(missing), len(missing))
    runs = tuple(run for number, run in sorted(stored.items()) if group_of(number) < count)
    windows = None if in_place else fit_windows(structure, terms, runs, step)
    others = related.runs if related else ()
    name = fit.name(runs_key, related)
    calibration = None if missing else _saved(store.get_calibration(where, name))
    if calibration is None:
        subject = Subject(structure, terms, choices, step, runtime, seed, progress)
        if windows is None:
            calibration = calibrate_in_place(subject, runs, others)
        else:
            calibration = calibrate_windows(subject, windows)
        store.put_calibration(where, name, asdict(calibration) | {"session": session()})
    if windows is None:
        staircases = Staircases((*runs, *others), step, calibration.shares)
        coefficients = own_coefficients(staircases, terms, calibration.memory)
    else:
        coefficients = windows.coefficients
    spent = time.perf_counter() - started
    found = (where, key, step, terms, coefficients, calibration, choices, len(missing), spent)
    table = LatencyTable(*found, related.share if related else 0.0)
    return valid_for(table, structure, full_variant(structure))


def _saved(payload: Mapping[str, Any] | None) -> Calibration | None:
    """A calibration of the store; None where there is none, one of an older version, or no sense in it."""
    names = set(Calibration.__slots__) - {"shares"}
    try:
        shares = tuple(float(share) for share in (payload or {}).get("shares", ()))
        found = Calibration(**{name: float((payload or {})[name]) for name in names}, shares=shares)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return found if all(0 < share < math.inf for share in shares) else None


def table_key(structure: Structure) -> str:
    """What a table is valid for: the topology of the normalised model at its bound shapes, and its states."""
    text = f"{topology_hash(structure.shadow.model)} {sorted(structure.shadow.inputs.items())}"
    if structure.shadow.states:
        text += f" {sorted(structure.shadow.states.items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _way(structure: Structure, terms: Sequence[CostTerm], runtime: Runtime, store: LutStore) -> str:
    """How the times of single layers are found; asked once for each model and device.

    The profiler shows nodes, of providers that compile a single one, and of others the time that it takes to
    start a node. Of some the primitives are printed. What shows neither is measured by windows.
    """
    if runtime.provider == "CPUExecutionProvider":
        return _NODES
    where, record = context(runtime), f"{table_key(structure)}.profiler"
    known = store.get_calibration(where, record) or {}
    way = known.get("way")
    if way not in (_NODES, _PRIMITIVES, _WINDOWS):
        nodes = known.get("in_place")
        if nodes is None:
            model, kept = rewrite(structure, PruningPlan(keep={}), split=True), full_variant(structure).kept
            nodes = shows_nodes(structure, terms, model, kept, runtime)
        primitives = not nodes and shows_primitives(structure, terms, runtime)
        way = _NODES if nodes else _PRIMITIVES if primitives else _WINDOWS
        store.put_calibration(where, record, {"way": way})
    return str(way)


def _opened(structure: Structure, runtime: Runtime, seed: int) -> tuple[InferenceSession, Feeds]:
    """A session of the unpruned model and its feeds."""
    model = whole_model(structure, PruningPlan(keep={}))
    session = open_placed(model, runtime, structure.shadow.inputs)
    return session, random_feeds(session, structure.shadow.inputs, seed)


def _profile(
    structure: Structure,
    terms: Sequence[CostTerm],
    choices: Mapping[int, Sequence[int]],
    runtime: Runtime,
    number: int,
    seed: int,
    way: str,
) -> Run:
    """Profile variant ``number``: 0 is the unpruned model, one the smallest, the others are random."""
    rng = np.random.default_rng([seed, number])
    if number == 0:
        variant = full_variant(structure)
    elif number == SMALLEST:
        variant = random_variant(structure, choices, rng, low=0.0, high=1e-9)
    else:
        variant = random_variant(structure, choices, rng)
    if way == _PRIMITIVES:
        return profile_primitives(structure, terms, variant, runtime, number=number, seed=seed)
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
