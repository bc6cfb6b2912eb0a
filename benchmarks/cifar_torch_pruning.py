"""Torch-Pruning (DepGraph, group Taylor, global ranking) on the CIFAR ResNets of the zoo.

It prunes the torch module with the zoo's weights. It slices what a zero-padded shortcut adds wrongly, so
there the shortcut is written as a strided 1x1 convolution with the weights of an identity, which computes the
same. ``pip install torch-pruning`` brings it (1.6).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import numpy_helper

from benchmarks.model_files import model_path
from onnx_mdp.model_io import load_model, model_bytes

__all__ = ["torch_pruning"]

_DEPTHS = {"resnet20": 20, "resnet56": 56}


def torch_pruning(name: str, batches: Callable[[], Any]) -> Callable[[float], bytes]:
    """The dial is one minus the pruning ratio; ``batches`` yields images and labels for the gradient."""
    original = load_model(model_path(name))

    def pruned(dial: float) -> bytes:
        import torch
        import torch_pruning as tp  # type: ignore[import-not-found]
        from torch import nn

        network = _torch_network(name)
        classifier = [part for part in network.modules() if isinstance(part, nn.Linear)]
        pruner = tp.pruner.BasePruner(
            network,
            torch.zeros(1, 3, 32, 32),
            importance=tp.importance.GroupTaylorImportance(),
            global_pruning=True,
            pruning_ratio=1 - dial,
            ignored_layers=classifier,
        )
        for images, labels in batches():
            scores = network(torch.from_numpy(images))
            nn.functional.cross_entropy(scores, torch.from_numpy(labels)).backward()
        pruner.step()
        return _exported(network, original)

    return pruned


def _torch_network(name: str) -> Any:
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


def _exported(network: Any, original: ir.Model) -> bytes:
    """The ONNX file of a module, its input and output named as the original's."""
    from models.export import export_module

    with tempfile.TemporaryDirectory() as folder:
        path = export_module(network, (3, 32, 32), Path(folder) / "pruned.onnx", dynamic_batch=True)
        model = load_model(path)
    names: Mapping[Any, Any] = {
        model.graph.inputs[0]: original.graph.inputs[0],
        model.graph.outputs[0]: original.graph.outputs[0],
    }
    for own, wanted in names.items():
        own.name = wanted.name
    return model_bytes(model)
