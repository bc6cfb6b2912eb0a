"""What `lut` does: list, export, merge and clear the measured latencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from onnx_mdp.cli.options import Options
from onnx_mdp.errors import UsageError
from onnx_mdp.files import check_output
from onnx_mdp.reports.report import printable
from onnx_mdp.tables.lut_store import StoreSummary, open_store

__all__ = ["run_lut_clear", "run_lut_export", "run_lut_list", "run_lut_merge"]


def run_lut_list(options: Options, only: str) -> int:
    """List what the store holds, and where and when it was measured."""
    with open_store(options.store) as store:
        rows, path = store.summary(only), store.path
    document: dict[str, Any] = {
        "schema_version": 1,
        "store": str(path),
        "tables": [asdict(row) | {"hosts": list(row.hosts)} for row in rows],
    }
    lines = [_line(row) for row in rows]
    options.screen.result("\n".join(lines) or _nothing(only), document)
    return 0


def _line(row: StoreSummary) -> str:
    parts = (
        row.model_hash,
        row.context.get("provider"),
        f"{row.context.get('threads')} thread(s)",
        f"{row.runs} runs",
        f"{row.samples} samples",
        row.last[:10],
        ", ".join(row.hosts) or "unknown host",
        row.context.get("device"),
    )
    return "  ".join(printable(str(part)) for part in parts)


def _nothing(only: str) -> str:
    return f"the store holds nothing that matches {only!r}" if only else "the store is empty"


def run_lut_export(path: Path, options: Options, only: str, *, overwrite: bool) -> int:
    """Write measurements as JSON lines."""
    check_output(path, overwrite=overwrite)
    with open_store(options.store) as store:
        count = store.export_jsonl(path, only)
    document = {"schema_version": 1, "records": count, "output": str(path)}
    options.screen.result(f"{count} records → {path}", document)
    return 0


def run_lut_merge(paths: Sequence[Path], options: Options) -> int:
    """Read measurements that other stores exported."""
    added = skipped = 0
    with open_store(options.store) as store:
        for path in paths:
            more, known = store.merge_jsonl(path)
            added, skipped = added + more, skipped + known
    document = {"schema_version": 1, "added": added, "skipped": skipped}
    options.screen.result(f"{added} records added, {skipped} were there already", document)
    return 0


def run_lut_clear(options: Options, only: str, older_than: float | None, *, dry_run: bool) -> int:
    """Forget the tables that match and are old enough."""
    if not only and older_than is None:
        raise UsageError("say what may go: --only PATTERN, --older-than DAYS, or both")
    limit = "~"  # above every date
    if older_than is not None:
        limit = (datetime.now(timezone.utc) - timedelta(days=older_than)).isoformat()
    with open_store(options.store) as store:
        rows = [row for row in store.summary(only) if row.last < limit]
        if not dry_run:
            store.remove(rows)
    size = sum(row.bytes for row in rows)
    document = {"schema_version": 1, "removed": len(rows), "bytes": size, "dry_run": dry_run}
    verb = "would be removed" if dry_run else "removed"
    lines = [*map(_line, rows), f"{len(rows)} tables {verb}, about {size / 1e6:.1f} MB"]
    options.screen.result("\n".join(lines), document)
    return 0
