"""Latency measurements in one SQLite file: whatever was measured once is never lost or repeated.

Every run is one committed transaction in write-ahead-log mode (30 µs), so that an interrupted
session keeps all it has measured. Stores of several machines are joined through JSON lines. ::

    runs          one profiled variant of one model, unique per (context, model, seed, variant)
    samples       what each layer of that run took, by shape key and staircase coordinates
    calibrations  the end-to-end correction of one model, unique per (context, model)
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from onnx_mdp.errors import OutputError
from onnx_mdp.files import write_files
from onnx_mdp.lut_records import (
    FORMAT,
    RUN_FIELDS,
    SAMPLE_FIELDS,
    Run,
    Sample,
    canonical,
    json_object,
    parse_lines,
    plain_values,
    run_from,
)

__all__ = ["LutStore", "Run", "Sample", "StoreSummary", "open_store"]

Context = Mapping[str, str | int]

_SCHEMA_VERSION = 1
# "MDPL": tells our files from other programs' SQLite files.
_APPLICATION_ID = 0x4D44504C
_SCHEMA = (
    """CREATE TABLE runs (
        id INTEGER PRIMARY KEY,
        context_json TEXT NOT NULL, model_hash TEXT NOT NULL,
        variant INTEGER NOT NULL, seed INTEGER NOT NULL,
        plain_ms REAL NOT NULL, sum_ms REAL NOT NULL, nodes INTEGER NOT NULL, seconds REAL NOT NULL,
        created TEXT NOT NULL, payload_json TEXT NOT NULL,
        UNIQUE (context_json, model_hash, seed, variant)
    )""",
    """CREATE TABLE samples (
        run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        key_json TEXT NOT NULL,
        a REAL NOT NULL, b REAL NOT NULL, ms REAL NOT NULL, count INTEGER NOT NULL
    )""",
    "CREATE INDEX samples_of_run ON samples (run_id)",
    """CREATE TABLE calibrations (
        context_json TEXT NOT NULL, model_hash TEXT NOT NULL,
        created TEXT NOT NULL, payload_json TEXT NOT NULL,
        PRIMARY KEY (context_json, model_hash)
    )""",
)

_SUMMARY = """
    SELECT context_json, model_hash, COUNT(*), SUM(samples),
        SUM(bytes + LENGTH(CAST(context_json || model_hash || created || payload_json AS BLOB)) + 48)
    FROM runs JOIN (
        SELECT id AS run_id, COUNT(key_json) AS samples,
            COALESCE(SUM(LENGTH(CAST(key_json AS BLOB)) + 40), 0) AS bytes
        FROM runs LEFT JOIN samples ON run_id = id GROUP BY id
    ) ON run_id = id
    GROUP BY context_json, model_hash ORDER BY context_json, model_hash
"""


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What the store holds for one model in one context; `bytes` approximates its size on disk."""

    context: dict[str, str | int]
    model_hash: str
    runs: int
    samples: int
    bytes: int


class LutStore:
    """An open store, made by ``open_store``; a context manager that closes its file.

    Every method raises ``OutputError`` when SQLite cannot read or write the file.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self.path = path

    def __enter__(self) -> LutStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the store cannot be used afterwards."""
        self._connection.close()

    def add_run(self, context: Context, model_hash: str, run: Run) -> bool:
        """Commit `run`; False if this variant is already there, which is then left as it is."""
        with _transaction(self._connection, self.path):
            return self._insert_run(canonical(context), model_hash, _now(), run)

    def runs(self, context: Context, model_hash: str) -> tuple[Run, ...]:
        """Return the runs of one model in the order of their variants, then of their seeds."""
        where = "WHERE context_json = ? AND model_hash = ? ORDER BY variant, seed"
        return tuple(row["run"] for row in self._select_runs(where, (canonical(context), model_hash)))

    def samples(self, context: Context) -> tuple[tuple[str, Sample], ...]:
        """Return (model hash, sample) of all models in a context, so that networks can share layers."""
        rows = self._select(
            "SELECT model_hash, key_json, a, b, ms, count FROM samples JOIN runs ON runs.id = run_id "
            "WHERE context_json = ? ORDER BY model_hash, variant, seed, samples.rowid",
            (canonical(context),),
        )
        return tuple((model_hash, Sample(*sample)) for model_hash, *sample in rows)

    def put_calibration(self, context: Context, model_hash: str, payload: Mapping[str, Any]) -> None:
        """Commit the calibration of one model, in place of an earlier one."""
        with _transaction(self._connection, self.path):
            about = (canonical(context), model_hash)
            # Replaced even if the clock stood still or went back since; a merge keeps the newer one.
            self._connection.execute(
                "DELETE FROM calibrations WHERE (context_json, model_hash) = (?, ?)", about
            )
            self._insert_calibration(*about, _now(), payload)

    def get_calibration(self, context: Context, model_hash: str) -> dict[str, Any] | None:
        """Return the calibration of one model, or None."""
        rows = self._select(
            "SELECT payload_json FROM calibrations WHERE context_json = ? AND model_hash = ?",
            (canonical(context), model_hash),
        )
        with _decoding(self.path):
            return _object(rows[0][0]) if rows else None

    def summary(self) -> tuple[StoreSummary, ...]:
        """Return one row per context and model that has runs."""
        with _decoding(self.path):
            return tuple(
                StoreSummary(_object(context), *counts) for context, *counts in self._select(_SUMMARY, ())
            )

    def export_jsonl(self, path: Path) -> int:
        """Write all records as JSON lines and return their number; `path` is replaced in one step."""
        records = tuple(self._records())
        write_files({path: "".join(canonical(line) + "\n" for line in (FORMAT, *records)).encode()})
        return len(records)

    def merge_jsonl(self, path: Path) -> tuple[int, int]:
        """Add the records of an export, all or none; return how many were (added, skipped).

        Known runs and older calibrations are skipped. Raises ``UsageError`` if `path` is no export.
        """
        records = parse_lines(path)
        with _transaction(self._connection, self.path):
            added = sum(self._insert(record) for record in records)
        return added, len(records) - added

    def _select(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with _sentences(self.path):
            return self._connection.execute(query, values).fetchall()

    def _select_runs(self, where: str, values: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
        rows = self._select(
            "SELECT id, context_json, model_hash, created, variant, seed, plain_ms, sum_ms, nodes, seconds, "
            f"payload_json FROM runs {where}",
            values,
        )
        for identity, context, model_hash, created, *fields, payload in rows:
            samples = self._select(
                "SELECT key_json, a, b, ms, count FROM samples WHERE run_id = ? ORDER BY rowid", (identity,)
            )
            rows_of_run = (dict(zip(SAMPLE_FIELDS, row, strict=True)) for row in samples)
            with _decoding(self.path):
                run = run_from(dict(zip(RUN_FIELDS, fields, strict=True)), rows_of_run, _object(payload))
                about = {"context": _object(context), "model_hash": model_hash, "created": created}
            yield {**about, "run": run}

    def _records(self) -> Iterator[dict[str, Any]]:
        for row in self._select_runs("ORDER BY context_json, model_hash, variant, seed", ()):
            yield {**row, "run": asdict(row["run"])}
        calibrations = self._select(
            "SELECT context_json, model_hash, created, payload_json FROM calibrations ORDER BY 1, 2", ()
        )
        for context, model_hash, created, payload in calibrations:
            with _decoding(self.path):
                record = {"context": _object(context), "calibration": _object(payload)}
            yield {**record, "model_hash": model_hash, "created": created}

    def _insert(self, record: Mapping[str, Any]) -> bool:
        about = (record["context"], record["model_hash"], record["created"])
        if "run" in record:
            return self._insert_run(*about, record["run"])
        return self._insert_calibration(*about, record["calibration"])

    def _insert_run(self, context: str, model_hash: str, created: str, run: Run) -> bool:
        cursor = self._connection.execute(
            "INSERT INTO runs (context_json, model_hash, created, variant, seed, plain_ms, sum_ms, nodes, "
            "seconds, payload_json) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (context_json, model_hash, seed, variant) DO NOTHING",
            (context, model_hash, created, *plain_values(RUN_FIELDS, run), canonical(run.payload)),
        )
        if cursor.rowcount != 1:
            return False
        self._connection.executemany(
            "INSERT INTO samples (run_id, key_json, a, b, ms, count) VALUES (?, ?, ?, ?, ?, ?)",
            [(cursor.lastrowid, *plain_values(SAMPLE_FIELDS, sample)) for sample in run.samples],
        )
        return True

    def _insert_calibration(
        self, context: str, model_hash: str, created: str, payload: Mapping[str, Any]
    ) -> bool:
        cursor = self._connection.execute(
            "INSERT INTO calibrations (context_json, model_hash, created, payload_json) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (context_json, model_hash) DO UPDATE "
            "SET created = excluded.created, payload_json = excluded.payload_json "
            "WHERE excluded.created > calibrations.created",
            (context, model_hash, created, canonical(payload)),
        )
        return cursor.rowcount == 1


def open_store(path: Path | None = None) -> LutStore:
    """Open the store at `path`, creating it and its folders.

    The default is $ONNX_MDP_STORE, else ``latency.sqlite`` in the user's cache folder. Raises
    ``OutputError`` if the file is another program's, newer than this version, damaged, or cannot be
    written.
    """
    path = _default_path() if path is None else path
    connection: sqlite3.Connection | None = None
    try:
        with _sentences(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        _prepare(connection, path)
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    return LutStore(connection, path)


def _default_path() -> Path:
    chosen = os.environ.get("ONNX_MDP_STORE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("onnx-mdp")) / "latency.sqlite"


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    with _transaction(connection, path):
        _refuse_foreign(connection, path)
        if _pragma(connection, "user_version") == 0:
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    with _sentences(path):
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        connection.execute("PRAGMA synchronous = NORMAL")
    if mode != "wal":
        raise OutputError(
            f"The file system of '{path}' does not support SQLite's write-ahead log: point ONNX_MDP_STORE "
            "to a file on a local disk."
        )


def _refuse_foreign(connection: sqlite3.Connection, path: Path) -> None:
    tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
    ours = _pragma(connection, "application_id") == _APPLICATION_ID
    version = _pragma(connection, "user_version")
    if (tables or version) and not ours:
        raise OutputError(
            f"'{path}' is a database of another program: choose another file with ONNX_MDP_STORE."
        )
    if version == _SCHEMA_VERSION and _statements(connection) != set(_SCHEMA):
        raise OutputError(
            f"'{path}' holds other tables than onnx-mdp makes: move it away, or choose another file with "
            "ONNX_MDP_STORE."
        )
    if version > _SCHEMA_VERSION:
        raise OutputError(
            f"'{path}' has schema {version}, but this version of onnx-mdp knows only {_SCHEMA_VERSION}: "
            "upgrade onnx-mdp or choose another file with ONNX_MDP_STORE."
        )


def _statements(connection: sqlite3.Connection) -> set[str]:
    """What made the tables; a view or a trigger in their place could run for ever."""
    rows = connection.execute(
        "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
    )
    return {str(row[0]) for row in rows}


def _object(text: Any) -> dict[str, Any]:
    return json_object(json.loads(text))


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise OutputError(
            f"Cannot use '{path}' as the latency store ({getattr(error, 'strerror', None) or error}): "
            "move it away, or choose another file with ONNX_MDP_STORE."
        ) from error


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """SQLite stores any type in any column, so that rows are checked when they are read."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise OutputError(
            f"'{path}' holds a row that is no measurement: move it away, or choose another file with "
            "ONNX_MDP_STORE."
        ) from error


@contextmanager
def _transaction(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    with _sentences(path):
        # IMMEDIATE takes the write lock now: a file that cannot be written is refused when opened.
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            # SQLite has already rolled back by itself when the disk is full.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
