"""Whether this machine can measure, and how well: which providers really run, how steady the clock is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from onnx_mdp.errors import MdpError, OutputError
from onnx_mdp.files import scratch_folder
from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.providers import SHORT_NAMES
from onnx_mdp.running.runtime import InferenceSession, Runtime, import_onnxruntime, one_line
from onnx_mdp.running.timing import Feeds, random_feeds, run_times, undisturbed
from onnx_mdp.tables.granularity import granularity
from onnx_mdp.tables.lut_file import default_path
from onnx_mdp.tables.lut_store import open_store

__all__ = ["Clock", "Provider", "Store", "clock", "providers", "store_health"]

_SHAPE = (1, 64, 56, 56)
_SLICES = 10  # of the time, whose medians show the drift
_FEWEST = 40  # runs


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider: whether a convolution runs on it, its granularity B then, or else why not."""

    name: str
    runs: bool
    granularity: int | None
    detail: str


@dataclass(frozen=True, slots=True)
class Clock:
    """How steadily one convolution runs back to back.

    ``noise`` is F, the relative difference of the medians of odd and even runs, ``drift`` the range of the
    medians of ten slices of time, and ``disturbed`` the share of runs that lost the core to another process
    (None where that cannot be told). ``threads_ratio`` is the time on all usable cores over that on one.
    """

    provider: str
    ms: float
    noise: float
    drift: float
    disturbed: float | None
    resolution_ns: float
    threads_ratio: float | None


@dataclass(frozen=True, slots=True)
class Store:
    """Where measurements are kept; ``fault`` says what is wrong with it."""

    path: Path
    exists: bool
    bytes: int
    tables: int
    fault: str | None


def providers() -> tuple[Provider, ...]:
    """Each provider of the ONNX Runtime that is installed, and what became of a session on it.

    Raises:
        MissingBackendError: there is no ONNX Runtime.
    """
    ort = import_onnxruntime()
    listed = list(ort.get_available_providers())
    if hasattr(ort, "get_ep_devices"):
        listed += [device.ep_name for device in ort.get_ep_devices()]
    found = [_probed(name) for name in dict.fromkeys(listed)]
    # A plugin is listed only once it is registered, which a session does.
    plugins = [_probed(name) for name in SHORT_NAMES.values() if name not in listed]
    return (*found, *(plugin for plugin in plugins if plugin.runs))


def _probed(name: str) -> Provider:
    runtime = Runtime(name)
    try:
        session, feeds = _opened(runtime)
        session.run(None, feeds)
        with scratch_folder() as folder, open_store(folder / "lut.sqlite") as store:
            return Provider(name, True, granularity(runtime, store), "")
    except MdpError as error:
        return Provider(name, False, None, str(error))
    except Exception as error:  # a build of the runtime that fails in a way of its own
        return Provider(name, False, None, one_line(error))


def _opened(runtime: Runtime) -> tuple[InferenceSession, Feeds]:
    weight = np.full((_SHAPE[1], _SHAPE[1], 3, 3), 0.01, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "doctor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, _SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, _SHAPE)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = open_placed(model.SerializeToString(), runtime, {"x": _SHAPE})
    return session, random_feeds(session, {"x": _SHAPE}, 0)


def clock(provider: str, cpus: int, seconds: float = 3.0) -> Clock:
    """Time a convolution on one thread of a provider that runs, and on all ``cpus``."""
    wall, cpu = _timed(Runtime(provider), seconds)
    on_cpu = provider == "CPUExecutionProvider"
    slices = [float(np.median(part)) for part in np.array_split(wall, _SLICES)]
    middle = float(np.median(wall))
    ratio = None
    if on_cpu and cpus > 1:
        ratio = float(np.median(_timed(Runtime(provider, threads=cpus), seconds / 3)[0])) / middle
    return Clock(
        provider=provider,
        ms=middle,
        noise=abs(float(np.median(wall[::2]) / np.median(wall[1::2])) - 1.0),
        drift=(max(slices) - min(slices)) / middle,
        disturbed=1.0 - float(undisturbed(wall, cpu).mean()) if on_cpu else None,
        resolution_ns=1e9 * time.get_clock_info("perf_counter").resolution,
        threads_ratio=ratio,
    )


def _timed(runtime: Runtime, seconds: float) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    session, feeds = _opened(runtime)
    run_times(session, feeds, 3)
    parts, end = [run_times(session, feeds, _FEWEST)], time.perf_counter() + seconds
    while time.perf_counter() < end:
        parts.append(run_times(session, feeds, _FEWEST))
    wall, cpu = (np.concatenate(times) for times in zip(*parts, strict=True))
    return wall, cpu


def store_health(path: Path | None) -> Store:
    """Whether the store can be opened and holds what it should; a store that is not there is not made."""
    path = default_path() if path is None else path
    try:
        if not path.exists():
            return Store(path, False, 0, 0, None)
        with open_store(path) as store:
            tables, fault = len(store.summary()), store.damage()
        return Store(path, True, path.stat().st_size, tables, fault)
    except (MdpError, OSError) as error:
        reason = str(error) if isinstance(error, OutputError) else f"{path} cannot be read: {error}"
        return Store(path, True, 0, 0, reason)
