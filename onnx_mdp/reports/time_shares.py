"""Where the milliseconds are: what each operation of a variant takes by a latency table."""

from __future__ import annotations

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.tables.cost_terms import width
from onnx_mdp.tables.latency import LatencyTable, term_ms, valid_for
from onnx_mdp.tables.variants import Variant

__all__ = ["operation_ms"]


def operation_ms(structure: Structure, table: LatencyTable, variant: Variant) -> dict[int, float]:
    """Milliseconds by index of an operation, with what is fused into it; 0 where its block is gone."""
    table = valid_for(table, structure, variant)
    gone = {i for b in structure.blocks if b.name in variant.removed_blocks for i in (*b.operations, b.joint)}
    return {
        t.operation: 0.0
        if t.operation in gone
        else term_ms(table, t, width(t.reads, variant.kept), width(t.makes, variant.kept))
        for t in table.terms
    }
