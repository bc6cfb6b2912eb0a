"""The pruning problem as an exact mixed-integer linear program, modelled in Pyomo, solved by HiGHS.

Every option i of a variable v has a binary w[v, i], and every tuple t of a factor over two or more
variables a continuous y[f, t] >= 0. With S = budget - Σ minimal costs and costs above their minimum,

    maximise   Σ V_v[i] w[v, i] + Σ V_f[t] y[f, t]
    such that  Σ_i w[v, i] = 1                                  for every variable v
               Σ_{t: t_v = i} y[f, t] = w[v, i]                 for every factor f, v in f, option i
               Σ C_v[i] w[v, i] / S + Σ C_f[t] y[f, t] / S <= 1          and so for every other budget
               w[m, absent] equal for all members m of a block
               Σ_i width_i w[total, i] = offset + Σ_p c_p Σ_i width_i w[p, i]   for every width sum.

Once w is 0/1 the equalities leave one y per factor, so no big-M and no integer y is needed. This is the
local marginal polytope (Wainwright and Jordan 2008, section 4) with the side constraints added. The paper
(arXiv 2504.02168) keeps the products of one-hot vectors and solves them by outer approximation.

Options and tuples that no consistent choice within the budget can use are left out beforehand.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import highspy
import numpy as np
import pyomo.environ as pyo  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pyomo.contrib.appsi.base import TerminationCondition  # type: ignore[import-untyped]
from pyomo.contrib.appsi.solvers.highs import Highs  # type: ignore[import-untyped]
from pyomo.core.expr.numeric_expr import LinearExpression  # type: ignore[import-untyped]

from onnx_mdp.errors import SolverError
from onnx_mdp.planning.problem import (
    Choice,
    PruningProblem,
    Solution,
    SolveLimits,
    Status,
    WidthSum,
    valued_by_cost,
)
from onnx_mdp.solvers.milp_tables import MilpTable, live_options, merged, milp_tables, restricted

__all__ = ["solve_milp"]

_NAME = "highs"
# The tolerances of HiGHS are absolute: this range of the objective turns them into about 1e-9 of it.
_OBJECTIVE_RANGE = 1e3
# Room in the budget row, relative: rounding must not refuse an exact fit. A choice that comes back over the
# integer budget is cut off and the search goes on, so the bound stays valid.
_ROOM = 1e-6
# With this rule of HiGHS' presolve exact fits get lost (1.16: a worse choice called optimal, a feasible
# problem infeasible; compare HiGHS issue 1725). Without it ResNet-50 is solved 1.3 times as fast, too.
_NO_AGGREGATOR = 1 << 12
_MAX_CUTS = 20
_PATIENCE_SECONDS = 30.0
_STATUS: dict[Any, Status] = {
    TerminationCondition.optimal: "optimal",
    TerminationCondition.maxTimeLimit: "feasible",
    TerminationCondition.infeasible: "infeasible",
    TerminationCondition.infeasibleOrUnbounded: "infeasible",
}

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Row:
    """One linear constraint ``lower <= Σ coefficients · x[columns] <= upper``."""

    columns: _Ints
    coefficients: _Floats
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class _Program:
    """The linear program; columns first[v] to first[v + 1] are w[v, :], those from first[-1] are y.

    `options` holds the option of every w, numbered as in the problem.
    """

    options: tuple[int, ...]
    first: _Ints
    value: _Floats
    value_offset: float
    value_range: float
    rows: tuple[_Row, ...]

    @property
    def scale(self) -> float:
        return _OBJECTIVE_RANGE / self.value_range if self.value_range > 0 else 1.0


def solve_milp(problem: PruningProblem, budget_ns: int, limits: SolveLimits) -> Solution:
    """Return the best choice within `budget_ns` and the bound that HiGHS proved, on one thread.

    Bounds hold up to HiGHS' tolerances, about 1e-6 of the range of values. A search that ends without any
    choice falls back on the fastest one, for which it may take `limits.seconds` again, and 30 s at least.
    Raises SolverError when HiGHS fails, or when neither search finds a choice in time.
    """
    started = time.perf_counter()
    program = _formulate(problem, budget_ns)
    if program is None:
        return _fall_back(problem, budget_ns, limits, started, bound=None)
    bound = program.value_offset + program.value_range
    if not problem.variables:
        return _answer(problem, (), bound, "optimal", started)
    model, solver = _model(program), _highs(limits.gap)
    metered = [f for f in problem.factors if f.cost_ns is not None]
    metered += [f for budget in problem.budgets for f in budget.factors]
    paying = {index for factor in metered for index in factor.scope}
    for _ in range(_MAX_CUTS):
        solver.config.time_limit = max(limits.seconds - (time.perf_counter() - started), 0.01)
        result = solver.solve(model)
        status = _STATUS.get(result.termination_condition)
        if status is None:
            raise SolverError(f"HiGHS stopped with {result.termination_condition.name}; try another solver")
        if status == "infeasible":
            return _fall_back(problem, budget_ns, limits, started, bound=None)
        if result.best_objective_bound is not None:
            bound = min(bound, result.best_objective_bound / program.scale)
        if result.best_feasible_objective is None:
            return _fall_back(problem, budget_ns, limits, started, bound)
        taken = _largest(program, model, result)
        choice = tuple(program.options[column] for column in taken)
        if problem.evaluate(choice)[1] <= budget_ns and problem.within_budgets(choice):
            return _answer(problem, choice, bound, status, started)
        model.cuts.add(sum(model.w[taken[index]] for index in paying) <= len(paying) - 1)
    raise SolverError(f"HiGHS returned {_MAX_CUTS} choices just over the budget; lower the budget slightly")


def _answer(
    problem: PruningProblem, choice: Choice, bound: float, status: Status, started: float
) -> Solution:
    value, cost_ns = problem.evaluate(choice)
    seconds = time.perf_counter() - started
    return Solution(choice, value, cost_ns, max(bound, value), status, None, _NAME, seconds)


def _fall_back(
    problem: PruningProblem, budget_ns: int, limits: SolveLimits, started: float, bound: float | None
) -> Solution:
    """Answer where HiGHS gave no choice; `bound` None says that it, or simple bounds, saw that none fits."""
    ceiling = sum(float(factor.value.max()) for factor in problem.factors if factor.value is not None)
    known = ceiling if bound is None else bound
    widest = problem.widest()
    if problem.evaluate(widest)[1] <= budget_ns and problem.within_budgets(widest):
        return _answer(problem, widest, known, "feasible", started)
    patience = SolveLimits(max(limits.seconds, _PATIENCE_SECONDS), gap=0.0)
    if bound is None and not any(factor.cost_ns is not None for factor in problem.factors):
        fastest_ns = problem.offset_ns if problem.offset_ns > budget_ns and not problem.budgets else None
        return Solution.infeasible(fastest_ns, _NAME, time.perf_counter() - started)
    fast = solve_milp(valued_by_cost(problem), 0, patience)
    if fast.choice is None:
        return Solution.infeasible(None, _NAME, time.perf_counter() - started)
    fastest_ns = problem.evaluate(fast.choice)[1]
    if fastest_ns <= budget_ns:
        return replace(_answer(problem, fast.choice, known, "feasible", started), fastest_ns=fastest_ns)
    if bound is not None and fast.status != "optimal":
        raise SolverError(f"no choice within the budget was found in {limits.seconds} s; allow more seconds")
    return Solution.infeasible(fastest_ns, _NAME, time.perf_counter() - started)


def _formulate(problem: PruningProblem, budget_ns: int) -> _Program | None:
    """Return the program over what simple bounds leave, or None when nothing can fit."""
    tables = milp_tables(problem)
    live = live_options(problem, tables, budget_ns)
    if live is None:
        return None
    tables = merged(restricted(table, live) for table in tables)
    if not all(table.allowed.any() for table in tables):
        return None
    least = sum(int(table.cost[table.allowed].min()) for table in tables)
    slack = budget_ns - problem.offset_ns - least
    if slack < 0:
        return None
    return _program(problem, [np.flatnonzero(mask) for mask in live], tables, slack)


def _program(problem: PruningProblem, options: list[_Ints], tables: list[MilpTable], slack: int) -> _Program:
    first = np.cumsum([0, *(len(kept) for kept in options)])
    values, costs = [np.zeros(first[-1])], [np.zeros(first[-1], np.int64)]
    amounts = [np.zeros((len(problem.budgets), first[-1]))]
    rooms = np.array([budget.allowance - budget.offset for budget in problem.budgets])
    rows = [_Row(np.arange(a, b), np.ones(b - a), 1.0, 1.0) for a, b in itertools.pairwise(first)]
    columns, offset, extent = int(first[-1]), 0.0, 0.0
    for table in tables:
        low, cheap = float(table.value[table.allowed].min()), int(table.cost[table.allowed].min())
        value, cost = table.value - low, table.cost - cheap
        frugal = table.amounts[:, table.allowed].min(axis=1, initial=np.inf)
        amount = table.amounts - frugal.reshape(-1, *([1] * len(table.scope)))
        rooms = rooms - frugal
        used = table.allowed & (cost <= slack)
        offset += low
        extent += float(value[used].max())
        if len(table.scope) == 1:
            at = slice(first[table.scope[0]], first[table.scope[0] + 1])
            values[0][at] += value
            costs[0][at] += cost
            amounts[0][:, at] += amount
        elif value[used].any() or cost[used].any() or amount[:, used].any() or not used.all():
            rows += _marginal_rows(table.scope, used, columns, first)
            values.append(value[used])
            costs.append(cost[used])
            amounts.append(amount[:, used])
            columns += len(values[-1])
    rows.append(_budget_row(np.concatenate(costs), slack))
    rows += [_amount_row(line, room) for line, room in zip(np.hstack(amounts), rooms, strict=True)]
    rows += [row for law in problem.sums for row in _sum_rows(problem, law, options, first)]
    rows += [row for block in problem.blocks for row in _block_rows(block.members, options, first)]
    flat = tuple(int(option) for kept in options for option in kept)
    return _Program(flat, first, np.concatenate(values), offset, extent, tuple(rows))


def _budget_row(costs: _Ints, slack: int) -> _Row:
    """Costs fit the slack, relative to it; without any slack they must be nothing."""
    paid = np.flatnonzero(costs)
    unit = max(slack, 1)
    return _Row(paid, costs[paid] / unit, -np.inf, slack / unit + _ROOM)


def _amount_row(amounts: _Floats, room: float) -> _Row:
    """What is used above the least fits the room, relative to it."""
    used = np.flatnonzero(amounts)
    unit = max(abs(room), float(np.abs(amounts).max(initial=0.0)) * 1e-9, 1e-300)
    return _Row(used, amounts[used] / unit, -np.inf, room / unit + _ROOM)


def _marginal_rows(scope: tuple[int, ...], used: _Mask, start: int, first: _Ints) -> Iterator[_Row]:
    """The y of a factor, columns from `start`, add up to the w of each of its variables."""
    for index, places in zip(scope, np.nonzero(used), strict=True):
        for place in range(first[index + 1] - first[index]):
            single = first[index] + place
            yield _equal(single, start + np.flatnonzero(places == place))


def _equal(column: int, others: _Ints) -> _Row:
    return _Row(np.append(others, column), np.append(np.ones(len(others)), -1.0), 0.0, 0.0)


def _sum_rows(
    problem: PruningProblem, law: WidthSum, options: Sequence[_Ints], first: _Ints
) -> Iterator[_Row]:
    """One equation; a sum over a single part is a map between options, and that is tighter."""
    terms = [(law.total, -1), *law.parts]
    widths = [c * np.asarray(problem.variables[index].widths)[options[index]] for index, c in terms]
    if len(law.parts) == 1:
        for place, width in enumerate(-widths[0]):
            reaching = first[law.parts[0][0]] + np.flatnonzero(widths[1] + law.offset == width)
            yield _equal(first[law.total] + place, reaching)
    else:
        columns = np.concatenate([np.arange(first[index], first[index + 1]) for index, _ in terms])
        scale = float(max(1, *(abs(width).max() for width in widths)))
        yield _Row(columns, np.concatenate(widths) / scale, -law.offset / scale, -law.offset / scale)


def _block_rows(members: tuple[int, ...], options: Sequence[_Ints], first: _Ints) -> Iterator[_Row]:
    """The absent states of all members are equal; bounds keep or drop them together, so one tells."""
    if options[members[0]][0] == 0:
        for member in members[1:]:
            yield _equal(first[member], first[[members[0]]])


def _model(program: _Program) -> Any:
    """Return the Pyomo model; linear expressions are made from arrays, `sum` rules are far slower."""
    model = pyo.ConcreteModel()
    binaries = int(program.first[-1])
    model.w = pyo.Var(range(binaries), domain=pyo.Binary)
    model.y = pyo.Var(range(binaries, len(program.value)), domain=pyo.NonNegativeReals)
    variables = [*model.w.values(), *model.y.values()]

    def row(_: Any, index: int) -> Any:
        given = program.rows[index]
        body = _linear(variables, given.columns, given.coefficients)
        return None if np.isinf(given.lower) else given.lower, body, given.upper

    model.rows = pyo.Constraint(range(len(program.rows)), rule=row)
    model.cuts = pyo.ConstraintList()
    worth = np.flatnonzero(program.value)
    scaled = _linear(variables, worth, program.scale * program.value[worth])
    model.worth = pyo.Objective(expr=scaled + program.scale * program.value_offset, sense=pyo.maximize)
    return model


def _linear(variables: list[Any], columns: _Ints, coefficients: _Floats) -> Any:
    terms = [variables[column] for column in columns.tolist()]
    return LinearExpression(constant=0.0, linear_coefs=coefficients.tolist(), linear_vars=terms)


def _highs(gap: float) -> Any:
    # HiGHS keeps one pool of threads a process and refuses to run with another count than it was made for.
    highspy.Highs.resetGlobalScheduler(True)
    solver = Highs()
    solver.config.load_solution = False
    solver.config.mip_gap = gap
    solver.highs_options = {
        "output_flag": False,
        "threads": 1,
        "parallel": "off",
        "random_seed": 0,
        "presolve_rule_off": _NO_AGGREGATOR,
    }
    return solver


def _largest(program: _Program, model: Any, result: Any) -> list[int]:
    """Return for every variable the column of its largest w."""
    primals = result.solution_loader.get_primals(list(model.w.values()))
    w = np.array([primals[variable] for variable in model.w.values()])
    return [int(start + w[start:end].argmax()) for start, end in itertools.pairwise(program.first)]
