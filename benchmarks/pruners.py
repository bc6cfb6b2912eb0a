"""Pruners, each a function from a dial between 0 and 1 to an ONNX model, and the dial for a speed.

A `Planner` plans with our solver or one in its place, ``uniform`` keeps the same share of every dimension;
these rank units by the same scores. ``onnxsim`` is `apply_structured_pruning` of onnxsim 0.8.1. Pruners that
could take any width come with one that takes those that the runtime likes, which goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from benchmarks.harness import note
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.scoring import Feeds, Importance, ranked_rows
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.plan import PruningPlan
from onnx_mdp.planning.formulation import to_ns
from onnx_mdp.planning.programs import Programs
from onnx_mdp.planning.solution_plan import plan_from_choice
from onnx_mdp.repairing.repair import repair
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.latency import LatencyTable, predict_ms
from onnx_mdp.tables.variants import full_variant, measure_models

__all__ = ["Fast", "Planner", "Pruner", "at_speed", "onnxsim", "uniforms"]

Pruner = Callable[[float], bytes]
Shapes = Mapping[str, tuple[int, ...]]

_ROUNDS, _CLOSE = 8, 0.015  # the second of the speed-up
_MEASURE_S = 4.0


@dataclass(frozen=True, slots=True)
class Fast:
    """A pruned model, how many times as fast as the original it was measured, and the noise F of that."""

    model: bytes
    speedup: float
    noise: float


def at_speed(
    pruners: Sequence[Pruner], base: bytes, shapes: Shapes, speedup: float, runtime: Runtime, seed: int
) -> Fast:
    """Turn the first pruner's dial until the model, measured beside the original, is as fast as asked.

    The others are tried where the ones before have no model that is. Of models that are fast enough the one
    nearest to the speed is taken; one that is slower by more than the noise only if no other is there.
    """
    found: list[Fast] = []
    for pruner in pruners:
        found += _tried(pruner, base, shapes, speedup, runtime, seed)
        enough = [one for one in found if one.speedup >= speedup * (1 - min(_CLOSE, one.noise))]
        if enough:
            break
    return min(enough or found, key=lambda one: abs(one.speedup / speedup - 1))


def _tried(
    pruner: Pruner, base: bytes, shapes: Shapes, speedup: float, runtime: Runtime, seed: int
) -> list[Fast]:
    """What one dial gave on its way to the speed; a model that comes again is not measured again."""
    low, high, dial = 0.0, 1.0, 1 / speedup
    found = dict[bytes, Fast]()
    for step in range(_ROUNDS):
        model = pruner(dial)
        if model not in found:
            timing = measure_models([base, model], shapes, runtime, seed=seed + step, budget_s=_MEASURE_S)
            found[model] = Fast(model, timing.ms[0] / timing.ms[1], timing.noise)
            note(f"  dial {dial:.3f}: {found[model].speedup:.2f} times as fast (F {timing.noise:.1%})")
        reached = found[model].speedup
        if 0 <= reached / speedup - 1 <= _CLOSE:
            break
        low, high = (dial, high) if reached > speedup else (low, dial)
        guess = dial * reached / speedup
        dial = guess if low < guess < high else (low + high) / 2
    return list(found.values())


class Planner:
    """The dial is the budget, as a share of the predicted latency of the original."""

    def __init__(self, programs: Programs, solver: str) -> None:
        self.programs, self.solver = programs, solver
        self.structure = programs.structure
        self.whole = predict_ms(programs.table, self.structure, full_variant(self.structure))
        self.plans: dict[bytes, PruningPlan] = {}

    def __call__(self, dial: float) -> bytes:
        """The original, pruned."""
        answer = self.programs.solve(to_ns(dial * self.whole), self.solver)
        choice = answer.solution.choice
        if choice is None:
            raise UsageError(f"no plan reaches {dial:.2f} of the latency; choose a smaller speed-up")
        plan = plan_from_choice(self.structure, answer.formulation, self.programs.importance, choice)
        model = model_bytes(rewrite(self.structure, plan))
        self.plans[model] = plan
        return model

    def refitted(self, model: bytes, feeds: Feeds) -> bytes:
        """What ``--repair lstsq`` makes of a model that was pruned here."""
        slim = load_model(onnx.load_from_string(model))
        return model_bytes(repair(self.structure, self.plans[model], slim, feeds, ("lstsq",)).model)


def uniforms(structure: Structure, importance: Importance, table: LatencyTable) -> list[Pruner]:
    """With the widths of the table, and with any."""
    counts = {index: range(1, structure.dimensions[index].count + 1) for index in structure.prunable}
    return [_uniform(structure, importance, choices) for choices in (table.choices, counts)]


def _uniform(structure: Structure, importance: Importance, choices: Mapping[int, Sequence[int]]) -> Pruner:
    """The dial is the share of units that each dimension keeps, the most important ones.

    ``choices`` says which numbers of a dimension's units may be kept; the nearest one is.
    """

    def pruned(dial: float) -> bytes:
        keep = {}
        for index in structure.prunable:
            dimension = structure.dimensions[index]
            wanted = dial * dimension.count
            count = min(choices[index], key=lambda kept: abs(kept - wanted))
            rows = ranked_rows(structure, importance, index)[:, :count]
            keep[dimension.name] = tuple(sorted(rows.reshape(-1).tolist()))
        return model_bytes(rewrite(structure, PruningPlan(keep=keep)))

    return pruned


def onnxsim(base: bytes) -> Pruner:
    """The dial is one minus the sparsity; filters go by their l2 norm."""

    def pruned(dial: float) -> bytes:
        from onnxsim import apply_structured_pruning  # type: ignore[import-not-found]

        slim: bytes = apply_structured_pruning(
            onnx.load_from_string(base), sparsity=1 - dial
        ).SerializeToString()
        return slim

    return pruned
