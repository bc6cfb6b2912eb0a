"""Sessions whose nodes run on the provider that was asked for, or an error that names those that do not.

ONNX Runtime hands what a provider cannot run to the CPU without a word: the latency is then that of two
processors and of the copies between them. So a session is opened with that fallback forbidden; where it does
not open, the model runs once more under the profiler, which says what ran where.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_mdp.errors import MeasurementError, MissingBackendError
from onnx_mdp.files import scratch_folder
from onnx_mdp.large_models import LargeModel
from onnx_mdp.running.bound_session import BoundSession, device_of
from onnx_mdp.running.runtime import InferenceSession, Runtime, one_line, open_session
from onnx_mdp.running.timing import random_feeds

__all__ = ["Fallback", "fallback_in", "fallback_of", "open_placed"]

_RUNS = 3  # the first one warms up and is not counted
_NAMED = 3
_HOST = "CPUExecutionProvider"
_VECTOR = re.compile(r"'int(?:32|64)': \[\d*\]")
_TENSOR = re.compile(r"'\w+': \[[^]]*\]")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Fallback:
    """Runtime nodes, as (name, operator), that ran on the CPU, of how many, and their share of the time."""

    provider: str
    nodes: tuple[tuple[str, str], ...]
    total: int
    share: float

    def __str__(self) -> str:
        """One clause: how many nodes, their operators, the first names, the share of time."""
        operators = Counter(operator for _, operator in self.nodes).most_common(_NAMED)
        kinds = ", ".join(f"{count} {operator}" for operator, count in operators)
        names = ", ".join(repr(name) for name, _ in self.nodes[:_NAMED])
        more = ", …" if len(self.nodes) > _NAMED else ""
        return (
            f"{self.provider} leaves {len(self.nodes)} of {self.total} nodes to the CPU, {self.share:.0%} of "
            f"the time ({kinds}: {names}{more})"
        )


def open_placed(
    model: bytes | LargeModel | str | Path,
    runtime: Runtime,
    shapes: Shapes,
    *,
    profile_prefix: str | None = None,
) -> InferenceSession:
    """Open a session of `model` all of whose work is done by the provider of `runtime`.

    `shapes` are those of the inputs. It is for timing: on a GPU, inputs and outputs stay there. Arithmetic
    on shapes may stay on the CPU, where runtimes put it on purpose; with `runtime.allow_fallback` anything
    may. Raises ``MissingBackendError`` that names the nodes on the CPU, and what `open_session` raises.
    """
    session = _open(model, runtime, shapes, profile_prefix)
    device = device_of(runtime.provider)
    number = dict(runtime.options).get("device_id", "0")
    return session if device is None else BoundSession(session, device, int(number))


def _open(
    model: bytes | LargeModel | str | Path, runtime: Runtime, shapes: Shapes, profile_prefix: str | None
) -> InferenceSession:
    if runtime.provider == _HOST or runtime.allow_fallback:
        return open_session(model, runtime, profile_prefix=profile_prefix)
    try:
        return open_session(model, runtime, profile_prefix=profile_prefix, fallback=False)
    except MeasurementError:
        found = fallback_of(model, runtime, shapes)
    if found is not None:
        raise MissingBackendError(
            f"{found}: cut these nodes off, choose another provider, or accept it with --allow-fallback."
        )
    return open_session(model, runtime, profile_prefix=profile_prefix)


def fallback_of(model: bytes | LargeModel | str | Path, runtime: Runtime, shapes: Shapes) -> Fallback | None:
    """Run `model` under the profiler; return what ran on the CPU instead of the provider, or None."""
    if runtime.provider == _HOST:
        return None
    with scratch_folder() as folder:
        session = open_session(model, runtime, profile_prefix=str(folder / "placement"))
        feeds = random_feeds(session, shapes, 0)
        try:
            for _ in range(_RUNS):
                session.run(None, feeds)
        except Exception as error:
            raise MeasurementError(f"ONNX Runtime cannot run the model: {one_line(error)}") from error
        return fallback_in(json.loads(Path(session.end_profiling()).read_text()), runtime.provider)


def fallback_in(events: Iterable[Mapping[str, Any]], provider: str) -> Fallback | None:
    """Read from the events of a profile which nodes ran on the CPU, or None if all ran on `provider`.

    Arithmetic on shapes does not count.
    """
    kernels: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kernels.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event)
    ms = {name: sum(event["dur"] for event in found[1:]) for name, found in kernels.items()}
    elsewhere = {
        name: str(args.get("op_name", "?"))
        for name, found in kernels.items()
        # Fused nodes of some providers come without arguments.
        if (args := found[0].get("args", {})).get("provider") == _HOST and not _on_shapes(args)
    }
    if not elsewhere:
        return None
    share = sum(ms[name] for name in elsewhere) / max(sum(ms.values()), 1)
    slowest = sorted(elsewhere, key=lambda name: -ms[name])
    return Fallback(provider, tuple((name, elsewhere[name]) for name in slowest), len(kernels), share)


def _on_shapes(args: Mapping[str, Any]) -> bool:
    """Whether a node reads a shape, or computes an integer or a list of integers from such."""
    tensors = {
        side: _TENSOR.findall(str(args.get(side, "")).replace('"', "'"))
        for side in ("input_type_shape", "output_type_shape")
    }
    if args.get("op_name") in ("Shape", "Size"):
        return True
    every = [text for found in tensors.values() for text in found]
    return bool(every) and all(_VECTOR.fullmatch(text) for text in every)
