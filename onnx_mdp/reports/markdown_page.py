"""A page as Markdown with tables, as code hosts and chats show it; figures stand there in numbers."""

from __future__ import annotations

import re

from onnx_mdp.reports.pages import Bar, Block, Cell, Code, Column, Facts, Figure, Page, Section, Table
from onnx_mdp.reports.report import printable

__all__ = ["markdown_page"]

_MARKS = re.compile(r"([\\`*_\[\]<>|#~&])")
_BAR_CELLS = 10


def markdown_page(page: Page) -> str:
    """The page as Markdown; the same page gives the same bytes."""
    head = f"# {_text(page.title)}\n\n**{_text(page.word)}** {_text(page.sentence)}"
    sections = [_section(section) for section in page.sections]
    return "\n\n".join([head, *sections, f"*{_text(page.foot)}*"]) + "\n"


def _text(text: str) -> str:
    """Plain text, no mark of which means anything."""
    return _MARKS.sub(r"\\\1", printable(text))


def _code(text: str, *, in_table: bool = False) -> str:
    """A code span; its fence is longer than any row of ticks in it."""
    shown = printable(text) or " "
    if in_table:
        shown = shown.replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _section(section: Section) -> str:
    return "\n\n".join([f"## {_text(section.title)}", *map(_block, section.blocks)])


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Facts):
        return "\n".join(f"- {_text(name)}: {_text(value)}" for name, value in block.pairs)
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        return f"{fence}sh\n{printable(block.text)}\n{fence}"
    if isinstance(block, Figure):
        return f"{_text(block.label)}\n\n{_table(block.numbers)}"
    return _text(block)


def _table(table: Table) -> str:
    lines = [
        _row([_text(column.heading) for column in table.columns]),
        _row(["---:" if column.kind == "number" else "---" for column in table.columns]),
        *(_row([_cell(c, v) for c, v in zip(table.columns, row, strict=True)]) for row in table.rows),
    ]
    text = "\n".join(lines)
    if not table.summary:
        return text
    return f"<details>\n<summary>{_text(table.summary)}</summary>\n\n{text}\n\n</details>"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(column: Column, cell: Cell) -> str:
    if isinstance(cell, Bar):
        filled, outline = (round(_BAR_CELLS * min(1.0, max(0.0, s))) for s in (cell.filled, cell.outline))
        return "█" * filled + "░" * (outline - filled)
    return _code(cell, in_table=True) if column.kind == "name" and cell else _text(cell)
