"""Does the file that is written compute what was trained? Both are run, and told apart from rounding.

Where the runtime's own optimised and unoptimised runs differ (its sigmoid is off by 1e-7 near zero), four
times that difference counts as rounding. A file in half precision is run in float32, and may be off by what
its weights are rounded by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from onnx_mdp.errors import VerificationError
from onnx_mdp.large_models import for_session
from onnx_mdp.numerics.precision import has_halves, in_float32
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.training.batched import Batched

__all__ = ["require_agreement"]

Arrays = Mapping[str, npt.NDArray[Any]]
# Relative to the largest value: float noise of a deep network stays below the first.
_CLOSE, _CLOSE_IN_HALF = 1e-4, 2e-2
_NOISE = 4.0


def require_agreement(trained: ir.Model, network: Batched, inputs: Arrays, rows: int) -> float:
    """The largest difference of an output between file and network, relative to its largest value.

    Outputs whose difference is no more than the runtime's own rounding do not count. The file takes ``rows``
    rows at a time.

    Raises:
        VerificationError: it is more than rounding.
    """
    close = _CLOSE_IN_HALF if has_halves(trained) else _CLOSE
    plain = in_float32(trained)
    theirs, other = (_outputs(plain, inputs, rows, optimize=how) for how in (True, False))
    with torch.no_grad():
        found = network.to("cpu").eval()({name: torch.from_numpy(array) for name, array in inputs.items()})
    worst = 0.0
    for name in (n for n, array in theirs.items() if array.dtype.kind == "f"):
        scale = float(np.abs(theirs[name]).max(initial=0.0)) or 1.0
        error, noise = (_apart(theirs[name], array) for array in (found[name].numpy(), other[name]))
        if error <= close * scale:
            worst = max(worst, error / scale)
        elif not error <= _NOISE * noise:
            raise VerificationError(
                f"output {name} of the written model differs from the trained one by {error / scale:.1e} of "
                "the scale; nothing was written: please report the model"
            )
    return worst


def _outputs(model: ir.Model, inputs: Arrays, rows: int, *, optimize: bool) -> dict[str, npt.NDArray[Any]]:
    session = open_session(for_session(model), Runtime(), optimize=optimize)
    names = [output.name for output in session.get_outputs()]
    starts = range(0, len(next(iter(inputs.values()))), rows)
    parts: Sequence[Sequence[npt.NDArray[Any]]] = [
        session.run(None, {name: array[start : start + rows] for name, array in inputs.items()})
        for start in starts
    ]
    return {name: np.concatenate(made) for name, made in zip(names, zip(*parts, strict=True), strict=True)}


def _apart(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> float:
    return float(np.abs(ours - theirs).max(initial=0.0))
