"""What scores are gradients of: a loss of each sample, with labels, or without any.

``labels``      −log p(label)
``fisher``      −log p(ŷ) of a label ŷ ~ p drawn from the model itself, whose mean square is Fisher's matrix
``projection``  r·y, r ~ N(0, 1): Σ over outputs / (spread · √outputs), whose mean square is the relative
                change of the outputs, Σ‖∂y‖² / Σ‖y − mean(y)‖², that the criterion ``drift`` measures

The distance of a model to itself has no gradient, so it is no loss here. What is drawn depends on the seed
and the number of the sample alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from onnx_mdp.errors import UsageError

__all__ = ["SampleLoss", "loss_of"]

SampleLoss = Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
"""The number of the feed, its inputs and the outputs; ``float[samples]``, or one number for the feed."""

UserLoss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


def loss_of(
    name: str | UserLoss,
    spreads: Mapping[str, float],
    labels: Sequence[npt.NDArray[np.int64]] | None = None,
    seed: int = 0,
) -> SampleLoss:
    """A loss by name, or the user's own function of inputs and outputs by name.

    ``spreads`` are the root mean squares of the outputs about their means, of those that a projection is of;
    ``labels`` holds ``int64[samples]`` for each feed.

    Raises:
        UsageError: labels that are missing; while it runs, outputs that are no classes.
    """
    if callable(name):
        return _users(name)
    if name == "labels":
        if labels is None:
            raise UsageError("--loss labels needs labels; pass --labels, or leave --loss out")
        return _of_labels(labels)
    return {"fisher": _fisher, "projection": _projection}[name](spreads, seed)


def _users(function: UserLoss) -> SampleLoss:
    def loss(number: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        found = function(inputs, outputs)
        if not isinstance(found, Tensor) or found.numel() != 1:
            kind = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"--loss must return a tensor of one number, not {kind}")
        return found

    return loss


def _of_labels(labels: Sequence[npt.NDArray[np.int64]]) -> SampleLoss:
    def loss(number: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        scores = _log_shares(outputs)
        wanted = torch.from_numpy(labels[number]).to(scores.device)
        if int(wanted.max()) >= scores.shape[1] or int(wanted.min()) < 0:
            raise UsageError(
                f"labels up to {int(wanted.max())} do not fit a model of {scores.shape[1]} classes"
            )
        return -scores.gather(1, wanted[:, None])[:, 0]

    return loss


def _fisher(spreads: Mapping[str, float], seed: int) -> SampleLoss:
    def loss(number: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        scores = _log_shares(outputs)
        shares = scores.detach().double().exp().cpu()
        drawn = torch.multinomial(shares, 1, generator=_generator(seed, number))
        return -scores.gather(1, drawn.to(scores.device))[:, 0]

    return loss


def _projection(spreads: Mapping[str, float], seed: int) -> SampleLoss:
    def loss(number: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        generator, parts = _generator(seed, number), []
        for name, spread in spreads.items():
            output = outputs[name]
            drawn = torch.randn(output.shape, generator=generator).to(output)
            rows = output.shape[0] if output.ndim else 1
            parts.append((output * drawn).reshape(rows, -1).sum(1) / (spread * len(spreads) ** 0.5))
        if len({len(part) for part in parts}) > 1:
            return torch.stack([part.sum() for part in parts]).sum()
        return torch.stack(parts).sum(0)

    return loss


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 2**24 + number)


def _log_shares(outputs: Mapping[str, Tensor]) -> Tensor:
    """``log p``, ``[samples, classes]``, of a classifier that gives scores or their softmax."""
    first: Any = next(iter(outputs.values()))
    rows = first.reshape(first.shape[0], -1) if first.ndim > 1 else first
    if len(outputs) != 1 or rows.ndim != 2 or rows.shape[1] < 2 or rows.shape[1] != max(first.shape[1:]):
        held = ", ".join(f"{name} {list(y.shape)}" for name, y in outputs.items())
        raise UsageError(
            f"labels need one output of [batch, classes], but the model gives {held}; use --loss projection "
            "or a function of yours"
        )
    with torch.no_grad():
        shares = bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all())
    return rows.clamp_min(1e-30).log() if shares else functional.log_softmax(rows, 1)
