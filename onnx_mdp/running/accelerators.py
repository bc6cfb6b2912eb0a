"""The NVIDIA GPU that a provider runs on: its name, its driver and its clocks, as ``nvidia-smi`` tells."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

__all__ = ["Gpu", "gpu_of", "parse_gpu"]

_PROVIDERS = frozenset(
    ("CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider", "TensorrtExecutionProvider")
)
_FIELDS = "name,driver_version,clocks.sm,clocks.max.sm"
_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU; the clocks of its multiprocessors in MHz are 0 where the driver does not tell them."""

    name: str
    driver: str
    clock_mhz: int
    most_mhz: int


def gpu_of(provider: str, options: tuple[tuple[str, str], ...]) -> Gpu | None:
    """The GPU of an NVIDIA provider (option ``device_id``), as it is now; None for others or if unknown."""
    if provider not in _PROVIDERS:
        return None
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    number = dict(options).get("device_id", "0")
    return parse_gpu(lines[int(number)]) if number.isdigit() and int(number) < len(lines) else None


def parse_gpu(line: str) -> Gpu:
    """Read one line of ``nvidia-smi``; a value that is not known is ``[N/A]`` there."""
    name, driver, *clocks = (part.strip() for part in line.split(","))
    now, most = ([int(c) if c.isdigit() else 0 for c in clocks] + [0, 0])[:2]
    return Gpu(name, driver, now, most)
