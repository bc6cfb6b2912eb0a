"""Random graphs: pruned = masked or frozen, an empty plan changes nothing, and nothing crashes.

Hypothesis makes every choice of a graph and shrinks what fails. The law is judged in float32; where the
difference is above the tolerance, the reference evaluator decides in float64: rounding is no excuse.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from random_graphs import random_model
from zoo import analyse, random_plan, run

from onnx_mdp.analysis.binding import doubled_shapes
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.model_io import model_bytes
from onnx_mdp.numerics.double_precision import BatchNormalization, in_double
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.computation import Computation
from onnx_mdp.surgery.masking import masked_model
from onnx_mdp.surgery.rewriting import rewrite

TOLERANCE, TOLERANCE_IN_DOUBLE = 1e-5, 1e-6  # of the scale; masks hold ratios in float32
EXAMPLES, SLOW_EXAMPLES, WORKERS = 120, 20_000, 2
Feed = dict[str, np.ndarray]


class QuickGelu(OpRun):
    """For the reference evaluator: an operator of another domain."""

    op_domain = "com.microsoft"

    def _run(self, x: np.ndarray, **_: Any) -> tuple[np.ndarray]:
        return (x / (1 + np.exp(-1.702 * x)),)


def feeds(model: ir.Model, shape: tuple[int, ...]) -> list[Feed]:
    """Two inputs of the bound shape, and one with all symbolic sizes doubled where the model runs at it."""
    rng = np.random.default_rng(0)
    tried = [{"x": rng.standard_normal(shape).astype(np.float32)}, {"x": rng.random(shape, np.float32)}]
    doubled = doubled_shapes(model, {"x": shape})["x"]
    if doubled != shape:
        larger = {"x": rng.standard_normal(doubled).astype(np.float32)}
        with contextlib.suppress(Exception):  # the file promises a size that it cannot run at
            run(model, larger)
            tried.append(larger)
    return tried


def error(expected: np.ndarray, actual: np.ndarray) -> float:
    """The largest difference relative to the largest value; infinite where shapes or infinities differ."""
    finite = np.isfinite(expected)
    if expected.shape != actual.shape or not np.array_equal(finite, np.isfinite(actual)):
        return float("inf")
    difference = np.abs(np.where(finite, expected, 0) - np.where(finite, actual, 0)).max(initial=0)
    return float(difference / max(np.abs(np.where(finite, expected, 0)).max(initial=0), 1e-30))


def in_float64(model: ir.Model, feed: Feed) -> list[np.ndarray]:
    wide = {name: array.astype(np.float64) for name, array in feed.items()}
    return [
        np.asarray(o)
        for o in ReferenceEvaluator(in_double(model), new_ops=[BatchNormalization, QuickGelu]).run(None, wide)
    ]


def check_same(expected: ir.Model, actual: ir.Model, tried: list[Feed], what: str) -> None:
    pair = [Computation(model) for model in (expected, actual)]
    for feed in tried:
        outputs = [computation.run(computation.outputs, feed) for computation in pair]
        if max(error(a, b) for a, b in zip(*outputs, strict=True)) > TOLERANCE:
            wide = [in_float64(model, feed) for model in (expected, actual)]
            worst = max(error(a, b) for a, b in zip(*wide, strict=True))
            assert worst <= TOLERANCE_IN_DOUBLE, f"{what}: {worst} of the scale, in float64"


def check(pick: Callable[[int], int], seen: Counter[str]) -> None:
    """One example: make a graph, analyse it, rewrite it with an empty plan and with a random one."""
    proto, shape = random_model(pick)
    plan_seed = pick(1000)
    onnx.checker.check_model(proto, full_check=True)
    seen["graphs"] += 1
    try:
        run(proto, {"x": np.ones(shape, np.float32)})
    except Exception:  # ONNX Runtime lacks a kernel for what ONNX allows
        seen["unrunnable"] += 1
        return
    model, structure = analyse(proto, {"x": shape})
    rng = np.random.default_rng(plan_seed)
    plans = [random_plan(structure, rng)] if structure.prunable or structure.blocks else []
    if rng.random() < 0.2:
        plans.append(PruningPlan(keep={}))
    seen["prunable"] += bool(structure.prunable)
    seen["pruned"] += any(plan.keep for plan in plans)
    tried = feeds(model, shape) if plans else []
    for plan in plans:
        check_plan(model, structure, plan, tried)


def check_plan(model: ir.Model, structure: Structure, plan: PruningPlan, tried: list[Feed]) -> None:
    pruned = rewrite(structure, plan)
    onnx.checker.check_model(model_bytes(pruned), full_check=True)
    nothing = not plan.keep and not plan.removed_blocks
    check_same(model if nothing else masked_model(model, structure, plan), pruned, tried, str(plan.keep))


def examples(count: int, number: int, phases: list[Phase], seen: Counter[str]) -> None:
    """Let hypothesis run ``count`` examples; the same ones every time."""

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def random_graph(data: st.DataObject) -> None:
        check(lambda n: data.draw(st.integers(0, n - 1)), seen)

    random_graph()


def test_random_graphs() -> None:
    seen: Counter[str] = Counter()
    examples(EXAMPLES, 0, [Phase.generate, Phase.shrink], seen)
    assert seen["graphs"] >= EXAMPLES
    assert seen["unrunnable"] <= 0.05 * seen["graphs"]
    assert seen["pruned"] >= 0.4 * seen["graphs"], seen


def _worker(number: int) -> dict[str, int]:
    seen: Counter[str] = Counter()
    examples(SLOW_EXAMPLES // WORKERS, number, [Phase.generate, Phase.shrink], seen)
    return dict(seen)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_thousand_random_graphs() -> None:
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        seen = sum(map(Counter, pool.map(_worker, range(1, WORKERS + 1))), Counter())
    print(os.linesep, dict(seen))
    assert seen["graphs"] >= SLOW_EXAMPLES
    assert seen["pruned"] >= 0.5 * seen["graphs"], seen
