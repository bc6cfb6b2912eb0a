"""What a repair did, as a line and as a table."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from onnx_mdp.repairing.linear_layers import LayerRepair
from onnx_mdp.repairing.repair import Repaired
from onnx_mdp.reports.report import printable

__all__ = ["repair_table", "repair_text"]


def repair_text(repaired: Repaired | None) -> str:
    """How far the outputs are from the original's before and after a repair; nothing without one."""
    if repaired is None:
        return ""
    drifts = " → ".join(f"{drift:.3g}" for drift in repaired.drifts)
    return f" · then repaired ({', '.join(repaired.methods)}): output drift {drifts}"


def repair_table(repaired: Repaired) -> Table:
    """The error of each layer before and after each method, or why the layer stays as it was."""
    table = Table(title="repair: relative squared error of each layer", title_justify="left")
    for name in ("method", "layer", "before", "after", ""):
        table.add_column(name, justify="right" if name in ("before", "after") else "left")
    for layer in repaired.layers:
        table.add_row(layer.method, Text(printable(layer.layer)), *_cells(layer))
    return table


def _cells(layer: LayerRepair) -> tuple[str, str, str]:
    if layer.before is None or layer.after is None:
        return "", "", f"as it was: {layer.kept}"
    return f"{layer.before:.3g}", f"{layer.after:.3g}", ""
