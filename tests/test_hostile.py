"""The law of damaged files: success or one sentence, never another exception, a hang or a crash."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutations
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space, and SIGALRM")


def batch(folder: Path, seed: int, first: int, last: int) -> Iterator[dict[str, Any]]:
    """The outcome of every case, computed by children: one that dies is followed by another."""
    while first < last:
        command = [sys.executable, mutations.__file__, str(folder), str(seed), str(first), str(last)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        yield from (line for line in lines if "outcome" in line)
        if done.returncode == 0:
            return
        assert lines, done.stderr
        died = signal.Signals(-done.returncode).name if done.returncode < 0 else done.stderr[-300:]
        yield {**lines[-1], "outcome": f"DIED: {died}"}
        first = lines[-1]["case"] + 1


def check(folder: Path, seed: int, count: int) -> Counter[str]:
    """Assert the law for so many cases; return how many came out how."""
    found = list(batch(folder, seed, 0, count))
    assert [line["case"] for line in found] == list(range(count))
    wrong = [line for line in found if line["outcome"].startswith(("FAILED", "DIED"))]
    assert not wrong, "\n".join(map(str, wrong[:20]))
    refusals = [line["outcome"] for line in found if line["outcome"].startswith("refused")]
    assert not [text for text in refusals if "\n" in text]
    return Counter(f"{line['kind']}: {line['outcome'].split(':')[0]}" for line in found)


def test_a_hundred_damaged_files(tmp_path: Path) -> None:
    outcomes = check(tmp_path, 0, 100)
    assert outcomes["model: refused"] > 20
    assert outcomes["model: pruned"] > 5


@pytest.mark.slow
def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    started = time.monotonic()
    outcomes = check(tmp_path, 1, 6000)
    print(sum(outcomes.values()), dict(outcomes), f"{time.monotonic() - started:.0f} s")
    assert min(outcomes[f"{kind}: refused"] for kind in ("model", "plan", "table")) > 100
