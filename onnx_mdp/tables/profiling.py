"""Profile a whole model where it runs, and charge the time of every runtime node to a cost term.

Layers timed alone are wrong by tens of percent on ONNX Runtime: they sit in hot caches and pay layout
changes that a whole model does not. So variants of the whole model run with the runtime's profiler on. The
nodes of a variant are named ``mdp<index>`` first; what the runtime fuses keeps such a name inside its own.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MeasurementError
from onnx_mdp.files import scratch_folder
from onnx_mdp.large_models import for_session
from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.running.timing import first_ms, random_feeds, run_times, undisturbed, warm_up_runs
from onnx_mdp.tables.cost_terms import CONTRACTIONS, CostTerm, anchors, width
from onnx_mdp.tables.lut_store import Run, Sample

__all__ = ["profile_variant", "shows_nodes"]

_TAG = re.compile(r"mdp(\d+)(?!\d)")
_CHARGED_SHARE = 0.98
_ADDS_UP = 0.25  # how far the times of nodes and of the whole may differ
_BLOCK = 6  # most runs in a row that count, after those that re-warm the caches
_CONVOLUTIONS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


@dataclass(frozen=True, slots=True)
class _Event:
    """One runtime node: its operator, the operation that its name points to, and its times."""

    op_name: str
    tagged: int | None
    ms: npt.NDArray[np.float64]


def profile_variant(
    structure: Structure,
    terms: Sequence[CostTerm],
    model: ir.Model,
    kept: Mapping[int, int],
    runtime: Runtime,
    *,
    variant: int,
    seed: int,
    runs: int | None = None,
) -> Run:
    """Profile one variant (edited in place) and return a sample for each cost term.

    ``kept`` gives the kept units of each dimension; ``runs`` the number of runs of each of two sessions,
    one with the profiler and one without, alternating in blocks (None: by how long one takes).

    Raises:
        MeasurementError: less than 98 % of the profiled time could be charged to a term.
    """
    started = time.perf_counter()
    _tag(structure, model)
    data = for_session(model)
    with scratch_folder() as folder:
        inputs = structure.shadow.inputs
        profiled = open_placed(data, runtime, inputs, profile_prefix=str(folder / "profile"))
        plain = open_placed(data, runtime, inputs)
        feeds = random_feeds(plain, inputs, seed)
        walls: dict[str, list[npt.NDArray[Any]]] = {"profiled": [], "plain": []}
        first = first_ms(plain, feeds)
        wanted, warm_up = _runs(first) if runs is None else runs, warm_up_runs(first)
        blocks = max(2, -(-wanted // _BLOCK))
        in_a_row = warm_up + -(-wanted // blocks)
        for _ in range(blocks):
            walls["profiled"].append(np.stack(run_times(profiled, feeds, in_a_row)))
            walls["plain"].append(np.stack(run_times(plain, feeds, in_a_row))[:, warm_up:])
        events = _events(json.loads(Path(profiled.end_profiling()).read_text()))
    wall = np.concatenate(walls["profiled"], axis=1)
    keep = np.arange(wall.shape[1]) % in_a_row >= warm_up
    keep[keep] = _kept_runs(wall[:, keep], runtime)
    totals, counts = _charge(structure, events, wall.shape[1])
    everything = np.sum([event.ms for event in events], axis=0)
    keep = _calm(everything, keep)
    samples = tuple(_sample(t, kept, totals, counts, keep) for t in terms if t.operation in totals)
    charged = sum(float(ms.sum()) for ms in totals.values()) / float(np.sum(everything))
    if charged < _CHARGED_SHARE:
        raise MeasurementError(
            f"only {charged:.0%} of the profiled time could be charged to operations of the model; "
            "please report this model"
        )
    quiet = np.concatenate(walls["plain"], axis=1)
    return Run(
        variant,
        seed,
        plain_ms=float(quiet[0][_calm(quiet[0], _kept_runs(quiet, runtime))].mean()),
        sum_ms=float(everything[keep].mean()),
        nodes=sum(counts.values()),
        seconds=time.perf_counter() - started,
        samples=samples,
        payload={"kept": {str(k): v for k, v in kept.items()}},
    )


def _runs(ms: float) -> int:
    """How many runs of so many milliseconds give a steady mean of the faster half."""
    return 8 if ms > 25 else 16 if ms > 8 else 24


def shows_nodes(
    structure: Structure,
    terms: Sequence[CostTerm],
    model: ir.Model,
    kept: Mapping[int, int],
    runtime: Runtime,
) -> bool:
    """Whether the profiler names the operations of a model (edited in place), and their times add up."""
    try:
        run = profile_variant(structure, terms, model, kept, runtime, variant=0, seed=0, runs=6)
    except MeasurementError:
        return False
    return abs(run.sum_ms / run.plain_ms - 1.0) < _ADDS_UP


def _tag(structure: Structure, model: ir.Model) -> None:
    """Name nodes and inner tensors after the operation that they come from."""
    index = {o: op.index for op in structure.shadow.operations for o in op.outputs if o}
    for node in model.graph:
        number = index.get(str(node.outputs[0].name))
        if number is None:
            continue
        node.name = f"mdp{number}"
        for place, value in enumerate(node.outputs):
            if value.name and not value.is_graph_output():
                value.name = f"mdp{number}_o{place}"


def _kept_runs(times: npt.NDArray[np.float64], runtime: Runtime) -> npt.NDArray[np.bool_]:
    """Runs that no other process disturbed; all of them if that is not to be seen, or too few are left."""
    quiet = undisturbed(times[0], times[1])
    seen = runtime.threads == 1 and runtime.on_cpu and quiet.sum() >= 3
    return quiet if seen else np.ones(times.shape[1], np.bool_)


def _calm(ms: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The faster half of the runs kept, because disturbances only ever add time.

    Means over them add up, and resolve the fractions of the microseconds that the profiler counts.
    """
    return kept & (ms <= np.median(ms[kept]))


def _events(document: Iterable[Mapping[str, Any]]) -> list[_Event]:
    found: dict[str, tuple[str, list[float]]] = {}
    for event in document:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            entry = found.setdefault(event["name"], (event.get("args", {}).get("op_name", ""), []))
            entry[1].append(event["dur"] * 1e-3)
    events = []
    for name, (op_name, durations) in found.items():
        tags = _TAG.findall(name)
        events.append(_Event(op_name, int(tags[-1]) if tags else None, np.asarray(durations)))
    return events


def _charge(
    structure: Structure, events: Sequence[_Event], runs: int
) -> tuple[dict[int, npt.NDArray[np.float64]], dict[int, int]]:
    """Milliseconds of each run, and node counts, by anchor operation.

    A layout change before a layer is charged to that layer; other runtime nodes without a name of ours
    to the layer before them.
    """
    charged = anchors(structure)
    fused = _fused_layers(structure, events, charged)
    totals: dict[int, npt.NDArray[np.float64]] = {}
    counts: dict[int, int] = {}
    pending: list[npt.NDArray[np.float64]] = []
    current: int | None = None
    for place, event in enumerate(events):
        if event.ms.shape != (runs,):
            continue
        if event.tagged is None and (event.op_name == "ReorderInput" or current is None):
            pending.append(event.ms)
            continue
        if event.tagged is not None:
            current = fused.get(place, charged[event.tagged])
        assert current is not None
        for ms in (*pending, event.ms):
            totals[current] = totals.get(current, np.zeros(runs)) + ms
            counts[current] = counts.get(current, 0) + 1
        pending = []
    return totals, counts


def _fused_layers(structure: Structure, events: Sequence[_Event], charged: Sequence[int]) -> dict[int, int]:
    """Runtime convolutions that carry the name of a later operation that they absorbed.

    Where an absorbed Add joins two convolutions, it is the one without a runtime node of its own name.
    """
    operations = structure.shadow.operations
    producer = {o: op.index for op in operations for o in op.outputs if o}
    tagged = {
        e.tagged for e in events if e.tagged is not None and operations[e.tagged].op_type in CONTRACTIONS
    }
    taken = set(tagged)
    layers: dict[int, int] = {}
    for place, event in enumerate(events):
        index = event.tagged
        if index is None or event.op_name not in _CONVOLUTIONS or operations[index].op_type in CONTRACTIONS:
            continue
        candidates = sorted(_upstream(structure, index, producer, charged) - taken)
        if candidates:
            layers[place] = candidates[-1]
            taken.add(candidates[-1])
    return layers


def _upstream(
    structure: Structure, index: int, producer: Mapping[str, int], charged: Sequence[int]
) -> set[int]:
    """Contractions that reach an operation through element-wise operations only."""
    operations = structure.shadow.operations
    found: set[int] = set()
    stack, seen = [index], {index}
    while stack:
        for name in operations[stack.pop()].inputs:
            maker = producer.get(name)
            if maker is None or maker in seen:
                continue
            seen.add(maker)
            if operations[maker].op_type in CONTRACTIONS:
                found.add(maker)
            elif charged[maker] != maker:
                stack.append(maker)
    return found


def _sample(
    term: CostTerm,
    kept: Mapping[int, int],
    totals: Mapping[int, npt.NDArray[np.float64]],
    counts: Mapping[int, int],
    keep: npt.NDArray[np.bool_],
) -> Sample:
    ms = float(totals[term.operation][keep].mean())
    a, b = width(term.reads, kept), width(term.makes, kept)
    return Sample(term.key, float(a), float(b), ms, counts[term.operation])
