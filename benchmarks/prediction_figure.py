"""Predicted against measured latency, one panel a model, as an SVG document."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

__all__ = ["prediction_svg"]

_SHOWN = (
    ("linear", "linear model of HALP and SMCP", "x", "#c98f3a"),
    ("macs", "multiply-accumulates", "+", "#8c8c8c"),
    ("calibrated", "onnx-mdp", "o", "#1f4e79"),
)


class _Predicted(Protocol):
    """What is shown of one model: measured ratios to the unpruned latency, and relative errors by method."""

    @property
    def model(self) -> str:
        """Its name."""

    @property
    def provider(self) -> str:
        """The execution provider."""

    @property
    def measured(self) -> Sequence[float]:
        """Ratios, one a configuration."""

    @property
    def errors(self) -> Mapping[str, Sequence[float]]:
        """Signed relative errors of the predicted ratios."""


def prediction_svg(rows: Sequence[_Predicted]) -> str:
    """The document; on the diagonal a prediction is right, and the lines beside it are 10 % off."""
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with matplotlib.style.context({"svg.fonttype": "none", "svg.hashsalt": "onnx-mdp", "font.size": 8}):
        figure = Figure(figsize=(2.6 * len(rows), 3.0), layout="constrained")
        panels = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
        for axes, row in zip(panels, rows, strict=True):
            measured = np.asarray(row.measured)
            ends = np.asarray([0.7 * measured.min(), 1.3])
            axes.plot(ends, ends, color="#1a1a1a", linewidth=0.8)
            for share in (0.9, 1.1):
                axes.plot(ends, share * ends, color="#c6c6c6", linewidth=0.6)
            for method, label, marker, colour in _SHOWN:
                predicted = measured * (1 + np.asarray(row.errors[method]))
                axes.scatter(measured, predicted, 14, colour, marker=marker, label=label, linewidths=0.9)
            axes.set(xscale="log", yscale="log", xlim=ends)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
            axes.set_title(f"{row.model}\n{row.provider.removesuffix('ExecutionProvider')}", fontsize=8)
            axes.set_xlabel("measured / unpruned")
        panels[0].set_ylabel("predicted / unpruned")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_SHOWN))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
