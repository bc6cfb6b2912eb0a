"""The SQLite file of the latency store: its tables, what is refused, and one sentence for each fault."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnx_mdp.errors import OutputError

__all__ = ["connect", "decoding", "default_path", "sentences", "transaction"]

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


def connect(path: Path) -> sqlite3.Connection:
    """Open the file and make its tables where it is new.

    Raises:
        OutputError: it is another program's, newer than this version, damaged, or cannot be written.
    """
    connection: sqlite3.Connection | None = None
    try:
        with sentences(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        _prepare(connection, path)
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    return connection


def default_path() -> Path:
    """$ONNX_MDP_STORE, else ``latency.sqlite`` in the user's cache folder."""
    chosen = os.environ.get("ONNX_MDP_STORE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("onnx-mdp")) / "latency.sqlite"


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    with transaction(connection, path):
        _refuse_foreign(connection, path)
        if _pragma(connection, "user_version") == 0:
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    with sentences(path):
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


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


@contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Say in a sentence what SQLite or the system could not do with the file."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise OutputError(
            f"Cannot use '{path}' as the latency store ({getattr(error, 'strerror', None) or error}): "
            "move it away, or choose another file with ONNX_MDP_STORE."
        ) from error


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """SQLite stores any type in any column, so that rows are checked when they are read."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise OutputError(
            f"'{path}' holds a row that is no measurement: move it away, or choose another file with "
            "ONNX_MDP_STORE."
        ) from error


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """All that happens inside is in the file, or nothing."""
    with sentences(path):
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
