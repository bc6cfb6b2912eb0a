"""Independent work on all processors that a process may use; results come in the order of the work."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeVar

__all__ = ["in_order", "matrix_threads", "usable_cpus"]

_MOST = 8  # pieces of work that are in memory at the same time
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def usable_cpus() -> int:
    """The processors that this process may run on."""
    with suppress(AttributeError, OSError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Generator[_Result, None, None]:
    """The result for each item; threads help where the function leaves Python, as ONNX Runtime and NumPy do.

    Matrix products take one thread meanwhile, so that results do not depend on how many run beside each
    other. After an error, or an interruption, what has not begun is not begun.
    """
    workers = min(usable_cpus(), _MOST)
    with matrix_threads(1):
        if workers == 1:
            yield from map(function, items)
            return
        pool = ThreadPoolExecutor(workers)
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


def matrix_threads(most: int | None) -> AbstractContextManager[Any]:
    """Limit the threads of one matrix product: on busy cores, those of small ones mostly wait."""
    limit: AbstractContextManager[Any] = _libraries().limit(limits=most, user_api="blas")
    return limit


@functools.cache
def _libraries() -> Any:
    import threadpoolctl  # a board may lack it, and neither ranks nor repairs

    return threadpoolctl.ThreadpoolController()
