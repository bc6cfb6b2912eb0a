"""A page as values: sections of sentences, tables, bars and figures, for whoever writes HTML or Markdown.

All text is plain; whoever writes it escapes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Bar", "Block", "Cell", "Code", "Column", "Facts", "Figure", "Page", "Section", "Table"]

Kind = Literal["name", "text", "number", "bar"]


@dataclass(frozen=True, slots=True)
class Bar:
    """A filled part in an outline, both shares of the place that there is (0 to 1)."""

    filled: float
    outline: float = 1.0


Cell: TypeAlias = "str | Bar"


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and what stands below it; names come from models and may be long."""

    heading: str
    kind: Kind = "text"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of as many cells as there are columns; with a ``summary``, folded behind it."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is so, by name."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Code:
    """A command or a file, letter by letter."""

    text: str


@dataclass(frozen=True, slots=True)
class Figure:
    """An SVG document, what it shows in a line, and the same in numbers; folded where it is very long.

    What is ``dense`` cannot be read if it is made smaller.
    """

    svg: str
    label: str
    numbers: Table
    folded: bool = False
    dense: bool = False


Block: TypeAlias = "str | Table | Facts | Code | Figure"


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """A title, the verdict (a word and a sentence), and the sections."""

    title: str
    word: str
    good: bool
    sentence: str
    sections: tuple[Section, ...]
    foot: str
