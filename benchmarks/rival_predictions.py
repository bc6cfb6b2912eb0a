"""Other ways to predict the latency of a pruned model, as ratios to the unpruned one.

*Linear* is the model of HALP (arXiv 2110.10811): a layer's latency is linear in the channels that it makes,
and what it reads is taken at full width. *Isolated* sums layers that were timed alone, by the same staircases
as the table. *MACs* are multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.reports.documents import plan_totals
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.running.timing import measure
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.compiled_profiling import open_window
from onnx_mdp.tables.cost_terms import CostTerm, width
from onnx_mdp.tables.latency import LatencyTable, predict_ms, term_ms
from onnx_mdp.tables.lut_records import Run, Sample
from onnx_mdp.tables.staircases import Staircases
from onnx_mdp.tables.variants import Variant, full_variant, plan_of_variant, random_variant
from onnx_mdp.tables.windows import Window, cut_window

__all__ = ["isolated_table", "linear_ratios", "macs_ratios", "table_errors", "table_ratios", "uncalibrated"]

_VARIANTS = 10
_WIDTHS = 6  # measured for each shape key
_TOGETHER = 24


def table_ratios(structure: Structure, table: LatencyTable, variants: Sequence[Variant]) -> list[float]:
    """What a table predicts, as shares of the unpruned latency that it was calibrated by."""
    return [predict_ms(table, structure, variant) / table.base_ms for variant in variants]


def table_errors(
    structure: Structure, table: LatencyTable, variants: Sequence[Variant], measured: Sequence[float]
) -> tuple[float, float]:
    """The median and the worst relative error of a table, of shares of the unpruned latency."""
    errors = np.abs(np.asarray(table_ratios(structure, table, variants)) / np.asarray(measured) - 1)
    return float(np.median(errors)), float(errors.max())


def uncalibrated(structure: Structure, table: LatencyTable) -> LatencyTable:
    """The table as the sum of its terms, scaled by the unpruned model alone."""
    bare = replace(table, calibration=replace(table.calibration, scale=1.0, offset_ms=0.0))
    base_ms = predict_ms(bare, structure, full_variant(structure))
    return replace(bare, calibration=replace(bare.calibration, base_ms=base_ms))


def macs_ratios(structure: Structure, variants: Sequence[Variant]) -> list[float]:
    """Shares of the multiply-accumulates."""
    totals = [plan_totals(structure, plan_of_variant(structure, variant)).macs for variant in variants]
    return [after / before for before, after in totals]


def linear_ratios(structure: Structure, table: LatencyTable, variants: Sequence[Variant]) -> list[float]:
    """Each layer's time at full width, in proportion to the channels that it makes."""
    full = full_variant(structure).kept

    def ms(variant: Variant) -> float:
        blocks = [b for b in structure.blocks if b.name in variant.removed_blocks]
        gone = {index for block in blocks for index in (*block.operations, block.joint)}
        return sum(
            term_ms(table, t, width(t.reads, full), width(t.makes, full))
            * width(t.makes, variant.kept)
            / width(t.makes, full)
            for t in table.terms
            if t.operation not in gone
        )

    base = ms(full_variant(structure))
    return [ms(variant) / base for variant in variants]


def isolated_table(structure: Structure, table: LatencyTable, runtime: Runtime, seed: int) -> LatencyTable:
    """A table whose staircases are fitted to single layers that were timed alone."""
    windows = list(_single(structure, table, seed))
    runs = []
    for start in range(0, len(windows), _TOGETHER):
        group = windows[start : start + _TOGETHER]
        pairs = [
            (window, *pair) for window in group if (pair := open_window(window, runtime, seed)) is not None
        ]
        timing = measure(
            [session for _, session, _ in pairs],
            [feeds for *_, feeds in pairs],
            rounds=8,
            seed=seed,
            threads=runtime.threads,
            on_cpu=runtime.on_cpu,
        )
        samples = tuple(
            Sample(*window.terms[0], ms, 1) for (window, *_), ms in zip(pairs, timing.ms, strict=True)
        )
        total = sum(timing.ms)
        runs.append(Run(start, seed, total, total, len(samples), 0.0, samples))
    alone = replace(table, coefficients=Staircases(runs, table.granularity).fit())
    return uncalibrated(structure, replace(alone, calibration=replace(table.calibration, ms_per_mb=0.0)))


def _single(structure: Structure, table: LatencyTable, seed: int) -> Iterator[Window]:
    """Every shape key at a few widths."""
    rng = np.random.default_rng([seed, 11])
    seen: dict[str, set[tuple[int, int]]] = {}
    for number in range(_VARIANTS):
        full = full_variant(structure)
        variant = random_variant(structure, table.choices, rng) if number else full
        model = rewrite(structure, plan_of_variant(structure, variant), split=True)
        for term in table.terms:
            widths = _widths(term, variant.kept)
            known = seen.setdefault(term.key, set())
            if widths not in known and len(known) < _WIDTHS:
                known.add(widths)
                window = cut_window(structure, [term], model, variant.kept)
                if window is not None:
                    yield window


def _widths(term: CostTerm, kept: Mapping[int, int]) -> tuple[int, int]:
    return width(term.reads, kept), width(term.makes, kept)
