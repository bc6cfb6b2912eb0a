"""A command runs in a child process, so that a crash of a native library is an error in words.

Models are run by libraries in C++, and a hostile one may crash them, exhaust the memory, or hold a kernel for
ever; Python then has no chance to say so. The command line forks before it has loaded anything, which takes
about a millisecond; the parent waits, passes signals on, and tells how the child ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

__all__ = ["deadline", "supervise"]

_FAILED = 1
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP")
_PR_SET_PDEATHSIG = 1
_ONCE_S = 1.0  # an interrupt from the keyboard reaches the child twice: from the terminal, and passed on
_supervised = False


def supervise(work: Callable[[], None]) -> None:
    """Do ``work`` in a child and exit as it does; where a system cannot fork, simply do it."""
    global _supervised
    if not hasattr(os, "fork"):
        work()
        return
    parent = os.getpid()
    child = os.fork()
    if child:
        _watch(child)
    _supervised = True
    _die_with(parent)
    _take_the_blame()
    _interrupt_once()
    work()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End a supervised process that is stuck in native code; elsewhere nothing could tell the user why."""
    if _supervised:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if _supervised:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _watch(child: int) -> None:
    for number in _numbers(_PASSED_ON):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: os.kill(child, received))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        # Nothing of this process needs to be tidied up.
        os._exit(code)
    number = signal.Signals(-code)
    if number in _numbers(_PASSED_ON):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    print(f"error: {_sentence(number)}", file=sys.stderr, flush=True)
    os._exit(_FAILED)


def _sentence(number: signal.Signals) -> str:
    kept = "files that were written are whole, and measurements are kept"
    if number == signal.SIGKILL:
        return f"the command was killed, most likely because no memory was left; {kept}"
    if number == signal.SIGALRM:
        return f"the runtime did not come to an end with this model and was stopped; {kept}"
    return f"the runtime crashed ({number.name}) on this model; {kept}: does it run in ONNX Runtime at all?"


def _numbers(names: tuple[str, ...]) -> tuple[signal.Signals, ...]:
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def _die_with(parent: int) -> None:
    """A child does not outlive a parent that was killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(_FAILED)


def _take_the_blame() -> None:
    """Where memory runs out, this process ends and not somebody else's."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def _interrupt_once() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    last = -_ONCE_S

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= _ONCE_S:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
