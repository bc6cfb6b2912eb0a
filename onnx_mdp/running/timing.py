"""Milliseconds of one or many sessions, with the drift of the machine taken out.

The clock of a shared machine drifts by 5 to 15 % within seconds, in epochs that more runs do not
average away. Sessions are therefore visited in a new random order each round, and all samples
are explained together by ::

    log w[t] = log y[model(t)] + s(t) + noise

with s a running median over neighbours in time and y the median over a model's samples. What one
model loses to a slow epoch its neighbours lose too, so the ratios of y are free of it. The protocol
is that of evidence/latency.md, where it cut split-half errors of 2 to 3 % to 0.4 to 1.1 %.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_mdp.errors import MeasurementError, UsageError
from onnx_mdp.running.runtime import InferenceSession, NodeArg, run_model

__all__ = [
    "Feeds",
    "Samples",
    "Timing",
    "drift_correct",
    "first_ms",
    "measure",
    "random_feeds",
    "run_times",
    "undisturbed",
    "warm_up_runs",
]

Feeds = Mapping[str, NDArray[np.generic]]

# Below this share of CPU time, another process held the core during the run.
_MIN_CPU_SHARE = 0.985
# The model before has evicted this one's weights. Until it is as fast as in a loop of its own, a model of
# 1 to 20 ms needs six runs (its second still takes up to a third longer), one of 50 ms two.
_WARM_UP_RUNS = 6
_WARM_UP_MS = 80.0
_SAMPLE_RUNS = 3
_SAMPLE_MS = 40.0
_MIN_ROUNDS = 4
_NEIGHBOURS = 4
_ITERATIONS = 6
# Timer and session-switching noise are a few µs: below 1 ‰ of a sample this long.
_MIN_SAMPLE_MS = 2.0
_MAX_ROUNDS = 300
_UNSTEADY = 0.01
_MAX_REPEATS = 1000

_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(int8)": "int8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(uint8)": "uint8",
}


@dataclass(frozen=True, slots=True)
class Samples:
    """Timed samples in the order of time: ``int64[n]`` model index, ``float64[n]`` wall and CPU ms."""

    model: NDArray[np.int64]
    wall_ms: NDArray[np.float64]
    cpu_ms: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timing:
    """Drift-corrected milliseconds per model, at the machine's quiet-quarter speed.

    `half_ms` holds the estimates from each model's odd and from its even samples. `noise` is F, the
    relative difference of the two: its median over the models, or its maximum if they are fewer
    than four, where a median can be small by luck. F bounds the error of *ratios* within this
    value; the common level moves with the machine.
    """

    ms: tuple[float, ...]
    noise: float
    rounds: int
    half_ms: tuple[tuple[float, ...], tuple[float, ...]]


def measure(
    sessions: Sequence[InferenceSession],
    feeds: Sequence[Feeds],
    *,
    rounds: int | None = None,
    budget_s: float = 20.0,
    seed: int = 0,
    threads: int,
    on_cpu: bool | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> Timing:
    """Time all `sessions` interleaved, each on its own feed, and correct the drift.

    Without `rounds`, the budget decides, between the rounds that the models' speed asks for (6 at
    60 ms, 9 at 30 ms, 23 at 8 ms; more than the budget if need be) and 300; while the machine is
    unsteady, F above 1 %, it takes three times as long. `threads` is the number
    that the sessions run on: the CPU-time filter against preemption needs one thread and a provider
    that computes `on_cpu` (None: if it is the CPU provider), and is off otherwise. `on_round` receives
    (rounds done, rounds in all). Raises
    ``UsageError`` for nothing to measure or fewer than 4 rounds, ``MeasurementError`` if a session
    does not run.
    """
    if not sessions or len(sessions) != len(feeds):
        raise UsageError(
            f"Cannot time {len(sessions)} sessions with {len(feeds)} feeds: pass one feed for each."
        )
    if rounds is not None and rounds < _MIN_ROUNDS:
        raise UsageError(f"{rounds} rounds are too few for a split-half error: use at least {_MIN_ROUNDS}.")
    opened = tuple(zip(sessions, feeds, strict=True))
    first = [first_ms(*pair) for pair in opened]
    turns = [_Turn(*pair, warm_up_runs(ms), _repeats(ms)) for pair, ms in zip(opened, first, strict=True)]
    if on_cpu is None:
        on_cpu = all(session.get_providers() == ["CPUExecutionProvider"] for session in sessions)
    # Windows counts CPU time in ticks of 15.6 ms, longer than most samples.
    filtering = threads == 1 and on_cpu and os.name != "nt"
    rng = np.random.default_rng(seed)
    count = _rounds(first, turns, budget_s) if rounds is None else rounds
    samples = _visit(turns, count, rng, on_round)
    timing = drift_correct(samples, filter_preempted=filtering)
    if rounds is None and timing.noise > _UNSTEADY:
        more = _visit(turns, 2 * count, rng, on_round)
        timing = drift_correct(_joined(samples, more), filter_preempted=filtering)
    return timing


def run_times(
    session: InferenceSession, feeds: Feeds, count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Run `count` times back to back; return wall and CPU milliseconds, ``float64[count]`` each."""
    times = [_sample_ms(session, feeds, 1) for _ in range(count)]
    wall_ms, cpu_ms = np.array(times, dtype=np.float64).reshape(-1, 2).T
    return wall_ms, cpu_ms


def undisturbed(wall_ms: NDArray[np.float64], cpu_ms: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mark the single-threaded CPU runs during which no other process held the core, ``bool[n]``."""
    return cpu_ms >= _MIN_CPU_SHARE * wall_ms


def random_feeds(
    inputs: InferenceSession | Sequence[NodeArg], shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, NDArray[np.generic]]:
    """Fill every input in its own dtype: floats from N(0, 1), integers 0, booleans False.

    What the model itself says of a size holds, as that of a pruned state; `shapes` fills in the others. An
    input that it does not name must have a static shape, else ``MeasurementError``.
    """
    rng = np.random.default_rng(seed)
    arguments = inputs if isinstance(inputs, Sequence) else inputs.get_inputs()
    return {argument.name: _random_array(argument, shapes, rng) for argument in arguments}


def _random_array(
    argument: NodeArg, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> NDArray[np.generic]:
    declared = tuple(argument.shape)
    shape = shapes.get(argument.name, declared)
    if len(declared) == len(shape):
        shape = tuple(d if isinstance(d, int) else s for d, s in zip(declared, shape, strict=True))
    sizes = tuple(size for size in shape if isinstance(size, int))
    if len(sizes) != len(shape):
        raise MeasurementError(
            f"Input '{argument.name}' has the dynamic shape {list(shape)}: state its sizes."
        )
    if argument.type not in _DTYPES:
        raise MeasurementError(
            f"Input '{argument.name}' is a {argument.type}, which cannot be drawn at random."
        )
    dtype = np.dtype(_DTYPES[argument.type])
    values = rng.standard_normal(sizes) if dtype.kind == "f" else np.zeros(sizes)
    return np.asarray(values, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Turn:
    """What one model does when its turn comes: untimed runs, then ``repeats`` runs that are one sample."""

    session: InferenceSession
    feeds: Feeds
    warm_up: int
    repeats: int


def first_ms(session: InferenceSession, feeds: Feeds) -> float:
    """Milliseconds of the first runs of a session, the best of three after two that are not timed."""
    # Two untimed runs: the first allocates the arena, the second still grows it on some providers.
    for _ in range(2):
        run_model(session, feeds)
    return float(run_times(session, feeds, 3)[0].min())


def warm_up_runs(ms: float) -> int:
    """How many untimed runs a session of ``ms`` milliseconds needs after another one ran."""
    return int(np.clip(np.ceil(_WARM_UP_MS / ms), 1, _WARM_UP_RUNS))


def _repeats(ms: float) -> int:
    several = np.clip(np.ceil(_SAMPLE_MS / ms), 1, _SAMPLE_RUNS)
    return int(min(_MAX_REPEATS, max(several, np.ceil(_MIN_SAMPLE_MS / ms))))


def _rounds(first: Sequence[float], turns: Sequence[_Turn], budget_s: float) -> int:
    round_ms = sum(ms * (turn.warm_up + turn.repeats) for ms, turn in zip(first, turns, strict=True))
    # Power law through the counts that sufficed: 6 at 60 ms, 9 at 30 ms, 23 at 8 ms.
    enough = float(np.clip(100.0 * np.median(first) ** -0.7, 6, 25))
    return round(float(np.clip(1e3 * budget_s / round_ms, enough, _MAX_ROUNDS)))


def _visit(
    turns: Sequence[_Turn],
    rounds: int,
    rng: np.random.Generator,
    on_round: Callable[[int, int], None] | None,
) -> Samples:
    order: list[int] = []
    times: list[tuple[float, float]] = []
    for done in range(1, rounds + 1):
        for model in rng.permutation(len(turns)).tolist():
            turn = turns[model]
            for _ in range(turn.warm_up):
                turn.session.run(None, turn.feeds)
            order.append(model)
            times.append(_sample_ms(turn.session, turn.feeds, turn.repeats))
        if on_round is not None:
            on_round(done, rounds)
    wall_ms, cpu_ms = np.array(times, dtype=np.float64).T
    return Samples(np.array(order, dtype=np.int64), wall_ms, cpu_ms)


def _joined(first: Samples, then: Samples) -> Samples:
    return Samples(
        np.concatenate([first.model, then.model]),
        np.concatenate([first.wall_ms, then.wall_ms]),
        np.concatenate([first.cpu_ms, then.cpu_ms]),
    )


def _sample_ms(session: InferenceSession, feeds: Feeds, repeats: int) -> tuple[float, float]:
    cpu_start = time.process_time()
    wall_start = time.perf_counter()
    for _ in range(repeats):
        session.run(None, feeds)
    wall_s = time.perf_counter() - wall_start
    cpu_s = time.process_time() - cpu_start
    return 1e3 * wall_s / repeats, 1e3 * cpu_s / repeats


def drift_correct(samples: Samples, *, filter_preempted: bool = True) -> Timing:
    """Separate the models' latencies from the machine's drift.

    Every model 0 … max must have been sampled. With `filter_preempted`, preempted samples are
    dropped; a model left with fewer than max(3, a quarter) is estimated from its CPU time.
    """
    count = int(samples.model.max()) + 1
    rounds = len(samples.model) // count
    model, log_ms = _kept(samples, count) if filter_preempted else (samples.model, np.log(samples.wall_ms))
    log_y = np.array([np.percentile(log_ms[model == index], 25) for index in range(count)])
    drift = np.zeros_like(log_ms)
    for _ in range(_ITERATIONS):
        drift = _running_median(log_ms - log_y[model])
        log_y = _medians(log_ms - drift, model, count)
    corrected = log_ms - drift + np.percentile(drift, 25)
    odd = _ordinals(model, count) % 2 == 0
    halves = [np.exp(_medians(corrected[half], model[half], count)) for half in (odd, ~odd)]
    errors = np.abs(halves[0] / halves[1] - 1.0)
    return Timing(
        ms=tuple(np.exp(_medians(corrected, model, count)).tolist()),
        noise=float(np.median(errors) if count >= 4 else errors.max()),
        rounds=rounds,
        half_ms=(tuple(halves[0].tolist()), tuple(halves[1].tolist())),
    )


def _kept(samples: Samples, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    keep = undisturbed(samples.wall_ms, samples.cpu_ms)
    ms = samples.wall_ms.copy()
    for index in range(count):
        own = samples.model == index
        if keep[own].sum() < max(3, own.sum() / 4):
            keep[own] = True
            ms[own] = samples.cpu_ms[own]
    return samples.model[keep], np.log(ms[keep])


def _running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    padded = np.pad(values, _NEIGHBOURS, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * _NEIGHBOURS + 1)
    return np.asarray(np.nanmedian(windows, axis=1), dtype=np.float64)


def _medians(values: NDArray[np.float64], model: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return np.array([np.median(values[model == index]) for index in range(count)])


def _ordinals(model: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    # Counted over kept samples, so that both halves of a model that lost samples stay filled.
    ordinals = np.zeros_like(model)
    for index in range(count):
        own = model == index
        ordinals[own] = np.arange(own.sum())
    return ordinals
