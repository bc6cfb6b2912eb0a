"""Fronts and explanations as tables, as JSON and as a figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnx_mdp.planning.explain import Explanation
from onnx_mdp.planning.problem import Solution
from onnx_mdp.reports.figures import STYLE
from onnx_mdp.reports.report import printable

__all__ = [
    "explanation_document",
    "explanation_table",
    "front_document",
    "front_points",
    "front_svg",
    "front_table",
]


def explanation_table(explanation: Explanation) -> RenderableType:
    """The price of a millisecond, the next cuts, the limits and the removed blocks."""
    cuts = _table("cheapest next cuts", "cut", "importance lost", "ms saved", "lost per ms")
    for cut in explanation.next_cuts:
        rate = cut.importance / cut.saved_ms
        cuts.add_row(printable(cut.name), f"{cut.importance:.3%}", f"{cut.saved_ms:.4f}", f"{rate:.3%}")
    limits = _table("limits", "limit", "used", "allowed", "importance gained without it")
    for use in explanation.limits:
        gain = f"{use.gain:.2%}" if use.gain > 0 else "none: it is slack"
        limits.add_row(printable(use.name), f"{use.used:.6g}", f"{use.limit:.6g}", gain)
    parts: list[RenderableType] = [cuts, limits]
    if explanation.blocks:
        blocks = _table("why blocks go", "removed block", "importance lost by keeping it")
        for reason in explanation.blocks:
            kept = "nothing fits with it" if reason.loss is None else f"{reason.loss:.3%}"
            blocks.add_row(printable(reason.name), kept)
        parts.append(blocks)
    return Group(Text(f"One more millisecond buys {explanation.price:.2%} of the importance."), *parts)


def explanation_document(explanation: Explanation) -> dict[str, Any]:
    """An explanation as plain JSON types; importances are shares of the total."""
    return {
        "price_per_ms": explanation.price,
        "next_cuts": [
            {"name": cut.name, "importance": cut.importance, "saved_ms": cut.saved_ms}
            for cut in explanation.next_cuts
        ],
        "limits": [
            {"name": use.name, "used": use.used, "limit": use.limit, "gain": use.gain}
            for use in explanation.limits
        ],
        "removed_blocks": [{"name": reason.name, "loss": reason.loss} for reason in explanation.blocks],
    }


def front_table(targets_ms: Sequence[float], base_ms: float, answers: Sequence[Solution]) -> RenderableType:
    """One row a target: what is predicted, what it is worth, and how well that is proven."""
    table = _table("latency against importance", "target ms", "ratio", "predicted", "importance", "gap", "")
    for target, answer in zip(targets_ms, answers, strict=True):
        ratio = f"{target / base_ms:.3f}"
        if answer.choice is None:
            least = "" if answer.fastest_ns is None else f"smallest reachable {answer.fastest_ns * 1e-6:.3f}"
            table.add_row(f"{target:.3f}", ratio, "–", "–", "–", f"infeasible; {least}".rstrip("; "))
        else:
            predicted = f"{answer.cost_ns * 1e-6:.3f}"
            table.add_row(
                f"{target:.3f}", ratio, predicted, f"{answer.value:.2%}", f"{answer.gap:.0e}", answer.status
            )
    return table


def front_document(targets_ms: Sequence[float], answers: Sequence[Solution]) -> list[dict[str, Any]]:
    """The same as plain JSON types."""
    return [
        {
            "target_ms": target,
            "status": answer.status,
            "predicted_ms": None if answer.choice is None else answer.cost_ns * 1e-6,
            "importance_share": None if answer.choice is None else answer.value,
            "gap": None if answer.choice is None else answer.gap,
            "fastest_ms": None if answer.fastest_ns is None else answer.fastest_ns * 1e-6,
            "seconds": answer.seconds,
        }
        for target, answer in zip(targets_ms, answers, strict=True)
    ]


def front_points(answers: Sequence[Solution]) -> tuple[tuple[float, float], ...]:
    """Predicted milliseconds and share of the importance of every choice, the fastest first."""
    return tuple(sorted({(a.cost_ns * 1e-6, a.value) for a in answers if a.choice is not None}))


def front_svg(
    base_ms: float,
    points: Sequence[tuple[float, float]],
    *,
    target_ms: float | None = None,
    chosen: tuple[float, float] | None = None,
    measured_ms: float | None = None,
) -> str:
    """Importance over predicted latency, one point a choice; both start at 0.

    What was ``chosen`` is a diamond, with a cross where it was measured; the target is a dashed line.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 3.8), facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        axes.plot([x for x, _ in points], [100 * y for _, y in points], "o-", color="#1f4e79", markersize=4)
        axes.plot([base_ms], [100.0], "s", color="#8c8c8c", markersize=6)
        axes.annotate("unpruned", (base_ms, 100.0), (8, -24), textcoords="offset points", ha="right")
        if target_ms is not None:
            axes.axvline(target_ms, color="#1a1a1a", linestyle="--", linewidth=1)
            axes.annotate("target", (target_ms, 3), (4, 0), textcoords="offset points")
        if chosen is not None:
            axes.plot(*_in_percent(chosen), "D", color="white", markeredgecolor="#1a1a1a", markersize=9)
            axes.annotate("chosen", _in_percent(chosen), (10, -14), textcoords="offset points")
        if chosen is not None and measured_ms is not None:
            axes.plot(*_in_percent((measured_ms, chosen[1])), "x", color="#1a1a1a", markersize=9)
        axes.set_xlim(0, 1.05 * max(base_ms, target_ms or 0.0))
        axes.set_ylim(0, 105)
        axes.set_xlabel("predicted latency, ms")
        axes.set_ylabel("importance kept, %")
        axes.set_title("The best plan at every latency", fontsize=11, loc="left", fontweight="bold")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        metadata = {"Date": None, "Creator": None, "Title": "Importance kept over latency"}
        figure.savefig(text, format="svg", metadata=metadata)
    return text.getvalue()


def _in_percent(point: tuple[float, float]) -> tuple[float, float]:
    return point[0], 100 * point[1]


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column(first, min_width=12)
    for header in numbers:
        table.add_column(header, justify="right")
    return table
