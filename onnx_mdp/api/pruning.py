"""The main job and what follows it, as functions: prune, save, apply, verify, repair."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnx_mdp import pipeline
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.api.stages import Progress, chosen_criterion, chosen_rules, chosen_runtime, silent
from onnx_mdp.data.feeds import DataLike, input_types, read_data
from onnx_mdp.errors import OutputError, UsageError
from onnx_mdp.importance.scoring import Criterion
from onnx_mdp.model_io import ModelLike, load_model
from onnx_mdp.plan import PruningPlan, check_plan, load_plan, plan_inputs
from onnx_mdp.planning.closed_loop import Request
from onnx_mdp.planning.formulation import Caps
from onnx_mdp.planning.ignored_scope import IgnoredScope
from onnx_mdp.planning.problem import SolveLimits
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.repairing import repair as repairing
from onnx_mdp.reports.result_files import result_paths, write_result
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.surgery.changed_weights import weights_apart
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import Evidence
from onnx_mdp.tables.latency import LatencyTable
from onnx_mdp.tables.lut_store import open_store
from onnx_mdp.tables.table_file import load_table

__all__ = ["apply", "prune", "repair", "save", "verify"]

PlanLike = str | os.PathLike[str] | PruningPlan


def prune(
    model: ModelLike,
    *,
    target_ms: float | None = None,
    target_ratio: float | None = None,
    data: DataLike | None = None,
    preprocess: str | None = None,
    samples: int = 64,
    labels: str | None = None,
    criterion: str | Criterion | None = None,
    loss: str | Callable[..., object] = "auto",
    scores: str | os.PathLike[str] | None = None,
    ep: str | Runtime = "cpu",
    threads: int = 1,
    table: str | os.PathLike[str] | LatencyTable | None = None,
    choices: int = 16,
    solver: str = "exact",
    limits: SolveLimits | None = None,
    rules: WidthRules | None = None,
    ignored: IgnoredScope | None = None,
    caps: Caps | None = None,
    rescale_attention: bool = False,
    repair: Sequence[str] = (),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
    states: Mapping[str, str] | None = None,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> pipeline.PruneResult:
    """Prune a model to a latency on this machine, measure it, and prove that it is what the plan says.

    Exactly one of ``target_ms`` and ``target_ratio`` (of the unpruned latency). Look at ``result.status``
    first: ``"met"``; ``"missed"`` (``result.model`` is the fastest that was measured); ``"infeasible"``
    (``result.fastest_ms``); ``"nothing_to_do"``. Options are those of the command line, which describes
    them; a ``table`` takes the place of measuring one, and ``ignored`` nodes are left as they are.

    >>> from importlib.resources import files
    >>> demo = files("onnx_mdp") / "demo_model" / "shapes_resnet.onnx"
    >>> prune(demo, target_ratio=2.0).status
    'nothing_to_do'

    Raises:
        UsageError: an argument is wrong, or the data does not fit.
        UnsupportedModelError: nothing of the model can be pruned.
        MissingBackendError, MeasurementError: the provider is missing, or cannot run the model.
        VerificationError: the pruned model is not what the plan says; nothing of it is returned.
    """
    if (target_ms is None) == (target_ratio is None):
        raise UsageError("give exactly one of target_ms and target_ratio")
    if not 0 < (target_ms or target_ratio or 0.0) < float("inf"):
        raise UsageError("the target must be a number larger than 0")
    original = load_model(model)
    structure = pipeline.analyze(original, input_shapes or {}, batch, states)
    inputs = None
    if data is not None:
        shapes, types = structure.shadow.inputs, input_types(original)
        inputs = read_data(data, shapes, types, preprocess=preprocess, samples=samples, labels=labels)
    methods = repairing.parse_methods(",".join(repair) or "none")
    request = Request(
        target_ms=target_ms,
        target_ratio=target_ratio,
        runtime=chosen_runtime(ep, threads, store),
        criterion=chosen_criterion(criterion, inputs, repair=methods, loss=loss, scores=scores, seed=seed),
        solver=solver,
        limits=limits or SolveLimits(),
        max_choices=choices,
        seed=seed,
        rules=chosen_rules(original, structure, rules, ignored),
        caps=caps or Caps(),
        rescale_attention=rescale_attention,
        repair=methods,
    )
    feeds = inputs.feeds if inputs else ()
    if table is not None:
        given = table if isinstance(table, LatencyTable) else load_table(Path(table), structure)
        return pipeline.prune(original, structure, request, given, feeds=feeds, progress=progress)
    with open_store(None if store is None else Path(store)) as opened:
        return pipeline.prune(original, structure, request, opened, feeds=feeds, progress=progress)


def save(
    result: pipeline.PruneResult, path: str | os.PathLike[str], *, overwrite: bool = False
) -> tuple[Path, Path, Path]:
    """Write the model of a result, its plan and a figure of it: all of them or none; return their paths.

    Raises:
        OutputError: the target was not met, or the files cannot be written.
    """
    if result.status != "met":
        raise OutputError(f"the result is {result.status}, so there is no model to write to {path}")
    paths = result_paths(Path(path))
    write_result(result, paths, overwrite=overwrite)
    return paths


def apply(model: ModelLike, plan: PlanLike) -> ir.Model:
    """Replay a plan on the model that it was made for: the same bytes, verified again.

    Raises:
        UsageError: the plan was made for another model.
        VerificationError: the pruned model is not what the plan says.
    """
    original, structure, chosen = _planned(model, plan)
    return pipeline.apply_plan(original, structure, chosen)[0]


def verify(
    original: ModelLike,
    pruned: ModelLike,
    plan: PlanLike,
    data: DataLike | None = None,
    *,
    preprocess: str | None = None,
) -> Evidence:
    """Whether a pruned model computes what the masked original does; look at ``evidence.verified``.

    Of a model that was repaired or fine-tuned, it is the slicing that is compared, and the file must be that
    graph with other numbers in its float tensors.

    Raises:
        UsageError: the plan was made for another model, or the data does not fit.
        VerificationError: the trained file is another graph, or does not run.
    """
    dense, structure, chosen = _planned(original, plan)
    feeds: pipeline.Feeds = ()
    if data is not None:
        shapes, types = structure.shadow.inputs, input_types(dense)
        feeds = read_data(data, shapes, types, preprocess=preprocess, samples=2).feeds
    return pipeline.verify_file(dense, structure, load_model(pruned), chosen, feeds)[0]


def repair(
    original: ModelLike,
    pruned: ModelLike,
    plan: PlanLike,
    data: DataLike,
    *,
    methods: Sequence[str] = ("lstsq",),
    preprocess: str | None = None,
    samples: int = 64,
    progress: Progress = silent,
) -> repairing.Repaired:
    """Other weights for a pruned model, so that its layers give what the original's gave; no labels.

    ``methods`` are of ``bias``, ``bn`` and ``lstsq``; the graph stays, and ``.model`` holds it.

    Raises:
        UsageError: a method is unknown, the data does not fit, or the plan is another model's.
        UnsupportedModelError: the model is not in float32.
    """
    chosen_methods = repairing.parse_methods(",".join(methods))
    dense, structure, chosen = _planned(original, plan)
    repairing.check_repair(structure, chosen_methods)
    slim = load_model(pruned)
    weights_apart(rewrite(structure, chosen), slim)
    shapes, types = structure.shadow.inputs, input_types(dense)
    feeds = read_data(data, shapes, types, preprocess=preprocess, samples=samples).feeds
    return repairing.repair(structure, chosen, slim, feeds, chosen_methods, progress)


def _planned(model: ModelLike, plan: PlanLike) -> tuple[ir.Model, Structure, PruningPlan]:
    """The model, analysed as it was when the plan was made."""
    chosen = plan if isinstance(plan, PruningPlan) else load_plan(Path(plan))
    original = load_model(model)
    structure = pipeline.analyze(original, plan_inputs(chosen), 1, chosen.states)
    check_plan(chosen, structure)
    return original, structure, chosen
