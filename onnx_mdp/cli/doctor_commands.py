"""What `doctor` prints: what was found, and what is missing with the command that installs it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from onnx_mdp._version import __version__
from onnx_mdp.cli.options import Options
from onnx_mdp.doctor import Clock, Provider, Store, clock, providers, store_health
from onnx_mdp.errors import MdpError, MissingBackendError
from onnx_mdp.machine import Machine, extras, flavours, machine, versions
from onnx_mdp.reports.report import printable

__all__ = ["run_doctor"]

_UNSTEADY = 0.02  # F above which 1 % cannot be told apart
_NO_GAIN = 0.9  # threads that do not save a tenth only add noise
_UNKNOWN = "the system does not say"

Row = tuple[str, str, str]


def run_doctor(options: Options) -> int:
    """Say what runs here; exit code 3 if nothing does."""
    here, fault, steady = machine(), None, None
    found: tuple[Provider, ...] = ()
    store = store_health(options.store)
    with options.screen.progress() as progress:
        progress("doctor", 0, 2)
        try:
            found = providers()
        except MdpError as error:
            fault = str(error)
        progress("doctor", 1, 2)
        running = [provider.name for provider in found if provider.runs]
        if running:
            first = "CPUExecutionProvider" if "CPUExecutionProvider" in running else running[0]
            steady = clock(first, here.usable_cpus)
        progress("doctor", 2, 2)
    rows = [
        *_runtime_rows(fault, found),
        *_machine_rows(here),
        *_clock_rows(steady),
        _store_row(store),
        *_package_rows(),
    ]
    if not options.screen.as_json:
        options.screen.table(_table(rows))
    line = f"ready: {', '.join(running)}" if running else "nothing can be measured on this machine"
    options.screen.result(line, _document(here, found, fault, steady, store))
    return 0 if running else MissingBackendError.exit_code


def _runtime_rows(fault: str | None, found: tuple[Provider, ...]) -> Iterator[Row]:
    installed = flavours()
    text = ", ".join(f"{name} {version}" for name, version in installed.items()) or "not from a package"
    note = fault or ""
    if len(installed) > 1:
        note = f"these own one module: `pip uninstall {' '.join(installed)}`, then install one of them"
    yield "ONNX Runtime", "not usable" if fault else text, note
    for provider in found:
        what = f"runs, B={provider.granularity}" if provider.runs else "does not run"
        yield provider.name, what, provider.detail


def _machine_rows(here: Machine) -> Iterator[Row]:
    yield "processor", here.cpu, f"{here.usable_cpus} usable by this process"
    memory = _UNKNOWN if here.memory_gb is None else f"{here.memory_gb:.1f} GB"
    yield "memory", memory, ""
    slow = here.governor is not None and "performance" not in here.governor
    advice = "clocks follow the load: `cpupower frequency-set -g performance` is steadier" if slow else ""
    yield "governor", here.governor or _UNKNOWN, advice
    turbo = {None: _UNKNOWN, True: "on", False: "off"}[here.turbo]
    yield "turbo", turbo, "clocks depend on the temperature" if here.turbo else ""
    busy = here.load is not None and here.load > here.usable_cpus / 2
    load = _UNKNOWN if here.load is None else f"{here.load:.1f}"
    yield "load", load, "other processes compute too" if busy else ""


def _clock_rows(steady: Clock | None) -> Iterator[Row]:
    if steady is None:
        return
    note = f"1 % cannot be told apart above {_UNSTEADY:.0%}" if steady.noise > _UNSTEADY else ""
    yield (
        "noise F",
        f"{steady.noise:.1%}",
        note or f"a convolution of {steady.ms:.2f} ms on {steady.provider}",
    )
    yield "drift", f"{steady.drift:.1%}", "over seconds; comparisons are interleaved"
    if steady.disturbed is not None:
        yield "disturbed runs", f"{steady.disturbed:.1%}", "another process held the core; these are dropped"
    yield "timer", f"{steady.resolution_ns:.0f} ns", ""
    if steady.threads_ratio is not None:
        poor = "keep --threads 1: more do not help here" if steady.threads_ratio > _NO_GAIN else ""
        yield "all cores", f"{steady.threads_ratio:.2f} of the time on one", poor


def _store_row(store: Store) -> Row:
    what = f"{store.tables} tables, {store.bytes / 1e6:.1f} MB" if store.exists else "not made yet"
    return "store", "damaged" if store.fault else what, store.fault or str(store.path)


def _package_rows() -> Iterator[Row]:
    yield "onnx-mdp", __version__, f"Python {platform.python_version()}, {platform.system()}"
    there = [f"{name} {version}" for name, version in versions().items() if version is not None]
    yield "packages", ", ".join(there), ""
    for extra in extras():
        lacks = ", ".join(extra.missing)
        yield f"extra {extra.name}", f"lacks {lacks}" if lacks else "there", extra.command if lacks else ""


def _table(rows: list[Row]) -> Table:
    table = Table(title="This machine", title_justify="left")
    for header in ("what", "found", "note"):
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _document(
    here: Machine, found: tuple[Provider, ...], fault: str | None, steady: Clock | None, store: Store
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "onnx_mdp": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "onnxruntime": {"packages": dict(flavours()), "fault": fault},
        "providers": [asdict(provider) for provider in found],
        "machine": asdict(here),
        "clock": None if steady is None else asdict(steady),
        "store": asdict(store) | {"path": str(store.path)},
        "packages": dict(versions()),
        "extras": [asdict(extra) | {"missing": list(extra.missing)} for extra in extras()],
        "ready": any(provider.runs for provider in found),
    }
