"""The pruning problem: sums of tables, laws between widths, and what it refuses to hold."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from onnx_mdp.planning.problem import (
    Block,
    Factor,
    PruningProblem,
    Solution,
    SolveLimits,
    Variable,
    WidthSum,
    valued_by_cost,
)

STEM = Variable("stem", (8, 16))
INNER = Variable("inner", (0, 8, 16))
OUTER = Variable("outer", (0, 4, 8))
JOINED = Variable("joined", (8, 16, 24, 32))


def concat_problem() -> PruningProblem:
    """Stem beside a removable branch of two dimensions; their concat is a dimension of its own."""
    rng = np.random.default_rng(0)
    factors = (
        Factor((0, 1), rng.normal(size=(2, 3)), rng.integers(0, 99, (2, 3))),
        Factor((2, 1), None, rng.integers(0, 99, (3, 3))),
        Factor((3,), rng.normal(size=4)),
    )
    sums = (WidthSum(3, ((0, 1), (1, 1)), 0),)
    return PruningProblem((STEM, INNER, OUTER, JOINED), factors, sums, (Block("branch", (1, 2)),), 7)


def all_choices(problem: PruningProblem) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(variable.widths)) for variable in problem.variables)))


def test_value_and_cost_are_sums_of_table_entries():
    problem = concat_problem()
    first, second, third = problem.factors
    for a, b, c, d in all_choices(problem):
        value, cost_ns = problem.evaluate((a, b, c, d))
        assert value == pytest.approx(first.value[a, b] + third.value[d], abs=1e-15)
        assert cost_ns == 7 + first.cost_ns[a, b] + second.cost_ns[c, b]
        assert type(cost_ns) is int


def test_a_choice_is_consistent_when_widths_add_up_and_blocks_go_whole():
    problem = concat_problem()
    for choice in all_choices(problem):
        stem, inner, outer, joined = problem.widths(choice)
        assert problem.is_consistent(choice) == (joined == stem + inner and (inner == 0) == (outer == 0))


def test_the_order_of_factors_does_not_change_a_choice():
    problem = concat_problem()
    turned = dataclasses.replace(problem, factors=problem.factors[::-1])
    assert [problem.evaluate(x) for x in all_choices(problem)] == [
        turned.evaluate(x) for x in all_choices(problem)
    ]


def test_widest_is_every_last_option_and_consistent():
    problem = concat_problem()
    assert problem.widest() == (1, 2, 2, 3)
    assert problem.is_consistent(problem.widest())


def test_valued_by_cost_turns_costs_into_values():
    problem = concat_problem()
    turned = valued_by_cost(problem)
    for choice in all_choices(problem):
        assert turned.evaluate(choice) == (-(problem.evaluate(choice)[1] - 7), 0)
        assert turned.is_consistent(choice) == problem.is_consistent(choice)


def test_tables_are_copies_that_cannot_be_written():
    table = np.ones(2)
    factor = Factor((0,), table, np.ones(2, np.int32))
    table[0] = 5
    assert factor.value[0] == 1
    assert (factor.value.dtype, factor.cost_ns.dtype) == (np.float64, np.int64)
    with pytest.raises(ValueError, match="read-only"):
        factor.cost_ns[0] = 3


@pytest.mark.parametrize("choice", [(), (0, 0, 0), (0, 0, 0, 4), (-1, 0, 0, 0)])
def test_a_choice_of_something_else_is_refused(choice):
    problem = concat_problem()
    assert not problem.is_consistent(choice)
    with pytest.raises(ValueError, match="one option of each of 4 variables"):
        problem.evaluate(choice)


@pytest.mark.parametrize("widths", [(), (8, 8), (16, 8), (-8, 8), (8, 0)])
def test_widths_are_distinct_and_ascending(widths):
    with pytest.raises(ValueError, match="ascending"):
        Variable("v", widths)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Factor((), np.ones(())), "1 to 4 distinct"),
        (lambda: Factor((0, 0), np.ones((2, 2))), "1 to 4 distinct"),
        (lambda: Factor((0, 1, 2, 3, 4), np.ones((1,) * 5)), "1 to 4 distinct"),
        (lambda: Factor((0,)), "value table, a cost table"),
        (lambda: Factor((0,), np.array([1.0, np.nan])), "finite"),
        (lambda: Factor((0,), None, np.array([1.0, 2.0])), "integers"),
        (lambda: WidthSum(0, ()), "distinct parts"),
        (lambda: WidthSum(0, ((0, 1),)), "other than the total"),
        (lambda: WidthSum(0, ((1, 0),)), "other than 0"),
        (lambda: Block("b", ()), "distinct members"),
        (lambda: Block("b", (1, 1)), "distinct members"),
        (lambda: SolveLimits(seconds=0.0), "seconds > 0"),
        (lambda: SolveLimits(gap=-1.0), "gap"),
    ],
)
def test_a_part_that_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": (Factor((4,), np.ones(2)),)}, "outside 0..3"),
        ({"sums": (WidthSum(3, ((9, 1),)),)}, "outside 0..3"),
        ({"blocks": (Block("b", (-1,)),)}, "outside 0..3"),
        ({"factors": (Factor((1, 0), np.ones((2, 3))),)}, "shape"),
        ({"factors": (Factor((0,), None, np.array([0, 2**53])),)}, "2\\*\\*53"),
        ({"blocks": (Block("b", (0, 1)),)}, "'stem' must be 0"),
        ({"sums": (WidthSum(3, ((0, 1), (2, 1))),)}, "widest"),
    ],
)
def test_a_problem_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(concat_problem(), **change)


@pytest.mark.parametrize(
    ("value", "bound", "gap"), [(9.0, 10.0, 0.1), (10.0, 10.0, 0.0), (-11.0, -10.0, 0.1), (5.0, 4.0, 0.0)]
)
def test_gap_is_relative_to_the_bound_and_never_negative(value, bound, gap):
    solution = Solution((0,), value, 1, bound, "feasible", None, "s", 0.0)
    assert solution.gap == pytest.approx(gap)


def test_an_infeasible_solution_carries_the_smallest_cost():
    solution = Solution.infeasible(42, "s", 0.5)
    assert (solution.choice, solution.status, solution.fastest_ns, solution.gap) == (
        None,
        "infeasible",
        42,
        0.0,
    )
    assert solution.value == solution.bound == -math.inf
