"""The channel block of a provider, and the widths that are worth offering on it.

Runtimes work on blocks of B channels: latency is a staircase of period B in either width, and a width
between two steps costs as much as the next step, or far more where it leaves the blocked layout. So only
multiples of B (and the full width) are offered. B is read from the filter that the runtime itself lays out.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_mdp.files import scratch_folder
from onnx_mdp.placement import open_placed
from onnx_mdp.runtime import Runtime, open_session
from onnx_mdp.structure import Dimension
from onnx_mdp.timing import measure, random_feeds

__all__ = ["granularity", "unit_choices"]

_CANDIDATES = (4, 8, 16, 32)


@functools.lru_cache(maxsize=8)
def granularity(runtime: Runtime) -> int:
    """The number of channels that the provider computes at a time.

    A provider that shows its layout is read: a convolution with one output channel is saved as the
    runtime optimised it, and its filter has B rows. Otherwise B is measured.
    """
    with scratch_folder() as folder:
        path = folder / "optimised.onnx"
        open_session(_convolution(32, 1).SerializeToString(), runtime, optimized_model_path=path)
        if path.is_file():
            laid_out = onnx.load(path)
            rows = [t.dims[0] for t in laid_out.graph.initializer if len(t.dims) == 4]
            if rows and rows[0] > 1:
                return int(rows[0])
    return _measured(runtime)


def _measured(runtime: Runtime) -> int:
    """The largest candidate block whose last channel is nearly free."""
    widths = sorted({96 + offset for block in _CANDIDATES for offset in (1, block)})
    shapes = {"x": (1, 64, 56, 56)}
    sessions = [open_placed(_convolution(64, w).SerializeToString(), runtime, shapes) for w in widths]
    feeds = [random_feeds(session, shapes, 0) for session in sessions]
    ms = dict(zip(widths, measure(sessions, feeds, budget_s=4.0, threads=runtime.threads).ms, strict=True))
    flat = [block for block in _CANDIDATES if ms[96 + block] <= 1.03 * ms[97]]
    return max(flat, default=_CANDIDATES[0])


def _convolution(inputs: int, outputs: int) -> onnx.ModelProto:
    weight = np.full((outputs, inputs, 3, 3), 0.01, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "granularity",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs, 56, 56])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs, 56, 56])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def unit_choices(dimension: Dimension, step: int, limit: int) -> tuple[int, ...]:
    """Ascending unit counts whose channels are multiples of ``step``, thinned to ``limit``, and all units.

    A dimension of at most one step can only be kept, or removed with its block. Heads are counted one by one;
    their widths, of which a product packs several, have half the step.
    """
    units = dimension.count
    if dimension.kind == "heads":
        step = 1
    elif dimension.kind in ("qk", "value"):
        step = max(1, step // 2)
    aligned = [k for k in range(1, units) if k * dimension.channels % step == 0]
    if len(aligned) > limit - 1:
        places = np.linspace(0, len(aligned) - 1, limit - 1).round().astype(int)
        aligned = [aligned[place] for place in dict.fromkeys(places.tolist())]
    return (*aligned, units)
