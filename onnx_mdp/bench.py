"""Models that are timed for others: jobs in, and one line of results after each, whatever kills the process.

A job names a model and, if it has one, the model that it is measured beside. Files are lists of JSON lines;
the first line says which list. A job is known by what its files hold, so that a result cannot be taken for
that of another model, and what has a result is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from onnx_mdp.errors import MdpError, MeasurementError, OutputError, UsageError
from onnx_mdp.files import write_files
from onnx_mdp.json_input import read_text
from onnx_mdp.large_models import for_session
from onnx_mdp.model_io import load_model
from onnx_mdp.running.runtime import Runtime, context
from onnx_mdp.tables.lut_records import canonical, json_object
from onnx_mdp.tables.session import session
from onnx_mdp.tables.variants import measure_models

__all__ = ["Job", "Result", "bench", "job_of", "jobs_text", "read_jobs", "read_results"]

_JOBS = {"format": "onnx-mdp-jobs", "schema_version": 1}
_RESULTS = {"format": "onnx-mdp-results", "schema_version": 1}
_JOBS_REMEDY = "`onnx-mdp prune --handover` writes it; its first line is " + canonical(_JOBS)
_RESULTS_REMEDY = "`onnx-mdp bench` writes it"
_SECONDS = 4.5  # of interleaved measuring for each job

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A model to time, interleaved with ``base`` if that is given, with these shapes of symbolic inputs."""

    model: Path
    base: Path | None = None
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """Milliseconds of a job's model and of its base, measured together; ``noise`` is F of the two."""

    job: str
    ms: float
    base_ms: float | None
    noise: float
    context: Mapping[str, str | int]
    session: Mapping[str, str]
    created: str


def job_of(model: Path, base: Path | None, inputs: Mapping[str, tuple[int, ...]]) -> Job:
    """The job of files that are there.

    Raises:
        UsageError: a file cannot be read.
    """
    digest = hashlib.sha256(canonical({name: list(shape) for name, shape in inputs.items()}).encode())
    for path in (model, base):
        if path is not None:
            try:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError as error:
                raise UsageError(f"cannot read {path}: {error.strerror}; give a job a model file") from error
    return Job(model, base, inputs, digest.hexdigest()[:16])


def jobs_text(jobs: Sequence[Job]) -> str:
    """A list of jobs whose models lie beside it."""
    lines: list[dict[str, Any]] = [
        {
            "model": job.model.name,
            "inputs": {name: list(shape) for name, shape in job.inputs.items()},
        }
        | ({} if job.base is None else {"base": job.base.name})
        for job in jobs
    ]
    return "".join(canonical(line) + "\n" for line in (_JOBS, *lines))


def read_jobs(path: Path) -> tuple[Job, ...]:
    """The jobs of a list; their files are relative to its folder.

    Raises:
        UsageError: it is no list of jobs, or a file is missing.
    """
    return tuple(_job(path, number, line) for number, line in _lines(path, _JOBS, _JOBS_REMEDY))


def _job(path: Path, number: int, line: Mapping[str, Any]) -> Job:
    try:
        inputs = {str(n): tuple(int(d) for d in shape) for n, shape in line.get("inputs", {}).items()}
        base = None if line.get("base") is None else path.parent / str(line["base"])
        model = path.parent / str(line["model"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f'line {number} of {path} is no job such as {{"model": "slim.onnx"}}') from error
    return job_of(model, base, inputs)


def read_results(path: Path) -> dict[str, Result]:
    """The results of a list by the identity of their jobs; without its last line, if that was cut off.

    Raises:
        UsageError: it is no list of results.
    """
    found = {}
    for number, line in _lines(path, _RESULTS, _RESULTS_REMEDY, cut_off=True):
        try:
            base_ms = None if line["base_ms"] is None else float(line["base_ms"])
            where, by = json_object(line["context"]), json_object(line["session"])
            numbers = (float(line["ms"]), base_ms, float(line["noise"]))
            result = Result(str(line["job"]), *numbers, where, by, str(line["created"]))
            if min(result.ms, result.noise, base_ms or 0.0) < 0 or not 0 < result.ms < 1e12:
                raise ValueError("out of range")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"line {number} of {path} is no result: {_RESULTS_REMEDY}") from error
        found[result.job] = result
    return found


def _lines(
    path: Path, form: Mapping[str, Any], remedy: str, *, cut_off: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    text = read_text(path, remedy)
    whole, _, rest = text.rpartition("\n")
    first, *lines = (whole if cut_off or not rest else text).splitlines() or [""]
    try:
        header = json.loads(first)
    except (ValueError, RecursionError):
        header = None
    if header != form:
        raise UsageError(f"{path} is not a list that this version reads: {remedy}")
    for number, text in enumerate(lines, start=2):
        try:
            yield number, json_object(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number} of {path} is not a JSON object: {remedy}") from error


def bench(jobs: Sequence[Job], output: Path, runtime: Runtime, progress: Progress) -> dict[str, Result]:
    """Measure the jobs that ``output`` does not hold on this runtime; each is in it once it is finished.

    Raises:
        OutputError: ``output`` cannot be written, or another process writes it.
        UsageError: ``output`` is something else.
        MeasurementError: jobs could not be measured; all others were.
    """
    where, failures = context(runtime), {}
    with _appending(output) as (file, known):
        wanted = {job.identity: job for job in jobs}
        missing = [j for i, j in wanted.items() if i not in known or dict(known[i].context) != where]
        for done, job in enumerate(missing):
            progress("bench", done, len(missing))
            try:
                result = _measured(job, runtime, where)
            except MdpError as error:
                failures[job.model.name] = str(error)
                continue
            known[job.identity] = result
            file.write(canonical(asdict(result)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        progress("bench", len(missing), len(missing))
    if failures:
        name, reason = next(iter(failures.items()))
        raise MeasurementError(
            f"{len(failures)} of {len(missing)} jobs could not be measured, first {name}: {reason}"
        )
    return {identity: known[identity] for identity in wanted}


def _measured(job: Job, runtime: Runtime, where: Mapping[str, str | int]) -> Result:
    paths = (job.model,) if job.base is None else (job.model, job.base)
    models = [for_session(load_model(path)) for path in paths]
    timing = measure_models(models, job.inputs, runtime, budget_s=_SECONDS)
    return Result(
        job=job.identity,
        ms=timing.ms[0],
        base_ms=timing.ms[1] if len(timing.ms) > 1 else None,
        noise=timing.noise,
        context=where,
        session=session(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


@contextmanager
def _appending(output: Path) -> Iterator[tuple[BinaryIO, dict[str, Result]]]:
    """The file of results at its end, locked, and what it holds; a line that was cut off is removed."""
    if not output.exists():
        write_files({output: (canonical(_RESULTS) + "\n").encode()})
    known = read_results(output)
    try:
        with output.open("r+b") as file:
            if not _locked(file):
                raise OutputError(f"another process writes {output}: wait for it, or choose another output")
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            yield file, known
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}; choose another output") from error


def _locked(file: BinaryIO) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
