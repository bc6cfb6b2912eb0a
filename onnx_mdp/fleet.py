"""Tables of several models on several devices at once: jobs of a Ray cluster whose nodes offer devices.

A node that is a device says so when it joins, by a custom resource of one: ``ray start --resources
'{"jetson": 1}'``. A job takes the whole of it, so one job runs on a device at a time. Ray starts a job again
whose node was lost, there or on another node with that device; what the store there holds is not repeated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx_mdp.cli.console import Screen
from onnx_mdp.cli.options import Options, load_structure
from onnx_mdp.errors import MdpError, MeasurementError, MissingBackendError, UsageError
from onnx_mdp.files import scratch_folder
from onnx_mdp.tables.latency import build_table, table_key
from onnx_mdp.tables.lut_store import LutStore, open_store
from onnx_mdp.tables.session import session
from onnx_mdp.tables.table_file import table_json

__all__ = ["Measured", "measure_fleet"]

_POLL_S = 2.0
_OF_RAY = ("CPU", "GPU", "memory", "object_store_memory")  # resources that every node may have
_REMEDY = "join a node with `ray start --address=HEAD:6379 --resources='{\"NAME\": 1}'`"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """A table as JSON, the records that it was made of as JSON lines, where it was measured, and when."""

    model: str
    device: str
    table: str
    records: str
    session: Mapping[str, str]
    base_ms: float
    profiled: int
    started: float
    finished: float


def measure_fleet(
    models: Sequence[Path],
    devices: Sequence[str],
    options: Options,
    store: LutStore,
    *,
    choices: int,
    address: str,
    patience_s: float,
    progress: Progress,
) -> tuple[Measured, ...]:
    """Measure each model on each device; what comes back is merged into ``store`` at once.

    Raises:
        MissingBackendError: Ray is not installed.
        UsageError: there is no cluster, or it does not offer a device, or offers more than one a node.
        MeasurementError: jobs failed, or no node offered their device for ``patience_s`` seconds.
    """
    contents = {path.stem: _contents(path) for path in models}
    if len(contents) < len(models):
        raise UsageError("two models have one name, so their tables would too; rename one")
    with _cluster(address) as ray:
        _check_devices(ray, devices)
        bare = replace(options, screen=Screen(quiet=True), store=None)
        remote = ray.remote(max_retries=-1)(_measure_here)
        waiting = {
            remote.options(resources={device: 1}, num_cpus=0).remote(name, device, data, bare, choices): (
                name,
                device,
            )
            for name, data in contents.items()
            for device in dict.fromkeys(devices)
        }
        finished, failures = [], []
        total = len(waiting)
        for reference in _done(ray, waiting, patience_s, options, progress):
            result = _result(ray, reference, *waiting.pop(reference))
            if isinstance(result, str):
                failures.append(result)
            else:
                _merge(store, result.records)
                finished.append(result)
            progress("fleet", total - len(waiting), total)
    if failures:
        raise MeasurementError(f"{len(failures)} of {total} jobs failed, first {failures[0]}")
    return tuple(sorted(finished, key=lambda one: (one.model, one.device)))


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give an ONNX file") from error


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise MissingBackendError("A fleet needs Ray: run `pip install 'onnx-mdp[ray]'`.") from error
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"there is no Ray cluster at {address!r}: begin one with `ray start --head`, then {_REMEDY}"
        ) from error
    try:
        # Ray tells of lost nodes on stdout, which is for results.
        with redirect_stdout(sys.stderr):
            yield ray
    finally:
        ray.shutdown()


def _offers(ray: Any) -> dict[str, float]:
    """The most of each resource that a node which is alive offers."""
    most: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"]:
            for name, amount in node["Resources"].items():
                most[name] = max(most.get(name, 0.0), amount)
    return most


def _check_devices(ray: Any, devices: Iterable[str]) -> None:
    offers = _offers(ray)
    for device in devices:
        if device not in offers:
            known = ", ".join(sorted(n for n in offers if n not in _OF_RAY and ":" not in n)) or "none"
            raise UsageError(f"no node offers {device!r} (there are {known}): {_REMEDY}")
        if offers[device] != 1:
            raise UsageError(
                f"a node offers {offers[device]:g} of {device!r}, and two jobs at a time disturb each other: "
                f"{_REMEDY}"
            )


def _done(
    ray: Any,
    waiting: Mapping[Any, tuple[str, str]],
    patience_s: float,
    options: Options,
    progress: Progress,
) -> Iterator[Any]:
    """Each job as it finishes; an error once a device is gone for too long."""
    progress("fleet", 0, len(waiting))
    gone_since: dict[str, float] = {}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_S)
        yield from ready
        offers, now = _offers(ray), time.monotonic()
        for device in {device for _, device in waiting.values()}:
            if device in offers:
                gone_since.pop(device, None)
            elif device not in gone_since:
                gone_since[device] = now
                options.screen.warn(f"no node offers {device!r} any more; its jobs wait for one: {_REMEDY}")
            elif now - gone_since[device] > patience_s:
                raise MeasurementError(
                    f"no node has offered {device!r} for {patience_s:.0f} seconds; what was finished is "
                    f"kept: {_REMEDY}, and run the same command again"
                )


def _result(ray: Any, reference: Any, name: str, device: str) -> Measured | str:
    """What a job returned, or why it failed."""
    try:
        result: Measured | str = ray.get(reference)
    except ray.exceptions.RayError as error:
        result = str(error).strip().splitlines()[-1]
    return f"{name} on {device}: {result}" if isinstance(result, str) else result


def _merge(store: LutStore, records: str) -> None:
    with scratch_folder() as folder:
        path = folder / "records.jsonl"
        path.write_text(records, encoding="utf-8")
        store.merge_jsonl(path)


def _measure_here(name: str, device: str, data: bytes, options: Options, choices: int) -> Measured | str:
    """On the device: the table of a model, by what its own store holds and lacks; or why there is none."""
    started = time.time()
    try:
        with scratch_folder() as folder, open_store() as store:
            path = folder / f"{name}.onnx"
            path.write_bytes(data)
            _, structure = load_structure(path, options)
            table = build_table(structure, options.runtime(), store, seed=options.seed, max_choices=choices)
            store.export_jsonl(folder / "records.jsonl", table_key(structure))
            return Measured(
                model=name,
                device=device,
                table=table_json(structure, table),
                records=(folder / "records.jsonl").read_text(encoding="utf-8"),
                session=session(),
                base_ms=table.base_ms,
                profiled=table.measured,
                started=started,
                finished=time.time(),
            )
    except MdpError as error:
        return str(error)
