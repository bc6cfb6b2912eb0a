"""Repair what is left of a model with unlabelled inputs, before any training: new weights in the same graph.

The layers are taken in order, and each is compared with the layer of the original that it is what is left of,
on inputs that come from the layers repaired before it. Methods, applied in the order in which they are named:

``bias``
    The mean of each output is made that of the original. What the removed units gave on average,
    ``W[:, removed] · mean(x[removed])``, is absorbed, together with what else moved the mean. The mean is
    over inputs and positions; where a Conv pads, its borders see less of it than its inside.

``bn``
    The mean and the variance of each output are made those of the original: by the statistics of the
    BatchNormalization behind it, or, where that was folded, by a factor and a shift of each output.

``lstsq``
    Weights and bias of a layer are fitted by least squares, so that it gives on what it gets now what the
    original gave; see `onnx_mdp.repairing.least_squares`. A layer that this does not help on inputs that
    are held out stays as it is.

Nothing but weights and biases changes: a Conv or Gemm without a bias may get one, names and shapes stay.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.states import kept_feeds
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UnsupportedModelError, UsageError
from onnx_mdp.importance.output_drift import model_drift
from onnx_mdp.model_io import clone
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.repairing.least_squares import refit
from onnx_mdp.repairing.linear_layers import Layer, LayerRepair, linear_layers
from onnx_mdp.repairing.output_moments import match_means, match_spreads
from onnx_mdp.repairing.stepwise import Walk
from onnx_mdp.surgery.changed_weights import mark_weights

__all__ = ["METHODS", "Repaired", "check_repair", "parse_methods", "repair"]

Array = npt.NDArray[Any]
Feeds = Sequence[Mapping[str, Array]]
Progress = Callable[[str, int, int], None]
Method = Callable[[ir.Model, Layer, Walk, Walk], LayerRepair]
METHODS: dict[str, Method] = {"bias": match_means, "bn": match_spreads, "lstsq": refit}


@dataclass(frozen=True, slots=True)
class Repaired:
    """A model with other weights, and what became of each layer.

    ``drifts`` are how far the outputs are from the original's on (at most 16 of) the inputs, before all and
    after each of the ``methods``: see `onnx_mdp.importance.output_drift`.
    """

    model: ir.Model
    layers: tuple[LayerRepair, ...]
    methods: tuple[str, ...]
    drifts: tuple[float, ...]


def repair(
    structure: Structure,
    plan: PruningPlan,
    model: ir.Model,
    feeds: Feeds,
    methods: Sequence[str],
    progress: Progress = lambda stage, done, total: None,
) -> Repaired:
    """Repair ``model``, which the plan left of the structure's model, on inputs of the unpruned model.

    Raises:
        UsageError: an unknown method, or no inputs.
        UnsupportedModelError: the model is not in float32.
    """
    check_repair(structure, methods)
    if not feeds:
        raise UsageError("a repair needs calibration inputs; pass --data")
    model, removed = clone(model), removed_classes(plan, structure)
    stages = [clone(model)]
    slim_feeds = [kept_feeds(structure, feed, removed) for feed in feeds]
    reports: list[LayerRepair] = []
    for method in methods:
        layers, others = linear_layers(structure, model, removed)
        reports += [LayerRepair(method, name, kept=why) for name, why in others.items()]
        with tempfile.TemporaryDirectory(prefix="onnx-mdp-") as folder:
            dense = Walk(structure.shadow.model, feeds, Path(folder) / "dense")
            slim = Walk(model, slim_feeds, Path(folder) / "slim")
            for done, layer in enumerate(layers):
                progress("repair", done, len(layers))
                reports.append(METHODS[method](model, layer, dense, slim))
        progress("repair", len(layers), len(layers))
        stages.append(clone(model))
    if methods:
        mark_weights(model, f"repaired: {', '.join(methods)}")
    return Repaired(model, tuple(reports), tuple(methods), model_drift(structure, plan, stages, feeds))


def parse_methods(text: str) -> tuple[str, ...]:
    """Read ``bias,lstsq``, or ``none``.

    Raises:
        UsageError: an unknown method.
    """
    methods = () if text == "none" else tuple(text.split(","))
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UsageError(f"unknown repair {unknown[0]!r}; choose none, or of {', '.join(METHODS)}")
    return methods


def check_repair(structure: Structure, methods: Sequence[str]) -> None:
    """Refuse what no repair can do, before anything is measured.

    Raises:
        UsageError: an unknown method.
        UnsupportedModelError: the model is not in float32.
    """
    parse_methods(",".join(methods) or "none")
    if methods and not structure.shadow.plain:
        raise UnsupportedModelError("only models in float32 can be repaired; leave --repair out")
