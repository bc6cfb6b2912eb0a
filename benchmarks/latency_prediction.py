"""How well the latency table predicts pruned models that it never saw.

Claim: over at least 20 heterogeneous configurations of each model, as ratios to the unpruned model, the
table's error has a median of at most 2 % and a maximum of at most 6 % on the CPU provider, and of 4 % and 12
% on one that compiles (``--ep openvino``). Fused projections are split in the unpruned model, as in all
others.

The configurations are a hard set: every stage (resolution) of the network has its own factor, so that no
common scale describes the model, and up to 60 % of the blocks are gone. They are measured twice, before the
table and after it, for what one model loses to a busy machine beside another changes within minutes: their
mean is what is predicted, and F, which allows nothing, is at least how far the two are apart. The table is
built from nothing in a temporary store. Beside it stand its error without the affine calibration (the sum of
the terms, scaled by the unpruned model alone), and those of three rivals: a linear model, sums of isolated
layers, and MACs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.configurations import (
    configuration_choices,
    drawn_configurations,
    measured_configurations,
)
from benchmarks.harness import (
    Verdict,
    arguments,
    combined,
    judge,
    note,
    print_table,
    publish,
    run_main,
)
from benchmarks.measuring import GROUP_S, Ratios, table_from_nothing
from benchmarks.model_files import model_path
from benchmarks.prediction_figure import prediction_svg
from benchmarks.rival_predictions import (
    isolated_table,
    linear_ratios,
    macs_ratios,
    table_ratios,
    uncalibrated,
)
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.files import write_text
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.running.providers import SHORT_NAMES
from onnx_mdp.running.runtime import Runtime, runtime
from onnx_mdp.tables.granularity import computed_in, granularity
from onnx_mdp.tables.latency import LatencyTable
from onnx_mdp.tables.lut_store import open_store
from onnx_mdp.tables.variants import Variant

__all__ = ["Prediction", "main"]

_MODELS = ("mobilenet_v2", "deit_tiny_torchscript", "resnet50_torchscript", "resnet18_torchscript")
_LEAST = 20
_LIMITS = (0.02, 0.06)
_COMPILED_LIMITS = (0.04, 0.12)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One model: ratios to the unpruned latency, and relative errors of each way to predict them."""

    model: str
    provider: str
    table_s: float
    base_ms: float
    noise: float
    measured: tuple[float, ...]
    errors: Mapping[str, tuple[float, ...]]
    verdict: Verdict


def _errors(
    structure: Structure,
    table: LatencyTable,
    isolated: LatencyTable,
    variants: Sequence[Variant],
    ratios: Ratios,
) -> dict[str, tuple[float, ...]]:
    """Signed relative errors of the table without and with its calibration, and of its rivals."""
    predicted = {
        "base_only": table_ratios(structure, uncalibrated(structure, table), variants),
        "calibrated": table_ratios(structure, table, variants),
        "linear": linear_ratios(structure, table, variants),
        "isolated": table_ratios(structure, isolated, variants),
        "macs": macs_ratios(structure, variants),
    }
    measured = np.asarray(ratios.values)
    return {name: tuple((np.asarray(p) / measured - 1).tolist()) for name, p in predicted.items()}


def _step(structure: Structure, where: Runtime) -> int:
    """The granularity of a device of which nothing is known."""
    with (
        tempfile.TemporaryDirectory(prefix="onnx-mdp-") as folder,
        open_store(Path(folder) / "store.sqlite") as store,
    ):
        return granularity(where, store, computed_in(structure))


def _predict(name: str, given: argparse.Namespace) -> Prediction:
    model = load_model(model_path(name))
    structure, where = analyze(model, {}), runtime(given.ep, given.threads)
    choices = configuration_choices(structure, _step(structure, where))
    variants = drawn_configurations(structure, choices, given.configs, given.seed)

    def measured(when: str) -> Ratios:
        return measured_configurations(
            structure,
            variants,
            where,
            given.seed,
            budget_s=GROUP_S / 2,
            on_group=lambda done, total: note(f"{name}, {when}: {done} of {total} configurations measured"),
        )

    before = measured("before the table")
    table = table_from_nothing(structure, where, given.seed)
    ratios = before.joined(measured("after the table"))
    note(f"{name}: layers alone")
    isolated = isolated_table(structure, table, where, given.seed)
    errors = _errors(structure, table, isolated, variants, ratios)
    verdict = _verdict(np.abs(errors["calibrated"]).tolist(), ratios.noise, where.provider)
    return Prediction(
        name, where.provider, table.seconds, ratios.base_ms, ratios.noise, ratios.values, errors, verdict
    )


def _verdict(errors: Sequence[float], noise: float, provider: str) -> Verdict:
    """Too few configurations, like too much noise, prove nothing."""
    median, worst = _LIMITS if provider == SHORT_NAMES["cpu"] else _COMPILED_LIMITS
    holds = bool(np.median(errors) <= median) and max(errors) <= worst
    return judge(holds, noise) if len(errors) >= _LEAST else "inconclusive"


def _two(errors: Sequence[float]) -> str:
    return f"{np.median(np.abs(errors)):.1%} / {np.abs(errors).max():.1%}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, _MODELS)
    parser.add_argument("--configs", type=int, default=24, help="configurations a model (default: 24)")
    parser.add_argument("--ep", default="cpu", help="execution provider (default: cpu)")
    given = parser.parse_args(argv)
    rows = [_predict(name, given) for name in given.models]
    columns = {
        "model": lambda r: r.model,
        "provider": lambda r: r.provider.removesuffix("ExecutionProvider"),
        "base ms": lambda r: f"{r.base_ms:.2f}",
        "table s": lambda r: f"{r.table_s:.1f}",
        "configs": lambda r: str(len(r.measured)),
        "of base": lambda r: f"{min(r.measured):.2f} … {max(r.measured):.2f}",
        "F": lambda r: f"{r.noise:.1%}",
        "table": lambda r: _two(r.errors["calibrated"]),
        "uncalibrated": lambda r: _two(r.errors["base_only"]),
        "linear": lambda r: _two(r.errors["linear"]),
        "isolated": lambda r: _two(r.errors["isolated"]),
        "MACs proxy": lambda r: _two(r.errors["macs"]),
        "verdict": lambda r: r.verdict,
    }
    table = print_table("prediction error, median / worst", columns, rows)
    given.output.mkdir(parents=True, exist_ok=True)
    figure = given.output / f"{Path(__file__).stem}.svg"
    write_text(prediction_svg(rows), figure, overwrite=True)
    note(f"figure → {figure}")
    summary = " · ".join(f"{r.model} {_two(r.errors['calibrated'])}, F {r.noise:.1%}" for r in rows)
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
