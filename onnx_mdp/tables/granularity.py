"""The channel block of a provider, and the widths that are worth offering on it.

Runtimes work on blocks of B channels: latency is a staircase of period B in either width, and a width
between two steps costs as much as the next step, or far more where it leaves the blocked layout. So only
multiples of B (and the full width) are offered. B is read from the filter that the runtime itself lays out,
or measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from onnx_mdp.analysis.structure import Dimension, Structure
from onnx_mdp.files import scratch_folder
from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.runtime import Runtime, context, open_session
from onnx_mdp.running.timing import measure, random_feeds
from onnx_mdp.tables.cost_terms import CONTRACTIONS
from onnx_mdp.tables.lut_store import LutStore

__all__ = ["computed_in", "granularity", "step_of", "unit_choices"]

_CANDIDATES = (4, 8, 16, 32)
# Both ends of blocks of every candidate, c + 1 and c, over a factor of two.
_WIDTHS = (97, 100, 104, 105, 112, 113, 120, 128, 129, 160, 161, 192)
_VISIBLE = 1.3  # of twice the width: below it, starting the work takes longer than the work
_IMAGES = ((1, 56), (1, 112), (1, 224), (4, 224))  # how many of what size; the last ones are for GPUs
_UNKNOWN = 8
_RECORD = "granularity"


def granularity(runtime: Runtime, store: LutStore, dtype: str = "float32") -> int:
    """The number of channels that the provider computes at a time, kept in the store by device.

    The CPU provider shows its layout: a convolution with one output channel is saved as it was optimised,
    and its filter has B rows. Of other providers B is measured, in ``dtype``, float32 or float16: the block
    whose staircase fits best.
    """
    where, name = context(runtime), _RECORD if dtype == "float32" else f"{_RECORD}.{dtype}"
    known = store.get_calibration(where, name)
    if known is not None and isinstance(known.get("step"), int) and 1 <= known["step"] <= max(_CANDIDATES):
        return int(known["step"])
    found = _read(runtime) if runtime.provider == "CPUExecutionProvider" else None
    step, record = _measured(runtime, dtype) if found is None else (found, {"how": "read from a filter"})
    store.put_calibration(where, name, {"step": step, **record})
    return step


def _read(runtime: Runtime) -> int | None:
    with scratch_folder() as folder:
        path = folder / "optimised.onnx"
        open_session(_convolution(32, 1, _IMAGES[0]).SerializeToString(), runtime, optimized_model_path=path)
        if not path.is_file():
            return None
        rows = [t.dims[0] for t in onnx.load(path).graph.initializer if len(t.dims) == 4]
    return int(rows[0]) if rows and 1 < rows[0] <= max(_CANDIDATES) else None


def _measured(runtime: Runtime, dtype: str) -> tuple[int, dict[str, Any]]:
    """The step, and the milliseconds by width that it follows from; more work until widths matter."""
    for images in _IMAGES:
        models = [_convolution(64, width, images, dtype).SerializeToString() for width in _WIDTHS]
        sessions = [open_placed(model, runtime, {}) for model in models]
        feeds = [random_feeds(sessions[0], {}, 0)] * len(sessions)
        timing = measure(sessions, feeds, budget_s=4.0, threads=runtime.threads, on_cpu=runtime.on_cpu)
        ms = dict(zip(_WIDTHS, timing.ms, strict=True))
        if ms[_WIDTHS[-1]] >= _VISIBLE * ms[_WIDTHS[0]]:
            return step_of(ms), {"how": "measured", "ms": {str(w): t for w, t in ms.items()}}
    return _UNKNOWN, {"how": "not visible in any measurement"}


def step_of(ms: Mapping[int, float]) -> int:
    """The candidate block B whose staircase ``t = c0 + c1·⌈w/B⌉`` leaves the least relative error."""
    took = np.asarray(list(ms.values()))

    def error(block: int) -> float:
        stairs = np.stack([np.ones(len(took)), np.ceil(np.asarray(list(ms)) / block)], 1) / took[:, None]
        found = np.linalg.lstsq(stairs, np.ones(len(took)), rcond=None)[0]
        return float(np.abs(stairs @ found - 1.0).sum())

    return min(_CANDIDATES, key=error)


def computed_in(structure: Structure) -> str:
    """float16 if most layers of the model compute in it, else float32."""
    layers = [op.outputs[0] for op in structure.shadow.operations if op.op_type in CONTRACTIONS]
    halves = sum(structure.shadow.types.get(name) is ir.DataType.FLOAT16 for name in layers)
    return "float16" if 2 * halves > len(layers) else "float32"


def _convolution(
    inputs: int, outputs: int, images: tuple[int, int], dtype: str = "float32"
) -> onnx.ModelProto:
    count, side = images
    weight = np.full((outputs, inputs, 3, 3), 0.01, dtype)
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "granularity",
        [helper.make_tensor_value_info("x", kind, [count, inputs, side, side])],
        [helper.make_tensor_value_info("y", kind, [count, outputs, side, side])],
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
