"""Laws of the store: what was added is there, once, whatever happens to the process or the file."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnx_mdp.errors import OutputError, UsageError
from onnx_mdp.tables.lut_store import LutStore, Run, Sample, open_store

CONTEXT: dict[str, str | int] = {
    "provider": "CPUExecutionProvider",
    "device": "Test Ω (2 cpus)",
    "threads": 1,
}
OTHER: dict[str, str | int] = {**CONTEXT, "threads": 2}


def make_run(variant: int, seed: int = 0) -> Run:
    rng = np.random.default_rng([variant, seed])
    samples = tuple(
        Sample(f'["Conv",{key},"\u2028"]', float(key), 1 / 3, float(rng.random()), key + 1)
        for key in range(5)
    )
    return Run(
        variant,
        seed,
        float(rng.random()),
        0.1 + 0.2,
        58,
        1.5,
        samples,
        {"keep": {"a": [1, 2]}, "note": "é\n"},
    )


def fill(store: LutStore) -> None:
    for variant in (2, 0, 1):
        assert store.add_run(CONTEXT, "resnet", make_run(variant))
    assert store.add_run(CONTEXT, "mobilenet", make_run(0, seed=4))
    assert store.add_run(OTHER, "resnet", make_run(0, seed=7))
    store.put_calibration(CONTEXT, "resnet", {"alpha": 0.1 + 0.2, "beta": -1e-300})


def contents(store: LutStore) -> tuple[object, ...]:
    return (
        *(store.runs(context, name) for context in (CONTEXT, OTHER) for name in ("resnet", "mobilenet")),
        *(store.samples(context) for context in (CONTEXT, OTHER)),
        store.get_calibration(CONTEXT, "resnet"),
        store.summary(),
    )


def test_what_was_added_is_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "lut.sqlite"
    with open_store(path) as store:
        fill(store)
        before = contents(store)
    with open_store(path) as store:
        assert contents(store) == before
        assert store.runs(CONTEXT, "resnet") == tuple(make_run(variant) for variant in (0, 1, 2))
        assert store.get_calibration(CONTEXT, "resnet") == {"alpha": 0.1 + 0.2, "beta": -1e-300}
        assert store.runs(CONTEXT, "unknown") == ()
        assert store.get_calibration(OTHER, "resnet") is None


def test_the_order_of_context_keys_does_not_matter(tmp_path: Path) -> None:
    with open_store(tmp_path / "lut.sqlite") as store:
        fill(store)
        assert len(store.runs(dict(reversed(CONTEXT.items())), "resnet")) == 3


def test_adding_again_changes_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path / "lut.sqlite") as store:
        fill(store)
        before = contents(store)
        assert not store.add_run(CONTEXT, "resnet", make_run(1))
        assert contents(store) == before


def test_samples_of_all_models_are_shared_within_a_context_only(tmp_path: Path) -> None:
    with open_store(tmp_path / "lut.sqlite") as store:
        fill(store)
        pairs = store.samples(CONTEXT)
        expected = [("mobilenet", sample) for sample in make_run(0, seed=4).samples]
        expected += [("resnet", sample) for variant in range(3) for sample in make_run(variant).samples]
        assert list(pairs) == expected


def test_numpy_numbers_come_back_as_numbers(tmp_path: Path) -> None:
    run = Run(np.int64(1), np.int64(0), np.float32(0.5), np.float64(2), np.int64(3), 1, (
        Sample("k", np.int64(4), np.float32(0.5), np.float64(1), np.int64(2)),
    ))  # fmt: skip
    with open_store(tmp_path / "lut.sqlite") as store:
        store.add_run(CONTEXT, "m", run)
        assert store.runs(CONTEXT, "m") == (Run(1, 0, 0.5, 2.0, 3, 1.0, (Sample("k", 4.0, 0.5, 1.0, 2),)),)


def test_a_run_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    bad = Sample("k", 1.0, 1.0, float("nan"), 1)
    with open_store(tmp_path / "lut.sqlite") as store:
        with pytest.raises(OutputError, match="NOT NULL"):
            store.add_run(CONTEXT, "m", Run(0, 0, 1.0, 1.0, 1, 1.0, (make_run(0).samples[0], bad)))
        assert store.summary() == ()
        assert store.add_run(CONTEXT, "m", make_run(0))


def test_rows_survive_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "lut.sqlite"
    code = f"""
import os, signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from onnx_mdp.tables.lut_store import Run, Sample, open_store
store = open_store(Path({str(path)!r}))
for variant in range(20):
    store.add_run({CONTEXT!r}, "m", Run(variant, 0, 1.0, 2.0, 3, 4.0, (Sample("k", 1.0, 2.0, 3.0, 4),)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    with open_store(path) as store:
        assert [run.variant for run in store.runs(CONTEXT, "m")] == list(range(20))
        assert len(store.samples(CONTEXT)) == 20


def test_two_connections_write_to_one_store(tmp_path: Path) -> None:
    with open_store(tmp_path / "lut.sqlite") as one, open_store(tmp_path / "lut.sqlite") as two:
        assert one.add_run(CONTEXT, "m", make_run(0))
        assert two.add_run(CONTEXT, "m", make_run(1))
        assert not one.add_run(CONTEXT, "m", make_run(1))
        assert one.runs(CONTEXT, "m") == two.runs(CONTEXT, "m")


def test_a_calibration_replaces_the_one_before(tmp_path: Path) -> None:
    with open_store(tmp_path / "lut.sqlite") as store:
        for alpha in range(50):
            store.put_calibration(CONTEXT, "m", {"alpha": alpha})
            assert store.get_calibration(CONTEXT, "m") == {"alpha": alpha}


def test_export_and_merge_round_trip(tmp_path: Path) -> None:
    export = tmp_path / "lut.jsonl"
    again = tmp_path / "again.jsonl"
    with open_store(tmp_path / "one.sqlite") as one, open_store(tmp_path / "two.sqlite") as two:
        fill(one)
        assert one.export_jsonl(export) == 6
        assert two.merge_jsonl(export) == (6, 0)
        assert contents(two) == contents(one)
        two.export_jsonl(again)
        assert again.read_bytes() == export.read_bytes()
        assert two.merge_jsonl(export) == (0, 6)
        assert one.merge_jsonl(export) == (0, 6)
        assert contents(two) == contents(one)


def test_a_merge_keeps_the_newer_calibration(tmp_path: Path) -> None:
    export = tmp_path / "lut.jsonl"
    with open_store(tmp_path / "one.sqlite") as one, open_store(tmp_path / "two.sqlite") as two:
        one.put_calibration(CONTEXT, "m", {"alpha": 1})
        one.export_jsonl(export)
        two.put_calibration(CONTEXT, "m", {"alpha": 2})
        assert two.merge_jsonl(export) == (0, 1)
        assert two.get_calibration(CONTEXT, "m") == {"alpha": 2}
        two.export_jsonl(export)
        assert one.merge_jsonl(export) == (1, 0)
        assert one.get_calibration(CONTEXT, "m") == {"alpha": 2}


def test_stores_that_are_merged_both_ways_are_equal(tmp_path: Path) -> None:
    exports = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    with open_store(tmp_path / "one.sqlite") as one, open_store(tmp_path / "two.sqlite") as two:
        for store, offset in ((one, 0), (two, 100)):  # the same variants, measured twice
            for variant in (0, 1):
                run = replace(make_run(variant, seed=offset), seed=0)
                assert store.add_run(CONTEXT, "m", run)
            store.put_calibration(CONTEXT, "m", {"scale": offset})
        assert one.add_run(CONTEXT, "m", make_run(5))
        assert two.add_run(OTHER, "m", make_run(6))
        one.export_jsonl(exports[0])
        two.export_jsonl(exports[1])
        assert one.merge_jsonl(exports[1]) == (4, 0)
        assert two.merge_jsonl(exports[0]) == (1, 3)
        assert contents(one) == contents(two)
        assert one.runs(CONTEXT, "m")[0] == replace(make_run(0, seed=100), seed=0), "the newer one"
        for store, path in ((one, exports[0]), (two, exports[1])):
            store.export_jsonl(path)
            assert one.merge_jsonl(path) == two.merge_jsonl(path) == (0, 5)
        assert exports[0].read_bytes() == exports[1].read_bytes()


def test_a_pattern_selects_what_is_listed_and_exported(tmp_path: Path) -> None:
    export = tmp_path / "lut.jsonl"
    with open_store(tmp_path / "lut.sqlite") as store:
        fill(store)
        assert [row.model_hash for row in store.summary("MOBILE")] == ["mobilenet"]
        assert len(store.summary("test*cpus")) == 3
        assert store.summary("tpu") == ()
        assert store.export_jsonl(export, "resnet") == 5
        assert store.export_jsonl(export, "tpu") == 0
        assert store.merge_jsonl(export) == (0, 0)


def test_what_is_removed_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "lut.sqlite"
    with open_store(path) as store:
        fill(store)
        store.put_calibration(CONTEXT, "resnet.0.16", {"scale": 1})
        store.put_calibration(CONTEXT, "resnet2.0.16", {"scale": 2})
        before = store.samples(OTHER)
        store.remove(store.summary("resnet")[:1])
        assert [row.model_hash for row in store.summary()] == ["mobilenet", "resnet"]
        assert store.samples(OTHER) == before
        assert store.get_calibration(CONTEXT, "resnet") is None
        assert store.get_calibration(CONTEXT, "resnet.0.16") is None
        assert store.get_calibration(CONTEXT, "resnet2.0.16") == {"scale": 2}
        store.remove(store.summary())
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT COUNT(*) FROM samples").fetchone() == (0,)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("how", ["cut off", "overwritten"])
def test_a_damaged_store_is_refused(how: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / "lut.sqlite"
    with open_store(path) as store:
        for variant in range(50):
            store.add_run(CONTEXT, "m", make_run(variant))
    whole = path.read_bytes()
    good = int(share * len(whole))
    path.write_bytes(whole[:good] + (b"" if how == "cut off" else b"?" * (len(whole) - good)))
    with pytest.raises(OutputError, match=r"lut\.sqlite"), open_store(path) as store:
        store.export_jsonl(tmp_path / "export.jsonl")


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"context":{}}', '{"context":{},"created":"x","model_hash":"m","run":{}}']
)
def test_a_damaged_export_is_refused_as_a_whole(tmp_path: Path, line: str) -> None:
    export = tmp_path / "lut.jsonl"
    with open_store(tmp_path / "one.sqlite") as one, open_store(tmp_path / "two.sqlite") as two:
        fill(one)
        one.export_jsonl(export)
        export.write_text(export.read_text() + line + "\n")
        with pytest.raises(UsageError, match="Line 8 of"):
            two.merge_jsonl(export)
        assert two.summary() == ()


@pytest.mark.parametrize("text", ["", "hello\n", '{"format":"onnx-mdp-lut","schema_version":2}\n'])
def test_other_files_cannot_be_merged(tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(text)
    with open_store(tmp_path / "lut.sqlite") as store:
        with pytest.raises(UsageError, match=r"other\.jsonl"):
            store.merge_jsonl(other)
        with pytest.raises(UsageError, match="cannot be read"):
            store.merge_jsonl(tmp_path / "absent.jsonl")
        with pytest.raises(OutputError, match="cannot write"):
            store.export_jsonl(tmp_path / "absent" / "lut.jsonl")


def test_the_summary_counts_runs_and_samples(tmp_path: Path) -> None:
    with open_store(tmp_path / "lut.sqlite") as store:
        fill(store)
        rows = {(row.context["threads"], row.model_hash): row for row in store.summary()}
    counts = {key: (row.runs, row.samples) for key, row in rows.items()}
    assert counts == {(1, "mobilenet"): (1, 5), (1, "resnet"): (3, 15), (2, "resnet"): (1, 5)}
    assert rows[1, "resnet"].bytes == pytest.approx(3 * rows[1, "mobilenet"].bytes, rel=0.05)
    assert rows[1, "resnet"].context == CONTEXT


def test_a_text_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes, not a data base " * 50)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"notes\.txt"):
        open_store(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (id INTEGER)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(OutputError, match="another program"):
        open_store(path)
    assert path.read_bytes() == before


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lut.sqlite"
    open_store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(OutputError, match=r"schema 2.*upgrade onnx-mdp"):
        open_store(path)


def test_places_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "lut.sqlite", tmp_path):
        with pytest.raises(OutputError, match="Cannot use") as caught:
            open_store(path)
        assert "\n" not in str(caught.value)


def test_the_default_place_is_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_MDP_STORE", str(tmp_path / "chosen.sqlite"))
    with open_store() as store:
        assert store.path == tmp_path / "chosen.sqlite"
    monkeypatch.delenv("ONNX_MDP_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_store() as store:
        assert store.path.name == "latency.sqlite"
        assert os.fspath(store.path).startswith(str(tmp_path))


# -- stores and exports from elsewhere ----------------------------------------------------------------------


def edited(path: Path, *statements: str) -> Path:
    """A store that another program has changed."""
    with open_store(path) as store:
        store.add_run(CONTEXT, "model", make_run(0))
        store.put_calibration(CONTEXT, "model", {"scale": 1.0})
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    return path


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE runs SET plain_ms = 'slow'",
        "UPDATE runs SET seconds = 1e300",
        "UPDATE runs SET context_json = '[1]'",
        "UPDATE runs SET payload_json = '" + "[" * 100_000 + "'",
        "UPDATE samples SET a = x'00ff'",
        "UPDATE samples SET count = 9e99",
        "UPDATE calibrations SET payload_json = '{\"scale\": NaN}'",
        "UPDATE calibrations SET payload_json = 'no json'",
    ],
)
def test_a_row_that_is_no_measurement_is_refused(statement: str, tmp_path: Path) -> None:
    with open_store(edited(tmp_path / "lut.sqlite", statement)) as store:
        with pytest.raises(OutputError, match="a row that is no measurement"):
            store.export_jsonl(tmp_path / "export.jsonl")
        assert not (tmp_path / "export.jsonl").exists()


@pytest.mark.parametrize(
    "statements",
    [
        ("DROP TABLE samples",),
        ("ALTER TABLE runs ADD COLUMN more",),
        ("CREATE TRIGGER t AFTER INSERT ON runs BEGIN DELETE FROM runs; END",),
        (
            "DROP TABLE calibrations",
            "CREATE VIEW calibrations AS WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
            "SELECT i AS context_json, i AS model_hash, i AS created, i AS payload_json FROM n",
        ),
    ],
    ids=["a table less", "a column more", "a trigger", "a view without end"],
)
def test_a_store_with_other_tables_is_refused(statements: tuple[str, ...], tmp_path: Path) -> None:
    path = edited(tmp_path / "lut.sqlite", *statements)
    with pytest.raises(OutputError, match="other tables than onnx-mdp makes"):
        open_store(path)


@pytest.mark.parametrize(
    "line", ['{"context":{"a":NaN}}', "[" * 100_000, "1" * 5000, "{}", "null", '{"context":[]}', "\x00"]
)
def test_a_line_that_is_no_record_is_refused(line: str, tmp_path: Path) -> None:
    with open_store(edited(tmp_path / "lut.sqlite")) as store:
        export = tmp_path / "export.jsonl"
        store.export_jsonl(export)
        export.write_text(export.read_text() + line + "\n")
        with pytest.raises(UsageError, match=r"Line 4 of .* is not a latency record"):
            store.merge_jsonl(export)
