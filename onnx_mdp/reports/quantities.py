"""Numbers and long tables as people read them."""

from __future__ import annotations

from onnx_mdp.reports.pages import Table

__all__ = ["NO_NUMBER", "SHOWN", "long_table", "milliseconds", "part", "percent", "ratio"]

NO_NUMBER = "–"
SHOWN = 12  # rows; the others are folded


def milliseconds(ms: float | None, unit: str = " ms") -> str:
    """Milliseconds to about four digits.

    >>> milliseconds(0.01234), milliseconds(12.345), milliseconds(1234.5), milliseconds(None)
    ('0.0123 ms', '12.35 ms', '1234 ms', '–')
    """
    if ms is None:
        return NO_NUMBER
    digits = 4 if abs(ms) < 0.1 else 3 if abs(ms) < 10 else 2 if abs(ms) < 100 else 1 if abs(ms) < 1000 else 0
    return f"{ms:.{digits}f}{unit}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return NO_NUMBER if share is None else f"{100 * share:.{digits}f} %"


def ratio(amount: float, whole: float) -> float | None:
    """How many times ``whole``; None of nothing."""
    return amount / whole if whole else None


def part(amount: float, whole: float) -> float:
    """The share of a bar; 0 of nothing."""
    return amount / whole if whole > 0 else 0.0


def long_table(table: Table, what: str) -> Table:
    """A table, folded where it is long."""
    if len(table.rows) <= 2 * SHOWN:
        return table
    return Table(table.columns, table.rows, f"All {len(table.rows)} {what}")
