"""Two models on the same inputs, over frames where they have states: how far their outputs are apart.

A state that is fed back is what the model itself returned in the frame before, so that whatever goes wrong in
a memory shows in the frames to come. Choices among scores that rounding alone tells apart are compared as
`onnx_mdp.surgery.ties` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.errors import MeasurementError, VerificationError
from onnx_mdp.running.computation import Computation
from onnx_mdp.surgery.ties import choices, following

__all__ = ["Comparison", "Distance", "Trial", "compare", "distance", "distances"]

Feeds = Mapping[str, npt.NDArray[Any]]
Keep = Callable[[str, Any], Any]
Run = Callable[[Sequence[str], Feeds], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Trial:
    """Inputs of one run; those that are states come from trial ``after``, if it is not None."""

    feeds: Feeds
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Distance:
    """Largest absolute difference between two outputs, and the largest absolute reference."""

    difference: float
    scale: float

    @property
    def ratio(self) -> float:
        """The difference as a share of the scale."""
        return self.difference / max(self.scale, 1e-30)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came out, by trial: ``fed`` to the reference, ``expected`` of it and ``actual``, for ``names``.

    Of the reference, that is what the other model has too. ``reference`` is the model to run, on ``fed``, for
    the same names; ``followed`` says that the choices of the reference were followed.
    """

    names: tuple[str, ...]
    fed: tuple[Feeds, ...]
    expected: tuple[Sequence[Any], ...]
    actual: tuple[Sequence[Any], ...]
    reference: ir.Model
    followed: bool = False

    @property
    def distances(self) -> tuple[tuple[Distance, ...], ...]:
        """By trial and output."""
        return tuple(distances(e, a) for e, a in zip(self.expected, self.actual, strict=True))

    @property
    def worst(self) -> Distance:
        """The one that is the largest share of its scale."""
        return max((d for found in self.distances for d in found), key=lambda d: d.ratio)


def compare(
    reference: ir.Model,
    model: ir.Model,
    names: Sequence[str],
    trials: Sequence[Trial],
    tolerance: float,
    *,
    states: Mapping[str, str] | None = None,
    keep: Keep = lambda name, value: value,
    prepare: Callable[[ir.Model, Sequence[str]], Run] = lambda model, seen: Computation(model, seen).run,
) -> Comparison:
    """Run both; ``keep(name, value)`` is what ``model`` has of an input or output of the reference.

    ``prepare`` makes a model ready to be asked for its outputs and for the tensors ``seen``.

    Where they are further apart than ``tolerance`` of the scale and both choose by score, the choices of the
    reference are followed.

    Raises:
        VerificationError: ``model`` does not load or run.
    """
    made, states = choices(reference, model), states or {}
    seen = [name for choice in made for name in choice.observed]
    fed, ran = _frames(prepare(reference, seen), (*names, *seen), trials, states)
    expected = [tuple(map(keep, names, outputs)) for outputs in ran]
    kept = [replace(t, feeds={n: keep(n, v) for n, v in t.feeds.items()}) for t in trials]
    _, actual = _frames(_careful(model, prepare), names, kept, states)
    found = Comparison(tuple(names), tuple(fed), tuple(expected), tuple(actual), reference)
    if not made or found.worst.ratio <= tolerance:
        return found
    chosen = [dict(zip(seen, outputs[len(names) :], strict=True)) for outputs in ran]
    told = [
        {n: v for c in made for n, v in c.told(values[c.values], values[c.places]).items()}
        for values in chosen
    ]
    observed = [[v for c in made for v in (values[c.scores], values[c.values])] for values in chosen]
    asked = (*names, *(name for choice in made for name in choice.compared))
    kept = [replace(trial, feeds={**trial.feeds, **more}) for trial, more in zip(kept, told, strict=True)]
    _, actual = _frames(_careful(following(model, made), prepare), asked, kept, states)
    return Comparison(
        names=asked,
        fed=tuple({**feeds, **more} for feeds, more in zip(fed, told, strict=True)),
        expected=tuple((*e, *o) for e, o in zip(expected, observed, strict=True)),
        actual=tuple(actual),
        reference=following(reference, made),
        followed=True,
    )


def _frames(
    run: Run,
    names: Sequence[str],
    trials: Iterable[Trial],
    states: Mapping[str, str],
) -> tuple[list[Feeds], list[Sequence[Any]]]:
    """What was fed and what came out, by trial."""
    fed: list[Feeds] = []
    found: list[Sequence[Any]] = []
    for trial in trials:
        feeds = dict(trial.feeds)
        if trial.after is not None:
            past = dict(zip(names, found[trial.after], strict=True))
            feeds |= {source: past[target] for source, target in states.items()}
        fed.append(feeds)
        found.append(run(names, feeds))
    return fed, found


def _careful(model: ir.Model, prepare: Callable[[ir.Model, Sequence[str]], Run]) -> Run:
    """Run a model whose failures are its own."""
    try:
        computed = prepare(model, ())
    except MeasurementError as error:
        raise VerificationError(f"the pruned model does not load: {error}") from error

    def run(names: Sequence[str], feeds: Feeds) -> Sequence[Any]:
        try:
            return computed(names, feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            reason = str(error).splitlines()[0][:200]
            raise VerificationError(f"the pruned model does not run: {reason}") from error

    return run


def distances(reference: Sequence[Any], result: Sequence[Any]) -> tuple[Distance, ...]:
    """Of each output."""
    return tuple(distance(np.asarray(a), np.asarray(b)) for a, b in zip(reference, result, strict=True))


def distance(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Distance:
    """Of ``b`` from the reference ``a``; non-finite values must agree in place."""
    if a.shape != b.shape:
        return Distance(float("inf"), 1.0)
    if a.dtype.kind != "f":
        return Distance(float((a != b).sum()), 1.0)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return Distance(float("inf"), 1.0)
    difference = np.abs(a - b, where=finite, out=np.zeros_like(a)).max(initial=0.0)
    scale = np.abs(a, where=finite, out=np.zeros_like(a)).max(initial=0.0)
    return Distance(float(difference), float(scale))
