"""Latency measurements in one SQLite file: whatever was measured once is never lost or repeated.

Every run is one committed transaction in write-ahead-log mode (30 µs), so that an interrupted
session keeps all it has measured. Stores of several machines are joined through JSON lines. ::

    runs          one profiled variant of one model, unique per (context, model, seed, variant)
    samples       what each layer of that run took, by shape key and staircase coordinates
    calibrations  the end-to-end correction of one model, unique per (context, model)
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from onnx_mdp.files import write_files
from onnx_mdp.tables.lut_file import connect, decoding, default_path, sentences, transaction
from onnx_mdp.tables.lut_records import (
    FORMAT,
    RUN_FIELDS,
    SAMPLE_FIELDS,
    Run,
    Sample,
    canonical,
    json_object,
    matches,
    parse_lines,
    plain_values,
    run_from,
)

__all__ = ["LutStore", "Run", "Sample", "StoreSummary", "open_store"]

Context = Mapping[str, str | int]

_SUMMARY = """
    SELECT context_json, model_hash, MIN(created), MAX(created),
        GROUP_CONCAT(DISTINCT json_extract(payload_json, '$.session.host')), COUNT(*), SUM(samples),
        SUM(bytes + LENGTH(CAST(context_json || model_hash || created || payload_json AS BLOB)) + 48)
    FROM runs JOIN (
        SELECT id AS run_id, COUNT(key_json) AS samples,
            COALESCE(SUM(LENGTH(CAST(key_json AS BLOB)) + 40), 0) AS bytes
        FROM runs LEFT JOIN samples ON run_id = id GROUP BY id
    ) ON run_id = id
    GROUP BY context_json, model_hash ORDER BY context_json, model_hash
"""


# A calibration is named after its table and the fit that it belongs to.
_REMOVAL = (
    "DELETE FROM samples WHERE run_id IN "
    "(SELECT id FROM runs WHERE (context_json, model_hash) = (:context, :key))",
    "DELETE FROM runs WHERE (context_json, model_hash) = (:context, :key)",
    "DELETE FROM calibrations WHERE context_json = :context "
    "AND (model_hash = :key OR SUBSTR(model_hash, 1, LENGTH(:key) + 1) = :key || '.')",
)


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What the store holds for one model in one context; `bytes` approximates its size on disk.

    `first` and `last` say when its runs were measured, in ISO 8601; `hosts` on which machines, if known.
    """

    context: dict[str, str | int]
    model_hash: str
    first: str
    last: str
    hosts: tuple[str, ...]
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
        with transaction(self._connection, self.path):
            return self._insert_run(canonical(context), model_hash, _now(), run)

    def runs(self, context: Context, model_hash: str) -> tuple[Run, ...]:
        """Return the runs of one model in the order of their variants, then of their seeds."""
        where = "WHERE context_json = ? AND model_hash = ? ORDER BY variant, seed"
        return tuple(row["run"] for row in self._select_runs(where, (canonical(context), model_hash)))

    def models(self, context: Context) -> tuple[str, ...]:
        """Return the models that have runs in a context."""
        rows = self._select(
            "SELECT DISTINCT model_hash FROM runs WHERE context_json = ? ORDER BY model_hash",
            (canonical(context),),
        )
        return tuple(str(row[0]) for row in rows)

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
        with transaction(self._connection, self.path):
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
        with decoding(self.path):
            return _object(rows[0][0]) if rows else None

    def summary(self, only: str = "") -> tuple[StoreSummary, ...]:
        """Return one row per context and model that has runs, of those that ``only`` matches."""
        with decoding(self.path):
            rows = (
                StoreSummary(
                    _object(context),
                    key,
                    first,
                    last,
                    tuple(sorted(filter(None, (hosts or "").split(",")))),
                    *counts,
                )
                for context, key, first, last, hosts, *counts in self._select(_SUMMARY, ())
            )
            return tuple(row for row in rows if matches(only, row.context, row.model_hash))

    def export_jsonl(self, path: Path, only: str = "") -> int:
        """Write the records that ``only`` matches as JSON lines and return their number.

        `path` is replaced in one step.
        """
        records = [r for r in self._records() if matches(only, r["context"], r["model_hash"])]
        write_files({path: "".join(canonical(line) + "\n" for line in (FORMAT, *records)).encode()})
        return len(records)

    def merge_jsonl(self, path: Path) -> tuple[int, int]:
        """Add the records of an export, all or none; return how many were (added, skipped).

        Of two measurements of one thing the newer one is kept, so that it does not matter which store is
        merged into which, or how often. Raises ``UsageError`` if `path` is no export.
        """
        records = parse_lines(path)
        with transaction(self._connection, self.path):
            added = sum(self._merge(record) for record in records)
        return added, len(records) - added

    def damage(self) -> str | None:
        """The first fault that SQLite finds in the whole file, or None."""
        found = str(self._select("PRAGMA quick_check(1)", ())[0][0])
        return None if found == "ok" else found

    def remove(self, tables: Iterable[StoreSummary]) -> None:
        """Forget the runs and calibrations of these tables, and give their space back."""
        with transaction(self._connection, self.path):
            for table in tables:
                about = {"context": canonical(table.context), "key": table.model_hash}
                for statement in _REMOVAL:
                    self._connection.execute(statement, about)
        with sentences(self.path):
            self._connection.execute("VACUUM")

    def _select(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with sentences(self.path):
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
            with decoding(self.path):
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
            with decoding(self.path):
                record = {"context": _object(context), "calibration": _object(payload)}
            yield {**record, "model_hash": model_hash, "created": created}

    def _merge(self, record: Mapping[str, Any]) -> bool:
        about = (record["context"], record["model_hash"], record["created"])
        if "run" in record:
            return self._merge_run(*about, record["run"])
        return self._insert_calibration(*about, record["calibration"])

    def _merge_run(self, context: str, model_hash: str, created: str, run: Run) -> bool:
        if self._insert_run(context, model_hash, created, run):
            return True
        identity, *known = self._connection.execute(
            "SELECT id, created, plain_ms, sum_ms, seconds, payload_json FROM runs "
            "WHERE (context_json, model_hash, seed, variant) = (?, ?, ?, ?)",
            (context, model_hash, run.seed, run.variant),
        ).fetchone()
        if [created, run.plain_ms, run.sum_ms, run.seconds, canonical(run.payload)] <= known:
            return False
        self._connection.execute("DELETE FROM samples WHERE run_id = ?", (identity,))
        self._connection.execute("DELETE FROM runs WHERE id = ?", (identity,))
        return self._insert_run(context, model_hash, created, run)

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
            "WHERE (excluded.created, excluded.payload_json) > "
            "(calibrations.created, calibrations.payload_json)",
            (context, model_hash, created, canonical(payload)),
        )
        return cursor.rowcount == 1


def open_store(path: Path | None = None) -> LutStore:
    """Open the store at `path`, creating it and its folders.

    The default is $ONNX_MDP_STORE, else ``latency.sqlite`` in the user's cache folder. Raises
    ``OutputError`` if the file is another program's, newer than this version, damaged, or cannot be
    written.
    """
    path = default_path() if path is None else path
    return LutStore(connect(path), path)


def _object(text: Any) -> dict[str, Any]:
    return json_object(json.loads(text))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
