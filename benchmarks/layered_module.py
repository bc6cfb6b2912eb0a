"""An ONNX file of a convolutional classifier as a torch module with layers of its own.

Tools that prune modules look for ``nn.Conv2d`` and ``nn.Linear``, which `onnx_mdp.to_torch` has none of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import onnx
from onnx import helper, numpy_helper

from onnx_mdp.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["layered_module"]

Held = Mapping[str, Any]


def layered_module(model: onnx.ModelProto) -> nn.Module:
    """The module, in evaluation mode, of a file with one input and one output.

    Raises:
        UsageError: it holds an operator that has no layer here.
    """
    import torch
    from torch import nn

    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    steps: list[tuple[list[str], str]] = []
    layers: list[nn.Module] = []
    for node in model.graph.node:
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Constant":
            held[node.output[0]] = numpy_helper.to_array(settings["value"])
        elif node.op_type in _LAYERS:
            layers.append(_LAYERS[node.op_type]([held.get(name) for name in node.input], settings))
            steps.append(([name for name in node.input if name and name not in held], node.output[0]))
        else:
            raise UsageError(f"operator {node.op_type} has no layer here; use a convolutional classifier")

    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            known = {model.graph.input[0].name: x}
            for (inputs, output), layer in zip(steps, self.layers, strict=True):
                known[output] = layer(*(known[name] for name in inputs))
            return known[model.graph.output[0].name]

    return Layered().eval()


def _convolution(held: list[Any], settings: Held) -> nn.Module:
    import torch
    from torch import nn

    weight, bias = held[1], held[2] if len(held) > 2 else None
    top, left, bottom, right = settings.get("pads", (0, 0, 0, 0))
    groups = settings.get("group", 1)
    made = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(settings.get("strides", (1, 1))),
        (top, left) if (top, left) == (bottom, right) else 0,
        tuple(settings.get("dilations", (1, 1))),
        groups,
        bias is not None,
    )
    made.weight.data = torch.tensor(weight)
    if bias is not None:
        made.bias.data = torch.tensor(bias)
    return (
        made
        if (top, left) == (bottom, right)
        else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), made)
    )


def _linear(held: list[Any], settings: Held) -> nn.Module:
    import torch
    from torch import nn

    weight = held[1] if settings.get("transB") else held[1].T
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.data, made.bias.data = torch.tensor(weight.copy()), torch.tensor(held[2])
    return made


def _plain(name: str) -> Callable[[list[Any], Held], nn.Module]:
    def made(held: list[Any], settings: Held) -> nn.Module:
        from torch import nn

        class Sum(nn.Module):
            def forward(self, a: Any, b: Any) -> Any:
                return a + b

        kinds: Mapping[str, Callable[[], nn.Module]] = {
            "add": Sum,
            "average": lambda: nn.AdaptiveAvgPool2d(1),
            "clip": lambda: nn.Hardtanh(float(held[1]), float(held[2])),
            "flatten": nn.Flatten,
            "identity": nn.Identity,
            "max pool": lambda: nn.MaxPool2d(
                settings["kernel_shape"], settings["strides"], settings.get("pads", (0, 0, 0, 0))[:2]
            ),
            "relu": nn.ReLU,
        }
        return kinds[name]()

    return made


_LAYERS: Mapping[str, Callable[[list[Any], Held], nn.Module]] = {
    "Add": _plain("add"),
    "Clip": _plain("clip"),
    "Conv": _convolution,
    "Flatten": _plain("flatten"),
    "Gemm": _linear,
    "GlobalAveragePool": _plain("average"),
    "Identity": _plain("identity"),
    "MaxPool": _plain("max pool"),
    "ReduceMean": _plain("average"),
    "Relu": _plain("relu"),
    "Reshape": _plain("flatten"),
}
