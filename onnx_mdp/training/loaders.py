"""Batches that a user's function makes: `package.module:function` or `file.py:function`.

The function is called once an epoch with a `LoaderRequest` and returns an iterable of batches: a dict of
arrays by input, or a pair of that (or of one array, where the model has one input) and the labels; arrays of
numpy or torch. Called with ``split="val"`` it gives the batches to validate on, which must be the same each
time.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnx_mdp.data.feeds import checked_batch
from onnx_mdp.errors import UsageError
from onnx_mdp.training.batches import Batch, Share

__all__ = ["LoaderData", "LoaderRequest", "is_loader", "load_function", "loader_name", "open_loader"]

Loader = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class LoaderRequest:
    """What a loader is asked for.

    ``shapes`` are those of one sample, by input, without the batch axis. ``batch`` is how many samples a
    batch holds over all processes; each process then takes its part. The same request must give the same
    batches, or a run that was interrupted cannot go on as it would have.
    """

    split: Literal["train", "val"]
    epoch: int
    batch: int
    seed: int
    shapes: Mapping[str, tuple[int, ...]]


def is_loader(data: str | Loader) -> bool:
    """Whether data is a function, or named as ``module:function``."""
    if not isinstance(data, str):
        return True
    return ":" in data and not Path(data).exists() and data.rpartition(":")[2].isidentifier()


def loader_name(data: str | Loader) -> str:
    """What messages call the data."""
    if isinstance(data, str):
        return data
    return f"{data.__module__}:{getattr(data, '__qualname__', type(data).__name__)}"


def load_function(text: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` or ``file.py:function`` names.

    Raises:
        UsageError: there is no such module or function, or importing it fails.
    """
    module, _, name = text.rpartition(":")
    try:
        loaded = _from_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except Exception as error:  # the module is the user's and may raise anything
        raise UsageError(f"{text}: importing {module} failed: {type(error).__name__}: {error}") from error
    function: Callable[..., Any] | None = getattr(loaded, name, None)
    if not callable(function):
        raise UsageError(f"{text}: {module} has no function {name}")
    return function


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, slots=True)
class LoaderData:
    """Batches of a user's functions, one for training and one for validation."""

    description: str
    learn: Callable[..., Any]
    check: Callable[..., Any]
    batch: int
    seed: int
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype[Any]]
    share: Share
    steps: int | None
    classes: int | None = None

    def training(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(self._batches("train", epoch)):
            if number >= start and batch.rows >= self.share.size:
                targets = None if batch.targets is None else self.share.part(batch.targets)
                yield Batch({n: self.share.part(a) for n, a in batch.inputs.items()}, targets)

    def validation(self) -> Iterator[Batch]:
        for number, batch in enumerate(self._batches("val", 0)):
            if number % self.share.size == self.share.rank:
                yield batch

    def probe(self) -> Batch:
        first = next(self._batches("val", 0), None)
        if first is None:
            raise UsageError(f"{self.description} gave no batch to validate on")
        return first

    def _batches(self, split: Literal["train", "val"], epoch: int) -> Iterator[Batch]:
        function = self.learn if split == "train" else self.check
        batches = iter(_called(function, self._request(split, epoch), self.description))
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:  # the function is the user's and may raise anything
                raise UsageError(f"{self.description} failed: {type(error).__name__}: {error}") from error
            yield _checked(batch, self)

    def _request(self, split: Literal["train", "val"], epoch: int) -> LoaderRequest:
        shapes = {name: shape[1:] for name, shape in self.shapes.items()}
        return LoaderRequest(split, epoch, self.batch, self.seed, shapes)


def open_loader(
    learn: str | Loader,
    check: str | Loader,
    batch: int,
    seed: int,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    share: Share,
) -> LoaderData:
    """Make data of functions, or of their names; an epoch's length is asked of what the first returns."""
    described = " and ".join(dict.fromkeys(map(loader_name, (learn, check))))
    learning, checking = (load_function(f) if isinstance(f, str) else f for f in (learn, check))
    data = LoaderData(described, learning, checking, batch, seed, shapes, dtypes, share, None)
    request = LoaderRequest("train", 0, batch, seed, {name: shape[1:] for name, shape in shapes.items()})
    batches = _called(data.learn, request, described)
    steps = len(batches) if isinstance(batches, Sized) else None
    return LoaderData(described, data.learn, data.check, batch, seed, shapes, dtypes, share, steps)


def _called(function: Callable[..., Any], request: LoaderRequest, described: str) -> Iterable[Any]:
    try:
        made: Iterable[Any] = function(request)
    except Exception as error:  # the function is the user's and may raise anything
        raise UsageError(f"{described} failed: {type(error).__name__}: {error}") from error
    if not hasattr(made, "__iter__"):
        raise UsageError(f"{described} returned {type(made).__name__}; return an iterable of batches")
    return made


def _checked(batch: Any, data: LoaderData) -> Batch:
    inputs, values = checked_batch(batch, data.shapes, data.dtypes, data.description)
    if values is None:
        return Batch(inputs, None)
    return Batch(inputs, values.astype(np.float32 if values.dtype.kind == "f" else np.int64))
