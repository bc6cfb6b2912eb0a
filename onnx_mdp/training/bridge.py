"""From an ONNX model to a torch module and back: the same graph, with other weights.

What lies between is the caller's: any training loop that takes a ``torch.nn.Module``.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor

from onnx_mdp.analysis.normal_form import inline_functions, refuse_unknown_form
from onnx_mdp.errors import UsageError
from onnx_mdp.model_io import ModelLike, clone, load_model
from onnx_mdp.numerics.precision import in_float32
from onnx_mdp.training.interpreter import OnnxModule

__all__ = ["to_torch", "write_back", "write_tensors"]


def to_torch(model: ModelLike) -> OnnxModule:
    """The model as a module in evaluation mode; half precision becomes float32.

    Raises:
        UnsupportedModelError: an operator has no form in torch here, or the model is quantized.
    """
    loaded = load_model(model)
    refuse_unknown_form(loaded)
    inline_functions(loaded)
    module = OnnxModule(in_float32(loaded))
    module.eval()
    return module


def write_back(model: ModelLike, module: OnnxModule) -> ir.Model:
    """A copy of the model, with the weights and statistics of a module that `to_torch` made of it.

    Names, types, metadata and every other tensor are those of ``model``; values are copied, and rounded to
    the type in which the model stores them.

    Raises:
        UsageError: the module has a tensor that the model lacks, or has in another shape.
    """
    return write_tensors(load_model(model), {**module.weights(), **module.statistics()})


def write_tensors(model: ir.Model, tensors: Mapping[str, Tensor]) -> ir.Model:
    """A copy of the model with other values in the stored tensors that ``tensors`` names.

    Raises:
        UsageError: the model lacks one of them, or has it in another shape.
    """
    written = clone(model)
    constants = {
        str(node.outputs[0].name): node
        for node in written.graph
        if node.op_type == "Constant" and node.outputs
    }
    for name, tensor in tensors.items():
        value = written.graph.initializers.get(name)
        if value is not None and value.const_value is not None:
            value.const_value = _stored(name, tensor, value.const_value)
        elif name in constants:
            _set_constant(constants[name], name, tensor)
        else:
            raise UsageError(f"the model has no weight {name!r}: the module was made of another model")
    return written


def _stored(name: str, tensor: Tensor, old: ir.TensorProtocol) -> ir.TensorProtocol:
    if tuple(tensor.shape) != tuple(old.shape):
        raise UsageError(
            f"the weight {name!r} of the model has the shape {list(old.shape)} and that of the module "
            f"{list(tensor.shape)}: the module was made of another model"
        )
    array = tensor.detach().cpu().numpy().astype(old.dtype.numpy(), copy=True)
    return ir.Tensor(
        array,
        dtype=old.dtype,
        name=old.name,
        doc_string=old.doc_string,
        metadata_props=dict(old.metadata_props),
    )


def _set_constant(node: ir.Node, name: str, tensor: Tensor) -> None:
    for key, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.TENSOR:
            node.attributes[key] = ir.AttrTensor(key, _stored(name, tensor, attribute.as_tensor()))
        else:
            numbers = tensor.detach().cpu().reshape(-1).tolist()
            single = attribute.type == ir.AttributeType.FLOAT
            node.attributes[key] = (
                ir.AttrFloat32(key, numbers[0]) if single else ir.AttrFloat32s(key, numbers)
            )
