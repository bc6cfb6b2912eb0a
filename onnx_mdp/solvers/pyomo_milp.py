"""The pruning problem as an exact mixed-integer linear program, modelled in Pyomo, solved by HiGHS.

Every option i of a variable v has a binary w[v, i], and every tuple t of a factor over two or more
variables a continuous y[f, t] >= 0. With S = budget - Σ minimal costs and costs above their minimum,

    maximise   Σ V_v[i] w[v, i] + Σ V_f[t] y[f, t]
    such that  Σ_i w[v, i] = 1                                  for every variable v
               Σ_{t: t_v = i} y[f, t] = w[v, i]                 for every factor f, v in f, option i
               Σ C_v[i] w[v, i] / S + Σ C_f[t] y[f, t] / S <= 1
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyomo.environ as pyo  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pyomo.contrib.appsi.base import TerminationCondition  # type: ignore[import-untyped]
from pyomo.contrib.appsi.solvers.highs import Highs  # type: ignore[import-untyped]
from pyomo.core.expr.numeric_expr import LinearExpression  # type: ignore[import-untyped]

from onnx_mdp.errors import SolverError
from onnx_mdp.problem import Choice, PruningProblem, Solution, SolveLimits, Status, WidthSum, valued_by_cost

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
# Dearer than any sum of costs that a problem may hold.
_NEVER_NS = 2**53

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
class _Table:
    """One factor over ascending variables: value, cost, and which tuples may be used at all."""

    scope: tuple[int, ...]
    value: _Floats
    cost: _Ints
    allowed: _Mask


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
    paying = {index for factor in problem.factors if factor.cost_ns is not None for index in factor.scope}
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
        if problem.evaluate(choice)[1] <= budget_ns:
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
    if problem.evaluate(problem.widest())[1] <= budget_ns:
        return _answer(problem, problem.widest(), known, "feasible", started)
    patience = SolveLimits(max(limits.seconds, _PATIENCE_SECONDS), gap=0.0)
    fast = solve_milp(valued_by_cost(problem), 0, patience)
    assert fast.choice is not None  # without costs the widest choice always fits
    fastest_ns = problem.evaluate(fast.choice)[1]
    if fastest_ns <= budget_ns:
        return replace(_answer(problem, fast.choice, known, "feasible", started), fastest_ns=fastest_ns)
    if bound is not None and fast.status != "optimal":
        raise SolverError(f"no choice within the budget was found in {limits.seconds} s; allow more seconds")
    return Solution.infeasible(fastest_ns, _NAME, time.perf_counter() - started)


def _tables(problem: PruningProblem) -> list[_Table]:
    """Return the factors, those of equal scope merged, with the tuples that blocks forbid."""
    tables = []
    for factor in problem.factors:
        shape = tuple(len(problem.variables[index].widths) for index in factor.scope)
        value = np.zeros(shape) if factor.value is None else factor.value
        cost = np.zeros(shape, np.int64) if factor.cost_ns is None else factor.cost_ns
        order = np.argsort(factor.scope)
        scope = tuple(factor.scope[axis] for axis in order)
        tables.append(_Table(scope, value.transpose(order), cost.transpose(order), _possible(problem, scope)))
    return _merged(tables)


def _possible(problem: PruningProblem, scope: tuple[int, ...]) -> _Mask:
    """Return which tuples hold all or none of the absent states of a block, bool[options of each]."""
    shape = tuple(len(problem.variables[index].widths) for index in scope)
    grid = dict(zip(scope, np.indices(shape, sparse=True), strict=True))
    possible = np.ones(shape, dtype=bool)
    for block in problem.blocks:
        inside = [grid[member] == 0 for member in block.members if member in grid]
        for absent in inside[1:]:
            possible &= absent == inside[0]
    return possible


def _merged(tables: Iterable[_Table]) -> list[_Table]:
    merged: dict[tuple[int, ...], _Table] = {}
    for table in tables:
        if table.scope in merged:
            one = merged[table.scope]
            both = one.allowed & table.allowed
            table = _Table(table.scope, one.value + table.value, one.cost + table.cost, both)
        merged[table.scope] = table
    return list(merged.values())


def _live_options(problem: PruningProblem, tables: Sequence[_Table], budget_ns: int) -> list[_Mask] | None:
    """Return the options that simple bounds leave to each variable, or None when nothing can fit."""
    live = [np.ones(len(variable.widths), dtype=bool) for variable in problem.variables]
    before = None
    while before != (before := [int(mask.sum()) for mask in live]):
        if not all(before) or not _keep_affordable(live, tables, budget_ns - problem.offset_ns):
            return None
        for law in problem.sums:
            _keep_reachable(live, law, problem)
        for block in problem.blocks:
            _keep_together(live, block.members)
    return live


def _keep_affordable(live: list[_Mask], tables: Sequence[_Table], slack: int) -> bool:
    """Drop options whose cost, beside the least of everything else, exceeds the budget; False if all do."""
    extra = [np.zeros(len(mask), dtype=np.int64) for mask in live]
    usable = [np.ones(len(mask), dtype=bool) for mask in live]
    for table in tables:
        dear = np.where(table.allowed, table.cost, _NEVER_NS)[_among(table, live)]
        least = int(dear.min())
        slack -= least
        for axis, index in enumerate(table.scope):
            cheapest = dear.min(axis=tuple(other for other in range(dear.ndim) if other != axis))
            usable[index][live[index]] &= cheapest < _NEVER_NS
            extra[index][live[index]] += np.where(cheapest < _NEVER_NS, cheapest - least, 0)
    for mask, added, possible in zip(live, extra, usable, strict=True):
        mask &= possible & (added <= slack)
    return slack >= 0


def _keep_reachable(live: list[_Mask], law: WidthSum, problem: PruningProblem) -> None:
    """Drop the options of the total and the parts of a width sum that complete no solution of it."""
    terms = [c * np.asarray(problem.variables[part].widths, np.int64) for part, c in law.parts]
    before = [np.array([law.offset])]
    for (part, _), term in zip(law.parts, terms, strict=True):
        before.append(np.unique(np.add.outer(before[-1], term[live[part]])))
    totals = np.asarray(problem.variables[law.total].widths, np.int64)
    live[law.total] &= np.isin(totals, before[-1])
    after = totals[live[law.total]]
    for (part, _), term, sums in zip(law.parts[::-1], terms[::-1], before[-2::-1], strict=True):
        live[part] &= np.isin(np.add.outer(term, sums), after).any(axis=1)
        after = np.unique(np.subtract.outer(after, term[live[part]]))


def _keep_together(live: list[_Mask], members: tuple[int, ...]) -> None:
    absent = all(live[member][0] for member in members)
    present = all(live[member][1:].any() for member in members)
    for member in members:
        live[member][0] &= absent
        live[member][1:] &= present


def _among(table: _Table, live: Sequence[_Mask]) -> tuple[_Ints, ...]:
    return np.ix_(*(np.flatnonzero(live[index]) for index in table.scope))


def _restricted(table: _Table, live: Sequence[_Mask]) -> _Table:
    """Drop dead options, and variables with one option left: a pair with such a variable becomes unary."""
    at = _among(table, live)
    value, cost, allowed = table.value[at], table.cost[at], table.allowed[at]
    scope = tuple(index for index, size in zip(table.scope, value.shape, strict=True) if size > 1)
    return _Table(scope, value.squeeze(), cost.squeeze(), allowed.squeeze())


def _formulate(problem: PruningProblem, budget_ns: int) -> _Program | None:
    """Return the program over what simple bounds leave, or None when nothing can fit."""
    tables = _tables(problem)
    live = _live_options(problem, tables, budget_ns)
    if live is None:
        return None
    tables = _merged(_restricted(table, live) for table in tables)
    if not all(table.allowed.any() for table in tables):
        return None
    least = sum(int(table.cost[table.allowed].min()) for table in tables)
    slack = budget_ns - problem.offset_ns - least
    if slack < 0:
        return None
    return _program(problem, [np.flatnonzero(mask) for mask in live], tables, slack)


def _program(problem: PruningProblem, options: list[_Ints], tables: list[_Table], slack: int) -> _Program:
    first = np.cumsum([0, *(len(kept) for kept in options)])
    values, costs = [np.zeros(first[-1])], [np.zeros(first[-1], np.int64)]
    rows = [_Row(np.arange(a, b), np.ones(b - a), 1.0, 1.0) for a, b in itertools.pairwise(first)]
    columns, offset, extent = int(first[-1]), 0.0, 0.0
    for table in tables:
        low, cheap = float(table.value[table.allowed].min()), int(table.cost[table.allowed].min())
        value, cost = table.value - low, table.cost - cheap
        used = table.allowed & (cost <= slack)
        offset += low
        extent += float(value[used].max())
        if len(table.scope) == 1:
            at = slice(first[table.scope[0]], first[table.scope[0] + 1])
            values[0][at] += value
            costs[0][at] += cost
        elif value[used].any() or cost[used].any() or not used.all():
            rows += _marginal_rows(table.scope, used, columns, first)
            values.append(value[used])
            costs.append(cost[used])
            columns += len(values[-1])
    rows.append(_budget_row(np.concatenate(costs), slack))
    rows += [row for law in problem.sums for row in _sum_rows(problem, law, options, first)]
    rows += [row for block in problem.blocks for row in _block_rows(block.members, options, first)]
    flat = tuple(int(option) for kept in options for option in kept)
    return _Program(flat, first, np.concatenate(values), offset, extent, tuple(rows))


def _budget_row(costs: _Ints, slack: int) -> _Row:
    """Costs fit the slack, relative to it; without any slack they must be nothing."""
    paid = np.flatnonzero(costs)
    unit = max(slack, 1)
    return _Row(paid, costs[paid] / unit, -np.inf, slack / unit + _ROOM)


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
