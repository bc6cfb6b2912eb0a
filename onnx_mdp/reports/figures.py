"""The structure figure: for every convolution and linear layer, how much of its width a plan keeps.

Each layer is a bar of the same length, whatever its width, because what counts is the part that stays; the
widths stand beside it in channels. Colours differ in lightness and removed layers are hatched, so the figure
reads in black and white. The file is reproducible: no date, no version, no random identifiers.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.analysis.structure import Structure, extent
from onnx_mdp.plan import PruningPlan
from onnx_mdp.reports.documents import plan_totals
from onnx_mdp.reports.report import compact, printable
from onnx_mdp.tables.cost_terms import width
from onnx_mdp.tables.variants import variant_of_plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["STYLE", "Layer", "headline", "layers_of", "layers_svg", "structure_svg"]

_KEPT, _CUT, _FIXED, _EDGE, _INK, _FAINT = "#1f4e79", "#c6d7e8", "#8c8c8c", "#8c8c8c", "#1a1a1a", "#555555"
_HATCH = "/////"
_TWO_COLUMNS = 30  # layers; more than these stand in two columns
_ROW, _CELL, _NAME_LEAST, _BAR, _NUMBERS, _MARGIN, _HEAD = 0.165, 0.066, 1.3, 2.0, 0.95, 0.15, 0.85  # inches
_NAME_CELLS = 30
_LEAST = 6.0  # inches of width that the legend needs
_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_PART = re.compile(r"part_\d")
_OPERATOR = re.compile(
    r"(?:Conv|ConvTranspose|Conv2D|Gemm|MatMul|BiasAdd|Relu6?|(?:Fused)?BatchNorm(?:V\d)?)(?:_\d+)?"
)
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small files that can be searched and read aloud
    "svg.hashsalt": "onnx-mdp",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True, slots=True)
class Layer:
    """Output channels of a layer before and after; ``fixed``: nothing could go; ``gone``: its block went."""

    name: str
    width: int
    kept: int
    fixed: bool
    gone: bool


def structure_svg(structure: Structure, plan: PruningPlan) -> str:
    """An SVG document that shows every layer of the model with the width that the plan keeps of it."""
    return layers_svg(layers_of(structure, plan), _totals(structure, plan))


def layers_svg(layers: Sequence[Layer], totals: str) -> str:
    """An SVG document that shows layers, with a line of ``totals`` above them."""
    import matplotlib.style
    from matplotlib.figure import Figure

    names = _short_names([layer.name for layer in layers])
    left = max(_NAME_LEAST, _CELL * max(map(cell_len, names), default=0))
    columns = 1 if len(layers) <= _TWO_COLUMNS else 2
    rows = max(1, math.ceil(len(layers) / columns))
    bar = max(_BAR, _LEAST / columns - left - _NUMBERS)
    pitch = left + bar + _NUMBERS
    text = io.StringIO()
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        # Names may hold characters that the measuring font lacks; the viewer brings its own fonts.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph", category=UserWarning)
        size = (columns * pitch + 2 * _MARGIN, _HEAD + rows * _ROW + _MARGIN)
        figure = Figure(figsize=size, facecolor="white")
        axes = _inches(figure)
        _draw_head(axes, headline(layers), totals, layers)
        for number, (layer, name) in enumerate(zip(layers, names, strict=True)):
            column, row = divmod(number, rows)
            _draw_layer(axes, layer, name, _MARGIN + left + column * pitch, _HEAD + row * _ROW, bar)
        metadata = {"Date": None, "Creator": None, "Title": "Layer widths before and after pruning"}
        figure.savefig(text, format="svg", metadata=metadata)
    return text.getvalue()


def layers_of(structure: Structure, plan: PruningPlan) -> tuple[Layer, ...]:
    """Convolutions and multiplications by a weight, in graph order."""
    shadow = structure.shadow
    gone = {i for b in structure.blocks if b.name in plan.removed_blocks for i in b.operations}
    return tuple(
        _layer(structure, plan, operation, operation.index in gone)
        for operation in shadow.operations
        if operation.op_type in _LAYERS
        and not operation.domain
        and shadow.shapes[operation.outputs[0]]
        and any(name in shadow.constants for name in operation.inputs[:2])
    )


def _layer(structure: Structure, plan: PruningPlan, operation: Operation, gone: bool) -> Layer:
    output = operation.outputs[0]
    shape = structure.shadow.shapes[output]
    axis = 1 if operation.op_type.startswith("Conv") else len(shape) - 1
    made = extent(structure, output, axis)
    kept = width(made, variant_of_plan(structure, plan).kept)
    name = operation.name or output
    return Layer(name, shape[axis], 0 if gone else kept, fixed=not made.terms, gone=gone)


def headline(layers: Sequence[Layer]) -> str:
    """How many layers there are, and their output channels before and after."""
    before, after = sum(layer.width for layer in layers), sum(layer.kept for layer in layers)
    share = f" ({100 * after / before:.0f} %)" if before else ""
    return f"{len(layers)} layers: {before} → {after} output channels{share}"


def _totals(structure: Structure, plan: PruningPlan) -> str:
    totals = plan_totals(structure, plan)
    parts = [
        f"parameters {compact(totals.params[0])} → {compact(totals.params[1])}",
        f"MACs {compact(totals.macs[0])} → {compact(totals.macs[1])}",
        f"{len(plan.removed_blocks)} of {len(structure.blocks)} blocks removed",
    ]
    if plan.predicted_ms is not None:
        parts.append(f"predicted {plan.predicted_ms:.3g} ms")
    return " · ".join(parts)


def _inches(figure: Figure) -> Axes:
    """Axes without frame whose unit is the inch, from the top left corner."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, figure.get_figwidth())
    axes.set_ylim(figure.get_figheight(), 0)
    axes.set_axis_off()
    return axes


def _draw_head(axes: Axes, first: str, totals: str, layers: Sequence[Layer]) -> None:
    _text(axes, _MARGIN, 0.2, first, size=10, weight="bold")
    _text(axes, _MARGIN, 0.4, totals, size=8, color=_FAINT)
    shown = [
        ("kept", {"facecolor": _KEPT}, True),
        ("pruned", {"facecolor": _CUT}, any(x.kept < x.width and not x.gone for x in layers)),
        ("removed with its block", _HATCHED, any(x.gone for x in layers)),
        ("cannot be pruned", {"facecolor": _FIXED}, any(x.fixed and not x.gone for x in layers)),
    ]
    left = _MARGIN
    for label, style, used in shown:
        if used:
            _box(axes, left, 0.55, 0.22, style)
            _text(axes, left + 0.28, 0.55 + _ROW / 2, label, size=7.5)
            left += 0.28 + 0.066 * len(label) + 0.22


_HATCHED: dict[str, Any] = {"facecolor": "white", "edgecolor": _EDGE, "hatch": _HATCH, "linewidth": 0.5}


def _draw_layer(axes: Axes, layer: Layer, name: str, start: float, top: float, length: float) -> None:
    """Name, bar and numbers; the bar starts at ``start`` and has the ``length`` in inches."""
    middle = top + _ROW / 2
    _text(axes, start - 0.08, middle, name, size=7, horizontalalignment="right")
    if layer.gone:
        _box(axes, start, top, length, _HATCHED)
    else:
        _box(axes, start, top, length, {"facecolor": _CUT})
        part = layer.kept / layer.width if layer.width else 1.0
        _box(axes, start, top, length * part, {"facecolor": _FIXED if layer.fixed else _KEPT})
    same = layer.kept == layer.width
    numbers = f"{layer.width}" if same else f"{layer.width} → {layer.kept}"
    _text(axes, start + length + 0.08, middle, numbers, size=7, color=_FAINT if same else _INK)


def _box(axes: Axes, left: float, top: float, width: float, style: dict[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top + 0.12 * _ROW), width, 0.76 * _ROW, **{"linewidth": 0, **style}))


def _text(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Plain text: a dollar sign in a name must not start a formula."""
    style = {"color": _INK, "verticalalignment": "center", **style}
    axes.text(x, y, text, parse_math=False, **style)


def _short_names(names: Sequence[str]) -> list[str]:
    """Names without what every reader can guess; whole names where the short ones would not differ."""
    paths = [_path(name) for name in names]
    deep = [parts[:-1] for parts in paths if len(parts) > 1]
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*deep, strict=False))
    shared = len(list(alike)) if len(deep) > 1 else 0
    short = ["/".join(_unrepeated(parts[shared if len(parts) > 1 else 0 :])) for parts in paths]
    often = Counter(short)
    return [_fit(name if often[brief] > 1 else brief) for name, brief in zip(names, short, strict=True)]


def _path(name: str) -> list[str]:
    """The parts of a hierarchical name, without the operator at its end.

    TensorFlow's converter joins the names of all that it fused; the bias names the layer itself. A part of a
    split projection stays named.

    >>> _path("/layer1/layer1.0/conv1/Conv"), _path("model/relu/Relu;model/dense/BiasAdd")
    (['layer1', 'layer1.0', 'conv1'], ['model', 'dense'])
    >>> _path("/layers.0/attention/qkv/MatMul/part_2")
    ['layers.0', 'attention', 'qkv', 'part_2']
    """
    fused = name.split(";")
    chosen = next((part for part in fused if part.endswith("/BiasAdd")), fused[0])
    parts = [part for part in chosen.split("/") if part] or [name]
    part = [parts.pop()] if len(parts) > 1 and _PART.fullmatch(parts[-1]) else []
    while len(parts) > 1 and (_OPERATOR.fullmatch(parts[-1]) or parts[-2].rstrip("_0123456789") == parts[-1]):
        parts.pop()
    return parts + part


def _unrepeated(parts: Sequence[str]) -> list[str]:
    """Without the parts that the next one repeats.

    >>> _unrepeated(["layer1", "layer1.0", "conv1"])
    ['layer1.0', 'conv1']
    """
    following = [*parts[1:], ""]
    return [
        p for p, after in zip(parts, following, strict=True) if not (after == p or after.startswith(f"{p}."))
    ]


def _fit(name: str) -> str:
    """Cut the front off a name that is too long for its place: names differ at their ends.

    >>> _fit("MobilenetV1/MobilenetV1/Conv2d_4_pointwise")
    '…/Conv2d_4_pointwise'
    """
    name = printable(name)
    if cell_len(name) <= _NAME_CELLS:
        return name
    tail = set_cell_size(name[::-1], _NAME_CELLS - 1)[::-1]
    whole_parts = tail[tail.find("/") :]
    return "…" + (whole_parts if len(whole_parts) > 0.6 * _NAME_CELLS else tail)
