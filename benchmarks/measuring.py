"""What is measured in the benchmark's own process: a table from nothing, and ratios of many pruned models."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.cli.console import Screen
from onnx_mdp.model_io import model_bytes
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.runtime import InferenceSession, Runtime
from onnx_mdp.running.timing import Timing, measure, random_feeds
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.latency import LatencyTable, build_table
from onnx_mdp.tables.lut_store import open_store

__all__ = ["GROUP_S", "Ratios", "measured_ratios", "table_from_nothing"]

GROUP_S = 15.0  # of measuring, for each group of plans
_TOGETHER = 12  # sessions of ResNet-50 hold 0.1 to 0.3 GB each


@dataclass(frozen=True, slots=True)
class Ratios:
    """Latencies as shares of the unpruned model's; ``noise`` is the worst split-half error F of a group."""

    values: tuple[float, ...]
    noise: float
    base_ms: float

    def joined(self, later: Ratios) -> Ratios:
        """The mean of two measurements of the same plans.

        F is at least how far the two are apart: the halves of one measurement cannot tell what the machine
        did to all of it.
        """
        first, second = np.asarray(self.values), np.asarray(later.values)
        mean = (first + second) / 2
        apart = float(np.median(np.abs(second - first) / mean))
        base_ms = (self.base_ms + later.base_ms) / 2
        return Ratios(tuple(mean.tolist()), max(self.noise, later.noise, apart), base_ms)


def table_from_nothing(structure: Structure, runtime: Runtime, seed: int) -> LatencyTable:
    """Build the table of a model in a temporary store."""
    with (
        tempfile.TemporaryDirectory(prefix="onnx-mdp-") as folder,
        open_store(Path(folder) / "store.sqlite") as store,
        Screen().progress() as progress,
    ):
        return build_table(structure, runtime, store, seed=seed, progress=progress)


def measured_ratios(
    base: bytes,
    structure: Structure,
    plans: Sequence[PruningPlan],
    runtime: Runtime,
    *,
    seed: int = 0,
    budget_s: float = GROUP_S,
    split: bool = False,
    on_group: Callable[[int, int], None] = lambda done, total: None,
) -> Ratios:
    """Rewrite every plan and time it against ``base``, at most twelve plans together.

    ``split`` leaves projections that were fused as the table sees them.
    """
    values: list[float] = []
    timings: list[Timing] = []
    for start in range(0, len(plans), _TOGETHER):
        on_group(start, len(plans))
        group = plans[start : start + _TOGETHER]
        sessions = [
            open_placed(base, runtime, structure.shadow.inputs),
            *_opened(structure, group, runtime, split),
        ]
        feeds = [random_feeds(session, structure.shadow.inputs, seed) for session in sessions]
        timing = measure(
            sessions,
            feeds,
            budget_s=budget_s,
            seed=seed + start,
            threads=runtime.threads,
            on_cpu=runtime.on_cpu,
        )
        timings.append(timing)
        values += [ms / timing.ms[0] for ms in timing.ms[1:]]
    base_ms = float(np.median([timing.ms[0] for timing in timings]))
    return Ratios(tuple(values), max(timing.noise for timing in timings), base_ms)


def _opened(
    structure: Structure, plans: Sequence[PruningPlan], runtime: Runtime, split: bool
) -> Iterator[InferenceSession]:
    """Open one after the other, so that only one serialised model exists at a time."""
    for plan in plans:
        model = model_bytes(rewrite(structure, plan, split=split))
        yield open_placed(model, runtime, structure.shadow.inputs)
