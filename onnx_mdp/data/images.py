"""Images as a model takes them: files, boxes of them, and the numbers that pixels become.

Preprocessing of an image is ::

    y[c] = (x[c] / 255 - mean[c]) / std[c]        x in 0..255, resized to the input's height and width

The resize is plain or, with ``crop``, covers size/crop and keeps the centre, as torchvision's ``Resize(256);
CenterCrop(224)``; one resize of a source box does both, so a thin image stays small. As training pipelines
do, it drops transparency and ignores EXIF rotation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_mdp.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "PREPROCESSINGS",
    "Box",
    "Framing",
    "ImageInput",
    "Preprocessing",
    "image_files",
    "image_input",
    "parse_preprocessing",
    "pixels_of_array",
    "pixels_of_file",
]

Box: TypeAlias = tuple[float, float, float, float]
Framing: TypeAlias = Callable[[tuple[int, int]], Box]
Pixels: TypeAlias = npt.NDArray[np.float32]

_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
# Named, because Pillow would otherwise start Ghostscript for an EPS file that is called .jpg.
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
# Pillow clips the other modes (16-bit, float) to white instead of scaling them.
_EIGHT_BIT_MODES = frozenset({"1", "CMYK", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"})
_FORM = "mean=0.5,0.5,0.5;std=0.5,0.5,0.5;crop=0.875;order=rgb"


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How pixels become inputs; ``meaning`` is its line in the list that users see.

    ``mean`` and ``std`` are for pixels in 0..1: one value, or three in the channel ``order`` that the model
    takes. ``crop`` is kept/covered size; None resizes without regard to the aspect ratio.
    """

    meaning: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    crop: float | None = None
    order: str = "rgb"
    bicubic: bool = False


_CROP = 224 / 256
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CAFFE = ((104 / 255, 117 / 255, 123 / 255), (1 / 255,))
PREPROCESSINGS: Mapping[str, Preprocessing] = {
    "imagenet": Preprocessing("centre crop, ImageNet mean and std (torchvision)", *_IMAGENET, _CROP),
    "imagenet-bicubic": Preprocessing("the same, bicubic (DeiT, timm)", *_IMAGENET, _CROP, bicubic=True),
    "imagenet-nocrop": Preprocessing("plain resize, ImageNet mean and std", *_IMAGENET),
    "half": Preprocessing("centre crop, RGB in -1..1 (TensorFlow, ViT)", (0.5,), (0.5,), _CROP),
    "unit": Preprocessing("plain resize, RGB in 0..1"),
    "raw": Preprocessing("plain resize, RGB in 0..255", std=(1 / 255,)),
    "bgr": Preprocessing("plain resize, BGR in 0..255 (OpenCV)", std=(1 / 255,), order="bgr"),
    "caffe": Preprocessing("centre crop, BGR minus 104,117,123", *_CAFFE, _CROP, "bgr"),
    "cifar": Preprocessing("plain resize, CIFAR mean and std", *_CIFAR),
}
_LIST = "\n".join(f"  {name:<17} {choice.meaning}" for name, choice in PREPROCESSINGS.items())
_CHOICES = f"use the one that the model was trained with:\n{_LIST}\n  or such as {_FORM!r}"


@dataclass(frozen=True, slots=True)
class ImageInput:
    """The one input of an image model: its size, its channels and where these are."""

    name: str
    height: int
    width: int
    channels: int
    channels_last: bool

    @property
    def mode(self) -> str:
        """The mode of Pillow with as many channels."""
        return "L" if self.channels == 1 else "RGB"


def image_input(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]]) -> ImageInput:
    """The only input of an image model, ``[n, c, h, w]`` or ``[n, h, w, c]`` of 1 or 3 channels.

    Raises:
        UsageError: the model has other inputs.
    """
    name, shape = next(iter(shapes.items()))
    first, last = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (1, -1))
    if len(shapes) > 1 or dtypes[name].kind != "f" or first == last:
        held = ", ".join(f"{n} {dtypes[n]}{list(s)}" for n, s in shapes.items())
        raise UsageError(f"images need one 4-D float input of 1 or 3 channels, not {held}; give an .npz file")
    height, width, channels = shape[1:] if last else (*shape[2:], shape[1])
    return ImageInput(name, height, width, channels, last)


def parse_preprocessing(text: str | None, target: ImageInput) -> Preprocessing:
    """The preprocessing of that name, or as in
    ``mean=0.5,0.5,0.5;std=0.5,0.5,0.5[;crop=0.875][;order=rgb]``.

    Raises:
        UsageError: there is none of that name, its form is wrong, or it has more channels than the input.
    """
    if text is None:
        raise UsageError(f"a folder of images needs --preprocess; {_CHOICES}")
    recipe = PREPROCESSINGS[text] if text in PREPROCESSINGS else _parsed(text)
    if len(recipe.mean) > target.channels:
        raise UsageError(
            f"--preprocess {text} is for 3 channels, but {target.name!r} has 1; use half or unit"
        )
    return recipe


def _parsed(text: str) -> Preprocessing:
    if "=" not in text:
        raise UsageError(f"no preprocessing is called {text!r}; {_CHOICES}")
    pairs = [part.partition("=")[::2] for part in text.split(";")]
    fields = {"order": "rgb", "crop": "", **dict(pairs)}
    try:
        mean, std = (tuple(float(number) for number in fields[key].split(",")) for key in ("mean", "std"))
        crop = float(fields["crop"]) if "crop" in dict(pairs) else None
        known = len(fields) == 4 and len(pairs) == len(dict(pairs)) and fields["order"] in ("rgb", "bgr")
        finite = all(map(math.isfinite, mean)) and all(0 < v < math.inf for v in std)
        if not (known and finite and len(mean) == len(std) in (1, 3) and (crop is None or 0 < crop <= 1)):
            raise ValueError(text)
    except (KeyError, ValueError) as error:
        rules = "1 or 3 means, as many positive stds, 0 < crop <= 1, order rgb or bgr, nothing else or twice"
        raise UsageError(f"--preprocess {text!r} is wrong; write it as {_FORM!r} ({rules})") from error
    return Preprocessing(text, mean, std, crop, fields["order"])


def image_files(folder: Path) -> list[Path]:
    """The folder's images by path; hidden files, such as macOS's ``._name.jpg``, are no images."""
    found = [p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise UsageError(f"{folder} holds no image; put {', '.join(sorted(_SUFFIXES))} files there")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def pixels_of_file(
    file: Path, target: ImageInput, recipe: Preprocessing, framing: Framing | None = None
) -> Pixels:
    """``float32[h, w, c]`` or ``[c, h, w]`` of one file, as the input has it.

    ``framing`` chooses the box of a (width, height) image that fills the input; default: by the recipe.
    """
    from PIL import Image  # here, because archives do not need it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as image:
                if image.mode not in _EIGHT_BIT_MODES:
                    raise ValueError(f"its mode {image.mode} is not 8-bit")
                return _prepared(image.convert(target.mode), target, recipe, framing)
    except Exception as error:  # Pillow's decoders raise many kinds for malformed bytes
        raise UsageError(f"{file} is no usable image ({str(error)[:160]}); repair or remove it") from error


def pixels_of_array(
    levels: npt.NDArray[np.uint8], target: ImageInput, recipe: Preprocessing, framing: Framing | None = None
) -> Pixels:
    """The same of levels ``uint8[h, w, c]``; of many, ``[n, h, w, c]``, if they are as large as the input."""
    whole = levels.shape[-3:] == (target.height, target.width, target.channels)
    if whole and recipe.crop is None and framing is None:  # Pillow would copy it
        return _standardised(levels, target, recipe)
    from PIL import Image

    image = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    return _prepared(image.convert(target.mode), target, recipe, framing)


def _prepared(
    image: Image, target: ImageInput, recipe: Preprocessing, framing: Framing | None = None
) -> Pixels:
    """The same of an image of Pillow that has the input's channels."""
    from PIL import Image

    resample = Image.Resampling.BICUBIC if recipe.bicubic else Image.Resampling.BILINEAR
    size = (target.width, target.height)
    box = _source_box(image.size, size, recipe.crop) if framing is None else framing(image.size)
    plain = image.resize(size, resample, box)
    return _standardised(np.asarray(plain).reshape(target.height, target.width, -1), target, recipe)


def _standardised(levels: npt.NDArray[np.uint8], target: ImageInput, recipe: Preprocessing) -> Pixels:
    mean, std = _of_levels(recipe, target)
    pixels = levels[..., :: -1 if recipe.order == "bgr" else 1].astype(np.float32, order="C")
    lines = pixels.reshape(*pixels.shape[:-2], -1)
    lines -= mean
    lines /= std
    return pixels if target.channels_last else np.moveaxis(pixels, -1, -3)


@cache
def _of_levels(recipe: Preprocessing, target: ImageInput) -> tuple[Pixels, Pixels]:
    """Mean and standard deviation of the levels, 0 to 255, of a line: NumPy repeats three numbers slowly."""
    shape = target.width, target.channels
    of_line = (np.broadcast_to(numbers, shape).reshape(-1) for numbers in (recipe.mean, recipe.std))
    mean, std = (255 * numbers for numbers in of_line)
    return mean.astype(np.float32), std.astype(np.float32)


def _source_box(held: tuple[int, int], size: tuple[int, int], crop: float | None) -> Box:
    """Left, top, right and bottom of the part of a ``held`` (width, height) image that fills ``size``."""
    if crop is None:
        return 0, 0, *held
    wide, tall = round(size[0] / crop), round(size[1] / crop)
    wide, tall = max(wide, tall * held[0] // held[1]), max(tall, wide * held[1] // held[0])
    left, top = round((wide - size[0]) / 2), round((tall - size[1]) / 2)
    right, bottom = (left + size[0]) * held[0] / wide, (top + size[1]) * held[1] / tall
    return left * held[0] / wide, top * held[1] / tall, right, bottom
