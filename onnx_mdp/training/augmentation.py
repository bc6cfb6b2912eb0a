"""Training images that are never twice the same: mirrored, and cropped at random.

Every draw depends on nothing but the seed, the epoch and the number of the sample, so a run that goes on
after a kill sees the images that it would have seen. Small images (to 64 pixels) are shifted by up to an
eighth of their size, with zeros beyond the edge (the mean colour, where inputs are standardised); of larger
ones a box of 35 to 100 % of the area and an aspect of 3/4 to 4/3 fills the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnx_mdp.data.images import Box, Framing, ImageInput
from onnx_mdp.errors import UsageError

__all__ = ["AUGMENTATIONS", "Augmentation", "Draws", "augmentation"]

Array = npt.NDArray[Any]
AUGMENTATIONS = ("none", "flip", "crop")
_SMALL = 64
_LEAST_AREA = 0.35
_ASPECT = math.log(4 / 3)
_TRIES = 10


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is drawn for an image besides a mirror: nothing, a shift, or the box that is resized."""

    target: ImageInput
    crop: Literal["none", "shift", "box"]

    def draws(self, key: tuple[int, ...], rows: int) -> Draws:
        """What is drawn in an epoch for each of so many images."""
        return Draws(self, key, np.random.default_rng(key).random((rows, 3), np.float32))


@dataclass(frozen=True, slots=True)
class Draws:
    """The draws of an epoch: three ``numbers[rows, 3]`` of 0 to 1 for an image, and a stream where it has a
    box.
    """

    augmentation: Augmentation
    key: tuple[int, ...]
    numbers: npt.NDArray[np.float32]

    def framing(self, row: int) -> Framing | None:
        """The box of an image that fills the input, where the recipe does not say."""
        if self.augmentation.crop != "box":
            return None
        return lambda held: _random_box(held, np.random.default_rng((*self.key, row)))

    def finish(self, pixels: Array, rows: npt.NDArray[np.int64]) -> Array:
        """The inputs of some images, mirrored and shifted."""
        channels_last, numbers = self.augmentation.target.channels_last, self.numbers[rows]
        mirrored = numbers[:, 0] < 0.5
        pixels = np.array(pixels, order="C")
        pixels[mirrored] = np.flip(pixels[mirrored], 2 if channels_last else 3)
        if self.augmentation.crop == "shift":
            _shift(pixels if channels_last else np.moveaxis(pixels, 1, 3), numbers[:, 1:])
        return pixels


def augmentation(kind: str, target: ImageInput | None, *, pictures: bool) -> Augmentation | None:
    """The augmentation of that name: ``none``, ``flip``, or ``crop`` (which mirrors too).

    Raises:
        UsageError: it is unknown, or the model takes no image.
    """
    if kind not in AUGMENTATIONS:
        raise UsageError(f"--augment {kind!r} is unknown; choose one of {', '.join(AUGMENTATIONS)}")
    if kind == "none":
        return None
    if target is None:
        raise UsageError("--augment needs a model with one image input of 1 or 3 channels; leave it out")
    if kind == "flip":
        return Augmentation(target, "none")
    boxed = pictures and min(target.height, target.width) > _SMALL
    return Augmentation(target, "box" if boxed else "shift")


def _shift(images: Array, draws: npt.NDArray[np.float32]) -> None:
    """Move each of ``images[n, h, w, c]`` down and to the right, or up and to the left, in place."""
    height, width = images.shape[1:3]
    down, right = height // 8, width // 8
    padded = np.pad(images, ((0, 0), (down, down), (right, right), (0, 0)))
    starts = (draws * (2 * down + 1, 2 * right + 1)).astype(int)
    for image, held, (top, left) in zip(images, padded, starts, strict=True):
        image[...] = held[top : top + height, left : left + width]


def _random_box(held: tuple[int, int], draw: np.random.Generator) -> Box:
    """The box of Inception's random resized crop; the largest centred one if none of ten fits."""
    for _ in range(_TRIES):
        area = held[0] * held[1] * draw.uniform(_LEAST_AREA, 1)
        aspect = math.exp(draw.uniform(-_ASPECT, _ASPECT))
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if width <= held[0] and height <= held[1]:
            left, top = draw.uniform(0, held[0] - width), draw.uniform(0, held[1] - height)
            return left, top, left + width, top + height
    side = min(held)
    left, top = (held[0] - side) / 2, (held[1] - side) / 2
    return left, top, left + side, top + side
