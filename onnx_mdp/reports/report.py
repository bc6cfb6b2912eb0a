"""Tables for a terminal: what can be pruned, and what a plan prunes.

Names and reasons come from model files that nobody vouches for. They are shown as plain text, never as
markup, and characters that would steer the terminal are written as escapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from onnx_mdp.analysis.structure import Structure, macs, operation_macs
from onnx_mdp.model_io import parameter_count
from onnx_mdp.plan import PruningPlan, kept_count
from onnx_mdp.reports.documents import Shares, frozen_operators, plan_totals, shares
from onnx_mdp.reports.frozen_parts import frozen_parts

__all__ = ["analysis_table", "compact", "cost_table", "kept_channels", "plan_table", "printable"]

_BAR_CELLS = 8
_NAMES_SHOWN = 3  # of the frozen dimensions that share a reason; --json lists all
_BREAKS = re.compile(r"[^/;]*[/;]+|[^/;]+")


def printable(text: str) -> str:
    r"""Write every character that is not printable as an escape, in a terminal and in XML alike.

    >>> print(printable("a\x1b[31mb"))
    a\x1b[31mb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def compact(number: float) -> str:
    """Three significant digits and a unit.

    >>> compact(25_557_032), compact(512)
    ('25.6 M', '512')
    """
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.{max(0, 3 - len(str(int(number / scale))))}f} {unit}"
    return f"{number:.0f}"


def analysis_table(structure: Structure, milliseconds: Mapping[int, float] | None = None) -> RenderableType:
    """What of a model can be pruned, what can not and why, and the removable blocks.

    ``milliseconds`` maps indices of operations to their time in the unpruned model.
    """
    part = shares(structure)
    parts: list[RenderableType] = []
    if structure.prunable:
        parts.append(_dimension_table(structure, part))
    if structure.blocks:
        parts.append(_block_table(structure))
    if len(structure.prunable) < len(structure.dimensions):
        parts.append(_frozen_table(structure, milliseconds))
    parts += [_unsupported_line(key, names) for key, names in frozen_operators(structure).items()]
    return Group(*parts, _summary(structure, part))


def plan_table(
    structure: Structure,
    plan: PruningPlan,
    milliseconds: Mapping[str, tuple[float, float]] | None = None,
) -> RenderableType:
    """What a plan keeps of every prunable dimension, the blocks that it removes, and the totals.

    ``milliseconds`` maps names of dimensions to the predicted time of their layers before and after.
    """
    table = _table("what the plan keeps")
    _name_column(table, "dimension")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    if milliseconds is not None:
        table.add_column("ms", justify="right", no_wrap=True)
    for index in structure.prunable:
        table.add_row(*_plan_row(structure, plan, index, milliseconds))
    parts: list[RenderableType] = [table] if structure.prunable else []
    if plan.removed_blocks:
        parts.append(_removed_table(structure, plan))
    return Group(*parts, *_plan_summary(structure, plan))


@dataclass(frozen=True, slots=True)
class _Name:
    """A whole name, never cut off because users copy it, that breaks after ``/`` and ``;``."""

    name: str
    style: str = ""

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(12, max(12, cell_len(printable(self.name)))).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for part in _BREAKS.findall(printable(self.name)):
            for piece in chop_cells(part, options.max_width):
                if cell_len(lines[-1] + piece) > options.max_width:
                    lines.append("")
                lines[-1] += piece
        yield Text("\n".join(lines), style=self.style, no_wrap=True)


def cost_table(structure: Structure, milliseconds: Mapping[int, float], most: int = 15) -> RenderableType:
    """Where the milliseconds are: the ``most`` dearest operations of the unpruned model, by index."""
    table = _table("where the time goes")
    _name_column(table, "operation (and what is fused into it)")
    table.add_column("kind", no_wrap=True)
    _numbers(table, "ms", "share")
    total = sum(milliseconds.values()) or 1.0
    dearest = sorted(milliseconds, key=lambda index: -milliseconds[index])
    for index in dearest[:most]:
        operation, ms = structure.shadow.operations[index], milliseconds[index]
        name = printable(operation.name or operation.outputs[0])
        table.add_row(Text(name), Text(printable(operation.op_type)), f"{ms:.3f}", _percent(ms / total))
    rest = sum(milliseconds[index] for index in dearest[most:])
    if rest:
        table.add_row(Text(f"{len(dearest) - most} others"), "", f"{rest:.3f}", _percent(rest / total))
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )


def _name_column(table: Table, header: str) -> None:
    table.add_column(header, min_width=12)


def _numbers(table: Table, *headers: str) -> None:
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _dimension_table(structure: Structure, part: Shares) -> Table:
    """Every prunable dimension; ``block`` is the number of its block in the table of blocks."""
    table = _table("prunable dimensions")
    _name_column(table, "dimension")
    table.add_column("kind", no_wrap=True)
    grouped = any(structure.dimensions[index].channels > 1 for index in structure.prunable)
    _numbers(table, "size", *["step"] * grouped, "cuts", "params", "MACs", "block")
    numbers = {block.name: str(number) for number, block in enumerate(structure.blocks, 1)}
    for index in structure.prunable:
        dimension = structure.dimensions[index]
        table.add_row(
            _Name(dimension.name),
            Text(printable(dimension.kind)),
            str(dimension.size),
            *[str(dimension.channels)] * grouped,
            str(len({member.tensor for member in dimension.members})),
            _percent(part.params[index]),
            _percent(part.macs[index]),
            numbers.get(dimension.block or "", ""),
        )
    return table


def _block_table(structure: Structure) -> Table:
    table = _table("removable blocks")
    _numbers(table, "#")
    _name_column(table, "block")
    table.add_column("kind", no_wrap=True)
    _numbers(table, "nodes", "MACs")
    operations, shapes = structure.shadow.operations, structure.shadow.shapes
    whole = macs(structure.shadow) or 1
    for number, block in enumerate(structure.blocks, 1):
        cost = sum(operation_macs(operations[index], shapes) for index in block.operations)
        name, kind = _Name(block.name), Text(printable(block.kind))
        table.add_row(str(number), name, kind, str(len(block.operations)), _percent(cost / whole))
    return table


def _frozen_table(structure: Structure, milliseconds: Mapping[int, float] | None) -> Table:
    """What froze dimensions and what these hold, the most first; reasons that differ in names share a row."""
    params, whole = parameter_count(structure.shadow.model) or 1, macs(structure.shadow) or 1
    table = _table("frozen dimensions")
    _numbers(table, "count")
    table.add_column("reason", overflow="fold", ratio=3)
    table.add_column("dimensions", overflow="fold", ratio=2)
    _numbers(table, "params", "MACs", *["ms"] * (milliseconds is not None))
    for part in frozen_parts(structure, milliseconds):
        more = f" (and {len(part.nodes) - 1} more nodes)" if len(part.nodes) > 1 else ""
        table.add_row(
            str(len(part.dimensions)),
            Text(printable(part.reason) + more),
            Text(_some(part.dimensions)),
            _percent(part.params / params),
            _percent(part.macs / whole),
            *[] if part.ms is None else [f"{part.ms:.3f}"],
        )
    return table


def _some(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _unsupported_line(key: str, names: Sequence[str]) -> Text:
    touched = f"; it freezes {_some(names)}" if names else ""
    return Text(f"No rule for operator {printable(key)}{touched}.", style="yellow")


def _summary(structure: Structure, part: Shares) -> Text:
    inputs = ", ".join(
        f"{printable(name)} {'×'.join(map(str, shape))}" for name, shape in structure.shadow.inputs.items()
    )
    return Text(
        f"{len(structure.prunable)} of {_plural(len(structure.dimensions), 'dimension')} prunable: "
        f"{_percent(part.prunable_params)} of {compact(parameter_count(structure.shadow.model))} parameters, "
        f"{_percent(part.prunable_macs)} of {compact(macs(structure.shadow))} MACs; "
        f"{_plural(len(structure.blocks), 'removable block')}. Inputs: {inputs}.{_states(structure)}"
    )


def _states(structure: Structure) -> str:
    pairs = structure.shadow.states.items()
    named = ", ".join(f"{printable(source)} → {printable(target)}" for source, target in pairs)
    return f" States: {named}." if named else ""


def kept_channels(structure: Structure, plan: PruningPlan, index: int) -> int:
    """Channels that stay of a dimension; none where its block goes."""
    dimension = structure.dimensions[index]
    if dimension.block is not None and dimension.block in plan.removed_blocks:
        return 0
    return kept_count(plan, structure, index) * dimension.channels


def _plan_row(
    structure: Structure,
    plan: PruningPlan,
    index: int,
    milliseconds: Mapping[str, tuple[float, float]] | None,
) -> list[RenderableType]:
    dimension = structure.dimensions[index]
    kept = kept_channels(structure, plan, index)
    same = kept == dimension.size
    row: list[RenderableType] = [
        _Name(dimension.name, style="dim" if same else ""),
        Text(str(kept) if same else f"{dimension.size} → {kept}", style="dim" if same else ""),
        _bar(kept / dimension.size),
        "removed" if kept == 0 else _percent(kept / dimension.size),
    ]
    if milliseconds is not None:
        times = milliseconds.get(dimension.name)
        row.append("" if times is None else f"{times[0]:.3g} → {times[1]:.3g}")
    return row


def _bar(share: float) -> Text:
    """A bar in eighths of a cell; what stays never looks like nothing, what goes never like all."""
    eighths = min(8 * _BAR_CELLS - (share < 1), max(int(share > 0), round(8 * _BAR_CELLS * share)))
    filled = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
    return Text(filled, style="cyan") + Text("·" * (_BAR_CELLS - len(filled)), style="dim")


def _removed_table(structure: Structure, plan: PruningPlan) -> Table:
    table = _table("removed blocks")
    _name_column(table, "block")
    table.add_column("kind", no_wrap=True)
    _numbers(table, "nodes")
    for block in structure.blocks:
        if block.name in plan.removed_blocks:
            table.add_row(_Name(block.name), Text(printable(block.kind)), str(len(block.operations)))
    return table


def _plan_summary(structure: Structure, plan: PruningPlan) -> list[Text]:
    sizes = [structure.dimensions[index].size for index in structure.prunable]
    kept = [kept_channels(structure, plan, index) for index in structure.prunable]
    cut = sum(k < s for k, s in zip(kept, sizes, strict=True))
    totals = plan_totals(structure, plan)
    lines = [
        f"{cut} of {_plural(len(sizes), 'prunable dimension')} cut, {sum(sizes)} → {sum(kept)} channels; "
        f"{len(plan.removed_blocks)} of {_plural(len(structure.blocks), 'block')} removed.",
        f"Parameters {_change(totals.params)}; MACs {_change(totals.macs)}.",
    ]
    if plan.predicted_ms is not None:
        lines.append(f"Predicted {plan.predicted_ms:.3g} ms.")
    return [Text(line) for line in lines]


def _change(pair: tuple[int, int]) -> str:
    before, after = pair
    left = f" ({_percent(after / before)})" if before else ""
    return f"{compact(before)} → {compact(after)}{left}"
