"""Real inputs, read from an .npz archive or a folder of images, as feeds of exactly the bound shapes.

*Choosing*: the feeds share an evenly spaced subset of the samples (rows of the arrays, or files sorted by
path), so data sorted by class stays representative and equal calls see equal inputs. *Bounding*: headers are
checked before any value is read, and only the chosen samples are kept. `images` says how
images become inputs.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.data.images import (
    image_files,
    image_input,
    parse_preprocessing,
    pixels_of_array,
    pixels_of_file,
)
from onnx_mdp.data.targets import TARGET_NAMES, folder_targets
from onnx_mdp.errors import UsageError

__all__ = ["CalibrationData", "array_header", "fitted", "load_data"]

Array = npt.NDArray[Any]
_MAX_BYTES = 4 * 10**9


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """Inputs for a model: each of ``feeds`` maps every input to an array of its bound shape and dtype.

    ``labels`` holds the class numbers of each feed, ``int64[n]``, where the data has some.
    """

    feeds: tuple[dict[str, Array], ...]
    source: str
    labels: tuple[npt.NDArray[np.int64], ...] | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    """What ``load_data`` was asked for; every shape starts with ``batch``."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype[Any]]
    samples: int
    batch: int
    labels: str | None = None

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

    def parted(self, labels: Array) -> tuple[npt.NDArray[np.int64], ...]:
        """The labels cut into batches."""
        starts = range(0, len(labels), self.batch)
        return tuple(labels[start : start + self.batch].astype(np.int64) for start in starts)

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
    labels: str | None = None,
) -> CalibrationData:
    """Read at most ``samples`` samples of ``path``, in feeds of ``shapes``; an incomplete batch is dropped.

    An ``.npz`` archive holds one array ``[n, ...]`` per model input (of any name if there is one input), with
    values as the model takes them; arrays that are called as ``TARGET_NAMES`` say are left to training. With
    ``preprocess`` the input is images ``uint8[n, h, w, c]``. A folder holds images (.jpg, .jpeg, .png, .bmp,
    .webp) at any depth, for a model with one float input ``[n, c, h, w]`` or ``[n, h, w, c]`` of 1 or 3
    channels; ``preprocess`` then is a name in ``images.PREPROCESSINGS`` or such as
    ``mean=0.5,0.5,0.5;std=0.5,0.5,0.5[;crop=0.875][;order=rgb]``.

    Labels are an array of class numbers, called as ``targets.TARGET_NAMES`` or ``labels`` say; those of
    images are subfolders in order (``labels="folder"``) or lie in a CSV or JSON file.

    Raises:
        UsageError: the data is missing, unreadable, above 4 GB, or does not fit the model.
    """
    batches = {shape[:1] for shape in shapes.values()}
    if len(batches) != 1 or () in batches:
        raise UsageError(f"--data needs inputs with a common batch size, but the model takes {dict(shapes)}")
    request = _Request(path, shapes, dtypes, samples, batches.pop()[0], labels)
    if path.is_dir():
        return _load_images(request, preprocess)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; --data takes an .npz file or a folder of images")
    try:
        with zipfile.ZipFile(path) as archive:
            if preprocess is not None:
                return _load_levels(archive, request, preprocess)
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
    arrays = {n: fitted(_rows(archive, members[n], rows), n, request.dtypes[n]) for n in request.shapes}
    source = f"{len(rows)} of {total} samples in {request.path}"
    return CalibrationData(request.feeds(arrays), source, _labels(archive, request, total, rows))


def _load_levels(archive: zipfile.ZipFile, request: _Request, preprocess: str) -> CalibrationData:
    """Images that an archive holds as levels ``uint8[n, h, w, c]``."""
    target = image_input(request.shapes, request.dtypes)
    recipe, member = parse_preprocessing(preprocess, target), _members(archive, request)[target.name]
    with archive.open(member) as stream:
        shape, _, dtype = array_header(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
        raise UsageError(
            f"--preprocess is for images, in a folder or as uint8[n, h, w, c], but {request.path} holds "
            f"{dtype}{list(shape)}; leave it out if these are the model's inputs"
        )
    rows = request.chosen(shape[0])
    levels = _rows(archive, member, rows)
    pixels = np.stack([pixels_of_array(image, target, recipe) for image in levels])
    source = f"{len(rows)} of {shape[0]} images in {request.path}, {preprocess}"
    feeds = request.feeds({target.name: pixels.astype(request.dtypes[target.name])})
    return CalibrationData(feeds, source, _labels(archive, request, shape[0], rows))


def _labels(
    archive: zipfile.ZipFile, request: _Request, total: int, rows: Sequence[int]
) -> tuple[npt.NDArray[np.int64], ...] | None:
    """The class numbers of the chosen rows; targets that are none count only where they were asked for."""
    named = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    names = (request.labels,) if request.labels is not None else TARGET_NAMES
    name = next((n for n in names if n in named and n not in request.shapes), None)
    if name is None and request.labels is None:
        return None
    where = f"--labels {request.labels}: {request.path}"
    if name is None:
        raise UsageError(f"{where} holds {', '.join(sorted(named))}; name one that is no input")
    with archive.open(named[name]) as stream:
        shape, _, dtype = array_header(stream)
    if dtype.kind in "biu" and shape == (total,):
        return request.parted(_rows(archive, named[name], rows))
    if request.labels is None:
        return None
    raise UsageError(
        f"{where} holds {dtype} of shape {shape}; class numbers are integers of shape ({total},)"
    )


def _members(archive: zipfile.ZipFile, request: _Request) -> dict[str, zipfile.ZipInfo]:
    named = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    targets = {*TARGET_NAMES, request.labels}
    found = {n: info for n, info in named.items() if n in request.shapes or n not in targets}
    if len(request.shapes) == len(found) == 1:
        found = dict(zip(request.shapes, found.values(), strict=True))
    if set(found) != set(request.shapes):
        names, wanted = (", ".join(sorted(some)) or "nothing" for some in (found, request.shapes))
        raise UsageError(f"{request.path} holds {names}, but the model takes {wanted}; save exactly these")
    for name, info in found.items():
        if info.file_size > _MAX_BYTES:
            raise UsageError(f"array {name!r} in {request.path} is above 4 GB; save fewer samples")
    return found


def array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the shape, Fortran order and dtype of a .npy stream, which is left at the first value."""
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _row_count(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, request: _Request) -> int:
    with archive.open(member) as stream:
        held, _, dtype = array_header(stream)
    shape, where = request.shapes[name], f"array {name!r} in {request.path}"
    if dtype.kind not in "biuf":
        raise UsageError(f"{where} has dtype {dtype}, which is no number; save a numeric array")
    if not held or held[1:] != shape[1:]:
        raise UsageError(f"{where} has shape {held}, but the model takes {('n', *shape[1:])}; save it so")
    return held[0]


def _rows(archive: zipfile.ZipFile, member: zipfile.ZipInfo, rows: Sequence[int]) -> Array:
    """The chosen rows of an array, streamed unless it is stored column by column."""
    with archive.open(member) as stream:
        shape, fortran, dtype = array_header(stream)
        start, size = stream.tell(), math.prod(shape[1:]) * dtype.itemsize
        if fortran:
            return np.frombuffer(stream.read(), dtype).reshape(shape, order="F")[list(rows)]
        values = bytearray()
        for row in rows:
            stream.seek(start + row * size)
            values += stream.read(size)
    return np.frombuffer(values, dtype).reshape(len(rows), *shape[1:])


def fitted(values: Array, name: str, dtype: np.dtype[Any]) -> Array:
    """The same numbers in the model's dtype, which may round them only if it is a float."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
    if not (np.isfinite(cast).all() if dtype.kind == "f" else np.array_equal(cast, values)):
        raise UsageError(f"array {name!r} holds {values.dtype} values that are no finite {dtype}; convert it")
    return cast


def _load_images(request: _Request, preprocess: str | None) -> CalibrationData:
    target = image_input(request.shapes, request.dtypes)
    recipe, dtype = parse_preprocessing(preprocess, target), request.dtypes[target.name]
    files = image_files(request.path)
    chosen = request.chosen(len(files))
    pixels = [pixels_of_file(files[i], target, recipe) for i in chosen]
    source = f"{len(pixels)} of {len(files)} images in {request.path}, {preprocess}"
    stacked = np.stack(pixels, dtype=dtype, casting="same_kind")
    labels = None
    if request.labels is not None:
        found = folder_targets(request.labels, request.path, files, None).values
        labels = request.parted(found[list(chosen)])
    return CalibrationData(request.feeds({target.name: stacked}), source, labels)
