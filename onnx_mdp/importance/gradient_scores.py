"""First-order importance: how gradients at the gates of units become scores, over any number of inputs.

    taylor    I(u) = mean over samples of |s_u|      Molchanov et al., CVPR 2019
    hessian   I(u) = mean over samples of s_u²       Yang et al. (NViT), CVPR 2023

with s_u = ∂L/∂g_u (``gating``). One pass over the inputs gives both.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.score_file import ScoreFile, read_scores, write_scores
from onnx_mdp.torch_backend import require_torch

__all__ = ["GRADIENT_CRITERIA", "LOSSES", "GradientOptions", "gradient_scores"]

Vector = npt.NDArray[np.float64]
Feeds = Sequence[Mapping[str, npt.NDArray[Any]]]
Progress = Callable[[str, int, int], None]

GRADIENT_CRITERIA = ("hessian", "taylor")
LOSSES = ("auto", "fisher", "labels", "projection")
_SAVE_S = 30.0


@dataclass(frozen=True, slots=True)
class GradientOptions:
    """What the gradients are of, and where they are kept.

    ``loss`` is a name or a function of inputs and outputs by name that returns a tensor of one number;
    ``labels`` holds ``int64[samples]`` for each feed; ``file`` keeps sums and scores between calls.
    """

    loss: str | Callable[..., Any] = "auto"
    labels: tuple[npt.NDArray[np.int64], ...] | None = None
    seed: int = 0
    file: Path | None = None

    @property
    def loss_name(self) -> str:
        """The loss that is taken, by name."""
        if callable(self.loss):
            return f"{self.loss.__module__}:{getattr(self.loss, '__qualname__', type(self.loss).__name__)}"
        if self.loss == "auto":
            return "projection" if self.labels is None else "labels"
        return self.loss


def gradient_scores(
    structure: Structure,
    criterion: str,
    feeds: Feeds,
    options: GradientOptions,
    finish: Callable[[Vector], tuple[Vector, Vector]],
    progress: Progress,
) -> tuple[Vector, Vector]:
    """The scores of the classes and of the blocks that ``finish`` makes of the means of the classes.

    Raises:
        UsageError: no inputs or labels; a file of scores of something else.
        MissingBackendError: torch is not installed, and the file lacks some of the inputs.
    """
    if not feeds:
        raise UsageError(f"criterion {criterion!r} needs calibration inputs; pass --data")
    sizes = [len(next(iter(feed.values()))) for feed in feeds]
    if options.labels is not None and [len(part) for part in options.labels] != sizes:
        raise UsageError("there must be one label for each calibration input")
    classes = structure.graph.classes
    identity, size = _identity(structure, feeds, options), classes + len(structure.blocks)
    known = read_scores(options.file, identity, size) if options.file is not None else None
    sums = known or ScoreFile(identity, np.zeros(size), np.zeros(size))
    if sums.feeds < len(feeds):
        sums = _accumulated(structure, criterion, feeds, options, sums, progress)
    if criterion not in sums.finished:
        means = (sums.absolute if criterion == "taylor" else sums.squares) / sums.samples
        scores = np.concatenate(finish(means[:classes]))
        sums = replace(sums, finished={**sums.finished, criterion: scores})
        if options.file is not None:
            write_scores(options.file, sums)
    return sums.finished[criterion][:classes], sums.finished[criterion][classes:]


def _identity(structure: Structure, feeds: Feeds, options: GradientOptions) -> dict[str, str]:
    data = hashlib.sha256()
    for feed in feeds:
        for name in sorted(feed):
            data.update(f"{name} {feed[name].dtype} {feed[name].shape}".encode())
            data.update(np.ascontiguousarray(feed[name]).tobytes())
    for labels in options.labels or ():
        data.update(np.ascontiguousarray(labels).tobytes())
    shapes = {name: list(shape) for name, shape in sorted(structure.shadow.inputs.items())}
    return {
        "model": f"{structure.shadow.source} {shapes}",
        "data": data.hexdigest(),
        "loss": f"{options.loss_name} {options.seed}",
    }


def _accumulated(
    structure: Structure,
    criterion: str,
    feeds: Feeds,
    options: GradientOptions,
    sums: ScoreFile,
    progress: Progress,
) -> ScoreFile:
    """The sums over all feeds; what was done is kept also where an interruption ends it."""
    require_torch(f"criterion {criterion!r}")
    from onnx_mdp.training.gradients import GateGradients

    engine = GateGradients(structure)
    name = options.loss if callable(options.loss) else options.loss_name
    loss = engine.loss(name, feeds, options.labels, options.seed)
    saved = time.monotonic()
    try:
        for number in range(sums.feeds, len(feeds)):
            progress("gradients", number, len(feeds))
            signed = np.concatenate(engine.of(number, feeds[number], loss), axis=1)
            if not np.isfinite(signed).all():
                raise UsageError(f"the gradients of calibration input {number} are not finite; leave it out")
            sums = replace(
                sums,
                absolute=sums.absolute + np.abs(signed).sum(0),
                squares=sums.squares + np.square(signed).sum(0),
                feeds=number + 1,
                samples=sums.samples + len(signed),
            )
            if options.file is not None and time.monotonic() - saved > _SAVE_S:
                write_scores(options.file, sums)
                saved = time.monotonic()
    finally:
        if options.file is not None and sums.feeds:
            write_scores(options.file, sums)
    progress("gradients", len(feeds), len(feeds))
    return sums
