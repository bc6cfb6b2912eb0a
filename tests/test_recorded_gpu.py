"""What a GPU told once, used where there is none: latencies of ResNet-50 by ONNX Runtime's CUDA provider.

``recordings/cuda_h200_resnet50_fp16_batch64.jsonl.gz`` is what ``profile`` measured on an NVIDIA H200 (ONNX
Runtime 1.31.1, driver 580.159.04), as ``lut export`` writes it: 24 whole variants, 144 windows of them, the
calibration. The model had random weights, on which latency does not depend. Its calibration has since been
given the two numbers that calibrations have now, as they are where whole models are timed: weights unpriced;
and the name that it has now, of a table of 8 variants, for which 24 of this device stand.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
from test_precision import in_halves

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.importance.scoring import magnitude, score
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.planning.formulation import formulate, to_ns
from onnx_mdp.planning.solution_plan import variant_from_choice
from onnx_mdp.running.runtime import runtime
from onnx_mdp.solvers import solve
from onnx_mdp.tables import compiled_profiling, granularity, latency, variants
from onnx_mdp.tables.calibrating import Calibration
from onnx_mdp.tables.compiled_profiling import group_of
from onnx_mdp.tables.cost_terms import cost_terms
from onnx_mdp.tables.latency import build_table, predict_ms
from onnx_mdp.tables.lut_store import LutStore, Run, open_store
from onnx_mdp.tables.staircases import affine
from onnx_mdp.tables.variants import Variant
from onnx_mdp.tables.window_fit import fit_windows

pytestmark = pytest.mark.slow

RECORDING = Path(__file__).parent / "recordings" / "cuda_h200_resnet50_fp16_batch64.jsonl.gz"
CUDA = runtime("cuda", options=[("device_id", "0")])


@pytest.fixture(scope="module")
def structure(exported: Callable[..., Path]) -> Structure:
    model = in_halves(onnx.load(exported("resnet50")), "float16")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    return analyze(load_model(model), {}, 64)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LutStore]:
    """The recording, on a machine that takes itself for the recorded one, and measures nothing."""
    path = tmp_path / "recording.jsonl"
    path.write_bytes(gzip.decompress(RECORDING.read_bytes()))
    where = json.loads(path.read_text().splitlines()[1])["context"]

    def measured(*_: object, **__: object) -> NoReturn:
        pytest.fail("something was measured")

    for module in (compiled_profiling, granularity, latency, variants):
        monkeypatch.setattr(module, "open_placed", measured, raising=False)
    for holder in (granularity, latency):
        monkeypatch.setattr(holder, "context", lambda _: where)
    with open_store(tmp_path / "store.sqlite") as opened:
        opened.merge_jsonl(path)
        yield opened


def variant(run: Run) -> Variant:
    about: dict[str, Any] = dict(run.payload)
    return Variant({int(k): n for k, n in about["kept"].items()}, frozenset(about["removed"]))


def recorded(structure: Structure, store: LutStore) -> list[Run]:
    runs = store.runs(latency.context(CUDA), latency.table_key(structure))
    return sorted(runs, key=lambda run: run.variant)


def test_the_table_is_that_of_the_recording(structure: Structure, store: LutStore) -> None:
    table = build_table(structure, CUDA, store)
    assert table.measured == 0
    assert table.context["device"] == "NVIDIA H200"
    whole = [run for run in recorded(structure, store) if group_of(run.variant) == run.variant]
    errors = [abs(predict_ms(table, structure, variant(run)) / run.plain_ms - 1) for run in whole]
    assert len(errors) == 24
    assert np.median(errors) <= 0.04


def test_variants_that_were_left_out_are_predicted(structure: Structure, store: LutStore) -> None:
    """Each is predicted from the groups of the others; one in 22 is measured 20 % from it, the rest near."""
    errors = []
    table, terms, runs = (
        build_table(structure, CUDA, store),
        cost_terms(structure),
        recorded(structure, store),
    )
    for fold in range(4):
        left_out = {group for group in range(2, 24) if group % 4 == fold}
        fit = fit_windows(structure, terms, tuple(r for r in runs if group_of(r.variant) not in left_out), 8)
        scale, offset = affine(fit.predicted, fit.measured)
        bare = latency.replace(
            table,
            coefficients=fit.coefficients,
            calibration=Calibration(scale, offset + scale * fit.call_ms, 0.0, 0.0, 0.0, 0.0),
        )
        errors += [
            abs(predict_ms(bare, structure, variant(run)) / run.plain_ms - 1)
            for run in runs
            if run.variant in left_out
        ]
    assert len(errors) == 22
    assert np.median(errors) <= 0.04
    assert np.quantile(errors, 0.9) <= 0.12


def test_plans_meet_budgets_on_the_recorded_device(structure: Structure, store: LutStore) -> None:
    table = build_table(structure, CUDA, store)
    problem = formulate(structure, score(structure, magnitude), table)
    for ratio in (0.8, 0.6, 0.4):
        budget = ratio * table.base_ms
        found = solve(problem.problem, to_ns(budget), "exact")
        assert found.choice is not None
        predicted = predict_ms(table, structure, variant_from_choice(structure, problem, found.choice))
        assert 0.95 * budget <= predicted <= budget * (1 + 1e-6)
