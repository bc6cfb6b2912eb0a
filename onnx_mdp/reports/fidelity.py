"""How far the outputs of a pruned model are from the original's on real inputs, and the accuracy of both.

Both are run on the CPU, in float32. Nothing here is better than the inputs are: those that units were ranked
by flatter the pruned model, and a report has to say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.states import kept_feeds, kept_part
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.data.calibration import CalibrationData
from onnx_mdp.large_models import for_session
from onnx_mdp.numerics.precision import in_float32, widened
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.running.runtime import Runtime, open_session, run_model

__all__ = ["Fidelity", "OutputFidelity", "fidelity", "finite"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class OutputFidelity:
    """One output over all inputs: cosine similarity, relative error in the Euclidean norm, and agreement.

    ``agreement`` is the share of rows, ``[n, classes]``, whose largest entry is the same; of an output that
    holds no floats, the share of entries that are equal. None where there is no such number: ``cosine`` and
    ``error`` of outputs whose size depends on the values, too.
    """

    name: str
    cosine: float | None
    error: float | None
    agreement: float | None


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Of ``samples`` inputs; ``accuracy`` is the share of labels that output ``scored`` names, in both."""

    samples: int
    outputs: tuple[OutputFidelity, ...]
    labelled: bool
    scored: str | None = None
    accuracy: tuple[float, float] | None = None


def fidelity(
    original: ir.Model, structure: Structure, plan: PruningPlan, pruned: ir.Model, data: CalibrationData
) -> Fidelity:
    """Run both models on ``data`` and compare.

    Raises:
        MeasurementError: a model does not run on an input.
    """
    removed = removed_classes(plan, structure)
    dense, slim = (open_session(for_session(in_float32(model)), Runtime()) for model in (original, pruned))
    names = [output.name for output in dense.get_outputs()]
    tallies = {name: _Tally() for name in names}
    boundary = set(structure.shadow.states.values())
    for number, feed in enumerate(data.feeds):
        labels = None if data.labels is None else data.labels[number]
        expected = run_model(dense, widened(feed))
        actual = run_model(slim, widened(kept_feeds(structure, feed, removed)))
        for name, before, after in zip(names, expected, actual, strict=True):
            kept = kept_part(structure.graph, name, before, removed) if name in boundary else before
            tallies[name].add(np.asarray(kept), np.asarray(after), labels)
    samples = sum(len(next(iter(feed.values()))) for feed in data.feeds)
    outputs = tuple(tally.of(name) for name, tally in tallies.items())
    scored = next((name for name, tally in tallies.items() if tally.classifies), None)
    if data.labels is None or scored is None:
        return Fidelity(samples, outputs, data.labels is not None)
    return Fidelity(samples, outputs, True, scored, tallies[scored].accuracy)


class _Tally:
    """Sums over the feeds for one output."""

    def __init__(self) -> None:
        self.sums = np.zeros(4)  # of ‖a‖², ‖b‖², a·b and ‖a − b‖²
        self.same: list[Array] = []
        self.right: list[Array] = []
        self.floats, self.alike, self.classifies = True, True, False

    def add(self, before: Array, after: Array, labels: Array | None) -> None:
        """Take one output of both models, and the classes of its rows."""
        self.alike = self.alike and before.shape == after.shape
        self.floats = before.dtype.kind == "f"
        if not self.alike:
            return
        if not self.floats:
            self.same.append((before == after).ravel())
            return
        a, b = before.astype(np.float64).ravel(), after.astype(np.float64).ravel()
        self.sums += [a @ a, b @ b, a @ b, (a - b) @ (a - b)]
        if before.ndim == 2 and before.shape[1] > 1:
            named = before.argmax(1), after.argmax(1)
            self.same.append(named[0] == named[1])
            self.classifies = labels is not None and labels.shape == before.shape[:1]
            if self.classifies:
                self.right.append(np.stack([rows == labels for rows in named]))

    def of(self, name: str) -> OutputFidelity:
        """What the sums say."""
        if not self.alike:
            return OutputFidelity(name, None, None, None)
        agreement = float(np.concatenate(self.same).mean()) if self.same else None
        dense, slim, product, apart = self.sums.tolist()
        if not self.floats or not dense:
            return OutputFidelity(name, None, None, agreement)
        cosine = product / float(np.sqrt(dense * slim)) if slim else 0.0
        return OutputFidelity(name, finite(cosine), finite(float(np.sqrt(apart / dense))), agreement)

    @property
    def accuracy(self) -> tuple[float, float]:
        """The share of labels that both models name."""
        before, after = np.concatenate(self.right, axis=1).mean(1).tolist()
        return before, after


def finite(number: float) -> float | None:
    """The number, if it is one."""
    return number if np.isfinite(number) else None
