"""Labelled images of the development zoo, split into calibration inputs and evaluation samples.

ImageNet: one image per class, the file name begins with the class; calibration takes even classes (at most
500) and evaluation odd ones. CIFAR-10: one lossless mosaic of the 10,000 test images; calibration takes some
of the first 1000, evaluation the other 9000.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.model_files import zoo_file
from onnx_mdp.data.images import PREPROCESSINGS
from onnx_mdp.errors import UsageError
from onnx_mdp.running.runtime import Runtime, open_session

__all__ = [
    "CALIBRATION",
    "Samples",
    "divergence",
    "hits",
    "logits",
    "samples_for",
    "save_training_images",
    "top1",
]

Images = npt.NDArray[np.float32]

CALIBRATION = 64
_CIFAR_HELD_BACK = 1000
_SIDE, _SHORT_SIDE = 224, 256
_BATCH = 25
# What each model was trained with; the zoo's ResNets on CIFAR-10 took ImageNet's mean and std.
_TASKS = {
    "efficientnet_lite0": ("imagenet", "half"),
    "mobilenet_v2": ("imagenet", "imagenet"),
    "resnet20": ("cifar", "imagenet"),
    "resnet56": ("cifar", "imagenet"),
}


@dataclass(frozen=True, slots=True)
class Samples:
    """Calibration feeds of one image each, and ``load`` for batches ``float32[n, 3, h, w]`` of ``labels``."""

    calibration: tuple[Mapping[str, Images], ...]
    calibration_labels: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    load: Callable[[slice], Images]


def samples_for(name: str, limit: int | None = None, calibration: int = CALIBRATION) -> Samples:
    """The samples of a zoo model, at most ``limit`` of them to evaluate on, and inputs to calibrate on.

    Raises:
        UsageError: the model has no labelled data, or the zoo is missing.
    """
    if name not in _TASKS:
        raise UsageError(f"{name} has no labelled images here; there are {', '.join(_TASKS)}")
    task, preprocessing = _TASKS[name]
    return (_imagenet if task == "imagenet" else _cifar)(preprocessing, limit, calibration)


def save_training_images(name: str, path: Path) -> tuple[Path, str]:
    """Write the ImageNet images of even classes as levels ``uint8[500, 256, 256, 3]``, without labels.

    Returns the file and what to preprocess it with.
    """
    archive = zipfile.ZipFile(zoo_file("data/imagenet1000_256.zip"))
    levels = [_centre(archive.read(member), _SHORT_SIDE) for member in sorted(archive.namelist())[::2]]
    np.savez(path, input=np.stack(levels))
    return path, _TASKS[name][1]


def logits(model: bytes, samples: Samples, threads: int = 1) -> Images:
    """The first output of a classifier for each sample, ``float32[n, classes]``."""
    session = open_session(model, Runtime(threads=threads))
    name = session.get_inputs()[0].name
    batches = [session.run(None, {name: samples.load(batch)})[0] for batch in _batches(len(samples.labels))]
    return np.concatenate(batches)


def top1(model: bytes, samples: Samples, threads: int = 1) -> float:
    """The share of the samples whose largest output is that of their label."""
    return hits(logits(model, samples, threads), samples)


def hits(scores: Images, samples: Samples) -> float:
    """The share of the samples whose largest score, of ``float32[n, classes]``, is that of their label."""
    return float((scores.argmax(1) == samples.labels).mean())


def divergence(wanted: Images, given: Images) -> float:
    """KL divergence of the classes that one model gives from another's, by logits; mean nats of a sample."""
    ours, theirs = (scores - np.logaddexp.reduce(scores, 1, keepdims=True) for scores in (given, wanted))
    return float((np.exp(theirs) * (theirs - ours)).sum(1, dtype=np.float64).mean())


def _batches(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH))


def _normalised(pixels: npt.NDArray[np.uint8], preprocessing: str) -> Images:
    """``uint8[n, h, w, 3]`` to ``float32[n, 3, h, w]``."""
    recipe = PREPROCESSINGS[preprocessing]
    mean, std = np.asarray(recipe.mean, np.float32), np.asarray(recipe.std, np.float32)
    values = (pixels.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def _feeds(images: Images) -> tuple[dict[str, Images], ...]:
    """Both kinds of zoo models call their input ``input``."""
    return tuple({"input": image[None]} for image in images)


def _imagenet(preprocessing: str, limit: int | None, calibration: int) -> Samples:
    archive = zipfile.ZipFile(zoo_file("data/imagenet1000_256.zip"))
    names = sorted(archive.namelist())

    def load(classes: npt.NDArray[np.int64]) -> Images:
        pixels = np.stack([_centre(archive.read(names[number])) for number in classes.tolist()])
        return _normalised(pixels, preprocessing)

    even = 2 * (np.arange(calibration) * (len(names) // 2) // calibration)
    odd = np.arange(1, len(names), 2)[:limit]
    return Samples(_feeds(load(even)), even, odd, lambda batch: load(odd[batch]))


def _centre(data: bytes, side: int = _SIDE) -> npt.NDArray[np.uint8]:
    """The centre of an image whose short side already is 256 pixels."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _cifar(preprocessing: str, limit: int | None, calibration: int) -> Samples:
    mosaic = np.asarray(Image.open(zoo_file("data/cifar10_test.webp")).convert("RGB"))
    rows, columns = mosaic.shape[0] // 32, mosaic.shape[1] // 32
    tiles = mosaic.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    labels = np.load(zoo_file("data/cifar10_test_labels.npy")).astype(np.int64)
    chosen = np.arange(calibration) * _CIFAR_HELD_BACK // calibration
    pixels = tiles[_CIFAR_HELD_BACK:]
    return Samples(
        _feeds(_normalised(tiles[chosen], preprocessing)),
        labels[chosen],
        labels[_CIFAR_HELD_BACK:][:limit],
        lambda batch: _normalised(pixels[batch], preprocessing),
    )
