"""Where training samples lie: arrays of an .npz archive, or images of a folder.

Arrays that `numpy.savez` stored are mapped from the file and need no memory; those of
`numpy.savez_compressed` are held as they are stored (50,000 CIFAR images: 154 MB of uint8). A folder is read
from the disk.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnx_mdp.data.calibration import array_header, fitted
from onnx_mdp.data.images import (
    Framing,
    ImageInput,
    Preprocessing,
    image_files,
    image_input,
    parse_preprocessing,
    pixels_of_array,
    pixels_of_file,
)
from onnx_mdp.data.targets import Targets, archive_targets, folder_targets
from onnx_mdp.errors import UsageError

__all__ = ["Source", "open_source"]

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
Framings = Callable[[int], Framing | None]
_MAX_BYTES = 4 * 10**9
_SMALL = 64  # pixels: a side up to which an image takes less time than handing it to a thread
_LOCAL_HEADER = struct.Struct("<26xHH")  # what precedes a member: its name and extra field have these lengths


class Source(Protocol):
    """Samples by number."""

    @property
    def size(self) -> int:
        """How many samples there are."""

    @property
    def pictures(self) -> bool:
        """Whether a sample is decoded and resized, so that threads help and a framing counts."""

    def read(self, rows: Rows, framing: Framings | None) -> dict[str, Array]:
        """Some samples, by input; of images, the boxes that ``framing`` gives by their numbers."""


@dataclass(frozen=True, slots=True)
class _Arrays:
    """Arrays ``[n, ...]`` by input, as the model takes them."""

    arrays: Mapping[str, Array]
    dtypes: Mapping[str, np.dtype[Any]]
    size: int
    pictures: bool = False

    def read(self, rows: Rows, framing: Framings | None) -> dict[str, Array]:
        del framing
        return {name: fitted(array[rows], name, self.dtypes[name]) for name, array in self.arrays.items()}


@dataclass(frozen=True, slots=True)
class _Levels:
    """Small images ``uint8[n, h, w, c]``, as large as the input."""

    levels: npt.NDArray[np.uint8]
    target: ImageInput
    recipe: Preprocessing
    dtype: np.dtype[Any]
    pictures: bool = False

    @property
    def size(self) -> int:
        return len(self.levels)

    def read(self, rows: Rows, framing: Framings | None) -> dict[str, Array]:
        del framing
        made = pixels_of_array(self.levels[rows], self.target, self.recipe)
        return {self.target.name: made.astype(self.dtype, copy=False)}


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Images, as files or as levels ``uint8[n, h, w, c]``, and the function that makes an input of one."""

    images: Sequence[Path] | npt.NDArray[np.uint8]
    pixels: Callable[[Any, ImageInput, Preprocessing, Framing | None], Array]
    target: ImageInput
    recipe: Preprocessing
    dtype: np.dtype[Any]
    pictures: bool = True

    @property
    def size(self) -> int:
        return len(self.images)

    def read(self, rows: Rows, framing: Framings | None) -> dict[str, Array]:
        made = [
            self.pixels(self.images[row], self.target, self.recipe, None if framing is None else framing(row))
            for row in rows.tolist()
        ]
        return {self.target.name: np.stack(made, dtype=self.dtype, casting="same_kind")}


def open_source(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    *,
    preprocess: str | None = None,
    labels: str | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Source, Targets | None]:
    """Open an archive or a folder for a model whose inputs have these shapes, each beginning with the batch.

    An ``.npz`` archive holds one array ``[n, ...]`` per model input (of any name if there is one input), and
    may hold targets ``[n, ...]`` called ``labels``, ``label``, ``targets`` or as ``labels`` says. With
    ``preprocess`` the input is levels ``uint8[n, h, w, c]``. A folder holds images at any depth; ``labels``
    is ``folder`` (a class is a subfolder; numbered in the order of ``classes``, or of their names) or a CSV
    or JSON file that gives each file its class.

    Raises:
        UsageError: the data is missing, unreadable or does not fit the model.
    """
    if path.is_dir():
        target = image_input(shapes, dtypes)
        recipe, files = parse_preprocessing(preprocess, target), image_files(path)
        source = _Pictures(files, pixels_of_file, target, recipe, dtypes[target.name])
        return source, None if labels is None else folder_targets(labels, path, files, classes)
    if not path.is_file():
        raise UsageError(
            f"{path} does not exist; training data is an .npz file, a folder of images, or module:function"
        )
    arrays = _read_archive(path)
    targets = archive_targets(arrays, labels, shapes, path)
    source_of = _arrays_source if preprocess is None else _levels_source
    return source_of(arrays, shapes, dtypes, preprocess, path), targets


def _arrays_source(
    arrays: dict[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    preprocess: str | None,
    path: Path,
) -> Source:
    for name, array in arrays.items():
        if array.shape[1:] != shapes[name][1:]:
            hint = ""
            if array.dtype == np.uint8 and array.ndim == 4:
                hint = "; for images uint8[n, h, w, c] pass --preprocess"
            raise UsageError(
                f"array {name!r} in {path} has shape {array.shape}, but the model takes "
                f"{('n', *shapes[name][1:])}; save it so{hint}"
            )
    return _Arrays(arrays, dtypes, len(next(iter(arrays.values()))))


def _levels_source(
    arrays: dict[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    preprocess: str | None,
    path: Path,
) -> Source:
    target = image_input(shapes, dtypes)
    recipe = parse_preprocessing(preprocess, target)
    levels = arrays[target.name]
    if levels.dtype != np.uint8 or levels.ndim != 4 or levels.shape[3] not in (1, 3):
        raise UsageError(
            f"--preprocess is for images uint8[n, h, w, c], but {path} holds {levels.dtype}"
            f"{list(levels.shape)}; leave it out if these are the model's inputs"
        )
    as_stored = levels.shape[1:3] == (target.height, target.width) and recipe.crop is None
    if as_stored and max(target.height, target.width) <= _SMALL:
        return _Levels(levels, target, recipe, dtypes[target.name])
    return _Pictures(levels, pixels_of_array, target, recipe, dtypes[target.name])


def _read_archive(path: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(path) as archive:
            held = {
                info.filename.removesuffix(".npy"): _member(path, archive, info)
                for info in archive.infolist()
            }
    except UsageError:
        raise
    except Exception as error:  # zipfile, its decompressors and NumPy raise many kinds for malformed bytes
        raise UsageError(f"{path} is no readable .npz archive; write one with numpy.savez") from error
    for name, array in held.items():
        if array.dtype.kind not in "biuf" or array.ndim < 1:
            raise UsageError(
                f"array {name!r} in {path} is {array.dtype}{list(array.shape)}; save numbers, a row a sample"
            )
    if not held or len({len(array) for array in held.values()}) != 1 or not len(next(iter(held.values()))):
        rows = {name: len(array) for name, array in held.items()}
        raise UsageError(f"the arrays in {path} have {rows} rows; give each the same number of samples")
    return held


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """A stored array is mapped, a compressed one read."""
    with archive.open(info) as stream:
        shape, fortran, dtype = array_header(stream)
        start = stream.tell()
        if dtype.hasobject or info.compress_type != zipfile.ZIP_STORED:
            if info.file_size > _MAX_BYTES:
                raise UsageError(
                    f"{info.filename} in {path} is above 4 GB; write it with numpy.savez, which is mapped"
                )
            stream.seek(0)
            array: Array = np.lib.format.read_array(stream, allow_pickle=False)
            return array
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    offset = info.header_offset + _LOCAL_HEADER.size + name + extra + start
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
