"""Independent work in threads: the order of results, errors, and one processor alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from onnx_mdp import concurrency
from onnx_mdp.concurrency import in_order, usable_cpus


@pytest.fixture(params=(1, 3))
def cpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    count = int(request.param)
    monkeypatch.setattr(concurrency, "usable_cpus", lambda: count)
    return count


def test_results_come_in_the_order_of_the_work(cpus: int) -> None:
    later = threading.Event()

    def first_last(number: int) -> int:
        if number == 0 and cpus > 1:
            assert later.wait(20)
        if number == 1:
            later.set()
        return number**2

    assert list(in_order(first_last, range(12))) == [number**2 for number in range(12)]


def test_as_many_run_at_a_time_as_there_are_processors(cpus: int) -> None:
    together = threading.Barrier(cpus, timeout=20)
    assert (
        len({thread for thread, _ in in_order(lambda n: (_thread(), together.wait()), range(3 * cpus))})
        == cpus
    )


@pytest.fixture
def canceling(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once nothing that waits can begin any more."""
    event, map_ = threading.Event(), concurrency.ThreadPoolExecutor.map

    def mapped(pool: Any, function: Any, items: Any) -> Any:
        results = map_(pool, function, items)
        try:
            yield from results
        finally:
            results.close()  # which cancels the rest
            event.set()

    monkeypatch.setattr(concurrency.ThreadPoolExecutor, "map", mapped)
    return event


def test_what_has_not_begun_when_one_fails_is_not_begun(cpus: int, canceling: threading.Event) -> None:
    begun = []

    def fails(number: int) -> int:
        begun.append(number)
        if number:
            assert canceling.wait(20)
        raise ValueError(f"number {number}")

    with pytest.raises(ValueError, match="number 0"):
        list(in_order(fails, range(100)))
    assert len(begun) <= 1 + cpus


def test_a_reader_that_stops_stops_the_work(cpus: int, canceling: threading.Event) -> None:
    begun = []

    def noted(number: int) -> int:
        begun.append(number)
        if number:
            assert canceling.wait(20)
        return number

    results = in_order(noted, range(100))
    assert next(results) == 0
    results.close()
    assert len(begun) <= 1 + cpus


def test_there_is_at_least_one_processor() -> None:
    assert usable_cpus() >= 1


def _thread() -> int:
    return threading.get_ident()
