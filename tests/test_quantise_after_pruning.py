"""Prune, repair, then quantise: the order in which each step still has what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from onnx_mdp import PruningPlan, analyze, apply, repair, score
from onnx_mdp.demo import accuracy
from onnx_mdp.errors import UnsupportedModelError
from onnx_mdp.importance.scoring import ranking
from onnx_mdp.large_models import save_model
from onnx_mdp.model_io import load_model
from onnx_mdp.numerics.integer_form import is_quantized
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.shapes_data import shapes

DEMO = Path(str(files("onnx_mdp") / "demo_model" / "shapes_resnet.onnx"))
CALIBRATION = shapes(64, 20_000)[0]
PICTURES, LABELS = shapes(200, 20_001)


class Reader(CalibrationDataReader):
    """The calibration pictures, as ONNX Runtime's quantizer asks for them."""

    def __init__(self) -> None:
        """Begin at the first."""
        self.batches: Iterator[npt.NDArray[np.float32]] = iter(np.split(CALIBRATION, 8))

    def get_next(self) -> dict[str, Any] | None:
        """The next eight pictures."""
        return next(({"image": batch} for batch in self.batches), None)


def quantise(source: Path) -> Path:
    """Write a model beside ``source`` in int8, QDQ form, with a scale for each channel."""
    path = source.with_suffix(".int8.onnx")
    kinds = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    quantize_static(source, path, Reader(), QuantFormat.QDQ, per_channel=True, **kinds)
    return path


def three_quarters(model: Path) -> PruningPlan:
    """Keep of every dimension the three quarters of its units that matter most."""
    structure = analyze(model)
    importance = score(structure, {"image": CALIBRATION}, criterion="activation", samples=16)
    kept = {structure.dimensions[i]: ranking(importance, i) for i in structure.prunable}
    return PruningPlan(keep={d.name: tuple(sorted(best[: d.count * 3 // 4])) for d, best in kept.items()})


def agreement(one: Path, other: Path) -> float:
    """Share of the pictures that two models give one class."""
    found = [
        open_session(path, Runtime()).run(None, {"image": PICTURES})[0].argmax(1) for path in (one, other)
    ]
    return float((found[0] == found[1]).mean())


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PruningPlan]:
    """The demo model pruned to three quarters, and the plan."""
    path = tmp_path_factory.mktemp("order") / "slim.onnx"
    plan = three_quarters(DEMO)
    save_model(apply(DEMO, plan), path)
    return path, plan


def test_a_pruned_model_is_quantised_as_any_other(slim: tuple[Path, PruningPlan]) -> None:
    quantised = quantise(slim[0])
    assert is_quantized(load_model(quantised))
    assert agreement(slim[0], quantised) >= 0.95


@pytest.mark.slow
def test_only_before_quantising_is_repaired_what_pruning_cost(
    slim: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    repaired = tmp_path / "repaired.onnx"
    save_model(repair(DEMO, slim[0], slim[1], {"image": CALIBRATION}).model, repaired)
    pruned_first = quantise(repaired)
    assert agreement(repaired, pruned_first) >= 0.97
    assert accuracy(pruned_first, PICTURES, LABELS) >= 0.93

    dense, quantised_first = tmp_path / "dense.onnx", tmp_path / "slim.onnx"
    dense.write_bytes(DEMO.read_bytes())
    plan = three_quarters(quantise(dense))
    save_model(apply(quantise(dense), plan), quantised_first)
    assert accuracy(quantised_first, PICTURES, LABELS) <= accuracy(pruned_first, PICTURES, LABELS) - 0.3
    with pytest.raises(UnsupportedModelError, match="float32"):
        repair(quantise(dense), quantised_first, plan, {"image": CALIBRATION})
