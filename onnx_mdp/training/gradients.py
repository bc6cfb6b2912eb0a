"""What each unit does to a loss, sample by sample: gradients at the gates of the model.

    s_u(x) = ∂L(x)/∂g_u at g = 1,   for a linear reader   Σ w · ∂L/∂w over the weights that read the unit

A head is the widths that it holds, of its values alone where it has any: query and key leave with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.numerics.precision import widened
from onnx_mdp.surgery.gating import gated_model
from onnx_mdp.training.bridge import to_torch
from onnx_mdp.training.score_losses import SampleLoss, UserLoss, loss_of

__all__ = ["GateGradients", "held_units"]

Vector = npt.NDArray[np.float64]
Feed = Mapping[str, npt.NDArray[Any]]
Feeds = Sequence[Feed]
_SPREAD_FEEDS = 16


class GateGradients:
    """The model with its gates, in torch; a resource that scores feeds one after the other."""

    def __init__(self, structure: Structure, *, double: bool = False) -> None:
        """Compile the gated model, on a GPU where there is one; ``double`` computes in float64.

        Raises:
            UnsupportedModelError: an operator has no form in torch here.
        """
        self.structure = structure
        self.gated = gated_model(structure)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._type = torch.float64 if double else torch.float32
        self._module = to_torch(self.gated.model).to(self._device, self._type).requires_grad_(False)
        self._places = {
            name: torch.from_numpy(labels.astype(np.int64)).to(self._device)
            for name, labels in self.gated.units.items()
        }
        self._heads = held_units(structure)

    def loss(
        self,
        name: str | UserLoss,
        feeds: Feeds,
        labels: Sequence[npt.NDArray[np.int64]] | None = None,
        seed: int = 0,
    ) -> SampleLoss:
        """The loss called ``name``; ``feeds`` tell a projection how far the outputs spread."""
        spreads = self._spreads(feeds) if name == "projection" else {}
        return loss_of(name, spreads, labels, seed)

    def of(self, number: int, feed: Feed, loss: SampleLoss) -> tuple[Vector, Vector]:
        """Signed gradients of the samples of a feed, ``float64[samples, classes]`` and ``[samples, blocks]``.

        Raises:
            UsageError: the loss depends on no unit.
        """
        units = torch.ones(self.structure.graph.classes, device=self._device, dtype=self._type)
        blocks = torch.ones(len(self.gated.blocks), device=self._device, dtype=self._type)
        gates = units.requires_grad_(), blocks.requires_grad_()
        inputs = self._tensors(feed)
        outputs = self._run(inputs, *gates)
        losses = loss(number, inputs, outputs).reshape(-1)
        if not losses.requires_grad:
            raise UsageError("the loss depends on nothing that can be pruned, so it cannot rank units")
        found: list[list[Tensor]] = [
            list(torch.autograd.grad(one, gates, retain_graph=True, materialize_grads=True)) for one in losses
        ]
        by_unit, by_block = (torch.stack(parts).double().cpu().numpy() for parts in zip(*found, strict=True))
        by_unit[:, 0] = 0.0
        rows, held = self._heads
        np.add.at(by_unit.T, rows, by_unit.T[held])
        return by_unit, by_block

    def value(
        self,
        number: int,
        feed: Feed,
        loss: SampleLoss,
        gates: Vector,
        blocks: Vector,
    ) -> float:
        """The loss at other gates, ``float64[classes]`` and ``float64[blocks]``."""
        tensors = (torch.from_numpy(values).to(self._device, self._type) for values in (gates, blocks))
        inputs = self._tensors(feed)
        with torch.no_grad():
            return float(loss(number, inputs, self._run(inputs, *tensors)).sum())

    def _tensors(self, feed: Feed) -> dict[str, Tensor]:
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in widened(feed).items()}
        return {
            name: tensor.to(self._device, self._type if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }

    def _run(self, inputs: Mapping[str, Tensor], units: Tensor, blocks: Tensor) -> dict[str, Tensor]:
        feeds = dict(inputs)
        feeds.update((name, units[place]) for name, place in self._places.items())
        feeds.update(zip(self.gated.blocks.values(), blocks, strict=True))
        return self._module.run(feeds)

    def _spreads(self, feeds: Feeds) -> dict[str, float]:
        """How far each output that can change lies from its mean, as a norm over all of its entries."""
        ones = torch.ones(self.structure.graph.classes, device=self._device, dtype=self._type)
        blocks = torch.ones(len(self.gated.blocks), device=self._device, dtype=self._type)
        places = np.unique(np.linspace(0, len(feeds) - 1, min(_SPREAD_FEEDS, len(feeds))).round().astype(int))
        with torch.no_grad():
            runs = [self._run(self._tensors(feeds[place]), ones, blocks) for place in places]
        names = [name for name, y in runs[0].items() if y.is_floating_point() and y.numel()]
        return {name: _spread([run[name] for run in runs]) for name in names}


def _spread(outputs: Sequence[Tensor]) -> float:
    """The norm by which an output lies from its mean over the feeds, root mean square."""
    if len({output.shape for output in outputs}) > 1:  # as many as were detected
        return max(float(outputs[0].double().norm()), 1e-30)
    rows = torch.stack(list(outputs)).double()
    distances = (rows - rows.mean(0), rows)  # one feed, or a constant output, has no spread
    return next((d for d in (_norm(part) for part in distances) if d > 0), 1.0)


def _norm(rows: Tensor) -> float:
    return float(rows.square().sum().div(len(rows)).sqrt())


def held_units(structure: Structure) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs (head, unit), ``int64[pairs]`` each: what is summed to a head."""
    graph = structure.graph
    held: dict[int, list[int]] = {}
    for number in np.flatnonzero(graph.head).tolist():
        held.setdefault(int(graph.head[number]), []).append(number)
    rows, units = [], []
    for row, numbers in held.items():
        values = [n for n in numbers if graph.kinds.get(n) != "qk"] or numbers
        rows += [row] * len(values)
        units += values
    return np.asarray(rows, np.int64), np.asarray(units, np.int64)
