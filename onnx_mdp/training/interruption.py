"""Ctrl-C ends a training run between two steps, so that what is written can be gone on from."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["interrupts"]

_ONCE_S = 1.0  # an interrupt from the keyboard comes twice: from the terminal, and from the parent process


@contextmanager
def interrupts() -> Iterator[list[float]]:
    """A list that is filled by the first Ctrl-C; a second one interrupts at once."""
    asked: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked and now - asked[0] >= _ONCE_S and callable(before):
            before(number, frame)
        asked.append(now)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
