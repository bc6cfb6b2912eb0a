"""What gradients cost, kept in one .npz: sums over the inputs done so far, and finished scores.

The file belongs to one model, its inputs and one loss; what is asked of another is refused. A run that was
interrupted goes on after the last input that it counted.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.errors import UsageError
from onnx_mdp.files import check_output, write_files

__all__ = ["ScoreFile", "read_scores", "write_scores"]

Vector = npt.NDArray[np.float64]
_SCHEMA = "onnx-mdp scores 1"
_ABOUT = {
    "model": "another model, or for other input shapes",
    "data": "other calibration inputs or labels",
    "loss": "another loss or seed",
}


@dataclass(frozen=True, slots=True)
class ScoreFile:
    """Sums over ``samples`` samples of the first ``feeds`` feeds: ``float64[classes + blocks]`` each.

    ``absolute`` sums |s| and ``squares`` s² of the signed gradients s; ``finished`` maps a criterion to the
    scores of classes and blocks that were made of them. ``identity`` says of what model, data and loss.
    """

    identity: Mapping[str, str]
    absolute: Vector
    squares: Vector
    feeds: int = 0
    samples: int = 0
    finished: Mapping[str, Vector] = field(default_factory=dict)


def read_scores(path: Path, identity: Mapping[str, str], size: int) -> ScoreFile | None:
    """What a file holds; None where there is none yet.

    Raises:
        UsageError: it is no file of scores, or one of something else.
        OutputError: it could not be written later.
    """
    check_output(path, overwrite=True)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = json.loads(str(arrays.pop("about")))
        held, counts = about["identity"], arrays.pop("counts")
        if about["schema"] != _SCHEMA or any(_unfit(array, size) for array in arrays.values()):
            raise ValueError(about["schema"])
        feeds, samples = (int(count) for count in counts)
        sums = arrays.pop("absolute"), arrays.pop("squares")
    except Exception as error:  # NumPy, zipfile and json raise many kinds for malformed bytes
        raise UsageError(
            f"{path} is no file of scores of this model; name a new file with --scores"
        ) from error
    for key, what in _ABOUT.items():
        if held.get(key) != identity[key]:
            raise UsageError(f"{path} holds scores of {what}; name a new file with --scores")
    return ScoreFile(identity, *sums, feeds, samples, arrays)


def _unfit(array: npt.NDArray[Any], size: int) -> bool:
    return array.dtype != np.float64 or array.shape != (size,) or not bool(np.isfinite(array).all())


def write_scores(path: Path, scores: ScoreFile) -> None:
    """Write a file in one step, over an older one.

    Raises:
        OutputError: it cannot be written.
    """
    about = json.dumps({"schema": _SCHEMA, "identity": dict(scores.identity)})
    arrays: dict[str, Any] = {
        "about": np.asarray(about),
        "counts": np.asarray([scores.feeds, scores.samples]),
    }
    arrays |= {"absolute": scores.absolute, "squares": scores.squares, **scores.finished}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_files({path: buffer.getvalue()})
