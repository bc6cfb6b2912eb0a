"""What a report shows, and in which order: the verdict, then each question with its figure or table.

The sections that are drawn are here, those that prove in `report_evidence`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx_mdp.reports.figures import headline, layers_svg
from onnx_mdp.reports.pages import Bar, Block, Column, Facts, Figure, Page, Section, Table
from onnx_mdp.reports.plan_report import front_svg
from onnx_mdp.reports.quantities import NO_NUMBER, SHOWN, long_table, milliseconds, part, percent, ratio
from onnx_mdp.reports.report import compact
from onnx_mdp.reports.report_evidence import evidence_sections
from onnx_mdp.reports.report_file import Costs, Operation, Report

__all__ = ["report_page"]

_TALL = 120  # layers; a figure of more is folded
_NO_GAP = 1e-9
_WORDS = {
    "met": "PASS",
    "missed": "MISSED",
    "infeasible": "INFEASIBLE",
    "nothing_to_do": "NOTHING TO DO",
}


def report_page(report: Report) -> Page:
    """The page of a report."""
    sections = (
        _numbers(report),
        _structure(report),
        _time(report),
        _rounds(report),
        _front(report),
        *evidence_sections(report),
    )
    return Page(
        title=f"{report.model}: {milliseconds(report.base_ms)} → {milliseconds(report.target_ms)} asked",
        word=_WORDS[report.status],
        good=report.status in ("met", "nothing_to_do"),
        sentence=_sentence(report),
        sections=tuple(section for section in sections if section is not None),
        foot=f"onnx-mdp {report.version}, {report.when}",
    )


def _sentence(report: Report) -> str:
    asked = f"{milliseconds(report.target_ms)} were asked for"
    base = f"the original takes {milliseconds(report.base_ms)}"
    if report.status == "nothing_to_do":
        return f"{asked}, and {base}: it meets the target already, and no model was written."
    if report.status == "infeasible":
        return (
            f"{asked}, and {base}; by the table no plan is faster than {milliseconds(report.fastest_ms)}. "
            "No model was written."
        )
    took = f"it takes {milliseconds(report.measured_ms)}, measured; {asked}; {base}"
    if report.status == "missed":
        return f"The best plan that was found does not meet the target: {took}. No model was written."
    return f"{report.output or 'The pruned model'} meets the target: {took}."


def _numbers(report: Report) -> Section:
    """What was asked, met, and measured."""
    measured = report.measured_ms
    left = percent(None if measured is None else ratio(measured, report.base_ms))
    sizes = (("parameters", report.params), ("multiply-accumulates", report.macs))
    rows = [
        ("latency", milliseconds(report.base_ms), milliseconds(measured), left),
        *((what, compact(a), compact(b), percent(ratio(b, a))) for what, (a, b) in sizes),
        ("importance kept", "100 %", percent(report.importance_share, 2), ""),
    ]
    if report.proof is None:
        rows = [(what, before, NO_NUMBER, NO_NUMBER) for what, before, *_ in rows[:3]]
    asked = f"{milliseconds(report.target_ms)}, {percent(ratio(report.target_ms, report.base_ms))} of before"
    facts = (("asked", asked), *_measured(report), *_found(report))
    told = [("then", text) for text in report.then] + [("note", text) for text in report.notes]
    columns = (Column(""), *(Column(c, "number") for c in ("before", "after", "left")))
    return Section("Asked, met, measured", (Table(columns, tuple(rows)), Facts((*facts, *told))))


def _measured(report: Report) -> Iterator[tuple[str, str]]:
    """The measurement, and how sure it is."""
    if report.measured_ms is None:
        return
    times = NO_NUMBER if not report.measured_ms else f"{report.base_ms / report.measured_ms:.2f}"
    yield "predicted", milliseconds(report.predicted_ms)
    yield "measured", f"{milliseconds(report.measured_ms)}, {times} times as fast as the original"
    noise = f"the larger of 2 % and twice the noise F ({percent(report.noise)})"
    yield "tolerance", f"{percent(report.tolerance)} of the target, {noise}"
    now = milliseconds(report.base_now_ms)
    yield (
        "original beside it",
        f"{now}; the measured time is scaled to the {milliseconds(report.base_ms)} before",
    )


def _found(report: Report) -> Iterator[tuple[str, str]]:
    """The plan, and the proof."""
    if report.fastest_ms is not None:
        yield "fastest plan there is", f"{milliseconds(report.fastest_ms)}, by the table"
    if report.solver is not None:
        near = f", within {report.gap:.0e} of the best" if report.gap is not None else ""
        best = report.gap is not None and report.gap <= _NO_GAP
        proven = ", proven to be the best" if best else near
        yield "chosen by", f"{report.solver}{proven}; units ranked by {report.criterion}"
    if report.proof is not None:
        holds = "equals the masked original" if report.proof.verified else "differs from the masked original"
        what = "the model as it was sliced" if report.then else "the pruned model"
        yield "verified", f"{what} {holds}, error {report.proof.worst:.1e} of the scale"


def _structure(report: Report) -> Section | None:
    if not report.layers:
        return None
    gone = sum(block.removed for block in report.blocks)
    totals = [
        f"parameters {compact(report.params[0])} → {compact(report.params[1])}",
        f"MACs {compact(report.macs[0])} → {compact(report.macs[1])}",
        *([f"{gone} of {len(report.blocks)} blocks removed"] if report.blocks else ()),
    ]
    rows = [
        (x.name, str(x.width), "removed" if x.gone else str(x.kept), Bar(part(x.kept, x.width)))
        for x in report.layers
    ]
    columns = (
        Column("layer", "name"),
        Column("before", "number"),
        Column("after", "number"),
        Column("kept", "bar"),
    )
    figure = Figure(
        layers_svg(report.layers, " · ".join(totals)),
        headline(report.layers),
        Table(columns, tuple(rows), f"The {len(rows)} layers in numbers"),
        folded=len(rows) > _TALL,
        dense=True,
    )
    blocks: list[Block] = ["Output channels that each layer keeps.", figure]
    if gone:
        removed = [(block.name, block.kind) for block in report.blocks if block.removed]
        blocks.append(f"Removed blocks, {gone} of {len(report.blocks)}:")
        blocks.append(
            long_table(Table((Column("block", "name"), Column("kind")), tuple(removed)), "removed blocks")
        )
    return Section("Structure", tuple(blocks))


def _time(report: Report) -> Section | None:
    costs = report.costs
    if costs is None:
        return None
    scales = _scales(report, costs)
    most = max((o.before_ms for o in costs.operations), default=0.0)
    dearest = sorted(costs.operations, key=lambda o: -o.before_ms)
    pruned = scales[1] is not None
    said = "By the latency table, scaled to the totals that were measured. "
    said += "Outline: before; filled: after." if pruned else "There is no plan, hence no time after."
    blocks: list[Block] = [said, _kinds(costs, scales)]
    blocks.append("The dearest operations, each with what is fused into it:")
    blocks.append(_costs_table(dearest[:SHOWN], scales, most))
    if len(dearest) > SHOWN:
        whole = _costs_table(costs.operations, scales, most)
        blocks.append(
            Table(whole.columns, whole.rows, f"All {len(dearest)} operations, in the order of the graph")
        )
    return Section("Where the milliseconds were and are", tuple(blocks))


def _scales(report: Report, costs: Costs) -> tuple[float, float | None]:
    """What makes the table's sums the measured totals, before and after."""
    before = ratio(report.base_ms, costs.around_ms[0] + sum(o.before_ms for o in costs.operations))
    if costs.around_ms[1] is None or report.measured_ms is None:
        return before or 1.0, None
    after = costs.around_ms[1] + sum(o.after_ms or 0.0 for o in costs.operations)
    return before or 1.0, ratio(report.measured_ms, after) or 1.0


def _kinds(costs: Costs, scales: tuple[float, float | None]) -> Table:
    """The same summed over operations of one type, the dearest first."""
    kinds: dict[str, list[Operation]] = {}
    for operation in costs.operations:
        kinds.setdefault(operation.kind, []).append(operation)
    sums = [
        Operation(
            f"{kind} × {len(some)}",
            kind,
            sum(o.before_ms for o in some),
            sum(o.after_ms or 0.0 for o in some),
        )
        for kind, some in kinds.items()
    ]
    sums.sort(key=lambda o: -o.before_ms)
    if any(costs.around_ms):
        sums.append(Operation("outside of operations", "", *costs.around_ms))
    most = max((o.before_ms for o in sums), default=0.0)
    table = _costs_table(sums, scales, most)
    rows = [(row[0], *row[2:]) for row in table.rows]
    return Table((Column("kind"), *table.columns[2:]), tuple(rows))


def _costs_table(operations: Iterable[Operation], scales: tuple[float, float | None], most: float) -> Table:
    before, after = scales
    rows = [
        (
            o.name,
            o.kind,
            milliseconds(before * o.before_ms, ""),
            NO_NUMBER if after is None else milliseconds(after * (o.after_ms or 0.0), ""),
            Bar(part((after or 0.0) * (o.after_ms or 0.0), before * most), part(o.before_ms, most)),
        )
        for o in operations
    ]
    numbers = (Column("ms before", "number"), Column("ms after", "number"), Column("", "bar"))
    return Table((Column("operation", "name"), Column("kind"), *numbers), tuple(rows))


def _rounds(report: Report) -> Section | None:
    if not report.rounds:
        return None
    most = max(*(r.measured_ms for r in report.rounds), report.target_ms, report.base_ms)
    rows = [
        (
            f"{number}{', delivered' if r.delivered and report.status == 'met' else ''}",
            milliseconds(r.predicted_ms, ""),
            milliseconds(r.measured_ms, ""),
            "" if not r.measured_ms else f"{100 * (r.predicted_ms / r.measured_ms - 1):+.1f} %",
            percent(r.noise),
            percent(r.value, 2),
            Bar(part(r.measured_ms, most), part(report.target_ms, most)),
        )
        for number, r in enumerate(report.rounds, 1)
    ]
    numbers = ("ms predicted", "ms measured", "predicted off by", "noise F", "importance kept")
    columns = (Column("round"), *(Column(c, "number") for c in numbers), Column("", "bar"))
    said = (
        "Each plan was rewritten and measured beside the original; what was measured corrected the next "
        "prediction. Outline: the target; filled: measured; the whole width is the original."
    )
    return Section("Predicted against measured", (said, Table(columns, tuple(rows))))


def _front(report: Report) -> Section | None:
    front = report.front
    if front is None or not front.points:
        return None
    svg = front_svg(
        report.base_ms,
        front.points,
        target_ms=report.target_ms,
        chosen=front.chosen,
        measured_ms=report.measured_ms,
    )
    rows = tuple(
        (milliseconds(ms, ""), percent(ratio(ms, report.base_ms)), percent(v, 2)) for ms, v in front.points
    )
    columns = tuple(Column(c, "number") for c in ("ms predicted", "of the original", "importance kept"))
    label = "The best plan at every latency: what a millisecond costs in importance"
    said = (
        "Importance is what the plan was chosen by, and no accuracy. Predicted by the table, scaled to the "
        "original's time."
    )
    if front.chosen is not None:
        said += " The diamond is the plan that was chosen, the cross what it measured."
    figure = Figure(svg, label, Table(columns, rows, f"The {len(rows)} plans in numbers"))
    return Section("What else could be had: the Pareto front", (said, figure))
