"""The paper's route: the bilinear program in Pyomo, solved by MindtPy's outer approximation.

Binaries w[v, i] choose an option of every variable; the objective and the latency are sums of products of
them, as in the paper (arXiv 2504.02168, section 3). The latency constraint is not convex, so the linear cuts
of outer approximation may cut off the optimum: a good heuristic, not an exact method. What it calls a bound
is none, and is not used: `solvers.solve` evaluates the answer on the tables and adds the Lagrangian bound.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyomo.environ as pyo  # type: ignore[import-untyped]
from numpy.typing import NDArray

from onnx_mdp.errors import MissingBackendError, SolverError
from onnx_mdp.planning.problem import Choice, PruningProblem, Solution, SolveLimits

__all__ = ["build_minlp", "solve_by_outer_approximation"]

_NAME = "mindtpy"


def solve_by_outer_approximation(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    """Return what MindtPy finds with strategy OA, started by the feasibility pump.

    Raises MissingBackendError without a nonlinear solver, and SolverError when MindtPy fails, or finds no
    choice that fits.
    """
    started = time.perf_counter()
    backend = _nonlinear_solver()
    model = build_minlp(problem, budget_ns)
    try:
        with _on_path(backend), _silence() as quiet:
            pyo.SolverFactory("mindtpy").solve(
                model,
                strategy="OA",
                init_strategy="FP",
                mip_solver="appsi_highs",
                nlp_solver="ipopt" if isinstance(backend, Path) else backend,
                time_limit=limits.seconds,
                logger=quiet,
            )
    except (ValueError, RuntimeError, ArithmeticError, AttributeError, TypeError) as error:
        raise SolverError(f"MindtPy failed: {str(error).splitlines()[0][:200]}") from error
    choice = _choice(problem, model)
    value, cost_ns = problem.evaluate(choice)
    if not problem.is_consistent(choice) or cost_ns > budget_ns or not problem.within_budgets(choice):
        raise SolverError("MindtPy returned no choice that fits the budget; use solver exact")
    seconds = time.perf_counter() - started
    return Solution(choice, value, cost_ns, math.inf, "feasible", None, _NAME, seconds)


def build_minlp(problem: PruningProblem, budget_ns: int) -> Any:
    """The program with products of binaries; every budget relative to what is left of it."""
    model = pyo.ConcreteModel()
    places = [(v, i) for v, variable in enumerate(problem.variables) for i in range(len(variable.widths))]
    widest = problem.widest()
    model.w = pyo.Var(places, domain=pyo.Binary, initialize=lambda _, v, i: 1.0 if i == widest[v] else 0.0)
    model.one = pyo.Constraint(
        range(len(problem.variables)),
        rule=lambda m, v: sum(m.w[v, i] for i in range(len(problem.variables[v].widths))) == 1,
    )
    model.laws = pyo.ConstraintList()
    for block in problem.blocks:
        for member in block.members[1:]:
            model.laws.add(model.w[member, 0] == model.w[block.members[0], 0])
    for law in problem.sums:
        parts = sum(c * _width(problem, model, part) for part, c in law.parts)
        model.laws.add(_width(problem, model, law.total) == law.offset + parts)
    worth = [t for f in problem.factors if f.value is not None for t in _products(model, f.scope, f.value)]
    model.worth = pyo.Objective(expr=pyo.quicksum(worth), sense=pyo.maximize)
    room = float(budget_ns - problem.offset_ns)
    costs = [(f.scope, f.cost_ns / max(room, 1.0)) for f in problem.factors if f.cost_ns is not None]
    model.budgets = pyo.ConstraintList()
    rows = [costs]
    for budget in problem.budgets:
        left = budget.allowance - budget.offset
        rows.append([(f.scope, f.value / left) for f in budget.factors if f.value is not None])
    for row in rows:
        terms = [t for scope, table in row for t in _products(model, scope, table)]
        if terms:
            model.budgets.add(pyo.quicksum(terms) <= 1.0)
    return model


def _width(problem: PruningProblem, model: Any, variable: int) -> Any:
    return sum(width * model.w[variable, i] for i, width in enumerate(problem.variables[variable].widths))


def _products(model: Any, scope: tuple[int, ...], table: NDArray[Any]) -> Iterator[Any]:
    for place in zip(*np.nonzero(table), strict=True):
        yield float(table[place]) * math.prod(model.w[v, int(i)] for v, i in zip(scope, place, strict=True))


def _choice(problem: PruningProblem, model: Any) -> Choice:
    chosen = []
    for v, variable in enumerate(problem.variables):
        weights = [pyo.value(model.w[v, i], exception=False) or 0.0 for i in range(len(variable.widths))]
        chosen.append(int(np.argmax(weights)))
    return tuple(chosen)


def _nonlinear_solver() -> str | Path:
    """The name under which MindtPy finds a nonlinear solver here, or a program to find under ``ipopt``."""
    if _has_cyipopt():
        return "cyipopt"
    if shutil.which("ipopt"):
        return "ipopt"
    spec = importlib.util.find_spec("pyomo_ripopt")
    if spec is not None and spec.origin is not None:
        program = Path(spec.origin).parent / "bin" / "ripopt"
        if program.is_file():
            return program
    raise MissingBackendError(
        "solver 'mindtpy' needs Ipopt or a replacement for it: run `pip install onnx-mdp[mindtpy]`, or see "
        "'The paper's solver' in the README"
    )


@contextmanager
def _on_path(backend: str | Path) -> Iterator[None]:
    """Let a program be found as ``ipopt``, the only name of the kind that MindtPy knows."""
    if isinstance(backend, str):
        yield
        return
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{_alias(backend)}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


@functools.cache
def _alias(program: Path) -> str:
    """A folder with a link called ``ipopt``; it lasts as long as this process: Pyomo remembers the path."""
    folder = tempfile.mkdtemp(prefix="onnx-mdp-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (Path(folder) / "ipopt").symlink_to(program)
    return folder


@contextmanager
def _silence() -> Iterator[logging.Logger]:
    """Yield a silent logger for MindtPy, and keep Pyomo's own warnings about its transformations back."""
    quiet, pyomo = logging.getLogger("onnx_mdp.mindtpy"), logging.getLogger("pyomo")
    quiet.setLevel(logging.CRITICAL)
    level = pyomo.level
    pyomo.setLevel(logging.ERROR)
    try:
        yield quiet
    finally:
        pyomo.setLevel(level)


def _has_cyipopt() -> bool:
    try:
        import cyipopt  # type: ignore[import-not-found]  # noqa: F401
        from pyomo.contrib.pynumero.asl import AmplInterface  # type: ignore[import-untyped]
    except ImportError:
        return False
    return bool(AmplInterface.available())
