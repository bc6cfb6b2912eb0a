"""Our calibration inputs as a data set of Olive: an .npz or a folder of images, in batches that fit a model.

Importing the module registers the data set; a data config names it and a user script that imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from olive.data.registry import Registry

from onnx_mdp.data.calibration import load_data
from onnx_mdp.errors import MdpError

__all__ = ["onnx_mdp_inputs"]


@Registry.register_dataset("onnx_mdp_inputs")  # type: ignore[untyped-decorator]
def onnx_mdp_inputs(
    path: str,
    inputs: Mapping[str, Mapping[str, Any]],
    preprocess: str | None = None,
    samples: int = 64,
    labels: str | None = None,
) -> Sequence[Any]:
    """Batches as `load_data` reads them, each with its class numbers where there are some.

    ``inputs`` holds a ``shape`` and a ``dtype`` for each input; the first axis of a shape is the batch.

    Raises:
        ValueError: the data is missing, unreadable, or does not fit the model.
    """
    shapes = {name: tuple(described["shape"]) for name, described in inputs.items()}
    types = {name: np.dtype(described["dtype"]) for name, described in inputs.items()}
    try:
        data = load_data(Path(path), shapes, types, preprocess=preprocess, samples=samples, labels=labels)
    except MdpError as error:
        raise ValueError(str(error)) from error
    return data.feeds if data.labels is None else list(zip(data.feeds, data.labels, strict=True))
