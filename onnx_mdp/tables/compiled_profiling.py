"""Measure a provider that compiles: whole variants, and windows of them, beside the unpruned model.

Each group is one variant of the model and a few windows of it, timed interleaved with the unpruned model,
which takes the drift of the machine out. What the groups hold is explained together by `window_fit`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.provider_options import compiles_slowly
from onnx_mdp.running.runtime import InferenceSession, Runtime
from onnx_mdp.running.timing import Feeds, measure, random_feeds
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.cost_terms import CostTerm
from onnx_mdp.tables.lut_records import Run
from onnx_mdp.tables.variants import (
    LEAST_LEVEL,
    Variant,
    full_variant,
    plan_of_variant,
    random_variant,
    spread_variant,
    whole_model,
)
from onnx_mdp.tables.windows import Window, cut_window

__all__ = ["group_count", "group_of", "open_window", "profile_group"]

_LENGTHS = (1, 1, 2, 3, 5, 8)  # terms of the windows of a group
_FEW = (1, 3)  # where each engine takes seconds to minutes: a table builds about 80 of them
_WINDOWS = 10_000  # windows are numbered from here, so that a group's variant has the number of the group
_ROUND_MS = 600.0
_ROUNDS = (8, 30)


def group_count(variants: int, provider: str) -> int:
    """How many groups stand for ``variants`` profiled variants, which show the time of each layer."""
    return variants * (2 if compiles_slowly(provider) else 3)


def group_of(number: int) -> int:
    """The group of a stored run: whole variants have its number, windows are numbered far above."""
    return number if number < _WINDOWS else (number - _WINDOWS) // len(_LENGTHS)


def _variant(structure: Structure, choices: Mapping[int, Sequence[int]], group: int, seed: int) -> Variant:
    """The variant of a group: the unpruned model, the smallest, then random ones of two kinds."""
    rng = np.random.default_rng([seed, group, 3])
    if group == 0:
        return full_variant(structure)
    if group == 1:
        return random_variant(structure, choices, rng, low=0.0, high=1e-9)
    if group % 2:
        return random_variant(structure, choices, rng)
    level = rng.uniform(LEAST_LEVEL, 1.0)
    return spread_variant(structure, choices, rng, level, rng.choice([0.0, 0.4]))


def profile_group(
    structure: Structure,
    terms: Sequence[CostTerm],
    choices: Mapping[int, Sequence[int]],
    runtime: Runtime,
    base: tuple[InferenceSession, Feeds],
    *,
    group: int,
    seed: int,
    base_ms: float | None,
) -> tuple[Run, ...]:
    """Time a group; the run of its whole variant is the last one.

    ``base`` is the open session of the unpruned model, ``base_ms`` what it took in group 0, to which times
    are normalised (None: this is group 0).

    Raises:
        MeasurementError: the provider cannot run a variant.
    """
    started = time.perf_counter()
    variant = _variant(structure, choices, group, seed)
    windows = list(_windows(structure, terms, variant, group, seed, runtime))
    opened = [
        (window, pair) for window in windows if (pair := open_window(window, runtime, seed)) is not None
    ]
    pairs = [base, *(pair for _, pair in opened)]
    if group:
        model = whole_model(structure, plan_of_variant(structure, variant))
        session = open_placed(model, runtime, structure.shadow.inputs)
        pairs.append((session, random_feeds(session, structure.shadow.inputs, seed)))
    first = measure([base[0]], [base[1]], rounds=4, threads=runtime.threads, on_cpu=runtime.on_cpu).ms[0]
    timing = measure(
        [session for session, _ in pairs],
        [feeds for _, feeds in pairs],
        rounds=round(float(np.clip(_ROUND_MS / first, *_ROUNDS))),
        seed=seed + group,
        threads=runtime.threads,
        on_cpu=runtime.on_cpu,
    )
    scale = 1.0 if base_ms is None else base_ms / timing.ms[0]
    spent = (time.perf_counter() - started) / len(pairs)
    runs = [
        _run(
            _WINDOWS + group * len(_LENGTHS) + place,
            seed,
            scale * ms,
            spent,
            {"terms": window.terms, "borders": window.borders},
        )
        for place, ((window, _), ms) in enumerate(zip(opened, timing.ms[1:], strict=False))
    ]
    about: dict[str, Any] = {
        "kept": {str(k): v for k, v in variant.kept.items()},
        "removed": sorted(variant.removed_blocks),
    }
    return (*runs, _run(group, seed, scale * timing.ms[-1 if group else 0], spent, about))


def _run(number: int, seed: int, ms: float, seconds: float, payload: Mapping[str, Any]) -> Run:
    return Run(number, seed, ms, ms, 1, seconds, (), dict(payload))


def _windows(
    structure: Structure,
    terms: Sequence[CostTerm],
    variant: Variant,
    group: int,
    seed: int,
    runtime: Runtime,
) -> Iterator[Window]:
    """Windows of a variant with all its blocks; single terms take their turns, so that no key is left out."""
    rng = np.random.default_rng([seed, group, 4])
    model = rewrite(structure, plan_of_variant(structure, Variant(variant.kept)), split=True)
    keys = list(dict.fromkeys(term.key for term in terms))
    lengths = _FEW if compiles_slowly(runtime.provider) else _LENGTHS
    singles = lengths.count(1)
    for place, length in enumerate(lengths):
        if length == 1:
            wanted = keys[(group * singles + place) % len(keys)]
            start = int(rng.choice([i for i, term in enumerate(terms) if term.key == wanted]))
        else:
            start = int(rng.integers(0, max(1, len(terms) - length + 1)))
        window = cut_window(structure, terms[start : start + length], model, variant.kept)
        if window is not None:
            yield window


def open_window(window: Window, runtime: Runtime, seed: int) -> tuple[InferenceSession, Feeds] | None:
    """A session that ran once; None for a window that does not stand alone, such as indices out of range."""
    try:
        session = open_placed(window.model, runtime, window.shapes)
        feeds = random_feeds(session, window.shapes, seed)
        session.run(None, feeds)
    except Exception:  # of ours and of the runtime: it has no common base of its own
        return None
    return session, feeds
