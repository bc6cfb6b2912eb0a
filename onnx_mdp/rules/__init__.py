"""What each operator does to index labels: one decorated function of a few lines per family."""

from __future__ import annotations

from onnx_mdp.rules import (
    attention,
    contraction,
    einsum,
    elementwise,
    movement,
    quantisation,
    selection,
    statistics,
)
from onnx_mdp.rules.labelling import (
    RULES,
    SINCE,
    Labelling,
    Labels,
    Rule,
    Site,
    couple,
    rule,
    squash,
    varying,
)

__all__ = [
    "RULES",
    "SINCE",
    "Labelling",
    "Labels",
    "Rule",
    "Site",
    "attention",
    "contraction",
    "couple",
    "einsum",
    "elementwise",
    "movement",
    "quantisation",
    "rule",
    "selection",
    "squash",
    "statistics",
    "varying",
]
