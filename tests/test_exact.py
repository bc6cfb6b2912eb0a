"""The exact solver against brute force and HiGHS, its laws, and what it does with the impossible."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from unittest import mock

import highspy
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from onnx_mdp.errors import MissingBackendError, SolverError
from onnx_mdp.planning.problem import Block, Budget, Factor, PruningProblem, Variable, WidthSum
from onnx_mdp.solvers import SolveLimits, cheapest, compiled, fastest, mindtpy, network, search, solve
from onnx_mdp.solvers.compiled import CompiledProblem
from onnx_mdp.solvers.exact import Exact, price, upper_bound
from onnx_mdp.solvers.fronts import solve_front

EXACT = SolveLimits(gap=0.0)
LAWS = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # shrinking tables takes minutes
)
MANY = settings(LAWS, max_examples=500)


def table(draw: st.DrawFn, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Values or costs: rough, tied, or all zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    flavour = draw(st.sampled_from(["rough", "rough", "tied", "zero"]))
    if kind == "cost":
        return {
            "rough": rng.integers(0, 1000, shape),
            "tied": 100 * rng.integers(0, 4, shape),
            "zero": np.zeros(shape, np.int64),
        }[flavour]
    return {
        "rough": rng.normal(size=shape),
        "tied": rng.integers(0, 3, shape).astype(float),
        "zero": np.zeros(shape),
    }[flavour]


@st.composite
def problems(draw: st.DrawFn, *, budgets: bool = False) -> PruningProblem:
    """Chains, trees, shared streams, disconnected parts; blocks, width sums, tables of up to four widths."""
    count = draw(st.integers(1, 6))
    variables = []
    for index in range(count):
        widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True))
        absent = [0] if draw(st.booleans()) else []
        variables.append(Variable(f"v{index}", tuple(absent + sorted(8 * w for w in widths))))
    removable = [i for i, v in enumerate(variables) if v.widths[0] == 0]
    blocks = []
    if len(removable) >= 2 and draw(st.booleans()):
        blocks.append(Block("branch", tuple(removable[: draw(st.integers(2, len(removable)))])))
    sums = []
    if count >= 2 and draw(st.booleans()):
        parts = tuple((i, draw(st.integers(1, 2))) for i in range(draw(st.integers(1, min(3, count)))))
        top = sum(c * variables[i].widths[-1] for i, c in parts)
        offered = draw(st.sets(st.integers(0, top // 8), max_size=10))
        variables.append(Variable("joined", tuple(sorted({8 * w for w in offered} | {top}))))
        sums.append(WidthSum(count, parts, 0))

    def scope() -> tuple[int, ...]:
        size = draw(st.integers(1, min(4, len(variables))))
        return tuple(draw(st.permutations(range(len(variables))))[:size])

    factors = []
    for _ in range(draw(st.integers(1, 2 * count + 1))):
        where = scope()
        shape = tuple(len(variables[v].widths) for v in where)
        value = table(draw, shape, "value") if draw(st.booleans()) else None
        factors.append(Factor(where, value, table(draw, shape, "cost")))
    extra = []
    for index in range(draw(st.integers(1, 3)) if budgets else 0):
        amounts = []
        for _ in range(draw(st.integers(1, 3))):
            where = scope()
            amounts.append(
                Factor(where, table(draw, tuple(len(variables[v].widths) for v in where), "value"))
            )
        peak = draw(st.booleans())
        total = (max if peak else sum)(float(f.value.max()) for f in amounts)
        extra.append(Budget(f"b{index}", total * draw(st.floats(0.2, 1.0)), tuple(amounts), peak=peak))
    offset = draw(st.integers(-200, 200))
    return PruningProblem(tuple(variables), tuple(factors), tuple(sums), tuple(blocks), offset, tuple(extra))


def budget_between(problem: PruningProblem, share: float) -> int:
    """A share of the way from the smallest reachable cost to that of the dearest choice."""
    low = fastest(dataclasses.replace(problem, budgets=()), "exhaustive").cost_ns
    high = problem.offset_ns + sum(int(f.cost_ns.max()) for f in problem.factors if f.cost_ns is not None)
    return round(low + share * (high - low))


def agree(one: float, other: float) -> bool:
    return one == other or one == pytest.approx(other, rel=1e-9, abs=1e-9)


SHARES = st.floats(-0.1, 1.0)


@MANY
@given(problems(), SHARES)
def test_exact_is_brute_force(problem: PruningProblem, share: float):
    budget_ns = budget_between(problem, share)
    truth, answer = solve(problem, budget_ns, "exhaustive"), solve(problem, budget_ns, limits=EXACT)
    assert answer.status == truth.status
    assert agree(answer.value, truth.value)
    assert agree(answer.bound, truth.value)
    if truth.choice is None:
        assert answer.fastest_ns == truth.fastest_ns


@pytest.mark.slow
@MANY
@given(problems(budgets=True), SHARES)
def test_exact_is_brute_force_under_several_budgets(problem: PruningProblem, share: float):
    budget_ns = budget_between(problem, share)
    truth, answer = solve(problem, budget_ns, "exhaustive"), solve(problem, budget_ns, limits=EXACT)
    assert answer.status == truth.status
    assert agree(answer.value, truth.value)
    assert agree(answer.bound, truth.value)
    if truth.choice is None:
        assert answer.fastest_ns == truth.fastest_ns


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Constants with which small problems meet what is meant for large ones."""
    hub = {"_HUB_LEAST": 0, "_HUB_SHARE": 0.0}
    with (
        mock.patch.object(compiled, "_COARSE", 2),
        mock.patch.multiple(network, _LARGE=0, _SPARSE=2.0),
        mock.patch.multiple(search, _FEW=1, _NEARLY=2.0, _CROWDED=1, _SMALL=0, _LARGE=0, **hub),
    ):
        yield


@pytest.mark.slow  # half a minute
@LAWS
@given(st.one_of(problems(), problems(budgets=True)), SHARES)
def test_every_stage_is_exact_where_small_problems_reach_it(problem: PruningProblem, share: float):
    """Two options on the first look, one in the first window, and branching as soon as there is a label."""
    budget_ns = budget_between(problem, share)
    truth = solve(problem, budget_ns, "exhaustive")
    with eager():
        answer = solve(problem, budget_ns, limits=EXACT)
    assert answer.status == truth.status
    assert agree(answer.value, truth.value)
    assert agree(answer.bound, truth.value)
    if truth.choice is None:
        assert answer.fastest_ns == truth.fastest_ns


@LAWS
@given(problems(budgets=True), SHARES, st.sampled_from([1e-3, 1e-2, 1e-1]))
def test_a_gap_is_kept_and_its_bound_is_one(problem: PruningProblem, share: float, gap: float):
    budget_ns = budget_between(problem, share)
    truth = solve(problem, budget_ns, "exhaustive")
    answer = solve(problem, budget_ns, limits=SolveLimits(gap=gap))
    assert answer.status == truth.status
    if truth.choice is not None:
        assert answer.bound >= truth.value - 1e-9
        assert answer.bound - answer.value <= gap * abs(answer.bound) + 1e-9


@LAWS
@given(problems(), SHARES, st.integers(0, 500))
def test_more_budget_is_never_worth_less(problem: PruningProblem, share: float, more: int):
    budget_ns = budget_between(problem, share)
    less = solve(problem, budget_ns, limits=EXACT).value
    assert solve(problem, budget_ns + more, limits=EXACT).value >= less - 1e-9


@LAWS
@given(problems(), SHARES, st.data())
def test_removing_an_option_is_never_worth_more(problem: PruningProblem, share: float, data: st.DataObject):
    budget_ns = budget_between(problem, share)
    variable = data.draw(st.integers(0, len(problem.variables) - 1))
    gone = np.zeros(len(problem.variables[variable].widths))
    gone[data.draw(st.integers(0, len(gone) - 1))] = 1.0
    without = Budget("without", 0.5, (Factor((variable,), gone),), peak=True)
    fewer = dataclasses.replace(problem, budgets=(without,))
    whole = solve(problem, budget_ns, limits=EXACT)
    assert solve(fewer, budget_ns, limits=EXACT).value <= whole.value + 1e-9


@LAWS
@given(problems(), SHARES, st.sampled_from([0.25, 3.0, 1024.0]), st.sampled_from([1, 7, 1000]))
def test_scaling_values_or_costs_scales_the_answer(
    problem: PruningProblem, share: float, worth: float, dear: int
):
    budget_ns = budget_between(problem, share)
    factors = tuple(
        Factor(
            f.scope,
            None if f.value is None else worth * f.value,
            None if f.cost_ns is None else dear * f.cost_ns,
        )
        for f in problem.factors
    )
    scaled = dataclasses.replace(problem, factors=factors, offset_ns=dear * problem.offset_ns)
    one, other = solve(problem, budget_ns, limits=EXACT), solve(scaled, dear * budget_ns, limits=EXACT)
    assert one.status == other.status
    assert agree(worth * one.value, other.value)


@LAWS
@given(problems(budgets=True), st.floats(0.0, 1.1))
def test_the_cheapest_choice_of_a_value_is_that_of_brute_force(problem: PruningProblem, share: float):
    most = solve(problem, 10**9, "exhaustive").value
    least = most - share * abs(most) if math.isfinite(most) else 0.0
    truth, answer = cheapest(problem, least, "exhaustive"), cheapest(problem, least, limits=EXACT)
    assert answer.status == truth.status
    assert answer.cost_ns == truth.cost_ns
    if answer.choice is not None:
        assert answer.value >= least - 1e-9
        assert answer.fastest_ns == answer.cost_ns


@LAWS
@given(problems(budgets=True), st.floats(0.0, 2.0), st.integers(0, 2**32 - 1))
def test_a_pass_of_some_depth_bounds_options_as_a_whole_one(problem: PruningProblem, depth: float, seed: int):
    whole = CompiledProblem(problem).network
    pool = np.random.default_rng(seed).exponential(1e-3, (3, whole.resources))
    totals, bounds = whole.marginals(pool)
    with mock.patch.multiple(network, _LARGE=0, _SPARSE=2.0):
        same, shallow = whole.marginals(pool, depth)
    np.testing.assert_array_equal(same, totals)
    for one, other in zip(bounds, shallow, strict=True):
        np.testing.assert_allclose(other, np.maximum(one, totals[:, None] - depth), rtol=1e-12, atol=1e-12)


@LAWS
@given(problems(), st.lists(SHARES, min_size=1, max_size=6))
def test_a_front_is_its_single_solves(problem: PruningProblem, shares: list[float]):
    budgets_ns = [budget_between(problem, share) for share in shares]
    with eager():
        hurried = solve_front(problem, budgets_ns, limits=EXACT)
    front = solve_front(problem, budgets_ns, limits=EXACT)
    for budget_ns, *answers in zip(budgets_ns, front, hurried, strict=True):
        alone = solve(problem, budget_ns, limits=EXACT)
        for answer in answers:
            assert answer.status == alone.status
            assert agree(answer.value, alone.value)
            assert agree(answer.bound, alone.bound)


@pytest.mark.parametrize("seed", range(3))
def test_neighbouring_budgets_are_proven_together(seed: int):
    """With many options the shared search proves most answers, and all are those of single solves."""
    problem = chain(np.random.default_rng(seed), 9, 24)
    budgets_ns = [budget_of(problem, share) for share in np.linspace(0.2, 0.95, 13)]
    alone = [solve(problem, budget_ns, limits=EXACT) for budget_ns in budgets_ns]
    one_search = search.Search._search
    with mock.patch.object(search.Search, "_search", autospec=True, side_effect=one_search) as searched:
        front = solve_front(problem, budgets_ns, limits=EXACT)
    assert searched.call_count <= len(budgets_ns) // 2
    for one, other in zip(front, alone, strict=True):
        assert one.status == other.status
        assert one.gap <= 1e-11
        assert agree(one.value, other.value)


@LAWS
@given(problems(), SHARES)
def test_the_lagrangian_bound_and_its_price(problem: PruningProblem, share: float):
    budget_ns = budget_between(problem, share)
    truth = solve(problem, budget_ns, "exhaustive")
    assert upper_bound(problem, budget_ns) >= truth.value - 1e-9
    assert price(problem, budget_ns) >= 0


@pytest.mark.parametrize("solver", ["greedy", "linear"])
@LAWS
@given(problem=problems(), share=SHARES)
def test_heuristics_are_never_better_and_carry_the_true_bound(
    solver: str, problem: PruningProblem, share: float
):
    budget_ns = budget_between(problem, share)
    truth = solve(problem, budget_ns, "exhaustive")
    try:
        answer = solve(problem, budget_ns, solver)
    except SolverError:
        assert truth.choice is not None
        return
    assert (answer.choice is None) == (truth.choice is None)
    assert answer.value <= truth.value + 1e-9
    assert answer.bound >= truth.value - 1e-9


def chain(rng: np.random.Generator, count: int, options: int) -> PruningProblem:
    """A residual network in small: a shared stream, inner dimensions in removable blocks."""
    variables = [Variable("stream", tuple(range(1, options + 1)))]
    factors, blocks = [], []
    for index in range(count):
        inner = len(variables)
        variables.append(Variable(f"inner{index}", tuple(range(options + 1))))
        shape = (options, options + 1)
        cost = np.outer(np.arange(1, options + 1), np.arange(options + 1)) * 100
        cost = cost + (rng.integers(0, 60, shape) * (cost > 0))
        factors.append(Factor((0, inner), None, cost))
        worth = np.append(0.0, np.cumsum(np.sort(rng.lognormal(0, 1.2, options))[::-1]))
        factors.append(Factor((inner,), worth))
        blocks.append(Block(f"block{index}", (inner,)))
    factors.append(Factor((0,), np.cumsum(np.sort(rng.lognormal(0, 1, options))[::-1]) * count / 2))
    return PruningProblem(tuple(variables), tuple(factors), (), tuple(blocks))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_exact_is_highs_on_middling_problems(seed: int):
    rng = np.random.default_rng(seed)
    problem = chain(rng, int(rng.integers(4, 12)), int(rng.integers(4, 16)))
    budget_ns = budget_of(problem, rng.uniform(0.2, 0.8))
    exact = solve(problem, budget_ns, limits=EXACT)
    milp = solve(problem, budget_ns, "highs", SolveLimits(gap=1e-9))
    assert exact.status == "optimal"
    assert exact.gap <= 1e-9
    assert milp.value <= exact.value + 1e-9
    assert milp.value == pytest.approx(exact.value, rel=1e-6)


def budget_of(problem: PruningProblem, share: float) -> int:
    return round(share * problem.evaluate(problem.widest())[1])


def test_middling_problems_are_closed_quickly_and_the_same_every_time():
    problem = chain(np.random.default_rng(0), 16, 40)
    started = time.process_time()
    answers = [solve(problem, budget_of(problem, 0.5), limits=EXACT) for _ in range(2)]
    assert answers[0].choice == answers[1].choice
    assert max(answer.gap for answer in answers) <= 1e-9
    assert time.process_time() - started < 30  # seconds in practice: a hundredth


def test_a_time_limit_returns_the_incumbent_with_its_true_bound():
    problem = chain(np.random.default_rng(1), 30, 60)
    budget_ns = budget_of(problem, 0.5)
    best = solve(problem, budget_ns, limits=EXACT)
    hurried = solve(problem, budget_ns, limits=SolveLimits(seconds=1e-6, gap=0.0))
    assert hurried.choice is not None
    assert hurried.value <= best.value <= hurried.bound + 1e-9


def test_solves_of_one_problem_in_any_order_agree():
    """What one budget taught, its multipliers and bounds, does not change the answer for another."""
    problem = chain(np.random.default_rng(2), 8, 20)
    exact = Exact(problem)
    for share in (0.9, 0.4, 0.6, 0.4):
        budget_ns = budget_of(problem, share)
        assert agree(exact.solve(budget_ns, EXACT).value, solve(problem, budget_ns, limits=EXACT).value)


def test_outer_approximation_is_wrong_where_exact_is_right():
    """Latency a·b <= 9: outer approximation calls (1, 4), worth 7, optimal, and (3, 3) is worth 9."""
    widths = (1, 2, 3, 4)
    problem = PruningProblem(
        (Variable("a", widths), Variable("b", widths)),
        (
            Factor((0,), [0.0, 0.0, 4.0, 5.0]),
            Factor((1,), [0.0, 3.0, 5.0, 7.0]),
            Factor((0, 1), None, np.outer(widths, widths)),
        ),
    )
    answer = solve(problem, 9, limits=EXACT)
    assert problem.widths(answer.choice) == (3, 3)
    assert answer.value == 9.0
    assert answer.gap <= 1e-9
    paper = solve(problem, 9, "mindtpy")
    assert paper.value == 7.0
    assert paper.status == "feasible"
    assert paper.bound >= 9.0
    assert paper.gap > 0.2


def test_outer_approximation_keeps_blocks_sums_and_budgets():
    problem = PruningProblem(
        (Variable("a", (0, 8, 16)), Variable("b", (0, 8)), Variable("joined", (0, 8, 16, 24))),
        (
            Factor((0,), [0.0, 1.0, 1.5]),
            Factor((1,), [0.0, 1.0]),
            Factor((0, 2), None, np.outer((0, 8, 16), (0, 8, 16, 24))),
        ),
        (WidthSum(2, ((0, 1), (1, 1))),),
        (Block("branch", (0, 1)),),
        5,
        (Budget("channels", 16.0, (Factor((2,), [0.0, 8.0, 16.0, 24.0]),)),),
    )
    answer = solve(problem, 400, "mindtpy")
    assert answer.choice == solve(problem, 400, limits=EXACT).choice == (1, 1, 2)
    assert solve(problem, 4, "mindtpy").status == "infeasible"


def test_highs_answers_after_another_user_of_its_threads():
    """HiGHS makes one thread pool a process, and MindtPy lets it take all cores."""
    problem = chain(np.random.default_rng(4), 4, 4)
    budget_ns = budget_of(problem, 0.5)
    highspy.Highs.resetGlobalScheduler(True)
    solve(problem, budget_ns, "mindtpy")
    assert agree(solve(problem, budget_ns, "highs", EXACT).value, solve(problem, budget_ns).value)


def test_without_a_nonlinear_solver_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mindtpy, "_has_cyipopt", lambda: False)
    monkeypatch.setattr(mindtpy.shutil, "which", lambda _: None)
    monkeypatch.setattr(mindtpy.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingBackendError, match="mindtpy"):
        solve(chain(np.random.default_rng(0), 2, 3), 10**6, "mindtpy")
