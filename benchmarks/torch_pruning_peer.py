"""Torch-Pruning (DepGraph) on the torch form of a model: ``pip install torch-pruning`` brings it (1.6).

It prunes modules: those of ``models`` have the weights of their exports; a file of the zoo becomes a module
with its weights. What a zero-padded shortcut adds is sliced wrongly, so that of CIFAR ResNets is written as a
strided 1x1 convolution with the weights of an identity, which computes the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import numpy_helper

from benchmarks.layered_module import layered_module
from benchmarks.model_files import ZOO_FILES, model_path
from onnx_mdp.model_io import load_model, model_bytes

__all__ = ["KINDS", "torch_pruning", "torch_prunings"]

_DEPTHS = {"resnet20": 20, "resnet56": 56}
_CLASSIFIERS = ("head", "classes", "boxes")
_MULTIPLES = (8, None)  # widths between multiples are slow here, but the only ones that reach some speeds
# magnitude takes the same share of every layer; the others rank over all layers, or over those of one form.
KINDS = ("magnitude", "taylor", "isomorphic")


Batches = Callable[[], Iterable[tuple[Any, Any]]]
Pruner = Callable[[float], bytes]


def torch_prunings(name: str, shape: tuple[int, ...], kind: str, batches: Batches) -> list[Pruner]:
    """With widths that are multiples of 8, and with any."""
    return [torch_pruning(name, shape, kind, batches, multiple) for multiple in _MULTIPLES]


def torch_pruning(
    name: str, shape: tuple[int, ...], kind: str, batches: Batches, multiple: int | None = None
) -> Pruner:
    """The dial is one minus the pruning ratio.

    ``shape`` is that of the input, with the batch; ``batches`` yields images and labels for the gradient of
    ``taylor``. Widths are multiples of ``multiple``.
    """
    original = load_model(model_path(name))

    def pruned(dial: float) -> bytes:
        import torch
        import torch_pruning as tp  # type: ignore[import-not-found]
        from torch import nn

        network = _network(name)
        taylor = kind == "taylor"
        importance = (
            tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance()
        )
        pruner = tp.pruner.BasePruner(
            network,
            torch.zeros(shape),
            importance=importance,
            global_pruning=kind != "magnitude",
            isomorphic=kind == "isomorphic",
            pruning_ratio=1 - dial,
            ignored_layers=_classifiers(network),
            num_heads=_heads(network),
            round_to=multiple,
        )
        if taylor:
            for images, labels in batches():
                scores = network(torch.from_numpy(images))
                nn.functional.cross_entropy(scores, torch.from_numpy(labels)).backward()
        pruner.step()
        return _exported(network, shape[1:], original)

    return pruned


def _network(name: str) -> Any:
    if name in _DEPTHS:
        return _cifar_network(name)
    if name in ZOO_FILES:
        return layered_module(onnx.load(str(model_path(name))))
    from models.catalog import build

    return build(name.rpartition("_")[0]).eval()


def _classifiers(network: Any) -> list[Any]:
    """The layers whose outputs are the model's."""
    from torch import nn

    named = [part for name, part in network.named_modules() if name.split(".")[-1] in _CLASSIFIERS]
    return named or [part for part in network.modules() if isinstance(part, nn.Linear)][-1:]


def _heads(network: Any) -> dict[Any, int]:
    return {
        layer: part.heads
        for part in network.modules()
        if hasattr(part, "heads")
        for name, layer in part.named_children()
        if name in ("qkv", "query", "key", "value", "kv")
    }


def _cifar_network(name: str) -> Any:
    """The zoo's network as a torch module; its BatchNorms, folded in the file, are identities with a bias."""
    import torch
    from torch import nn

    from models.catalog import build
    from models.resnet import PaddedShortcut, Residual

    proto = onnx.load(str(model_path(name)))
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    layers = [[held[i] for i in n.input[1:]] for n in proto.graph.node if n.op_type in ("Conv", "Gemm")]
    network: Any = build(f"cifar_resnet{_DEPTHS[name]}").eval()
    weighted = [part for part in network.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    with torch.no_grad():
        for part, (weight, bias) in zip(weighted, layers, strict=True):
            part.weight.copy_(torch.tensor(weight))
            if isinstance(part, nn.Linear):
                part.bias.copy_(torch.tensor(bias))
        for norm, (_, bias) in zip(norms, layers, strict=False):
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.fill_(1)
            norm.bias.copy_(torch.tensor(bias))
        for block in (part for part in network.modules() if isinstance(part, Residual)):
            if isinstance(block.shortcut, PaddedShortcut):
                block.shortcut = _as_convolution(block.shortcut, block.branch)
    return network


def _as_convolution(shortcut: Any, branch: Any) -> Any:
    from torch import nn

    made = [part for part in branch.modules() if isinstance(part, nn.Conv2d)][-1].out_channels
    before, after = shortcut.padding[-2:]
    same = nn.Conv2d(made - before - after, made, 1, shortcut.stride, bias=False)
    nn.init.zeros_(same.weight)
    for channel in range(same.in_channels):
        same.weight.data[before + channel, channel] = 1
    return same.eval()


def _exported(network: Any, shape: tuple[int, ...], original: ir.Model) -> bytes:
    """The ONNX file of a module, its inputs and outputs named as the original's."""
    from models.export import export_module

    outputs = tuple(str(value.name) for value in original.graph.outputs)
    with tempfile.TemporaryDirectory() as folder:
        path = export_module(
            network, shape, Path(folder) / "pruned.onnx", dynamic_batch=_dynamic(original), outputs=outputs
        )
        model = load_model(path)
    model.graph.inputs[0].name = original.graph.inputs[0].name
    return model_bytes(model)


def _dynamic(model: ir.Model) -> bool:
    """Whether the file leaves the batch open."""
    shape = model.graph.inputs[0].shape
    return shape is not None and not isinstance(shape[0], int)
