"""The files of a result: the slim model, the plan beside it, and a figure of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from onnx_mdp.files import Content
from onnx_mdp.large_models import save_model
from onnx_mdp.pipeline import PruneResult
from onnx_mdp.plan import plan_json
from onnx_mdp.reports.figures import structure_svg

__all__ = ["result_paths", "write_result"]


def result_paths(model: Path) -> tuple[Path, Path, Path]:
    """Where a model, its plan and its figure lie."""
    stem = model.name.removesuffix(".onnx")
    return model, model.with_name(f"{stem}.plan.json"), model.with_name(f"{stem}.structure.svg")


def write_result(
    result: PruneResult,
    paths: tuple[Path, Path, Path],
    *,
    overwrite: bool,
    beside: Mapping[Path, Content] = MappingProxyType({}),
) -> None:
    """Write all files of a result that has a model, and those ``beside`` it, or none.

    Raises:
        OutputError: a file is there already, or cannot be written.
    """
    model, plan, figure = paths
    assert result.model is not None
    assert result.plan is not None
    own = {
        figure: structure_svg(result.structure, result.plan).encode(),
        plan: plan_json(result.plan).encode(),
    }
    save_model(result.model, model, overwrite=overwrite, beside={**own, **beside})
