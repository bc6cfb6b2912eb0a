"""Laws of measuring elsewhere: no finished job is lost, and candidates come back as measured there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run, is_refused
from test_cli import TINY
from zoo import text_model

from onnx_mdp import bench as bench_module
from onnx_mdp.bench import Job, bench, job_of, jobs_text, read_jobs, read_results
from onnx_mdp.errors import MeasurementError, OutputError, UsageError
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.running import timing
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.tables.latency import build_table
from onnx_mdp.tables.lut_store import open_store
from onnx_mdp.tables.table_file import table_json

HEADER = '{"format":"onnx-mdp-jobs","schema_version":1}\n'
STORED = '{"format":"onnx-mdp-results","schema_version":1}\n'


def silent(stage: str, done: int, total: int) -> None:
    """Take the progress of nobody."""


def measure_little(monkeypatch: pytest.MonkeyPatch) -> None:
    full = timing.measure
    monkeypatch.setattr(
        "onnx_mdp.tables.variants.measure", lambda *a, **options: full(*a, **{**options, "rounds": 6})
    )


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_little(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with jobs: three models, the first of which is the base of the others."""
    model = text_model(TINY)
    for number in range(3):
        model.doc_string = str(number)
        (tmp_path / f"m{number}.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "jobs.jsonl").write_text(
        HEADER
        + '{"model":"m0.onnx"}\n'
        + "".join(f'{{"model":"m{n}.onnx","base":"m0.onnx"}}\n' for n in (1, 2))
    )
    return tmp_path


def test_jobs_are_measured_once_and_known_by_what_their_files_hold(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, output = read_jobs(folder / "jobs.jsonl"), folder / "results.jsonl"
    assert [job.base and job.base.name for job in jobs] == [None, "m0.onnx", "m0.onnx"]
    results = bench(jobs, output, Runtime(), silent)
    assert read_results(output) == results
    assert [results[job.identity].base_ms is None for job in jobs] == [True, False, False]
    assert all(result.ms > 0 and result.session["host"] for result in results.values())
    monkeypatch.setattr(bench_module, "measure_models", None)
    assert bench(read_jobs(folder / "jobs.jsonl"), output, Runtime(), silent) == results
    (folder / "m2.onnx").write_bytes((folder / "m1.onnx").read_bytes())
    same = read_jobs(folder / "jobs.jsonl")
    assert same[2].identity == same[1].identity == jobs[1].identity


def test_another_runtime_measures_again(folder: Path) -> None:
    jobs, output = read_jobs(folder / "jobs.jsonl")[:1], folder / "results.jsonl"
    one = bench(jobs, output, Runtime(), silent)
    two = bench(jobs, output, Runtime(threads=2), silent)
    assert [r[jobs[0].identity].context["threads"] for r in (one, two)] == [1, 2]
    assert len(output.read_text().splitlines()) == 3


@pytest.mark.parametrize("rest", ['{"job":"a","ms":1', "{", '{"job":"a"}'])
def test_a_line_that_was_cut_off_is_measured_again(folder: Path, rest: str) -> None:
    jobs, output = read_jobs(folder / "jobs.jsonl")[:2], folder / "results.jsonl"
    first = bench(jobs[:1], output, Runtime(), silent)
    with output.open("a") as file:
        file.write(rest)
    assert read_results(output) == first
    both = bench(jobs, output, Runtime(), silent)
    assert both[jobs[0].identity] == first[jobs[0].identity]
    assert read_results(output) == both
    assert output.read_text().count("\n") == 3


def test_a_killed_bench_loses_no_finished_job(folder: Path) -> None:
    code = """
import onnx_mdp.running.timing as timing
full = timing.measure
timing.measure = lambda sessions, feeds, **options: full(sessions, feeds, **{**options, "rounds": 60})
from onnx_mdp.__main__ import start
start()
"""
    command = [sys.executable, "-c", code, "bench", "--jobs", "jobs.jsonl", "-o", "results.jsonl", "--json"]
    output = folder / "results.jsonl"
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        limit = time.monotonic() + 120
        while time.monotonic() < limit and not (output.exists() and output.read_text().count("\n") > 1):
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    kept = read_results(output)
    assert 1 <= len(kept) < 3
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    after = read_results(output)
    assert after.items() >= kept.items()
    assert [row["model"] for row in json.loads(done.stdout)["results"]] == ["m0.onnx", "m1.onnx", "m2.onnx"]


def test_a_job_that_fails_holds_no_other_up(folder: Path) -> None:
    (folder / "m1.onnx").write_text("no model")
    jobs, output = read_jobs(folder / "jobs.jsonl"), folder / "results.jsonl"
    with pytest.raises(MeasurementError, match=r"1 of 3 jobs could not be measured, first m1\.onnx"):
        bench(jobs, output, Runtime(), silent)
    assert read_results(output).keys() == {jobs[0].identity, jobs[2].identity}


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of open files there")
def test_two_processes_do_not_write_one_file(folder: Path) -> None:
    import fcntl

    jobs, output = read_jobs(folder / "jobs.jsonl"), folder / "results.jsonl"
    output.write_text(STORED)
    with output.open() as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process writes"):
            bench(jobs, output, Runtime(), silent)


@pytest.mark.parametrize(
    "text",
    ["", "text\n", HEADER + "[]\n", HEADER + "{}\n", HEADER + '{"model":"nowhere.onnx"}\n',
     HEADER + '{"model":"m0.onnx","inputs":{"x":"wide"}}\n', HEADER + '{"model":"m0.onnx","inputs":[]}\n',
     HEADER + '{"model":"m0.onnx","base":"nowhere.onnx"}\n', HEADER.replace("1}", "2}"), STORED],
)  # fmt: skip
def test_a_list_that_is_none_is_one_sentence(run: Run, folder: Path, text: str) -> None:
    (folder / "jobs.jsonl").write_text(text)
    is_refused(run("bench", "--jobs", "jobs.jsonl", "-o", "results.jsonl"), 2, ".")
    assert not (folder / "results.jsonl").exists()


@pytest.mark.parametrize("line", ["[]", "{}", '{"job":"a","ms":"x"}', HEADER.strip()])
def test_results_that_are_none_are_refused_and_left_alone(folder: Path, line: str) -> None:
    output = folder / "results.jsonl"
    output.write_text(STORED + line + "\n")
    with pytest.raises(UsageError, match="line 2 of"):
        bench(read_jobs(folder / "jobs.jsonl"), output, Runtime(), silent)
    assert output.read_text() == STORED + line + "\n"


def test_jobs_are_written_as_they_are_read(folder: Path) -> None:
    jobs = (
        job_of(folder / "m1.onnx", folder / "m0.onnx", {"x": (1, 3, 8, 8)}),
        job_of(folder / "m0.onnx", None, {}),
    )
    (folder / "again.jsonl").write_text(jobs_text(jobs))
    assert read_jobs(folder / "again.jsonl") == jobs
    assert isinstance(jobs[0], Job)


# -- candidates that are measured elsewhere -----------------------------------------------------------------

PRUNE = ("prune", "model.onnx", "--lut", "table.json", "-o", "slim.onnx")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("table") / "model.onnx"
    path.write_bytes(text_model(TINY).SerializeToString())
    structure = analyze(load_model(path), {})
    with pytest.MonkeyPatch.context() as patch, open_store(path.with_name("lut.sqlite")) as store:
        measure_little(patch)
        return table_json(structure, build_table(structure, Runtime(), store, variants=4))


@pytest.fixture
def host(run: Run, table: str) -> Run:
    Path("model.onnx").write_bytes(text_model(TINY).SerializeToString())
    Path("table.json").write_text(table)
    return run


def measured_as(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """A device on which models take ``share`` of their weights' part of the time that the base takes."""

    def measure_models(models: Any, *_: Any, **__: Any) -> timing.Timing:
        ms = (*(share * len(data) / len(models[-1]) for data in models[:-1]), 1.0)
        return timing.Timing(ms, 0.0, 6, (ms, ms))

    monkeypatch.setattr(bench_module, "measure_models", measure_models)


def test_a_handover_ends_with_what_the_device_measured(host: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_mdp.pipeline.measure_models", None)
    arguments = (*PRUNE, "--target-ratio", "0.8", "--handover", "board")
    measured_as(monkeypatch, 1.0)
    for _ in range(6):
        outcome = host(*arguments, "--json")
        assert outcome.code in (0, 1), outcome
        if outcome.document["status"] != "handed_over":
            break
        assert "onnx-mdp bench --jobs jobs.jsonl -o results.jsonl --ep CPUExecutionProvider" in outcome.err
        assert not Path("slim.onnx").exists()
        done = host("bench", "--jobs", "board/jobs.jsonl", "-o", "board/results.jsonl", "--json")
        assert done.code == 0
        assert len(done.document["results"]) == outcome.document["jobs"]
    document = outcome.document
    by_job = read_results(Path("board/results.jsonl"))
    measured = {round(r.ms / (r.base_ms or 1) * document["base_ms"], 9) for r in by_job.values()}
    assert round(document["measured_ms"], 9) in measured
    assert document["iterations"] == len(by_job)
    assert document["status"] == (
        "met" if document["measured_ms"] <= 1.02 * document["target_ms"] else "missed"
    )
    assert Path("slim.onnx").exists() == (document["status"] == "met")


def test_results_of_another_device_are_refused(host: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, 1.0)
    arguments = (*PRUNE, "--target-ratio", "0.8", "--handover", "board")
    assert host(*arguments).out.startswith("HANDED OVER  target ")
    assert host("bench", "--jobs", "board/jobs.jsonl", "-o", "board/results.jsonl", "--threads", 2).code == 0
    is_refused(host(*arguments), 2, "threads 2", "1")
    Path("board/results.jsonl").write_text("{}\n")
    is_refused(host(*arguments), 2, "results.jsonl")


def test_a_table_replaces_the_profile_here(host: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_mdp.pipeline.build_table", None)
    outcome = host(*PRUNE, "--target-ratio", "0.8", "--dry-run")
    assert outcome.code in (0, 1)
    assert "the table was measured on" not in outcome.err
    changed = json.loads(Path("table.json").read_text())
    changed["context"]["device"] = "a board"
    Path("table.json").write_text(json.dumps(changed))
    outcome = host(*PRUNE, "--target-ratio", "0.8", "--dry-run", "--overwrite")
    assert "warning: the table was measured on a board" in outcome.err


def test_a_handover_needs_a_table(host: Run) -> None:
    is_refused(host("prune", "model.onnx", "--target-ratio", 0.8, "--handover", "board"), 2, "--lut")
    Path("file").write_text("")
    is_refused(host(*PRUNE, "--target-ratio", 0.8, "--handover", "file"), 2, "cannot make file")
    assert np.all([not Path("slim.onnx").exists(), not os.path.exists("board")])


def test_two_stores_that_are_merged_both_ways_give_the_same_plan(host: Run) -> None:
    machines = ("one", "two")
    for name in machines:
        assert host("profile", "model.onnx", "--store", f"{name}.sqlite").code == 0
        assert host("lut", "export", f"{name}.jsonl", "--store", f"{name}.sqlite").code == 0
    for name, other in (machines, machines[::-1]):
        assert host("lut", "merge", f"{other}.jsonl", "--store", f"{name}.sqlite").code == 0
    for name in machines:
        table, plan = f"{name}.table.json", f"{name}.plan.json"
        merged = host("profile", "model.onnx", "--store", f"{name}.sqlite", "-o", table, "--json")
        assert merged.document["profiled"] == 0
        assert host("solve", "model.onnx", table, "--target-ratio", "0.7", "-o", plan).code == 0
    tables, plans = ([Path(f"{n}.{what}.json").read_text() for n in machines] for what in ("table", "plan"))
    assert tables[0] == tables[1]
    varying = {"seconds", "provenance"}
    one, two = ({k: v for k, v in json.loads(text).items() if k not in varying} for text in plans)
    assert one == two
