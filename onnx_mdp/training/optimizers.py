"""Optimizers of weights by name, and their state as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from onnx_mdp.training.recipes import Recipe

__all__ = ["make_optimizer", "optimizer_tensors", "restore_optimizer"]

Tensors = dict[str, Tensor]


def make_optimizer(recipe: Recipe, weights: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Matrices and kernels decay; vectors (norms, biases, scales of one axis) do not."""
    vectors = [w for w in weights.values() if w.numel() == max(w.shape, default=1)]
    others = [w for w in weights.values() if w.numel() != max(w.shape, default=1)]
    groups = [
        {"params": others, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.lr, recipe.momentum)
    return torch.optim.AdamW(groups, recipe.lr, (recipe.momentum, 0.999))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> Tensors:
    """The state of an optimizer, by ``optimizer.KEY:weight``."""
    return {
        f"optimizer.{key}:{name}": value
        for parameter, name in names.items()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], tensors: Tensors
) -> None:
    """Give an optimizer the state that `optimizer_tensors` took."""
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        kind, _, name = key.partition(":")
        if kind.startswith("optimizer."):
            parameter, field = parameters[name], kind.removeprefix("optimizer.")
            # Adam counts its steps on the CPU, wherever the weights are.
            optimizer.state[parameter][field] = value if field == "step" else value.to(parameter.device)
