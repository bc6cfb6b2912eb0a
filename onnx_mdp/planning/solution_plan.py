"""The solution of a pruning problem back to a plan: which units stay, and how that was found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_mdp._version import __version__
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.importance.scoring import Importance, ranked_rows, ranking
from onnx_mdp.plan import PruningPlan
from onnx_mdp.planning.formulation import Formulation
from onnx_mdp.planning.problem import Choice, Solution
from onnx_mdp.tables.latency import LatencyTable
from onnx_mdp.tables.variants import Variant

__all__ = ["plan_from_choice", "plan_from_solution", "variant_from_choice"]


def variant_from_choice(structure: Structure, formulation: Formulation, choice: Choice) -> Variant:
    """Kept units and removed blocks of a choice; dimensions of removed blocks count as full."""
    gone = frozenset(name for name, place in formulation.switch.items() if choice[place] == 0)
    kept = {i: d.count for i, d in enumerate(structure.dimensions)}
    for index, place in formulation.variable.items():
        width = formulation.problem.variables[place].widths[choice[place]]
        kept[index] = width or kept[index]
    return Variant(kept, gone)


def plan_from_solution(
    structure: Structure,
    formulation: Formulation,
    importance: Importance,
    table: LatencyTable,
    solution: Solution,
    *,
    state: float = 1.0,
    rescale_attention: bool = False,
    seed: int = 0,
    command: str = "",
) -> PruningPlan:
    """The plan of a solution, with how it was found; ``state`` scales the table to the machine of now."""
    assert solution.choice is not None
    plan = plan_from_choice(structure, formulation, importance, solution.choice)
    return replace(
        plan,
        rescale_attention=rescale_attention,
        states=dict(structure.shadow.states),
        predicted_ms=solution.cost_ns * 1e-6 * state,
        importance_share=solution.value,
        status=solution.status,
        bound=solution.bound,
        gap=solution.gap,
        solver=solution.solver,
        seconds=solution.seconds,
        fastest_ms=None if solution.fastest_ns is None else solution.fastest_ns * 1e-6 * state,
        provenance={
            "model": structure.shadow.source,
            "inputs": {name: list(shape) for name, shape in structure.shadow.inputs.items()},
            "table": table.key,
            "context": dict(table.context),
            "criterion": importance.criterion,
            "seed": seed,
            "version": __version__,
            "command": command,
            **({} if solution.note is None else {"note": solution.note}),
        },
    )


def plan_from_choice(
    structure: Structure, formulation: Formulation, importance: Importance, choice: Choice
) -> PruningPlan:
    """Keep the most important units of each dimension, and of each head that stays."""
    variant = variant_from_choice(structure, formulation, choice)
    keep = {}
    for index in formulation.variable:
        dimension = structure.dimensions[index]
        count = variant.kept[index]
        rows = ranked_rows(structure, importance, index)
        if dimension.heads is not None and dimension.heads in formulation.variable:
            rows = rows[np.sort(ranking(importance, dimension.heads)[: variant.kept[dimension.heads]])]
        if count < dimension.count:
            keep[dimension.name] = tuple(sorted(rows[:, :count].reshape(-1).tolist()))
    removed = tuple(b.name for b in structure.blocks if b.name in variant.removed_blocks)
    return PruningPlan(keep=keep, removed_blocks=removed)
