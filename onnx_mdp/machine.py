"""What a machine says of itself: processor, clocks, packages; None wherever it does not say."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from onnx_mdp.concurrency import usable_cpus
from onnx_mdp.running.runtime import device_name

__all__ = ["Extra", "Machine", "extras", "flavours", "machine", "versions"]

_ROOT = Path("/")
_FLAVOURS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
    "onnxruntime-migraphx",
    "onnxruntime-rocm",
)
# What a measurement or a plan may depend on.
_PACKAGES = ("numpy", "onnx", "onnx-ir", "scipy", "pyomo", "highspy", "pydantic", "typer", "torch", "ray")
_CHOICES = ("cpu", "gpu", "openvino")  # exactly one of these extras is installed, as the flavour says
_REQUIREMENT = re.compile(r"([\w.-]+)(\[[^]]*\])?[^;]*;.*extra\s*==\s*['\"]([\w-]+)['\"]")


@dataclass(frozen=True, slots=True)
class Machine:
    """``usable_cpus`` are those that this process may run on; ``load`` is that of the last minute."""

    cpu: str
    usable_cpus: int
    governor: str | None
    turbo: bool | None
    load: float | None
    memory_gb: float | None


@dataclass(frozen=True, slots=True)
class Extra:
    """An extra of onnx-mdp, what it lacks here, and the command that installs it."""

    name: str
    missing: tuple[str, ...]
    command: str


def machine() -> Machine:
    """What the processor and the system say."""
    return Machine(
        cpu=device_name(),
        usable_cpus=usable_cpus(),
        governor=_governor(),
        turbo=_turbo(),
        load=_load(),
        memory_gb=_memory_gb(),
    )


def _governor() -> str | None:
    """The frequency governors of all processors, without repeats."""
    found = []
    with suppress(OSError):
        for path in sorted((_ROOT / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")):
            found.append(_read(path))
    return ", ".join(dict.fromkeys(filter(None, found))) or None


def _turbo() -> bool | None:
    no_turbo = _read(_ROOT / "sys/devices/system/cpu/intel_pstate/no_turbo")
    if no_turbo in ("0", "1"):
        return no_turbo == "0"
    boost = _read(_ROOT / "sys/devices/system/cpu/cpufreq/boost")
    return boost == "1" if boost in ("0", "1") else None


def _load() -> float | None:
    with suppress(AttributeError, OSError):
        return os.getloadavg()[0]
    return None


def _memory_gb() -> float | None:
    found = re.search(r"MemTotal:\s*(\d{1,15}) kB", _read(_ROOT / "proc/meminfo") or "")
    return int(found[1]) / 1e6 if found else None


def _read(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return None


def flavours() -> Mapping[str, str]:
    """The packages that bring ONNX Runtime, with their versions; more than one is a fault."""
    return {name: version for name in _FLAVOURS if (version := _version(name)) is not None}


def versions() -> Mapping[str, str | None]:
    """The versions of packages that matter."""
    return {name: _version(name) for name in _PACKAGES}


def extras() -> tuple[Extra, ...]:
    """The extras of onnx-mdp, without the flavours of ONNX Runtime; none where it is not installed."""
    try:
        requirements = importlib.metadata.requires("onnx-mdp") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    missing: dict[str, list[str]] = {}
    for text in requirements:
        found = _REQUIREMENT.match(text)
        if found is None or found[3] in _CHOICES:
            continue
        lacks = missing.setdefault(found[3], [])
        if found[1] != "onnx-mdp" and _version(found[1]) is None:
            lacks.append(found[1])
    return tuple(
        Extra(name, tuple(lacks), f"pip install 'onnx-mdp[{name}]'") for name, lacks in missing.items()
    )


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None
