"""A command that crashes, hangs or is killed ends in a sentence and an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are not supervised there")

START = "import ctypes, os, signal, sys, time\nfrom onnx_mdp.supervision import deadline, supervise\n"


def ended(work: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    code = f"{START}def work():\n    {work}\nsupervise(work)"
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True)


@pytest.mark.parametrize("code", [0, 1, 4, 130])
def test_the_exit_code_is_the_childs(code: int) -> None:
    done = ended(f"print('result'); sys.exit({code})")
    assert (done.returncode, done.stdout, done.stderr) == (code, "result\n", "")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("ctypes.string_at(0)", "the runtime crashed (SIGSEGV)"),
        ("os.abort()", "the runtime crashed (SIGABRT)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "no memory was left"),
        ("with deadline(0.2): ctypes.CDLL(None).sleep(60)", "did not come to an end"),
    ],
    ids=["segmentation fault", "abort", "killed", "stuck in native code"],
)
def test_a_crash_is_told_in_a_sentence(work: str, said: str) -> None:
    done = ended(work)
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_deadline_that_is_met_leaves_nothing_behind() -> None:
    assert ended("exec('with deadline(0.05): pass'); time.sleep(0.2); print('done')").stdout == "done\n"


def children(pid: int) -> list[int]:
    return [int(name) for name in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_both(number: signal.Signals) -> None:
    # Tests that run under nohup inherit that a hang-up is ignored.
    heard = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code = f"{START}{heard}; supervise(lambda: (print(flush=True), time.sleep(60)))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        (child,) = children(parent.pid)
        parent.send_signal(number)
        assert parent.wait(10) == -number
        limit = time.monotonic() + 10
        while Path(f"/proc/{child}/cmdline").exists() and time.monotonic() < limit:
            if not Path(f"/proc/{child}/cmdline").read_text():  # it waits to be reaped
                break
            time.sleep(0.01)
        else:
            assert not Path(f"/proc/{child}").exists()


def test_an_interrupt_that_comes_twice_is_one() -> None:
    work = (
        "print(flush=True)\n    try: time.sleep(60)\n"
        "    except KeyboardInterrupt: time.sleep(0.3); print('tidied up'); sys.exit(130)"
    )
    code = f"{START}def work():\n    {work}\nsupervise(work)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        time.sleep(0.3)  # until it sleeps
        os.killpg(parent.pid, signal.SIGINT)
        out, _ = parent.communicate(timeout=10)
    assert (parent.returncode, out) == (130, "tidied up\n")
