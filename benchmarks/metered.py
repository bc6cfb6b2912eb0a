"""Run a command in a fresh process and report its output, seconds and peak memory.

A child begins with the peak of the process that starts it, because the system counts memory across ``exec``.
A small launcher (this file) therefore stands between a benchmark, which holds models, and the command:
``python -m benchmarks.metered REPORT.json COMMAND …``. It needs a Unix, whose children report their memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Metered", "main", "run_metered"]

_ROOT = Path(__file__).resolve().parents[1]
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; Linux counts in KiB


@dataclass(frozen=True, slots=True)
class Metered:
    """What a command returned and used; ``peak_mb`` (10⁶ bytes) is that of its largest process."""

    code: int
    seconds: float
    peak_mb: float
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """The last line on stderr."""
        return (self.stderr.strip().splitlines() or ["no message"])[-1]


def run_metered(*command: str) -> Metered:
    """Run a command from the repository root, away from the terminal."""
    with tempfile.TemporaryDirectory(prefix="onnx-mdp-") as folder:
        report = Path(folder) / "report.json"
        launcher = [sys.executable, "-m", "benchmarks.metered", str(report), *command]
        done = subprocess.run(launcher, cwd=_ROOT, capture_output=True, text=True)
        if not report.is_file():
            raise RuntimeError(f"the launcher of {command[0]} failed: {done.stderr.strip()}")
        used = json.loads(report.read_text(encoding="utf-8"))
    return Metered(done.returncode, used["seconds"], used["peak_mb"], done.stdout, done.stderr)


def main(argv: Sequence[str]) -> int:
    """Run ``argv[1:]``, write what it used to ``argv[0]``, and return its exit code."""
    started = time.perf_counter()
    code = subprocess.run(list(argv[1:])).returncode
    seconds = time.perf_counter() - started
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _RSS_UNIT / 1e6
    Path(argv[0]).write_text(json.dumps({"seconds": seconds, "peak_mb": peak_mb}), encoding="utf-8")
    return code if code >= 0 else 128 - code  # killed by a signal: as a shell reports it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
