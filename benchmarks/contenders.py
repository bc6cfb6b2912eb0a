"""What prunes a model at equal latency: ours, what else one would do with our table, and other tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from benchmarks.measuring import table_from_nothing
from benchmarks.model_files import model_path
from benchmarks.pruners import Fast, Planner, Pruner, at_speed, onnxsim, uniforms
from benchmarks.samples import CALIBRATION, Samples, samples_for
from benchmarks.torch_pruning_peer import KINDS, torch_prunings
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.scoring import Importance, score
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.pipeline import analyze
from onnx_mdp.planning.programs import Programs
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.tables.latency import LatencyTable

__all__ = ["FOR_REFIT", "METHODS", "OURS", "PEERS", "REFITTED", "Contest", "Likeness"]

OURS, REFITTED = "mdp", "mdp_lstsq"
FOR_REFIT = "mdp_refit"  # planned for weights that are refitted, and refitted
_PLANNED = ("greedy", "linear")  # our program, with another solver
PEERS = ("onnxsim", *(f"tp_{k}" for k in KINDS))
METHODS = (
    OURS,
    REFITTED,
    FOR_REFIT,
    *_PLANNED,
    "uniform",
    *PEERS,
)

_COMPARED = 200  # images; more do not change which pruner is ahead

Feed = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Likeness:
    """How much a pruned model's outputs are the original's: cosine, the worst output; the same top-1; top-1
    of the labels, where there are some.
    """

    cosine: float
    agreement: float | None
    accuracy: float | None


class Contest:
    """A model, and everything that its pruners share; feeds without images are random."""

    def __init__(self, name: str, threads: int, seed: int, calibration: int = CALIBRATION) -> None:
        """Rank and refit on ``calibration`` unlabelled images, where the model has some."""
        self.name, self.seed, self.runtime = name, seed, Runtime(threads=threads)
        self._calibration = calibration
        model = load_model(model_path(name))
        self.structure, self.base = analyze(model, {}), model_bytes(model)
        self._made: dict[tuple[str, float], Fast] = {}
        self.shapes = self.structure.shadow.inputs

    def fast(self, method: str, speedup: float) -> Fast:
        """The model, pruned by a method until it is as fast as asked; refitted after that.

        Raises:
            Exception: whatever the tool raises.
        """
        if method == REFITTED:
            return self._refitted(self.fast(OURS, speedup), self._ours)
        if method == FOR_REFIT:
            return self._refitted(self._at_speed([self._for_refit], speedup), self._for_refit)
        if (method, speedup) not in self._made:
            pruners = [self._ours] if method == OURS else self._pruners(method)
            self._made[method, speedup] = self._at_speed(pruners, speedup)
        return self._made[method, speedup]

    def _at_speed(self, pruners: Sequence[Pruner], speedup: float) -> Fast:
        return at_speed(pruners, self.base, self.shapes, speedup, self.runtime, self.seed)

    def _refitted(self, fast: Fast, planner: Planner) -> Fast:
        return replace(fast, model=planner.refitted(fast.model, self._feeds))

    def likeness(self, model: bytes) -> Likeness:
        """The pruned model beside the original on the samples."""
        feeds, labels = self._compared
        original, pruned = (self._outputs(each, feeds) for each in (self.base, model))
        cosines = [_cosine(a, b) for a, b in zip(original, pruned, strict=True)]
        if len(original) != 1 or original[0].ndim != 2:
            return Likeness(min(cosines), None, None)
        chosen, found = original[0].argmax(1), pruned[0].argmax(1)
        accuracy = None if labels is None else float((found == labels).mean())
        return Likeness(cosines[0], float((chosen == found).mean()), accuracy)

    def _pruners(self, method: str) -> Sequence[Pruner]:
        """Those of a method, the next one for speeds that the one before does not reach."""
        if method == "onnxsim":
            return [onnxsim(self.base)]
        if method.startswith("tp_"):
            (shape,) = self.shapes.values()
            kind = method.removeprefix("tp_")
            return torch_prunings(self.name, shape, kind, self._batches)
        if method == "uniform":
            return uniforms(self.structure, self.importance, self.table)
        return [self._planner(method, self.importance)]

    @cached_property
    def _ours(self) -> Planner:
        """One for all, for it refits only plans that it made."""
        return self._planner("exact", self.importance)

    @cached_property
    def _for_refit(self) -> Planner:
        if self._samples is None:
            raise UsageError(f"{self.name} has no images to rank units by what a refit brings back")
        return self._planner("exact", score(self.structure, "refit", self._feeds))

    def _planner(self, solver: str, importance: Importance) -> Planner:
        return Planner(Programs(self.structure, importance, self.table), solver)

    def _batches(self) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        """The calibration images with their labels: more than the others are told."""
        if self._samples is None:
            raise UsageError(f"{self.name} has no labels to take a gradient of")
        images = np.concatenate([next(iter(feed.values())) for feed in self._samples.calibration])
        return [(images, self._samples.calibration_labels)]

    def _outputs(self, model: bytes, feeds: list[Feed]) -> list[npt.NDArray[np.float64]]:
        session = open_session(model, Runtime(threads=2))
        runs = [session.run(None, dict(feed)) for feed in feeds]
        return [np.concatenate(parts).astype(np.float64) for parts in zip(*runs, strict=True)]

    @cached_property
    def _samples(self) -> Samples | None:
        try:
            return samples_for(self.name, _COMPARED, self._calibration)
        except UsageError:
            return None

    @cached_property
    def table(self) -> LatencyTable:
        """The table, built from nothing."""
        return table_from_nothing(self.structure, self.runtime, self.seed)

    @cached_property
    def importance(self) -> Importance:
        """By ``drift``, on images where there are some."""
        return score(self.structure, "drift", self._feeds)

    @cached_property
    def _feeds(self) -> list[Feed]:
        if self._samples is not None:
            return list(self._samples.calibration)
        return [self._noise(seed) for seed in range(16)]

    @cached_property
    def _compared(self) -> tuple[list[Feed], npt.NDArray[np.int64] | None]:
        if self._samples is None:
            return [self._noise(seed) for seed in range(100, 116)], None
        (name,), labels = self.shapes, self._samples.labels
        images = self._samples.load(slice(0, len(labels)))
        return [{name: image[None]} for image in images], labels

    def _noise(self, seed: int) -> Feed:
        session = open_session(self.base, self.runtime)
        return {name: a.astype(np.float32) for name, a in random_feeds(session, self.shapes, seed).items()}


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Of what is left when the mean over the samples is taken away, which all inputs share."""
    if a.shape != b.shape:
        raise UsageError(f"the pruned model gives {b.shape} in the place of {a.shape}")
    if len(a) > 1:
        a, b = a - a.mean(0), b - a.mean(0)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norms if norms else 0.0
