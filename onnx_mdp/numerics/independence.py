"""Which tensors of a model depend on no input value: shape arithmetic, movement of weights, constants.

MatMul, Gemm, Conv and normalisations of constants do not count: a decoder whose first layer reads constants
only would lose its weights.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["independent_outputs", "subgraphs"]

_LAYERS = frozenset(
    (
        "MatMul Gemm Conv ConvTranspose LayerNormalization RMSNormalization GroupNormalization "
        "InstanceNormalization BatchNormalization If Loop Scan RandomNormal RandomNormalLike "
        "RandomUniform RandomUniformLike Multinomial Bernoulli"
    ).split()
)


def independent_outputs(model: ir.Model) -> tuple[str, ...]:
    """Names of node outputs that depend on no input value (on its size perhaps), in graph order."""
    constant = set(model.graph.initializers)
    names: list[str] = []
    for node in model.graph:
        if node.op_type in _LAYERS or subgraphs(node):
            continue
        inputs = [v.name for v in node.inputs if v is not None]
        if node.op_type in ("Shape", "Size") or all(name in constant for name in inputs):
            names += [str(v.name) for v in node.outputs if v.name]
            constant.update(names[-len(node.outputs) :])
    return tuple(names)


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs that a node holds in its attributes."""
    kinds = {ir.AttributeType.GRAPH: 1, ir.AttributeType.GRAPHS: 2}
    held = [a for a in node.attributes.values() if isinstance(a, ir.Attr) and a.type in kinds]
    return [g for a in held for g in (a.value if a.type == ir.AttributeType.GRAPHS else [a.value])]
