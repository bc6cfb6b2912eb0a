"""Rules for quantized activations: a scale for the whole tensor passes labels, one for each index is cut."""

from __future__ import annotations

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.rules.labelling import Labelling, rule

__all__ = ["scales"]


@rule("QuantizeLinear", "DequantizeLinear")
def scales(state: Labelling, operation: Operation) -> None:
    """``q = round(x / s) + z`` and back; ``s`` and ``z`` hold one number, or one for each index.

    Frozen: scales for blocks of indices.
    """
    labels = state.labels(operation.inputs[0])
    shape = state.shape(operation.inputs[1])
    if len(shape) > 1:
        state.freeze_inputs(operation, f"{operation} has a scale for each block of indices")
        return
    if shape and shape[0] > 1:
        axis = operation.attributes.get("axis", 1)
        vector = state.vector(
            labels, axis, shape[0], f"{operation} has a scale along one of two prunable axes"
        )
        for slot in (1, 2):
            state.site(operation, slot, 0, vector)
    state.emit(operation, labels)


@rule("ConvInteger", "MatMulInteger")
def integer_products(state: Labelling, operation: Operation) -> None:
    """Layers in integers, whose data is quantized at run time. Frozen: all that they read and make."""
    why = f"{operation} quantizes at run time: prune the float model, then quantize it again"
    state.freeze_inputs(operation, why)
    axis = 0 if operation.op_type == "ConvInteger" else len(state.shape(operation.inputs[1])) - 1
    if state.is_constant(operation.inputs[1]):
        made = state.fresh(state.shape(operation.inputs[1])[axis])
        state.site(operation, 1, axis, made, "out")
        state.freeze(made, why)


@rule("DynamicQuantizeLinear")
def scales_by_extremes(state: Labelling, operation: Operation) -> None:
    """The scale follows the extremes of the whole tensor. Frozen: the tensor."""
    state.freeze_inputs(operation, f"{operation} takes a scale from the extremes of a prunable tensor")
