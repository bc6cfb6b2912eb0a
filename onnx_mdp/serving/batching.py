"""Whether a server may join requests: samples computed together must give what each gives alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_mdp.errors import UsageError
from onnx_mdp.large_models import for_session
from onnx_mdp.running.runtime import Runtime, one_line, open_session
from onnx_mdp.running.timing import random_feeds

__all__ = ["require_batches"]

_TOLERANCE = 2e-2  # of the largest output: other kernels, and scales that are taken over a batch


def require_batches(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Run two samples apart and together, on the CPU; ``shapes`` are those of one sample.

    Raises:
        UsageError: the model does not run on two samples, or they change each other's outputs.
    """
    session = open_session(for_session(model), Runtime())
    ones = {name: (1, *shape[1:]) for name, shape in shapes.items()}
    first, second = (random_feeds(session, ones, seed) for seed in (0, 1))
    both = {name: np.concatenate([first[name], second[name]]) for name in first}
    apart = [session.run(None, feeds) for feeds in (first, second)]
    try:
        together = session.run(None, both)
    except Exception as error:
        raise UsageError(
            f"--max-batch joins requests, but the model does not run on two samples ({one_line(error)}); "
            "leave it out, or export the model with a symbolic batch"
        ) from error
    for output, one, two, joint in zip(model.graph.outputs, *apart, together, strict=True):
        if not _agree(joint, one, two):
            raise UsageError(
                f"--max-batch joins requests, but output {output.name!r} of two samples together is not what "
                "each gives alone: the first dimension of the inputs is no batch; leave it out"
            )


def _agree(joint: Any, one: Any, two: Any) -> bool:
    if joint.ndim == 0 or one.shape[1:] != two.shape[1:] or len(one) != 1 or len(two) != 1:
        return False
    wanted = np.concatenate([one, two])
    if joint.shape != wanted.shape or joint.dtype.kind not in "f":
        return bool(np.array_equal(joint, wanted))
    scale = max(float(np.abs(wanted).max(initial=0)), 1e-30)
    return bool(np.abs(joint.astype(np.float64) - wanted).max(initial=0) <= _TOLERANCE * scale)
