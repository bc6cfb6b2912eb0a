"""Real inputs, read from an .npz archive or a folder of images, as feeds of exactly the bound shapes.

*Choosing*: the feeds share an evenly spaced subset of the samples (rows of the arrays, or files sorted by
path), so data sorted by class stays representative and equal calls see equal inputs. *Bounding*: headers are
checked before any value is read, and only the chosen samples are kept. *Preprocessing* of an image is ::

    y[c] = (x[c] / 255 - mean[c]) / std[c]        x in 0..255, resized to the input's height and width

The resize is plain or, with ``crop``, covers size/crop and keeps the centre, as torchvision's ``Resize(256);
CenterCrop(224)``; one resize of a source box does both, so a thin image stays small. As training pipelines
do, it drops transparency and ignores EXIF rotation.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.errors import UsageError

__all__ = ["PREPROCESSINGS", "CalibrationData", "Preprocessing", "load_data"]

Array = npt.NDArray[Any]
_Box = tuple[float, float, float, float]

_MAX_BYTES = 4 * 10**9
_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
# Named, because Pillow would otherwise start Ghostscript for an EPS file that is called .jpg.
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
# Pillow clips the other modes (16-bit, float) to white instead of scaling them.
_EIGHT_BIT_MODES = frozenset({"1", "CMYK", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"})
_FORM = "mean=0.5,0.5,0.5;std=0.5,0.5,0.5;crop=0.875;order=rgb"


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """Inputs for a model: each of ``feeds`` maps every input to an array of its bound shape and dtype."""

    feeds: tuple[dict[str, Array], ...]
    source: str


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
class _Request:
    """What ``load_data`` was asked for; every shape starts with ``batch``."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype[Any]]
    samples: int
    batch: int

    def chosen(self, held: int) -> tuple[int, ...]:
        """Evenly spaced indices below ``held``, as many as whole batches take."""
        count = min(self.samples, held) // self.batch * self.batch
        if count < 1:
            given = f"--samples {self.samples} of the {held} in {self.path}"
            raise UsageError(f"{given} do not fill a batch of {self.batch}; give more or bind a smaller one")
        size = count * sum(math.prod(s[1:]) * self.dtypes[n].itemsize for n, s in self.shapes.items())
        if size > _MAX_BYTES:
            raise UsageError(f"{count} samples take {size / 1e9:.1f} GB (at most 4); lower --samples")
        return tuple((2 * i + 1) * held // (2 * count) for i in range(count))

    def feeds(self, arrays: Mapping[str, Array]) -> tuple[dict[str, Array], ...]:
        """The arrays cut into batches, each contiguous as ONNX Runtime wants it."""
        count, size = len(next(iter(arrays.values()))), self.batch
        cuts = (slice(start, start + size) for start in range(0, count, size))
        return tuple({name: np.ascontiguousarray(a[cut]) for name, a in arrays.items()} for cut in cuts)


def load_data(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    *,
    preprocess: str | None,
    samples: int = 64,
) -> CalibrationData:
    """Read at most ``samples`` samples of ``path``, in feeds of ``shapes``; an incomplete batch is dropped.

    An ``.npz`` archive holds one array ``[n, ...]`` per model input (of any name if there is one input), with
    values as the model takes them. A folder holds images (.jpg, .jpeg, .png, .bmp, .webp) at any depth, for
    a model with one float input ``[n, c, h, w]`` or ``[n, h, w, c]`` of 1 or 3 channels; ``preprocess`` then
    is a name in ``PREPROCESSINGS`` or such as ``mean=0.5,0.5,0.5;std=0.5,0.5,0.5[;crop=0.875][;order=rgb]``.

    Raises:
        UsageError: the data is missing, unreadable, above 4 GB, or does not fit the model.
    """
    batches = {shape[:1] for shape in shapes.values()}
    if len(batches) != 1 or () in batches:
        raise UsageError(f"--data needs inputs with a common batch size, but the model takes {dict(shapes)}")
    request = _Request(path, shapes, dtypes, samples, batches.pop()[0])
    if path.is_dir():
        return _load_images(request, preprocess)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; --data takes an .npz file or a folder of images")
    if preprocess is not None:
        raise UsageError(f"--preprocess is for a folder of images, but {path} is a file; leave it out")
    try:
        with zipfile.ZipFile(path) as archive:
            return _load_npz(archive, request)
    except UsageError:
        raise
    except Exception as error:  # zipfile, its decompressors and NumPy raise many kinds for malformed bytes
        raise UsageError(f"{path} is no readable .npz archive; write one with numpy.savez") from error


def _load_npz(archive: zipfile.ZipFile, request: _Request) -> CalibrationData:
    members = _members(archive, request)
    held = {name: _row_count(archive, member, name, request) for name, member in members.items()}
    total, *others = set(held.values())
    if others:
        raise UsageError(f"the first dimensions in {request.path} differ, {held}; make them equal")
    rows = request.chosen(total)
    arrays = {n: _fit(_rows(archive, members[n], rows), n, request.dtypes[n]) for n in request.shapes}
    return CalibrationData(request.feeds(arrays), f"{len(rows)} of {total} samples in {request.path}")


def _members(archive: zipfile.ZipFile, request: _Request) -> dict[str, zipfile.ZipInfo]:
    found = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if len(request.shapes) == len(found) == 1:
        found = dict(zip(request.shapes, found.values(), strict=True))
    if set(found) != set(request.shapes):
        names, wanted = (", ".join(sorted(some)) or "nothing" for some in (found, request.shapes))
        raise UsageError(f"{request.path} holds {names}, but the model takes {wanted}; save exactly these")
    for name, info in found.items():
        if info.file_size > _MAX_BYTES:
            raise UsageError(f"array {name!r} in {request.path} is above 4 GB; save fewer samples")
    return found


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of a .npy stream, which is left at the first value."""
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _row_count(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, request: _Request) -> int:
    with archive.open(member) as stream:
        held, _, dtype = _header(stream)
    shape, where = request.shapes[name], f"array {name!r} in {request.path}"
    if dtype.kind not in "biuf":
        raise UsageError(f"{where} has dtype {dtype}, which is no number; save a numeric array")
    if not held or held[1:] != shape[1:]:
        raise UsageError(f"{where} has shape {held}, but the model takes {('n', *shape[1:])}; save it so")
    return held[0]


def _rows(archive: zipfile.ZipFile, member: zipfile.ZipInfo, rows: Sequence[int]) -> Array:
    """The chosen rows of an array, streamed unless it is stored column by column."""
    with archive.open(member) as stream:
        shape, fortran, dtype = _header(stream)
        start, size = stream.tell(), math.prod(shape[1:]) * dtype.itemsize
        if fortran:
            return np.frombuffer(stream.read(), dtype).reshape(shape, order="F")[list(rows)]
        values = bytearray()
        for row in rows:
            stream.seek(start + row * size)
            values += stream.read(size)
    return np.frombuffer(values, dtype).reshape(len(rows), *shape[1:])


def _fit(values: Array, name: str, dtype: np.dtype[Any]) -> Array:
    """The same numbers in the model's dtype, which may round them only if it is a float."""
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = values.astype(dtype)
    if not (np.isfinite(fitted).all() if dtype.kind == "f" else np.array_equal(fitted, values)):
        raise UsageError(f"array {name!r} holds {values.dtype} values that are no finite {dtype}; convert it")
    return fitted


def _load_images(request: _Request, preprocess: str | None) -> CalibrationData:
    name, channels_last = _image_input(request)
    if preprocess is None:
        raise UsageError(f"a folder of images needs --preprocess; {_CHOICES}")
    recipe, shape, dtype = _recipe(preprocess), request.shapes[name], request.dtypes[name]
    height, width, channels = shape[1:] if channels_last else (*shape[2:], shape[1])
    if len(recipe.mean) > channels:
        raise UsageError(f"--preprocess {preprocess} is for 3 channels, but {name!r} has 1; use half or unit")
    files = _image_files(request.path)
    pixels = [_pixels(files[i], (height, width, channels), recipe) for i in request.chosen(len(files))]
    ordered = pixels if channels_last else [image.transpose(2, 0, 1) for image in pixels]
    source = f"{len(pixels)} of {len(files)} images in {request.path}, {preprocess}"
    return CalibrationData(request.feeds({name: np.stack(ordered, dtype=dtype, casting="same_kind")}), source)


def _image_input(request: _Request) -> tuple[str, bool]:
    """The name of the only input and whether its channels are last."""
    name, shape = next(iter(request.shapes.items()))
    first, last = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (1, -1))
    if len(request.shapes) > 1 or request.dtypes[name].kind != "f" or first == last:
        held = ", ".join(f"{n} {request.dtypes[n]}{list(s)}" for n, s in request.shapes.items())
        raise UsageError(f"images need one 4-D float input of 1 or 3 channels, not {held}; give an .npz file")
    return name, last


def _recipe(text: str) -> Preprocessing:
    if text in PREPROCESSINGS:
        return PREPROCESSINGS[text]
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


def _image_files(folder: Path) -> list[Path]:
    """The folder's images by path; hidden files, such as macOS's ``._name.jpg``, are no images."""
    found = [p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise UsageError(f"{folder} holds no image; put {', '.join(sorted(_SUFFIXES))} files there")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _pixels(file: Path, shape: tuple[int, int, int], recipe: Preprocessing) -> npt.NDArray[np.float32]:
    """``float32[height, width, channels]`` of one file."""
    from PIL import Image  # here, because archives do not need it

    height, width, mode = *shape[:2], "L" if shape[2] == 1 else "RGB"
    resample = Image.Resampling.BICUBIC if recipe.bicubic else Image.Resampling.BILINEAR
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as image:
                if image.mode not in _EIGHT_BIT_MODES:
                    raise ValueError(f"its mode {image.mode} is not 8-bit")
                box = _source_box(image.size, (width, height), recipe.crop)
                plain = image.convert(mode).resize((width, height), resample, box)
    except Exception as error:  # Pillow's decoders raise many kinds for malformed bytes
        raise UsageError(f"{file} is no usable image ({str(error)[:160]}); repair or remove it") from error
    values = np.asarray(plain, np.float32).reshape(shape)[..., :: -1 if recipe.order == "bgr" else 1]
    mean, std = (np.float32(255 * np.array(numbers)) for numbers in (recipe.mean, recipe.std))
    return np.asarray((values - mean) / std, np.float32)


def _source_box(held: tuple[int, int], size: tuple[int, int], crop: float | None) -> _Box:
    """Left, top, right and bottom of the part of a ``held`` (width, height) image that fills ``size``."""
    if crop is None:
        return 0, 0, *held
    wide, tall = round(size[0] / crop), round(size[1] / crop)
    wide, tall = max(wide, tall * held[0] // held[1]), max(tall, wide * held[1] // held[0])
    left, top = round((wide - size[0]) / 2), round((tall - size[1]) / 2)
    right, bottom = (left + size[0]) * held[0] / wide, (top + size[1]) * held[1] / tall
    return left * held[0] / wide, top * held[1] / tall, right, bottom
