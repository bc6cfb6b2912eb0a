"""Batches for training and validation, the same at every run: order and augmentation come from the seed
alone.

A *sample* is one row of every input; of a model whose file fixes a batch of b > 1 (six cameras, say) b rows
that stay together. Several processes share a batch: each reads its part of the same samples, in the order of
their ranks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnx_mdp.data.images import ImageInput, image_input
from onnx_mdp.data.targets import Targets
from onnx_mdp.errors import UsageError
from onnx_mdp.training.augmentation import Augmentation, Draws, augmentation
from onnx_mdp.training.batches import Batch, Share
from onnx_mdp.training.loaders import LoaderData, is_loader, loader_name, open_loader
from onnx_mdp.training.sources import Source, open_source

__all__ = ["DataOptions", "StoredData", "TrainingData", "open_data"]

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
Loader = Callable[..., Any]
_ORDER, _SPLIT, _SAMPLE = 1, 2, 3  # what a random stream is for
_AHEAD = 3  # batches that are read while one is trained on
_MOST_THREADS = 16


class TrainingData(Protocol):
    """Batches by epoch; what `open_data` returns."""

    @property
    def description(self) -> str:
        """What is read, in words."""

    @property
    def steps(self) -> int | None:
        """Batches of an epoch, where that is known."""

    @property
    def classes(self) -> int | None:
        """How many classes the labels number, where folders say."""

    def training(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's part of the batches of an epoch, from batch ``start``."""

    def validation(self) -> Iterator[Batch]:
        """This process's part of the batches that are never trained on."""

    def probe(self) -> Batch:
        """The first batch of validation, the same in every process."""


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What training data is asked for: see `open_source` for ``data``, ``labels`` and ``preprocess``, and
    `loaders` for a function in the place of a path.

    ``validation`` is data of the same kind; without it, a share of ``validation_share`` of ``data`` is never
    trained on. ``batch`` counts rows, over all processes.
    """

    data: str | Loader
    validation: str | Loader | None = None
    validation_share: float = 0.1
    labels: str | None = None
    preprocess: str | None = None
    augment: str = "none"
    batch: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """Samples of a source: ``numbers`` of groups of ``group`` rows."""

    source: Source
    targets: Targets | None
    numbers: Rows
    group: int

    def rows(self, numbers: Rows) -> Rows:
        """The rows of samples."""
        return (numbers[:, None] * self.group + np.arange(self.group)).reshape(-1)

    def pieces(self, rows: Rows) -> Sequence[Rows]:
        """What one thread reads at a time: an image that it decodes, or all where nothing is decoded."""
        return list(rows.reshape(-1, 1)) if self.source.pictures else [rows]

    def read(self, rows: Rows, draws: Draws | None) -> dict[str, Array]:
        """Rows, by input."""
        if draws is None:
            return self.source.read(rows, None)
        return {name: draws.finish(a, rows) for name, a in self.source.read(rows, draws.framing).items()}


@dataclass(frozen=True, slots=True)
class StoredData:
    """Samples that lie in files: shuffled each epoch, incomplete batches left out."""

    description: str
    learn: _Part
    check: _Part
    batch: int
    seed: int
    augment: Augmentation | None
    share: Share

    @property
    def steps(self) -> int | None:
        return len(self.learn.numbers) // self.batch

    @property
    def classes(self) -> int | None:
        named = None if self.learn.targets is None else self.learn.targets.classes
        return None if named is None else len(named)

    def training(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng((self.seed, _ORDER, epoch)).permutation(self.learn.numbers)
        stops = range((start + 1) * self.batch, len(order) + 1, self.batch)
        batches = (self.share.part(order[stop - self.batch : stop]) for stop in stops)
        draws = None
        if self.augment is not None:
            draws = self.augment.draws((self.seed, _SAMPLE, epoch), self.learn.source.size)
        return _read_ahead(self.learn, batches, draws)

    def validation(self) -> Iterator[Batch]:
        starts = range(self.share.rank * self.batch, len(self.check.numbers), self.share.size * self.batch)
        batches = (self.check.numbers[start : start + self.batch] for start in starts)
        return _read_ahead(self.check, batches, None)

    def probe(self) -> Batch:
        return next(_read_ahead(self.check, iter([self.check.numbers[: self.batch]]), None))


def _read_ahead(part: _Part, batches: Iterator[Rows], draws: Draws | None) -> Iterator[Batch]:
    """Read in threads; batches come in order, whatever is ready first."""
    waiting: deque[tuple[Rows, list[Future[dict[str, Array]]]]] = deque()
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS) if part.source.pictures else 1)
    try:
        for numbers in batches:
            rows = part.rows(numbers)
            waiting.append((rows, [pool.submit(part.read, piece, draws) for piece in part.pieces(rows)]))
            if len(waiting) > _AHEAD:
                yield _gathered(part, *waiting.popleft())
        while waiting:
            yield _gathered(part, *waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _gathered(part: _Part, rows: Rows, pieces: Sequence[Future[dict[str, Array]]]) -> Batch:
    read = [piece.result() for piece in pieces]
    inputs = {name: np.concatenate([piece[name] for piece in read]) for name in read[0]}
    return Batch(inputs, None if part.targets is None else part.targets.values[rows])


def open_data(
    options: DataOptions,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    share: Share,
) -> TrainingData:
    """Open what ``options`` name for a model with inputs of these shapes, each beginning with the batch.

    Raises:
        UsageError: the data is missing, unreadable, too little, or does not fit the model.
    """
    firsts = {shape[:1] for shape in shapes.values()}
    if len(firsts) != 1 or () in firsts:
        raise UsageError(
            f"training needs inputs with a common batch size, but the model takes {dict(shapes)}"
        )
    group = firsts.pop()[0]
    if options.batch % (group * share.size):
        raise UsageError(
            f"a batch of {options.batch} cannot be shared by {share.size} process(es) of a model that takes "
            f"{group} at a time; choose a multiple of {group * share.size} with --batch-size"
        )
    if not isinstance(options.data, str) or is_loader(options.data):
        return _open_loader(options, shapes, dtypes, share)
    source, targets = _open(options, options.data, shapes, dtypes, None)
    learn = _Part(source, targets, np.arange(source.size // group), group)
    if options.validation is not None:
        classes = None if targets is None else targets.classes
        check = _validation_part(options, shapes, dtypes, classes, group)
    else:
        learn, check = _split(learn, options)
    batch = min(options.batch // group, len(learn.numbers) // share.size * share.size)
    if batch < 1 or not len(check.numbers):
        raise UsageError(
            f"{options.data} holds {source.size} samples, too few to train on some and check on others"
        )
    target = _image_target(shapes, dtypes)
    augment = augmentation(options.augment, target, pictures=source.pictures)
    described = f"{len(learn.numbers)} samples of {options.data}, validated on {len(check.numbers)} others"
    return StoredData(described, learn, check, batch, options.seed, augment, share)


def _open(
    options: DataOptions,
    data: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    classes: Sequence[str] | None,
) -> tuple[Source, Targets | None]:
    preprocess, labels = options.preprocess, options.labels
    return open_source(Path(data), shapes, dtypes, preprocess=preprocess, labels=labels, classes=classes)


def _validation_part(
    options: DataOptions,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    classes: Sequence[str] | None,
    group: int,
) -> _Part:
    assert options.validation is not None
    if not isinstance(options.validation, str) or is_loader(options.validation):
        raise UsageError(
            "--val is a loader but --data is none; give both in files or both as module:function"
        )
    source, targets = _open(options, options.validation, shapes, dtypes, classes)
    return _Part(source, targets, np.arange(source.size // group), group)


def _split(part: _Part, options: DataOptions) -> tuple[_Part, _Part]:
    """Set a share of the samples aside, the same one at every run with the seed."""
    if not 0 < options.validation_share < 1:
        raise UsageError("--val-share is a share of the data, between 0 and 1")
    order = np.random.default_rng((options.seed, _SPLIT)).permutation(len(part.numbers))
    aside = max(1, round(options.validation_share * len(order)))
    learn, check = np.sort(order[aside:]), np.sort(order[:aside])
    source, targets, group = part.source, part.targets, part.group
    return _Part(source, targets, learn, group), _Part(source, targets, check, group)


def _image_target(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]]
) -> ImageInput | None:
    try:
        return image_input(shapes, dtypes)
    except UsageError:
        return None


def _open_loader(
    options: DataOptions,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    share: Share,
) -> LoaderData:
    unfit = {"--labels": options.labels, "--preprocess": options.preprocess}
    given = [name for name, value in unfit.items() if value is not None]
    if options.augment != "none":
        given.append("--augment")
    if given:
        raise UsageError(f"{given[0]} is for files; {loader_name(options.data)} makes its batches itself")
    validation = options.validation or options.data
    if not is_loader(validation):
        raise UsageError(
            "--data is a loader but --val is none; give both in files or both as module:function"
        )
    return open_loader(options.data, validation, options.batch, options.seed, shapes, dtypes, share)
