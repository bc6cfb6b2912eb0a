"""Pruners of a CIFAR ResNet, each a function from a dial between 0 and 1 to an ONNX model, and their speed.

``mdp`` is our plan, and ``mdp_lstsq`` also what ``--repair lstsq`` makes of its weights; ``linear`` and
``greedy`` replace its solver, ``uniform`` keeps the same share of every dimension: all of them rank units
by the same scores. ``torch_pruning`` is Torch-Pruning 1.6 (DepGraph, group Taylor, global ranking) on the
torch module with the zoo's weights. It slices what a zero-padded shortcut adds wrongly, so there the
shortcut is written as a strided 1x1 convolution with the weights of an identity, which computes the same.
``pip install torch-pruning`` brings it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import numpy_helper

from benchmarks.harness import note
from benchmarks.model_files import model_path
from onnx_mdp.errors import UsageError
from onnx_mdp.formulation import Formulation, to_ns
from onnx_mdp.latency import LatencyTable, predict_ms
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.plan import PruningPlan
from onnx_mdp.repair import repair
from onnx_mdp.rewriting import rewrite
from onnx_mdp.runtime import Runtime
from onnx_mdp.scoring import Feeds, Importance, ranking
from onnx_mdp.solution_plan import plan_from_choice
from onnx_mdp.solvers import solve
from onnx_mdp.structure import Structure
from onnx_mdp.variants import full_variant, measure_models

__all__ = ["SHAPES", "Fast", "Pruner", "at_speed", "planner", "torch_pruning", "uniform"]

Pruner = Callable[[float], bytes]

SHAPES = {"input": (1, 3, 32, 32)}

_ROUNDS, _CLOSE = 8, 0.015  # the second of the speed-up
_MEASURE_S = 4.0
_DEPTHS = {"resnet20": 20, "resnet56": 56}


@dataclass(frozen=True, slots=True)
class Fast:
    """A pruned model, how many times as fast as the original it was measured, and the noise F of that."""

    model: bytes
    speedup: float
    noise: float


def at_speed(pruner: Pruner, base: bytes, speedup: float, runtime: Runtime, seed: int) -> Fast:
    """Turn the dial until the model, measured beside the original, is as fast as asked; the nearest one.

    A model that is slower than asked by more than the noise is taken only if no other is there.
    """
    low, high, dial = 0.0, 1.0, 1 / speedup
    found: list[Fast] = []
    for step in range(_ROUNDS):
        model = pruner(dial)
        timing = measure_models([base, model], SHAPES, runtime, seed=seed + step, budget_s=_MEASURE_S)
        found.append(Fast(model, timing.ms[0] / timing.ms[1], timing.noise))
        note(f"  dial {dial:.3f}: {found[-1].speedup:.2f} times as fast (F {timing.noise:.1%})")
        if 0 <= found[-1].speedup / speedup - 1 <= _CLOSE:
            break
        low, high = (dial, high) if found[-1].speedup > speedup else (low, dial)
        guess = dial * found[-1].speedup / speedup
        dial = guess if low < guess < high else (low + high) / 2
    enough = [one for one in found if one.speedup >= speedup * (1 - min(_CLOSE, one.noise))]
    return min(enough or found, key=lambda one: abs(one.speedup / speedup - 1))


def planner(
    structure: Structure,
    formulation: Formulation,
    importance: Importance,
    table: LatencyTable,
    solver: str,
    refit: Feeds = (),
) -> Pruner:
    """The dial is the budget, a share of the predicted latency of the original; ``refit`` feeds `lstsq`."""
    whole = predict_ms(table, structure, full_variant(structure))

    def pruned(dial: float) -> bytes:
        found = solve(formulation.problem, to_ns(dial * whole), solver)
        if found.choice is None:
            raise UsageError(f"no plan reaches {dial:.2f} of the latency; choose a smaller speed-up")
        plan = plan_from_choice(structure, formulation, importance, found.choice)
        slim = rewrite(structure, plan)
        return model_bytes(repair(structure, plan, slim, refit, ("lstsq",)).model if refit else slim)

    return pruned


def uniform(structure: Structure, importance: Importance) -> Pruner:
    """The dial is the share of units that each dimension keeps, the most important ones."""

    def pruned(dial: float) -> bytes:
        keep = {}
        for index in structure.prunable:
            dimension = structure.dimensions[index]
            count = max(1, round(dial * dimension.count))
            keep[dimension.name] = tuple(sorted(ranking(importance, index)[:count].tolist()))
        return model_bytes(rewrite(structure, PruningPlan(keep=keep)))

    return pruned


def torch_pruning(name: str, batches: Callable[[], Any]) -> Pruner:
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
