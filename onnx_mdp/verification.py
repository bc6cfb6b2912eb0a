"""The law of every prune: the pruned model equals the masked original.

``run(pruned, x) = run(original, every consumer that sums over a pruned axis restricted to kept units, x)``

The masked original is built by `masked_model`, which never slices. Where fused projections were split, the
split graph stands for the original, and must give the original's outputs on every input tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnx_mdp.binding import doubled_shapes, graph_inputs
from onnx_mdp.computation import Computation, weightless
from onnx_mdp.errors import MeasurementError, VerificationError
from onnx_mdp.integer_form import is_quantized, without_rounding
from onnx_mdp.masking import masked_model
from onnx_mdp.model_io import model_bytes
from onnx_mdp.plan import PruningPlan
from onnx_mdp.precision import has_halves, widened
from onnx_mdp.runtime import Runtime, one_line, open_session
from onnx_mdp.structure import Structure
from onnx_mdp.timing import random_feeds

__all__ = ["TOLERANCE", "Drift", "Evidence", "require", "verify"]

TOLERANCE = 1e-5  # of the largest absolute output, in float32
_SPLIT_TOLERANCE = 1e-6
_NOISE_LIMIT = 1e-2  # of the scale; a runtime that is worse than this proves nothing
_NOISE_FACTOR = 4.0
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
    sigmoid that saturates near zero has such noise, and no slicing error is that small). ``constant``
    names the outputs that stayed the same over all inputs tried: about those the law says little. ``judged``
    says how a model was compared that is not in float32, and whether its file itself runs.
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


@dataclass(frozen=True, slots=True)
class _Error:
    """Largest absolute difference between two outputs, and the largest absolute reference."""

    difference: float
    scale: float

    @property
    def ratio(self) -> float:
        return self.difference / max(self.scale, 1e-30)


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
    Where activations are rounded to integers and the two differ by steps, they are compared without rounding.
    Where the model has symbolic dimensions, one more random input has all of them doubled.

    Raises:
        VerificationError: the pruned model does not load or run, or its signature changed.
    """
    _check_signature(original, pruned)
    names, tried, before = _dense_outputs(original, structure, feeds, seeds)
    if structure.shadow.split:
        _require_same(before, _outputs(structure.shadow.model, names, tried))
    after = [_run_pruned(slim, names, feed) for slim in [_open_pruned(pruned)] for feed in tried]
    expected = _outputs(masked_model(original, structure, plan), names, tried)
    errors, worst = _worst(expected, after)
    judged = _judged_in_float32(original, pruned, tried[0]) if has_halves(original) else None
    if worst > TOLERANCE and is_quantized(structure.shadow.model):
        ranks = {name: len(shape) for name, shape in structure.shadow.shapes.items()}
        real = [without_rounding(m, ranks) for m in (masked_model(original, structure, plan), pruned)]
        judged = f"compared without rounding to integers, with which they differ by {worst:.0e} of the scale"
        errors, worst = _worst(*(_outputs(m, names, tried) for m in real))
    noise, holds = None, True
    if worst > TOLERANCE:
        reference = masked_model(original, structure, plan)
        noise, holds = _within_noise(model_bytes(reference), names, tried, expected, errors)
    top = max((e for found in errors for e in found), key=lambda e: e.ratio)
    complaint = _checker_complaint(original, pruned)
    return Evidence(
        verified=holds and complaint is None,
        max_error=top.difference,
        scale=top.scale,
        worst=worst,
        inputs_tried=len(tried),
        drift=_drifts(names, before[0], after[0]),
        runtime_noise=noise,
        checker=complaint,
        constant=_constant_outputs(names, expected),
        judged=judged,
    )


def _worst(
    expected: Sequence[Sequence[Any]], after: Sequence[Sequence[Any]]
) -> tuple[list[tuple[_Error, ...]], float]:
    errors = [_errors(e, a) for e, a in zip(expected, after, strict=True)]
    return errors, max(e.ratio for found in errors for e in found)


def _dense_outputs(
    original: ir.Model, structure: Structure, feeds: Sequence[Feeds], seeds: Sequence[int]
) -> tuple[list[str], list[Feeds], list[Sequence[Any]]]:
    """Output names, the inputs to try, and what the original makes of them."""
    dense = Computation(original)
    shapes = dict(structure.shadow.inputs)
    first = random_feeds(dense.inputs, shapes, seeds[0])
    tried = [
        first,
        _unit_feeds(first),
        *(random_feeds(dense.inputs, shapes, s) for s in seeds[1:]),
        *map(dict, feeds),
    ]
    doubled = doubled_shapes(original, shapes)
    if doubled != shapes and _runs(dense, random_feeds(dense.inputs, doubled, 0)):
        tried.append(random_feeds(dense.inputs, doubled, 0))
    names = list(dense.outputs)
    return names, list(tried), [dense.run(names, feed) for feed in tried]


def _outputs(model: ir.Model, names: Sequence[str], tried: Sequence[Feeds]) -> list[Sequence[Any]]:
    computation = Computation(model)
    return [computation.run(names, feed) for feed in tried]


def _require_same(before: Sequence[Sequence[Any]], split: Sequence[Sequence[Any]]) -> None:
    """Refuse a split of projections that changes an output by more than rounding."""
    errors = [error for pair in zip(before, split, strict=True) for error in _errors(*pair)]
    if max(error.ratio for error in errors) > _SPLIT_TOLERANCE:
        raise VerificationError(
            "splitting the fused projections changed the outputs; this is a bug in onnx-mdp, "
            "nothing was written, please report it"
        )


def _constant_outputs(names: Sequence[str], expected: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    """Outputs that hardly differ from one input to the next of the same size."""
    return tuple(
        name
        for name, (first, *others) in zip(names, zip(*expected, strict=True), strict=True)
        if all(_error(first, o).ratio < _CONSTANT for o in others if np.shape(o) == np.shape(first))
    )


def _within_noise(
    reference: bytes,
    names: Sequence[str],
    tried: Sequence[Feeds],
    expected: Sequence[Sequence[Any]],
    errors: Sequence[Sequence[_Error]],
) -> tuple[float, bool]:
    """Whether the runtime's own noise explains every error above the tolerance.

    Where it is larger than `_NOISE_LIMIT` an input decides nothing about an output; each output needs
    one input that does.
    """
    optimised = open_session(reference, Runtime())
    worst = 0.0
    decided = [False] * len(names)
    for feed, outputs, found in zip(tried, expected, errors, strict=True):
        own = _errors(outputs, optimised.run(list(names), widened(feed)))
        for place, (noise, error) in enumerate(zip(own, found, strict=True)):
            worst = max(worst, noise.ratio)
            if error.ratio <= TOLERANCE:
                decided[place] = True
            elif noise.ratio <= _NOISE_LIMIT:
                if error.ratio > TOLERANCE + _NOISE_FACTOR * noise.ratio:
                    return worst, False
                decided[place] = True
    return worst, all(decided)


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


def _check_signature(original: ir.Model, pruned: ir.Model) -> None:
    def signature(model: ir.Model) -> list[tuple[str, str, str]]:
        values = (*model.graph.inputs, *model.graph.outputs)
        return [
            (str(v.name), str(v.dtype), str(v.shape))
            for v in values
            if v.name not in model.graph.initializers
        ]

    if signature(original) != signature(pruned):
        raise VerificationError("the pruned model has other inputs or outputs than the original")


def _open_pruned(pruned: ir.Model) -> Computation:
    try:
        return Computation(pruned)
    except MeasurementError as error:
        raise VerificationError(f"the pruned model does not load: {error}") from error


def _run_pruned(computation: Computation, names: Sequence[str], feed: Feeds) -> list[Any]:
    try:
        return computation.run(names, feed)
    except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
        raise VerificationError(
            f"the pruned model does not run: {str(error).splitlines()[0][:200]}"
        ) from error


def _judged_in_float32(original: ir.Model, pruned: ir.Model, feed: Feeds) -> str:
    """How a model in half precision was compared; raises where the runtime runs the original alone."""
    try:
        before = _run_as_stored(original, feed)
    except Exception:  # ONNX Runtime's exceptions share no base but Exception
        return "compared in float32: this runtime has no kernels for the original as it is stored"
    try:
        after = _run_as_stored(pruned, feed)
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
    session = open_session(model_bytes(model), Runtime(), optimize=False)
    return [np.asarray(output) for output in session.run(None, stored)]


def _runs(computation: Computation, feed: Feeds) -> bool:
    try:
        computation.run(computation.outputs, feed)
    except Exception:  # the file promises a symbolic size that it cannot run at
        return False
    return True


def _errors(reference: Sequence[Any], result: Sequence[Any]) -> tuple[_Error, ...]:
    return tuple(_error(np.asarray(a), np.asarray(b)) for a, b in zip(reference, result, strict=True))


def _error(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> _Error:
    """Largest absolute difference and scale; non-finite values must agree in place."""
    if a.shape != b.shape:
        return _Error(float("inf"), 1.0)
    if a.dtype.kind != "f":
        return _Error(float((a != b).sum()), 1.0)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return _Error(float("inf"), 1.0)
    difference = np.abs(a - b, where=finite, out=np.zeros_like(a)).max(initial=0.0)
    return _Error(float(difference), float(np.abs(a, where=finite, out=np.zeros_like(a)).max(initial=0.0)))


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
