"""Whether a server may join requests: samples computed together must give what each gives alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_mdp.errors import MeasurementError, UsageError
from onnx_mdp.large_models import for_session
from onnx_mdp.running.runtime import InferenceSession, Runtime, open_session, run_model
from onnx_mdp.running.timing import random_feeds

__all__ = ["require_batches"]

_TOLERANCE = 2e-2  # of the largest output: other kernels, and scales that are taken over a batch


def require_batches(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Run two samples apart and together, on the CPU; ``shapes`` are those of the inputs, batch first.

    Raises:
        MeasurementError: the model does not run on drawn inputs.
        UsageError: it does not run on two samples, or they change each other's outputs.
    """
    session = open_session(for_session(model), Runtime())
    alone = {name: (1, *shape[1:]) for name, shape in shapes.items()}
    first, second = (_drawn(session, alone, seed) for seed in (0, 1))
    both = {name: np.concatenate([first[name], second[name]]) for name in first}
    one, two = run_model(session, first), run_model(session, second)
    try:
        together = run_model(session, both)
    except MeasurementError as error:
        raise UsageError(
            f"--max-batch joins requests, but of two samples together: {error} "
            "Leave it out, or export the model with a symbolic batch."
        ) from error
    for value, *results in zip(model.graph.outputs, together, one, two, strict=True):
        if not _agree(*results):
            raise UsageError(
                f"--max-batch joins requests, but output {value.name!r} of two samples together is not what "
                "each gives alone: the first dimension of the inputs is no batch; leave it out"
            )


def _drawn(session: InferenceSession, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    """Floats from N(0, 1), integers and booleans 0 or 1, which most tables of embeddings hold."""
    rng = np.random.default_rng(seed)
    feeds = random_feeds(session, shapes, seed)
    return {
        name: array if array.dtype.kind == "f" else rng.integers(0, 2, array.shape).astype(array.dtype)
        for name, array in feeds.items()
    }


def _agree(joint: Any, one: Any, two: Any) -> bool:
    """Whether the samples' own outputs, one after the other, are the joint one."""
    if any(array.ndim == 0 for array in (joint, one, two)) or one.shape != two.shape or len(one) != 1:
        return False
    wanted = np.concatenate([one, two])
    if joint.shape != wanted.shape or joint.dtype.kind not in "f":
        return bool(np.array_equal(joint, wanted))
    scale = max(float(np.abs(wanted).max(initial=0)), 1e-30)
    return bool(np.abs(joint.astype(np.float64) - wanted).max(initial=0) <= _TOLERANCE * scale)
