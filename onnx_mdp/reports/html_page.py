"""A page as one HTML file: no script, no network, readable on a phone, on paper and without colours."""

from __future__ import annotations

import re
from html import escape

from onnx_mdp.reports.inline_svg import inline_svg
from onnx_mdp.reports.pages import Bar, Block, Cell, Code, Column, Facts, Figure, Page, Section, Table
from onnx_mdp.reports.report import printable

__all__ = ["html_page"]

_PARTS = re.compile(r"[^/.;,]*[/.;,]+|[^/.;,]+")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { --ink: #1a1a1a; --faint: #555; --paper: #fff; --card: #f4f6f8; --line: #c9ced4; --fill: #1f4e79;
  --good: #17613a; --bad: #96201c; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --faint: #a9afb6; --paper: #14171a;
  --card: #1e2327; --line: #3c444b; --fill: #7fb2e0; --good: #7fd1a3; --bad: #ff9d97 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line) }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere }
.verdict { border: 2px solid var(--bad); border-left-width: .7rem; padding: .6rem 1rem; max-width: none }
.verdict.good { border-color: var(--good) }
.verdict strong { margin-right: .4rem; color: var(--bad) }
.verdict.good strong { color: var(--good) }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line) }
th { font-weight: 600; color: var(--faint); vertical-align: bottom }
.text { overflow-wrap: break-word; min-width: 4.5rem }
.number { text-align: right; white-space: nowrap }
th.number { white-space: normal }
.name { overflow-wrap: anywhere; min-width: 9rem; max-width: 34rem }
td.name { font-family: ui-monospace, Consolas, Menlo, monospace; font-size: .82rem }
td.bar { min-width: 6rem; width: 12rem; vertical-align: middle }
.bar svg { display: block; width: 100%; height: .8rem; overflow: visible }
.bar .outline { fill: none; stroke: var(--ink); vector-effect: non-scaling-stroke }
.bar .filled { fill: var(--fill) }
dl { display: grid; grid-template-columns: fit-content(13rem) 1fr; gap: .2rem 1.5rem; margin: .5rem 0;
  font-size: .95rem }
dt { color: var(--faint) }
dd { margin: 0; overflow-wrap: anywhere }
pre { background: var(--card); padding: .7rem; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
details { margin: .5rem 0 }
summary { cursor: pointer; color: var(--faint) }
figure { margin: .8rem 0 }
figure svg { background: #fff; max-width: 100%; height: auto; display: block }
.dense svg { max-width: none }
footer { margin: 2.5rem 0 1rem; color: var(--faint); font-size: .85rem; border-top: 1px solid var(--line);
  padding-top: .5rem }
@media (max-width: 36rem) { th, td { padding-right: .6rem } table { font-size: .82rem }
  dl { grid-template-columns: 6.5rem 1fr } .text { min-width: 0 } .name { min-width: 6.5rem }
  td.name { font-size: .75rem } td.bar { min-width: 3rem } .dense svg { zoom: .85 } }
@media screen and (max-width: 30rem) { .dense::after { content: "scroll sideways →"; color: var(--faint);
  font-size: .82rem } }
@media print { :root { --ink: #000; --faint: #333; --paper: #fff; --card: #fff; --line: #999; --fill: #444;
  --good: #000; --bad: #000 }
  body { max-width: none; padding: 0; font-size: 10pt; print-color-adjust: exact;
    -webkit-print-color-adjust: exact }
  h2 { break-after: avoid } tr, figure { break-inside: avoid } thead { display: table-header-group }
  pre { border: 1px solid #999 } .scroll { overflow: visible } .dense svg { max-width: 100% } }
"""


def html_page(page: Page) -> str:
    """The page as HTML; the same page gives the same bytes."""
    body = "\n".join(_section(section, number) for number, section in enumerate(page.sections, 1))
    good = " good" if page.good else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(page.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{_text(page.title)}</h1>
<p class="verdict{good}"><strong>{_text(page.word)}</strong> {_text(page.sentence)}</p>
</header>
<main>
{body}
</main>
<footer>{_text(page.foot)}</footer>
</body>
</html>
"""


def _text(text: str) -> str:
    return escape(printable(text))


def _breakable(name: str) -> str:
    """A name that may be broken after what separates its parts, not only anywhere."""
    return "<wbr>".join(map(_text, _PARTS.findall(name)))


def _section(section: Section, number: int) -> str:
    blocks = "\n".join(_block(block, f"s{number}b{place}-") for place, block in enumerate(section.blocks))
    return f"<section>\n<h2>{_text(section.title)}</h2>\n{blocks}\n</section>"


def _block(block: Block, prefix: str) -> str:
    if isinstance(block, Table):
        return _folded(_table(block), block.summary)
    if isinstance(block, Facts):
        pairs = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>\n" for name, value in block.pairs)
        return f"<dl>\n{pairs}</dl>"
    if isinstance(block, Code):
        return f"<pre><code>{_text(block.text)}</code></pre>"
    if isinstance(block, Figure):
        svg = inline_svg(block.svg, prefix, printable(block.label))
        size = "dense" if block.dense else "fitting"
        figure = f'<figure class="{size}"><div class="scroll" tabindex="0">{svg}</div></figure>'
        shown = _folded(figure, block.label if block.folded else "")
        return f"{shown}\n{_folded(_table(block.numbers), block.numbers.summary)}"
    return f"<p>{_text(block)}</p>"


def _folded(html: str, summary: str) -> str:
    return f"<details>\n<summary>{_text(summary)}</summary>\n{html}\n</details>" if summary else html


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col" class="{c.kind}">{_text(c.heading)}</th>' for c in table.columns)
    rows = "\n".join(
        "<tr>" + "".join(_cell(c, v) for c, v in zip(table.columns, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    head, body = f"<thead><tr>{heads}</tr></thead>", f"<tbody>\n{rows}\n</tbody>"
    return f'<div class="scroll"><table>\n{head}\n{body}\n</table></div>'


def _cell(column: Column, cell: Cell) -> str:
    if isinstance(cell, Bar):
        shown = _bar(cell)
    else:
        shown = _breakable(cell) if column.kind == "name" else _text(cell)
    return f'<td class="{column.kind}">{shown}</td>'


def _bar(bar: Bar) -> str:
    filled, outline = (f"{100 * min(1.0, max(0.0, share)):.4g}" for share in (bar.filled, bar.outline))
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="filled" x="0" y="0" width="{filled}" height="10"/>'
        f'<rect class="outline" x="0" y="0" width="{outline}" height="10"/></svg>'
    )
