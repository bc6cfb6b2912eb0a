"""BatchNorm where an exporter folded it away: inserted as the identity, trained, folded into the layer again.

Behind a layer ``y = w * x + b`` stands ``γ (y − μ) / √(σ² + ε) + β`` with the mean μ and the variance σ² of
each channel of y on calibration inputs, β = μ and γ = √(σ² + ε): nothing changes until something is trained.
Folding gives ``w' = γ w / √(σ² + ε)`` and ``b' = γ (b − μ) / √(σ² + ε) + β``, with the running statistics.

A layer gets none whose output is normalised already, that shares its weight or bias with another reader or
computes it, or whose output reaches the outputs of the model through no further layer (a prediction).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from onnx_mdp.analysis.shadow import add_initializer
from onnx_mdp.errors import UsageError
from onnx_mdp.model_io import ModelLike, clone, load_model
from onnx_mdp.numerics.precision import in_float32
from onnx_mdp.surgery.changed_weights import ADDED_BIAS
from onnx_mdp.training.bridge import to_torch, write_tensors
from onnx_mdp.training.interpreter import OnnxModule

__all__ = ["fold_batchnorm", "insert_batchnorm", "normalised_layers"]

_EPSILON = 1e-5
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_LAYERS = frozenset((*_CONVOLUTIONS, "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"))
_NORMS = frozenset(
    (
        "BatchNormalization GroupNormalization InstanceNormalization LayerNormalization LpNormalization "
        "MeanVarianceNormalization RMSNormalization"
    ).split()
)
_PARTS = ("scale", "bias", "mean", "var")


@dataclass(frozen=True, slots=True)
class _Norm:
    """Names of the parameters of the BatchNorm behind a tensor."""

    scale: str
    bias: str
    mean: str
    var: str


def _norm_of(tensor: str) -> _Norm:
    return _Norm(*(f"{tensor}/inserted_norm/{part}" for part in _PARTS))


def normalised_layers(model: ir.Model) -> tuple[ir.Node, ...]:
    """The convolutions of a model that `insert_batchnorm` gives a BatchNorm, in graph order."""
    return tuple(node for node in model.graph if node.op_type in _CONVOLUTIONS and _takes_norm(node))


def _takes_norm(node: ir.Node) -> bool:
    output = node.outputs[0]
    readers = [use.node for use in output.uses()]
    normalised = any(map(_normalises, _readers(output)))
    own = bool(node.inputs[1:]) and all(_is_own(value) for value in node.inputs[1:] if value is not None)
    inner = not node.domain and not output.is_graph_output()
    return own and inner and not normalised and any(map(_reaches_layer, readers))


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """What reads a value, in whatever shape."""
    for use in value.uses():
        yield use.node
        if use.node.op_type in ("Reshape", "Transpose", "Flatten", "Identity"):
            yield from _readers(use.node.outputs[0])


def _normalises(node: ir.Node) -> bool:
    """Whether a node is a normalisation, or the first of one that is written out: a mean to be subtracted."""
    if node.op_type != "ReduceMean" or node.inputs[0] is None:
        return node.op_type in _NORMS
    beside = {use.node for use in node.inputs[0].uses()}
    return any(use.node.op_type == "Sub" and use.node in beside for use in node.outputs[0].uses())


def _is_own(value: ir.Value) -> bool:
    """Whether a stored tensor has one reader."""
    maker = value.producer()
    stored = value.is_initializer() or (maker is not None and maker.op_type == "Constant")
    return stored and not value.is_graph_input() and len(list(value.uses())) == 1


def _reaches_layer(node: ir.Node) -> bool:
    seen, front = {node}, [node]
    while front:
        current = front.pop()
        if current.op_type in _LAYERS:
            return True
        ahead = {use.node for value in current.outputs for use in value.uses()} - seen
        seen |= ahead
        front += ahead
    return False


def insert_batchnorm(model: ModelLike, feeds: Iterable[Mapping[str, npt.NDArray[Any]]]) -> ir.Model:
    """The model, in float32, with a BatchNorm that changes nothing behind each layer that takes one.

    Statistics are measured on ``feeds``, inputs by name. Train ``to_torch`` of the result, and give what you
    trained to `fold_batchnorm`.

    Raises:
        UsageError: there are no feeds, or no layer takes a BatchNorm.
    """
    plain = in_float32(clone(load_model(model)))
    layers = normalised_layers(plain)
    if not layers:
        raise UsageError(
            "no convolution of the model takes a BatchNorm: all are normalised, share weights or make "
            "predictions"
        )
    moments = _moments(plain, [str(layer.outputs[0].name) for layer in layers], feeds)
    for layer, (mean, var) in zip(layers, moments, strict=True):
        _insert(plain, layer, mean, var)
    return plain


def _moments(
    model: ir.Model, names: list[str], feeds: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The mean and the variance of each channel of each tensor, over all feeds, in float64."""
    module, count = to_torch(model), 0
    sums = [torch.zeros(2, 1, dtype=torch.float64)] * len(names)
    sizes = [0] * len(names)
    for feed in feeds:
        count += 1
        with torch.no_grad():
            found = module.run({name: torch.from_numpy(np.array(a)) for name, a in feed.items()}, also=names)
        for k, name in enumerate(names):
            values = found[name].double().transpose(0, 1).flatten(1)
            sums[k] = sums[k] + torch.stack([values.sum(1), values.square().sum(1)])
            sizes[k] += values.shape[1]
    if not count:
        raise UsageError("BatchNorm is measured on calibration inputs, and there are none")
    for total, size in zip(sums, sizes, strict=True):
        mean, square = total / size
        yield mean, (square - mean.square()).clamp(min=0)


def _insert(model: ir.Model, layer: ir.Node, mean: Tensor, var: Tensor) -> None:
    value = layer.outputs[0]
    name = str(value.name)
    names = _norm_of(name)
    values = ((var + _EPSILON).sqrt(), mean, mean, var)
    stored = []
    for key, tensor in zip((names.scale, names.bias, names.mean, names.var), values, strict=True):
        made = ir.tensor(tensor.to(torch.float32).numpy(), name=key)
        stored.append(
            ir.Value(name=key, shape=ir.Shape(tensor.shape), type=ir.TensorType(made.dtype), const_value=made)
        )
        model.graph.register_initializer(stored[-1])
    attributes = [ir.AttrFloat32("epsilon", _EPSILON), ir.AttrFloat32("momentum", 0.9)]
    norm = ir.Node("", "BatchNormalization", [value, *stored], attributes, name=f"{name}/inserted_norm")
    value.replace_all_uses_with(norm.outputs[0])
    norm.replace_input_with(0, value)
    norm.outputs[0].type, norm.outputs[0].shape = value.type, value.shape
    norm.outputs[0].name, value.name = name, f"{name}/before_norm"
    model.graph.insert_after(layer, norm)


def fold_batchnorm(model: ModelLike, module: OnnxModule) -> ir.Model:
    """A copy of the model, as `write_back` makes it, that computes what the module does in evaluation mode.

    The module was made of `insert_batchnorm` of the same model. A layer without a bias gets one.

    Raises:
        UsageError: the module was made of another model.
    """
    written = clone(load_model(model))
    tensors: dict[str, Tensor] = {**module.weights(), **module.statistics()}
    for layer in normalised_layers(written):
        names = _norm_of(str(layer.outputs[0].name))
        if names.scale in tensors:
            scale, bias, mean, var = (
                tensors.pop(key).detach().double().cpu()
                for key in (names.scale, names.bias, names.mean, names.var)
            )
            factor = scale / (var + _EPSILON).sqrt()
            _fold(written, layer, tensors, factor, bias - mean * factor)
    return write_tensors(written, tensors)


def _fold(model: ir.Model, layer: ir.Node, tensors: dict[str, Tensor], factor: Tensor, shift: Tensor) -> None:
    """Multiply each output channel by its factor, and shift it, in the ``tensors`` to write."""
    weight, bias = (*layer.inputs, None)[1:3]
    assert weight is not None
    w = _values(weight, tensors)
    if layer.op_type == "Conv":
        tensors[str(weight.name)] = w * factor.reshape(-1, *[1] * (w.dim() - 1))
    else:  # [inputs, outputs / groups, ...]
        groups = layer.attributes.get_int("group", 1) or 1
        by_group = w.reshape(groups, -1, *w.shape[1:])
        by_output = factor.reshape(groups, 1, -1, *[1] * (w.dim() - 2))
        tensors[str(weight.name)] = (by_group * by_output).reshape(w.shape)
    if bias is None:
        zeros = np.zeros(len(factor), weight.const_value.numpy().dtype if weight.const_value else np.float32)
        bias = add_initializer(model, f"{weight.name}{ADDED_BIAS}", zeros)
        layer.resize_inputs(3)
        layer.replace_input_with(2, bias)
    tensors[str(bias.name)] = _values(bias, tensors) * factor + shift


def _values(value: ir.Value, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a module made of a stored tensor, or the tensor itself where it is no weight, in float64."""
    if str(value.name) in tensors:
        return tensors[str(value.name)].detach().double().cpu()
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return torch.from_numpy(tensor.numpy().astype(np.float64))
