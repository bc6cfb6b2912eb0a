"""Layers that another model of the same device has are not measured again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir
import pytest
from test_cli import TINY
from zoo import text_model

from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.tables.cost_terms import CostTerm, cost_terms
from onnx_mdp.tables.latency import VARIANTS, build_table
from onnx_mdp.tables.lut_store import LutStore, Run, Sample, open_store
from onnx_mdp.tables.related import OWN_VARIANTS, Fit, related_runs

HERE: dict[str, str | int] = {"device": "here"}
FIT = Fit(seed=0, variants=4)


@pytest.fixture(scope="module")
def terms() -> tuple[CostTerm, ...]:
    return cost_terms(analyze(onnx_ir.from_proto(text_model(TINY)), {}))


def add(store: LutStore, model: str, found: list[str], variants: int = 4, seed: int = 0) -> None:
    samples = tuple(Sample(key, 8.0, 8.0, 1.0, 1) for key in [*found, "a key of its own"])
    for variant in range(variants):
        store.add_run(HERE, model, Run(variant, seed, 1.0, 1.0, 1, 1.0, samples))


def test_the_model_with_the_most_shape_keys_is_taken_and_kept(
    terms: tuple[CostTerm, ...], tmp_path: Path
) -> None:
    def best() -> tuple[str, float] | None:
        found = related_runs(store, HERE, "mine", terms, FIT)
        return None if found is None else (found.model_hash, found.share)

    every = sorted({term.key for term in terms})
    most = every[: -(-len(every) * 8 // 10)]
    with open_store(tmp_path / "lut.sqlite") as store:
        add(store, "few", every[: len(every) // 2])
        add(store, "another seed", every, seed=1)
        add(store, "unfinished", every, variants=3)
        assert best() is None
        add(store, "most", most)
        assert best() == ("most", len(most) / len(every))
        related = related_runs(store, HERE, "mine", terms, FIT)
        assert related is not None
        assert {sample.key for run in related.runs for sample in run.samples} > set(most)  # all that it ran
        store.put_calibration(HERE, FIT.name("mine", related), {"scale": 1.0})
        add(store, "all", every)
        assert best() == ("most", len(most) / len(every)), "a table does not change with what else is known"
        assert related_runs(store, {"device": "there"}, "mine", (), FIT) is None
        add(store, "mine", every, variants=3)
        assert best() is not None
        add(store, "mine", every)
        assert best() is None, "its own variants are enough"


@pytest.mark.slow
def test_resnet101_after_resnet50(exported: Callable[..., Path], tmp_path: Path) -> None:
    first, then = (analyze(load_model(exported(name)), {}) for name in ("resnet50_small", "resnet101_small"))
    with open_store(tmp_path / "lut.sqlite") as store:
        assert build_table(first, Runtime(), store).measured == VARIANTS
        table = build_table(then, Runtime(), store)
        assert table.shared >= 0.8
        assert table.measured == OWN_VARIANTS
        again = build_table(then, Runtime(), store)
        assert (again.measured, again.shared) == (0, table.shared)
        assert replace(again, seconds=0.0, measured=0) == replace(table, seconds=0.0, measured=0)
