"""The solvers against brute force: the same optimum, never over the budget, and a bound that holds."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import time

import numpy as np
import pytest

from onnx_mdp.errors import MissingBackendError, SolverError, UsageError
from onnx_mdp.planning.problem import Block, Factor, PruningProblem, Solution, Variable, WidthSum
from onnx_mdp.solvers import SOLVERS, SolveLimits, fastest, solve

EXACT = SolveLimits(gap=0.0)


def random_problem(seed: int, cost_scale: int = 1) -> PruningProblem:
    """Rough tables of one to four variables, often with a block, a width sum and an odd branch."""
    rng = np.random.default_rng(seed)
    variables = [_random_variable(rng, index) for index in range(int(rng.integers(1, 6)))]
    blocks, sums = [], []
    removable = [i for i, one in enumerate(variables) if one.widths[0] == 0 and len(one.widths) > 1]
    if len(removable) >= 2 and rng.random() < 0.7:
        blocks.append(Block("branch", tuple(removable[: int(rng.integers(2, len(removable) + 1))])))
    if rng.random() < 0.6:
        law = _random_sum(rng, variables)
        top = law.offset + sum(c * variables[part].widths[-1] for part, c in law.parts)
        offered = {int(width) for width in rng.choice(np.arange(0, top + 8, 8), 8) if width <= top}
        variables.append(Variable("joined", tuple(sorted(offered | {top}))))
        sums.append(law)
    factors = tuple(
        _random_factor(rng, variables, cost_scale)
        for _ in range(int(rng.integers(1, 2 * len(variables) + 2)))
    )
    offset_ns = int(rng.integers(0, 500)) * cost_scale
    return PruningProblem(tuple(variables), factors, tuple(sums), tuple(blocks), offset_ns)


def _random_variable(rng: np.random.Generator, index: int) -> Variable:
    widths = 8 * np.sort(rng.choice(np.arange(1, 6), int(rng.integers(1, 5)), replace=False))
    return Variable(f"v{index}", tuple(np.append([0] if rng.random() < 0.5 else [], widths)))


def _random_sum(rng: np.random.Generator, variables: list[Variable]) -> WidthSum:
    some = rng.choice(len(variables), int(rng.integers(1, min(3, len(variables)) + 1)), replace=False)
    parts = tuple((int(part), int(rng.integers(1, 3))) for part in some)
    return WidthSum(len(variables), parts, 8 * int(rng.integers(0, 2)))


def _random_factor(rng: np.random.Generator, variables: list[Variable], cost_scale: int) -> Factor:
    arity = min(int(rng.choice([1, 2, 2, 2, 3, 4])), len(variables))
    scope = tuple(rng.choice(len(variables), arity, replace=False))
    shape = tuple(len(variables[index].widths) for index in scope)
    value = rng.normal(size=shape) if rng.random() < 0.7 else None
    cost_ns = rng.integers(0, 1000, shape) * cost_scale + rng.integers(0, 3, shape)
    return Factor(scope, value, cost_ns if value is None or rng.random() < 0.9 else None)


def random_budget(problem: PruningProblem, seed: int) -> int:
    """From below the smallest reachable cost to above that of the widest choice."""
    low, high = fastest(problem, "exhaustive").cost_ns, problem.evaluate(problem.widest())[1]
    return round(low + np.random.default_rng(seed).uniform(-0.25, 1.1) * (high - low))


def same_value(one: float, other: float) -> bool:
    return one == pytest.approx(other, rel=1e-8, abs=1e-8)


@dataclasses.dataclass(frozen=True)
class Case:
    """A random problem with its budget, and both answers."""

    problem: PruningProblem
    budget_ns: int
    truth: Solution
    answer: Solution


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    found = []
    for seed in range(220):
        problem = random_problem(seed)
        budget_ns = random_budget(problem, seed)
        truth = solve(problem, budget_ns, "exhaustive")
        found.append(Case(problem, budget_ns, truth, solve(problem, budget_ns, "highs", EXACT)))
    return found


@pytest.fixture(scope="module")
def feasible(cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.truth.choice is not None]


def test_the_random_problems_cover_what_a_problem_can_hold(cases: list[Case], feasible: list[Case]):
    assert 150 < len(feasible) < len(cases) - 20
    for field in ("sums", "blocks"):
        assert sum(bool(getattr(case.problem, field)) for case in cases) > 50
    widest = [case.truth.choice == case.problem.widest() for case in feasible]
    assert sum(widest) < 0.3 * len(feasible)


def test_brute_force_equals_a_plain_loop():
    for seed in range(30):
        problem = random_problem(seed)
        budget_ns = random_budget(problem, seed)
        options = (range(len(variable.widths)) for variable in problem.variables)
        reached = [problem.evaluate(x) for x in itertools.product(*options) if problem.is_consistent(x)]
        answer = solve(problem, budget_ns, "exhaustive")
        assert answer.fastest_ns == min(cost_ns for _, cost_ns in reached)
        fitting = [value for value, cost_ns in reached if cost_ns <= budget_ns]
        assert answer.value == pytest.approx(max(fitting, default=-np.inf))


def test_highs_finds_the_value_that_brute_force_finds(cases: list[Case]):
    for case in cases:
        assert case.answer.status == case.truth.status
        assert same_value(case.answer.value, case.truth.value)


def test_no_choice_is_over_the_budget_or_inconsistent(feasible: list[Case]):
    for case in feasible:
        assert case.problem.is_consistent(case.answer.choice)
        assert case.answer.cost_ns == case.problem.evaluate(case.answer.choice)[1] <= case.budget_ns


def test_an_exact_bound_closes_on_the_best_value(feasible: list[Case]):
    for case in feasible:
        assert case.answer.bound >= case.answer.value
        assert same_value(case.answer.bound, case.truth.value)


def test_infeasible_carries_the_smallest_reachable_cost(cases: list[Case]):
    nothing_fits = [case for case in cases if case.truth.choice is None]
    for case in nothing_fits:
        assert case.answer.fastest_ns == case.truth.fastest_ns > case.budget_ns
        reached = solve(case.problem, case.answer.fastest_ns, "highs", EXACT)
        assert reached.cost_ns == case.answer.fastest_ns


def test_a_loose_gap_still_gives_a_bound_above_the_best(feasible: list[Case]):
    for case in feasible[:60]:
        answer = solve(case.problem, case.budget_ns, "highs", SolveLimits(gap=0.3))
        assert answer.bound >= case.truth.value - 1e-8
        assert answer.value <= case.truth.value + 1e-8


def test_more_budget_never_costs_value(feasible: list[Case]):
    for case in feasible[:20]:
        low, high = case.truth.fastest_ns, case.problem.evaluate(case.problem.widest())[1]
        budgets = [round(low + part * (high - low)) for part in (0.0, 0.3, 0.6, 1.0)]
        values = [solve(case.problem, max(b, low), "highs", EXACT).value for b in sorted(budgets)]
        assert all(a <= b + 1e-8 for a, b in itertools.pairwise(values))


def test_renumbering_variables_does_not_change_the_optimum(feasible: list[Case]):
    for case in feasible[:40]:
        order = np.random.default_rng(case.budget_ns).permutation(len(case.problem.variables))
        turned = solve(_renumbered(case.problem, order), case.budget_ns, "highs", EXACT)
        assert same_value(turned.value, case.truth.value)


def _renumbered(problem: PruningProblem, order: np.ndarray) -> PruningProblem:
    new = {int(old): index for index, old in enumerate(order)}
    return PruningProblem(
        tuple(problem.variables[old] for old in order),
        tuple(dataclasses.replace(one, scope=tuple(new[v] for v in one.scope)) for one in problem.factors),
        tuple(
            WidthSum(new[law.total], tuple((new[part], c) for part, c in law.parts), law.offset)
            for law in problem.sums
        ),
        tuple(Block(one.name, tuple(new[member] for member in one.members)) for one in problem.blocks),
        problem.offset_ns,
    )


def test_one_nanosecond_decides_even_over_seconds():
    for seed in range(25):
        problem = random_problem(seed, cost_scale=10**7)
        best = solve(problem, 2**53, "exhaustive")
        for budget_ns in (best.cost_ns, best.cost_ns - 1):
            truth = solve(problem, budget_ns, "exhaustive")
            answer = solve(problem, budget_ns, "highs", EXACT)
            assert same_value(answer.value, truth.value)


# Budgets that one choice meets exactly, each lost by HiGHS under settings that we tried: with its presolve
# aggregator, with coefficients below 1e-9, and with cuts that also name variables without a cost.
@pytest.mark.parametrize(
    ("seed", "cost_scale", "budget_ns"),
    [(100030, 4, 7559), (1322, 27173, 27499079), (3, 10**7, 36200000005), (629, 88417821, 164368729241)],
)
def test_an_exact_fit_is_not_lost(seed: int, cost_scale: int, budget_ns: int):
    problem = random_problem(seed, cost_scale)
    truth = solve(problem, budget_ns, "exhaustive")
    assert same_value(solve(problem, budget_ns, "highs", EXACT).value, truth.value)


def test_fastest_is_the_smallest_cost(feasible: list[Case]):
    for case in feasible[:40]:
        answer = fastest(case.problem)
        assert answer.cost_ns == answer.fastest_ns == case.truth.fastest_ns
        assert case.problem.is_consistent(answer.choice)


# Widths 1 to 4 and latency a·b <= 9: the feasible set is not convex, and outer approximation answers 7.
def test_a_budget_on_a_product_of_widths():
    widths = (Variable("a", (1, 2, 3, 4)), Variable("b", (1, 2, 3, 4)))
    product = np.outer([1, 2, 3, 4], [1, 2, 3, 4])
    importance = (Factor((0,), [0, 0, 4, 5]), Factor((1,), [0, 3, 5, 7]))
    problem = PruningProblem(widths, (*importance, Factor((0, 1), None, product)))
    answer = solve(problem, 9, "highs", EXACT)
    assert (answer.choice, answer.value, answer.status) == ((2, 2), 9.0, "optimal")


def resnet(options: int, seed: int = 0, stages: tuple[int, ...] = (3, 4, 6, 3)) -> PruningProblem:
    """Return a bottleneck ResNet: a stream per stage, identity blocks removable, costs quantised by 16.

    Importance is the running sum of sorted log-normal scores; costs have one per cent of noise, so they
    are not monotone. `options` widths per dimension.
    """
    rng = np.random.default_rng(seed)
    variables, factors, blocks = [], [], []

    def dimension(name: str, size: int, removable: bool) -> int:
        widths = np.unique(np.linspace(size / options, size, options).round().astype(int))
        variables.append(Variable(name, tuple(np.append([0] if removable else [], widths))))
        return len(variables) - 1

    def widths(index: int) -> np.ndarray:
        return np.asarray(variables[index].widths)

    def importance(index: int) -> np.ndarray:
        scores = np.sort(rng.lognormal(0, 1.2, widths(index)[-1]))[::-1]
        return np.append(0, np.cumsum(scores / scores.sum() * rng.lognormal(0, 0.7)))[widths(index)]

    def conv(reads: np.ndarray, writes: np.ndarray, kernel: int, side: int) -> np.ndarray:
        a, b = reads[:, None], writes[None, :]
        work = np.ceil(a / 16) * np.ceil(b / 16) * 512 * kernel**2 * side**2 / 60
        moved = side**2 * (a + b) * 0.4 + 20_000
        noisy = (work + moved) * np.exp(rng.normal(0, 0.01, work.shape))
        return np.where((a > 0) & (b > 0), noisy, 0).astype(np.int64)

    stream = dimension("stem", 64, removable=False)
    factors.append(Factor((stream,), importance(stream), conv(np.array([3]), widths(stream), 7, 112)[0]))
    for stage, count in enumerate(stages):
        before, side = stream, 56 >> stage
        stream = dimension(f"stage{stage}", 256 << stage, removable=False)
        for index in range(count):
            reads = stream if index else before
            inner = [dimension(f"s{stage}b{index}c{k}", 64 << stage, removable=index > 0) for k in (1, 2)]
            if index:
                blocks.append(Block(f"s{stage}b{index}", tuple(inner)))
            shown = (widths(inner[1]) > 0)[:, None] * importance(stream)[None, :]
            factors += [
                Factor((reads, inner[0]), None, conv(widths(reads), widths(inner[0]), 1, side)),
                Factor(tuple(inner), None, conv(widths(inner[0]), widths(inner[1]), 3, side)),
                Factor((inner[1], stream), shown, conv(widths(inner[1]), widths(stream), 1, side)),
                *(Factor((one,), importance(one)) for one in inner),
            ]
        factors.append(Factor((before, stream), None, conv(widths(before), widths(stream), 1, side)))
    factors.append(Factor((stream,), None, conv(widths(stream), np.array([1000]), 1, 1)[:, 0]))
    return PruningProblem(tuple(variables), tuple(factors), (), tuple(blocks), 100_000)


@pytest.fixture(scope="module")
def small_resnet() -> PruningProblem:
    return resnet(5, stages=(2, 2))


def share(problem: PruningProblem, part: float) -> int:
    return round(part * problem.evaluate(problem.widest())[1])


def test_a_huge_budget_keeps_the_widest(small_resnet: PruningProblem):
    answer = solve(small_resnet, 10**18, "highs", EXACT)
    assert small_resnet.evaluate(answer.choice)[0] == pytest.approx(
        small_resnet.evaluate(small_resnet.widest())[0]
    )
    assert answer.choice == small_resnet.widest()


def test_a_small_resnet_loses_whole_blocks_when_time_is_short(small_resnet: PruningProblem):
    answer = solve(small_resnet, share(small_resnet, 0.15))
    assert answer.status == "optimal"
    assert answer.gap <= 1e-4
    assert any(answer.choice[block.members[0]] == 0 for block in small_resnet.blocks)


def test_two_runs_give_the_same_answer(small_resnet: PruningProblem):
    one, two = (solve(small_resnet, share(small_resnet, 0.4)) for _ in range(2))
    assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(two, seconds=0.0)


def test_no_time_gives_the_fastest_choice_and_a_bound():
    problem = resnet(8, stages=(2, 3))
    budget_ns = share(problem, 0.4)
    best = solve(problem, budget_ns, "highs")
    answer = solve(problem, budget_ns, "highs", SolveLimits(seconds=1e-3))
    assert answer.status == "feasible"
    assert answer.cost_ns <= budget_ns
    assert answer.value <= best.bound
    assert best.value <= answer.bound < np.inf
    assert 0 < answer.gap < 1


def test_no_time_still_tells_an_infeasible_budget():
    problem = resnet(5, stages=(2, 2))
    smallest = fastest(problem).cost_ns
    answer = solve(problem, smallest - 1, "highs", SolveLimits(seconds=1e-3))
    assert (answer.status, answer.fastest_ns) == ("infeasible", smallest)


def test_solving_prints_nothing(small_resnet: PruningProblem, capfd: pytest.CaptureFixture[str]):
    solve(small_resnet, share(small_resnet, 0.4))
    solve(small_resnet, 1)
    assert capfd.readouterr() == ("", "")


def test_a_sum_over_one_part_maps_options():
    flat = PruningProblem(
        (Variable("channels", (8, 16, 24)), Variable("flat", (8, 392, 784, 1176))),
        (Factor((0,), [3.0, 2.0, 1.0]), Factor((1,), None, [0, 1, 2, 3])),
        (WidthSum(1, ((0, 49),)),),
    )
    assert solve(flat, 3, "highs", EXACT).choice == (0, 1)
    assert fastest(flat).cost_ns == 1


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"mindtpy"}))
def test_every_solver_of_the_registry_answers(name: str):
    problem = random_problem(3)
    if name in ("greedy", "linear"):  # they prove nothing, and may not find the one choice that fits
        assert solve(problem, 10**6, name).value <= solve(problem, 10**6).value
        assert solve(problem, fastest(problem).cost_ns - 1, name).status == "infeasible"
        return
    low = fastest(problem, name).cost_ns
    assert solve(problem, low, name).cost_ns == low
    assert solve(problem, low - 1, name).status == "infeasible"
    nothing = PruningProblem((), (), offset_ns=5)
    assert solve(nothing, 5, name).choice == ()
    assert solve(nothing, 4, name).fastest_ns == 5


def test_a_solver_may_be_a_function_and_its_answer_is_checked():
    problem = random_problem(3)
    truth = solve(problem, 10**6, "exhaustive")
    assert solve(problem, 10**6, lambda *_: dataclasses.replace(truth, value=0.0, cost_ns=0)) == truth
    broken = tuple(-1 for _ in problem.variables)
    for lie, message in [
        (dataclasses.replace(truth, choice=broken), "inconsistent"),
        (dataclasses.replace(truth, choice=None), "neither"),
        (Solution.infeasible(truth.cost_ns, "s", 0.0), "infeasible"),
    ]:
        with pytest.raises(SolverError, match=message):
            solve(problem, 10**6, lambda *_, lie=lie: lie)
    with pytest.raises(SolverError, match="for a budget of"):
        solve(problem, truth.cost_ns - 1, lambda *_: truth)


def test_an_unknown_solver_lists_the_known_ones():
    with pytest.raises(UsageError, match="exhaustive, greedy, highs"):
        solve(random_problem(0), 1, "cplex")


def test_brute_force_refuses_large_problems():
    variables = tuple(Variable(f"v{index}", tuple(range(1, 11))) for index in range(7))
    with pytest.raises(UsageError, match="10000000"):
        solve(PruningProblem(variables, ()), 1, "exhaustive")


@pytest.mark.parametrize("package", ["highspy", "pyomo.environ"])
def test_a_missing_package_names_the_install_command(package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingBackendError, match="pip install pyomo highspy"):
        solve(random_problem(0), 1, "highs")


def test_naming_a_solver_does_not_import_pyomo():
    code = "import sys, onnx_mdp.solvers; sys.exit('pyomo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [12, 16])
def test_a_full_resnet50_is_solved_to_its_gap(options: int):
    problem = resnet(options)
    for part in (0.3, 0.5, 0.7):
        started = time.process_time()
        answer = solve(problem, share(problem, part), "highs", SolveLimits(seconds=300.0))
        print(f"{options} options, budget {part:.0%}: {time.process_time() - started:.1f} s of CPU")
        assert answer.status == "optimal"
        assert answer.gap <= 1e-4
