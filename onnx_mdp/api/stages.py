"""Each stage of a prune as a function: what one returns, the next one takes.

::

    analyze → score   ─┐
            → profile ─┴→ solve or pareto → rewrite → verify

Models are paths, ``ModelProto``, ``onnx_ir.Model`` or graphsurgeon graphs, and are never changed. Data is a
path or batches in any form (`onnx_mdp.data.feeds.DataLike`). ``progress`` is called with a stage, and how
many of how many parts of it are done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from onnx_mdp import pipeline
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.data.calibration import CalibrationData
from onnx_mdp.data.feeds import DataLike, input_types, read_data
from onnx_mdp.errors import UsageError
from onnx_mdp.importance import scoring
from onnx_mdp.importance.gradient_scores import GRADIENT_CRITERIA, GradientOptions
from onnx_mdp.model_io import ModelLike, load_model
from onnx_mdp.plan import PruningPlan
from onnx_mdp.planning.formulation import Caps, to_ns
from onnx_mdp.planning.ignored_scope import IgnoredScope, held_by
from onnx_mdp.planning.problem import SolveLimits
from onnx_mdp.planning.programs import Programs
from onnx_mdp.planning.solution_plan import plan_from_solution
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.running.runtime import Runtime, runtime
from onnx_mdp.solvers import SOLVERS
from onnx_mdp.surgery import rewriting
from onnx_mdp.tables.latency import LatencyTable, build_table
from onnx_mdp.tables.lut_store import open_store

__all__ = [
    "Progress",
    "analyze",
    "chosen_criterion",
    "chosen_rules",
    "chosen_runtime",
    "pareto",
    "profile",
    "rewrite",
    "score",
    "silent",
    "solve",
]

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def analyze(
    model: ModelLike,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
    states: Mapping[str, str] | None = None,
) -> Structure:
    """Find the prunable dimensions and the removable blocks of a model, and why others are frozen.

    ``input_shapes`` binds inputs that are symbolic in the file, ``batch`` the first axis of those. ``states``
    maps inputs to the outputs that become them in the next frame; such a pair is pruned together.

    >>> from importlib.resources import files
    >>> structure = analyze(files("onnx_mdp") / "demo_model" / "shapes_resnet.onnx")
    >>> len(structure.prunable), len(structure.blocks)
    (9, 4)

    Raises:
        UnreadableModelError, UsageError, UnsupportedModelError, MeasurementError: see `pipeline.analyze`.
    """
    return pipeline.analyze(load_model(model), input_shapes or {}, batch, states)


def profile(
    structure: Structure,
    *,
    ep: str | Runtime = "cpu",
    threads: int = 1,
    choices: int = 16,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> LatencyTable:
    """Measure what every width costs on this machine; what ``store`` holds is not measured again.

    ``ep`` is an execution provider by name, or what `runtime` made of one with its options. ``choices`` is
    the largest number of widths that are offered of a dimension.

    Raises:
        MissingBackendError, MeasurementError: the provider is missing, or cannot run the model.
    """
    with open_store(None if store is None else Path(store)) as opened:
        on = chosen_runtime(ep, threads, store)
        return build_table(structure, on, opened, seed=seed, max_choices=choices, progress=progress)


def score(
    structure: Structure,
    data: DataLike | None = None,
    *,
    criterion: str | scoring.Criterion | None = None,
    preprocess: str | None = None,
    samples: int = 64,
    labels: str | None = None,
    loss: str | Callable[..., object] = "auto",
    scores: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> scoring.Importance:
    """What every prunable unit and block is worth; without a criterion, the best that the data allows.

    ``loss`` and ``scores`` (a file that keeps what was computed) are of the criteria taylor and hessian.

    Raises:
        UsageError: the data does not fit, or the criterion needs some.
        MissingBackendError: taylor and hessian need torch.
    """
    inputs = None
    if data is not None:
        shapes, types = structure.shadow.inputs, input_types(structure.shadow.model)
        inputs = read_data(data, shapes, types, preprocess=preprocess, samples=samples, labels=labels)
    chosen = chosen_criterion(criterion, inputs, loss=loss, scores=scores, seed=seed)
    return scoring.score(structure, chosen, inputs.feeds if inputs else (), progress)


def solve(
    structure: Structure,
    importance: scoring.Importance,
    table: LatencyTable,
    *,
    target_ms: float | None = None,
    target_ratio: float | None = None,
    solver: str = "exact",
    limits: SolveLimits | None = None,
    rules: WidthRules | None = None,
    caps: Caps | None = None,
    rescale_attention: bool = False,
) -> PruningPlan:
    """Choose all widths and block removals for one latency, by a table; ``plan.gap`` says how surely.

    A target that no plan meets is no error: ``plan.status`` is ``"infeasible"``, and ``plan.fastest_ms`` the
    smallest latency that can be reached.

    Raises:
        UsageError: not exactly one target, or rules that fit no dimension.
    """
    targets = [target_ms] if target_ratio is None else [target_ratio * table.base_ms]
    if (target_ms is None) == (target_ratio is None):
        raise UsageError("give exactly one of target_ms and target_ratio")
    return pareto(
        structure,
        importance,
        table,
        [ms for ms in targets if ms is not None],
        solver=solver,
        limits=limits,
        rules=rules,
        caps=caps,
        rescale_attention=rescale_attention,
    )[0]


def pareto(
    structure: Structure,
    importance: scoring.Importance,
    table: LatencyTable,
    targets_ms: Sequence[float],
    *,
    solver: str = "exact",
    limits: SolveLimits | None = None,
    rules: WidthRules | None = None,
    caps: Caps | None = None,
    rescale_attention: bool = False,
) -> tuple[PruningPlan, ...]:
    """The best plan for each of several latencies, as `solve` gives it, in much less time than one by one.

    Raises:
        UsageError: a target is not positive, or rules fit no dimension.
    """
    if solver not in SOLVERS:
        raise UsageError(f"unknown solver {solver!r}; choose one of {', '.join(sorted(SOLVERS))}")
    if not targets_ms or not min(targets_ms) > 0:
        raise UsageError("targets must be numbers larger than 0")
    programs = Programs(structure, importance, table, rules or WidthRules(), caps or Caps())
    budgets = [to_ns(ms) for ms in targets_ms]
    plans = []
    for answer in programs.solve_front(budgets, solver, limits or SolveLimits()):
        solution = answer.solution
        if solution.choice is None:
            least = None if solution.fastest_ns is None else solution.fastest_ns * 1e-6
            plans.append(PruningPlan(keep={}, status="infeasible", solver=solver, fastest_ms=least))
            continue
        plans.append(
            plan_from_solution(
                structure,
                answer.formulation,
                importance,
                table,
                solution,
                rescale_attention=rescale_attention,
            )
        )
    return tuple(plans)


def rewrite(structure: Structure, plan: PruningPlan) -> ir.Model:
    """The slim model of a plan, not verified yet: the same plan gives the same bytes.

    Raises:
        UsageError: the plan was made for another model.
    """
    return pipeline.stamp(rewriting.rewrite(structure, plan), plan)


def chosen_runtime(ep: str | Runtime, threads: int, store: str | os.PathLike[str] | None) -> Runtime:
    """The runtime that ``ep`` is, or names."""
    if isinstance(ep, Runtime):
        return ep
    return runtime(ep, threads, store="" if store is None else str(store))


def chosen_rules(
    model: ModelLike,
    structure: Structure,
    rules: WidthRules | None = None,
    ignored: IgnoredScope | None = None,
) -> WidthRules:
    """Rules that leave the ignored nodes of a model as they are, for `solve` and `pareto`.

    Raises:
        UsageError: a name, a pattern or a type that no node has.
    """
    rules = rules or WidthRules()
    if not ignored:
        return rules
    return replace(rules, held=held_by(load_model(model), structure, ignored))


def chosen_criterion(
    criterion: str | scoring.Criterion | None,
    data: CalibrationData | None,
    *,
    repair: Sequence[str] = (),
    loss: str | Callable[..., object] = "auto",
    scores: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> str | scoring.Criterion:
    """A criterion for these inputs and the repair that follows; without a name, the best that they allow."""
    if criterion is None:
        return scoring.default_criterion(0 if data is None else len(data.feeds), repair)
    if not isinstance(criterion, str) or criterion not in GRADIENT_CRITERIA:
        return criterion
    from onnx_mdp.training.loaders import load_function

    taken = load_function(loss) if isinstance(loss, str) and ":" in loss else loss
    labels = data.labels if data is not None and loss in ("auto", "labels") else None
    file = None if scores is None else Path(scores)
    return scoring.gradient_criterion(criterion, GradientOptions(taken, labels, seed, file))
