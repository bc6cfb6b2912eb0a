"""The law of every prune: the pruned model equals the masked original.

``run(pruned, x) = run(original, every consumer that sums over a pruned axis restricted to kept units, x)``

The masked original is built by `masked_model`, which never slices. Where fused projections were split, or
functions and branches inlined, that graph stands for the original, whose outputs it must give on every input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnx_mdp.analysis.binding import doubled_shapes, graph_inputs, with_batch
from onnx_mdp.analysis.states import kept_part, resize_states
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import VerificationError
from onnx_mdp.large_models import for_session
from onnx_mdp.model_io import clone
from onnx_mdp.numerics.double_precision import run_in_double
from onnx_mdp.numerics.integer_form import is_quantized, without_rounding
from onnx_mdp.numerics.precision import has_halves, in_float32, widened
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.running.computation import Computation, weightless
from onnx_mdp.running.runtime import Runtime, one_line, open_session
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery.comparison import Comparison, Distance, Trial, compare, distance, distances
from onnx_mdp.surgery.masking import masked_model

__all__ = ["TOLERANCE", "Drift", "Evidence", "require", "verify"]

TOLERANCE = 1e-5  # of the largest absolute output, in float32
_SPLIT_TOLERANCE = 1e-6
_DOUBLE_TOLERANCE = 1e-6  # masks hold ratios in float32
_NOISE_LIMIT = 1e-2  # of the scale; a runtime that is worse than this proves nothing
_NOISE_FACTOR = 4.0
_FRAMES = 3
_ROWS = 4  # of a symbolic batch; the law is about each row alone
_CONSTANT = 1e-3  # of the scale; an output that varies by less over the inputs hides what was cut

Feeds = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Drift:
    """How far one output moved from the unpruned model: cosine similarity and largest difference."""

    cosine: float
    max_abs: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """The outcome of a verification.

    ``max_error`` is the largest absolute difference between pruned and masked outputs, ``scale`` the
    largest absolute masked output, both where their ratio ``worst`` is largest. The law holds when
    ``worst <= TOLERANCE``, or when it stays within four times ``runtime_noise``: the ratio by which the
    masked model differs from *itself* when ONNX Runtime optimises it (measured only where needed; a
    sigmoid that saturates near zero has such noise, and no slicing error is that small), or when it holds in
    float64, which is tried last. ``constant`` names the outputs that stayed the same over all inputs tried:
    about those the law says little. ``errors`` holds the worst of each output. ``judged`` says how a model
    was compared if not in float32 as it is stored, and whether its file itself runs. ``followed`` says that
    scores within rounding of each other were ordered otherwise, so that the pruned model was compared
    following the choices of the masked one (see `onnx_mdp.surgery.ties`).
    """

    verified: bool
    max_error: float
    scale: float
    worst: float
    inputs_tried: int
    drift: Mapping[str, Drift]
    runtime_noise: float | None = None
    checker: str | None = None
    constant: tuple[str, ...] = ()
    judged: str | None = None
    followed: bool = False
    errors: Mapping[str, Distance] = field(default_factory=dict)


def verify(
    original: ir.Model,
    structure: Structure,
    pruned: ir.Model,
    plan: PruningPlan,
    *,
    feeds: Sequence[Feeds] = (),
    seeds: Sequence[int] = (0, 1, 2),
) -> Evidence:
    """Compare the pruned model with the masked original on random inputs and on ``feeds``.

    Half precision is compared in float32, which holds every half number, and the file itself is run as well.
    Activations that are rounded to integers are compared without this rounding, which both hides and makes
    differences, and the files themselves are run as well.
    Of a symbolic batch a few rows are compared, however many latency was measured with, and where the model
    has symbolic dimensions, one more random input has all of them doubled. A model with states is fed with
    what it returned: the pruned one with what is kept of it.

    Raises:
        VerificationError: the pruned model does not load or run, or its signature changed.
    """
    removed = removed_classes(plan, structure)
    _check_signature(original, pruned, structure, removed)
    names, trials, before = _dense_outputs(original, structure, feeds, seeds)

    def keep(name: str, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return kept_part(structure.graph, name, value, removed) if name in boundary else value

    boundary = {*structure.shadow.states, *structure.shadow.states.values()}
    if structure.shadow.rearranged:
        _require_same(original, structure, names, trials)
    masked = masked_model(original, structure, plan)
    apart = functools.partial(
        compare, names=names, trials=trials, tolerance=TOLERANCE, states=structure.shadow.states, keep=keep
    )
    pair = masked, pruned
    found = apart(*pair)
    slim = found.actual[0][: len(names)]
    first = {name: keep(name, value) for name, value in trials[0].feeds.items()}
    halves = has_halves(original)
    judged = _judged_in_float32(original, pruned, trials[0].feeds, first) if halves else None
    if is_quantized(structure.shadow.model):
        # Rounding makes whole steps of float noise, and hides differences below half a step.
        apart_by = (
            f"they differ by {found.worst.ratio:.0e} of the scale" if found.worst.ratio else "they agree"
        )
        judged = f"compared without rounding to integers; with it {apart_by}"
        pair = _real(structure, masked), _real(structure, pruned)
        found = apart(*pair)
    top, noise, holds = found.worst, None, True
    if top.ratio > TOLERANCE:
        noise, holds = _within_noise(found, keep)
        if not holds and top.ratio <= _NOISE_LIMIT:
            exact = _in_double(found, trials, functools.partial(apart, *pair))
            if exact is not None and exact <= _DOUBLE_TOLERANCE:
                holds = True
                judged = f"compared in float64, {exact:.0e} of the scale apart: float32 rounds too much away"
    complaint = _checker_complaint(original, pruned)
    return Evidence(
        verified=holds and complaint is None,
        max_error=top.difference,
        scale=top.scale,
        worst=top.ratio,
        inputs_tried=len(trials),
        drift=_drifts(names, list(map(keep, names, before)), slim),
        runtime_noise=noise,
        checker=complaint,
        constant=_constant_outputs(names, [outputs[: len(names)] for outputs in found.expected]),
        judged=judged,
        followed=found.followed,
        errors={
            name: max(apart, key=lambda d: d.ratio)
            for name, apart in zip(names, zip(*found.distances, strict=True), strict=False)
        },
    )


def _dense_outputs(
    original: ir.Model, structure: Structure, feeds: Sequence[Feeds], seeds: Sequence[int]
) -> tuple[list[str], list[Trial], list[Any]]:
    """Output names, the inputs to try, and what the original makes of the first of them.

    A model with states is run over at least three frames, each fed with the states of the one before.
    """
    dense = Computation(original)
    shapes = dict(structure.shadow.inputs)
    few = with_batch(original, shapes, _ROWS)
    if few != shapes and _runs(dense, random_feeds(dense.inputs, few, 0)):
        shapes = few
        feeds = [{name: array[: few[name][0]] for name, array in feed.items()} for feed in feeds]
    drawn = list(seeds)
    if structure.shadow.states:
        drawn += range(max(drawn) + 1, max(drawn) + 1 + _FRAMES - len(drawn))
    frames = [random_feeds(dense.inputs, shapes, seed) for seed in drawn]
    trials = [
        Trial(feed, place - 1 if place and structure.shadow.states else None)
        for place, feed in enumerate(frames)
    ]
    trials += [Trial(_unit_feeds(frames[0])), *map(Trial, feeds)]
    doubled = doubled_shapes(original, shapes)
    if doubled != shapes and _runs(dense, random_feeds(dense.inputs, doubled, 0)):
        trials.append(Trial(random_feeds(dense.inputs, doubled, 0)))
    names = list(dense.outputs)
    return names, trials, dense.run(names, frames[0])


def _require_same(
    original: ir.Model, structure: Structure, names: Sequence[str], trials: Sequence[Trial]
) -> None:
    """Refuse a form of the graph that changes an output by more than the rounding of floats."""
    whole, split = original, structure.shadow.model
    if is_quantized(split):
        whole, split = (_real(structure, form) for form in (structure.shadow.unsplit, split))
    alone = [Trial(trial.feeds) for trial in trials]
    found = compare(whole, split, names, alone, _SPLIT_TOLERANCE)
    if found.worst.ratio > _SPLIT_TOLERANCE:
        raise VerificationError(
            "splitting fused layers, or inlining, changed the outputs; this is a bug in onnx-mdp, "
            "nothing was written, please report it"
        )


def _real(structure: Structure, model: ir.Model) -> ir.Model:
    return without_rounding(model, {name: len(shape) for name, shape in structure.shadow.shapes.items()})


def _constant_outputs(names: Sequence[str], expected: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    """Outputs that hardly differ from one input to the next of the same size."""
    return tuple(
        name
        for name, (first, *others) in zip(names, zip(*expected, strict=True), strict=True)
        if all(distance(first, o).ratio < _CONSTANT for o in others if np.shape(o) == np.shape(first))
    )


def _within_noise(found: Comparison, keep: Callable[[str, Any], Any]) -> tuple[float, bool]:
    """Whether the runtime's own noise explains every error above the tolerance.

    Where it is larger than `_NOISE_LIMIT` an input decides nothing about an output; each output needs
    one input that does.
    """
    optimised = open_session(for_session(found.reference), Runtime())
    worst = 0.0
    decided = [False] * len(found.names)
    for feed, outputs, errors in zip(found.fed, found.expected, found.distances, strict=True):
        again = optimised.run(list(found.names), widened(feed))
        own = distances(outputs, list(map(keep, found.names, again)))
        for place, (noise, error) in enumerate(zip(own, errors, strict=True)):
            worst = max(worst, noise.ratio)
            if error.ratio <= TOLERANCE:
                decided[place] = True
            elif noise.ratio <= _NOISE_LIMIT:
                if error.ratio > TOLERANCE + _NOISE_FACTOR * noise.ratio:
                    return worst, False
                decided[place] = True
    return worst, all(decided)


def _in_double(found: Comparison, trials: Sequence[Trial], apart: Callable[..., Comparison]) -> float | None:
    """How far the models are apart in float64, on the inputs that float32 decides nothing of.

    None where ONNX's reference evaluator cannot run one of them.
    """

    def prepare(model: ir.Model, seen: Sequence[str]) -> Callable[[Sequence[str], Feeds], Sequence[Any]]:
        single = in_float32(model)
        return lambda names, feeds: run_in_double(single, feeds, names)

    apart_here = [max(d.ratio for d in errors) > TOLERANCE for errors in found.distances]
    chained = any(trial.after is not None for trial in trials)
    some = [trial for trial, apart in zip(trials, apart_here, strict=True) if apart or chained]
    try:
        return apart(trials=some, tolerance=_DOUBLE_TOLERANCE, prepare=prepare).worst.ratio
    except Exception:  # the evaluator raises errors of many kinds for what it has no code for
        return None


def require(evidence: Evidence) -> None:
    """Raise VerificationError unless the law holds: such a model must never be written."""
    if evidence.checker is not None:
        raise VerificationError(f"the pruned model fails the ONNX checker: {evidence.checker}")
    if not evidence.verified:
        raise VerificationError(
            f"the pruned model differs from the masked original by {evidence.max_error:.3g} at scale "
            f"{evidence.scale:.3g} (allowed: {TOLERANCE:g} of the scale); this is a bug in onnx-mdp or in "
            "the runtime, nothing was written, please report it"
        )


def _unit_feeds(feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
    """Floats folded into [0, 1), the range of images, which saturates fewer outputs than N(0, 1)."""
    return {name: array % 1 if array.dtype.kind == "f" else array for name, array in feeds.items()}


def _check_signature(
    original: ir.Model, pruned: ir.Model, structure: Structure, removed: npt.NDArray[np.bool_]
) -> None:
    """Names, types and shapes of inputs and outputs stay, but for what is cut from states."""

    def signature(model: ir.Model) -> list[tuple[str, str, str]]:
        values = (*model.graph.inputs, *model.graph.outputs)
        return [
            (str(v.name), str(v.dtype), str(v.shape))
            for v in values
            if v.name not in model.graph.initializers
        ]

    if structure.shadow.states:
        original = clone(original)
        resize_states(original, structure, removed)
    if signature(original) != signature(pruned):
        raise VerificationError("the pruned model has other inputs or outputs than the original")


def _judged_in_float32(original: ir.Model, pruned: ir.Model, feed: Feeds, kept: Feeds) -> str:
    """How a model in half precision was compared; raises where the runtime runs the original alone."""
    try:
        before = _run_as_stored(original, feed)
    except Exception:  # ONNX Runtime's exceptions share no base but Exception
        return "compared in float32: this runtime has no kernels for the original as it is stored"
    try:
        after = _run_as_stored(pruned, kept)
    except Exception as error:
        raise VerificationError(f"the pruned model does not run: {one_line(error)}") from error
    if _all_finite(before) and not _all_finite(after):
        return "compared in float32: in half precision the pruned model overflows, the original does not"
    return "compared in float32, and the file runs in half precision"


def _all_finite(outputs: Sequence[npt.NDArray[Any]]) -> bool:
    return all(bool(np.isfinite(output).all()) for output in outputs if output.dtype.kind == "f")


def _run_as_stored(model: ir.Model, feed: Feeds) -> list[npt.NDArray[Any]]:
    types = {str(value.name): value.dtype for value in graph_inputs(model)}
    stored = {
        name: array if (kind := types[name]) is None else array.astype(kind.numpy())
        for name, array in feed.items()
    }
    session = open_session(for_session(model), Runtime(), optimize=False)
    return [np.asarray(output) for output in session.run(None, stored)]


def _runs(computation: Computation, feed: Feeds) -> bool:
    try:
        computation.run(computation.outputs, feed)
    except Exception:  # the file promises a symbolic size that it cannot run at
        return False
    return True


def _drifts(names: Sequence[str], dense: Sequence[Any], slim: Sequence[Any]) -> dict[str, Drift]:
    drifts = {}
    for name, before, after in zip(names, dense, slim, strict=True):
        a, b = np.asarray(before, np.float64).ravel(), np.asarray(after, np.float64).ravel()
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosine = float(a @ b) / norm if norm else float(np.array_equal(a, b))
        drifts[name] = Drift(cosine, float(np.abs(a - b).max(initial=0.0)))
    return drifts


def _checker_complaint(original: ir.Model, pruned: ir.Model) -> str | None:
    """What the ONNX checker says of the pruned model, unless it says so of the original too."""
    complaint = _check(pruned)
    return None if complaint is None or _check(original) is not None else complaint


def _check(model: ir.Model) -> str | None:
    try:
        # What a large weight holds is no matter of the checker: its type and shape are.
        onnx.checker.check_model(weightless(model)[0].SerializeToString(), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error).strip().splitlines()[0][:200]
    return None
