"""Which operators have a rule, from which opset, and what becomes of units there: the registry as a table."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import onnx

from onnx_mdp.rules import RULES, SINCE

__all__ = ["Coverage", "coverage", "operators_document", "operators_markdown"]

_OLDEST_OPSET = 7  # what ONNX Runtime runs
_NEWEST_OPSET = 26  # the newest that ONNX Runtime has kernels of
_FROZEN = "Frozen: "


@dataclass(frozen=True, slots=True)
class Coverage:
    """One rule: its operators (of ``domain``, "" is ONNX's own), and what it does, as its docstring says.

    ``frozen`` is "" for rules that freeze nothing. Forms from before opset ``since`` have no rule.
    """

    operators: tuple[str, ...]
    domain: str
    since: int
    effect: str
    frozen: str


def coverage() -> tuple[Coverage, ...]:
    """Every rule once, in alphabetical order of its first operator."""
    found: dict[tuple[Any, str, int], list[str]] = {}
    for key in sorted(RULES):
        domain, _, operator = key.rpartition("::")
        found.setdefault((RULES[key], domain, SINCE[key]), []).append(operator)
    return tuple(
        Coverage(tuple(operators), domain, since, *_described(inspect.getdoc(rule) or ""))
        for (rule, domain, since), operators in found.items()
    )


def _described(docstring: str) -> tuple[str, str]:
    effect, _, frozen = " ".join(docstring.replace("``", "`").split()).partition(_FROZEN)
    return effect.strip(), frozen.strip().rstrip(".")


def operators_markdown() -> str:
    """The table of docs/operators.md: one row for each rule."""
    lines = ["| operators | what becomes of units | frozen |", "|---|---|---|"]
    for row in coverage():
        names = ", ".join(f"`{row.domain}::{name}`" if row.domain else f"`{name}`" for name in row.operators)
        since = f" (from opset {row.since})" if row.since > 1 else ""
        lines.append(f"| {names}{since} | {_cell(row.effect)} | {_cell(row.frozen)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def operators_document() -> dict[str, Any]:
    """What ``operators --json`` prints: ``versions`` are the opsets that brought each handled form."""
    return {
        "schema_version": 1,
        "operators": [
            {
                "operator": name,
                "domain": row.domain,
                "versions": list(_versions(name, row)),
                "effect": row.effect,
                "frozen": row.frozen or None,
            }
            for row in coverage()
            for name in row.operators
        ],
    }


def _versions(name: str, row: Coverage) -> tuple[int, ...]:
    """The forms of an operator that an opset from 7 to 26 uses; of another domain, the oldest one."""
    if row.domain:
        return (row.since,)
    known = sorted(
        s.since_version
        for s in onnx.defs.get_all_schemas_with_history()
        if s.name == name and not s.domain and not s.deprecated
    )
    first = max((v for v in known if v <= max(_OLDEST_OPSET, row.since)), default=row.since)
    return tuple(v for v in known if first <= v <= _NEWEST_OPSET)
