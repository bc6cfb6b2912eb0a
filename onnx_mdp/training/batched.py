"""A module on batches of any size, also where the file fixes how many rows it takes at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from onnx_mdp.errors import UnsupportedModelError
from onnx_mdp.training.fixed_sizes import Sizes, sizes_of

__all__ = ["Batched", "Network", "freeze_unreached", "takes_batches"]

_CLOSE = 1e-3  # relative; a Reshape that mixes samples is off by far more


class Network(Protocol):
    """What training needs of a module: `interpreter.OnnxModule` has it."""

    def run(
        self, feeds: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None, also: Sequence[str]
    ) -> dict[str, Tensor]:
        """The outputs by name, and the inner tensors that are named."""

    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by initializer."""

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics, by initializer."""

    def fix_sizes(self, feeds: Mapping[str, Tensor]) -> None:
        """Make runs on inputs of these sizes such that `torch.compile` can trace them."""


_Run = Callable[[Mapping[str, Tensor], Mapping[str, Tensor] | None, Sequence[str]], dict[str, Tensor]]


class Batched(nn.Module):
    """``forward(feeds)`` runs ``module``, a `Network`, on all rows at once, or on ``rows`` at a time.

    It returns the outputs by name, and the inner tensors named in ``also``.
    """

    def __init__(self, module: nn.Module, rows: int | None = None, also: Sequence[str] = ()) -> None:
        super().__init__()
        self.module = module
        self.rows = rows
        self.also = tuple(also)
        self._compiled: _Run | None = None
        self._compiled_for: tuple[Sizes, bool] | None = None

    @property
    def network(self) -> Network:
        """The module that is run."""
        return cast(Network, self.module)

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor has as many rows as the feeds."""
        if self.rows is None:
            return self._run(feeds)
        held = len(next(iter(feeds.values())))
        starts = range(0, held, self.rows)
        cuts = ({name: value[start : start + self.rows] for name, value in feeds.items()} for start in starts)
        parts = [self._run(cut) for cut in cuts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def compile_for(self, feeds: Mapping[str, Tensor], *, training: bool) -> None:
        """Compile what runs on batches as large as ``feeds`` in one mode; others are run as before."""
        cut = {name: value[: self.rows] for name, value in feeds.items()}
        self.network.fix_sizes(cut)
        self._compiled = torch.compile(self.network.run, dynamic=False)
        self._compiled_for = sizes_of(cut), training

    def _run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        run: _Run = self.network.run
        if self._compiled is not None and self._compiled_for == (sizes_of(feeds), self.training):
            run = self._compiled
        return run(feeds, None, self.also)


def takes_batches(module: nn.Module, feeds: Mapping[str, Tensor], rows: int) -> bool:
    """Whether two times ``rows`` rows at once give what they give one after the other.

    A file may hold its batch size in a Reshape; then the second run fails, or mixes samples.
    """
    both = {name: value[: 2 * rows] for name, value in feeds.items()}
    if len(next(iter(both.values()))) < 2 * rows:
        return True
    module.eval()
    with torch.no_grad():
        apart = Batched(module, rows)(both)
        try:
            together = Batched(module)(both)
        except (RuntimeError, ValueError, IndexError):
            return False
    return all(_same(together[name], value) for name, value in apart.items() if value.is_floating_point())


def _same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    return bool(((ours - theirs).abs() <= _CLOSE * max(scale, 1e-12)).all())


def freeze_unreached(batched: Batched, feeds: Mapping[str, Tensor]) -> int:
    """Leave alone the weights that no output depends on; how many are left to train.

    Raises:
        UnsupportedModelError: gradients reach no weight.
    """
    batched.eval()
    weights = batched.network.weights()
    outputs = [value.float() for value in batched(feeds).values() if value.is_floating_point()]
    reached = [value.square().sum() for value in outputs if value.requires_grad]
    if reached:
        torch.autograd.backward([torch.stack(reached).sum()])
    count = 0
    for weight in weights.values():
        weight.requires_grad_(weight.grad is not None)
        count += weight.grad is not None
        weight.grad = None
    if not count:
        raise UnsupportedModelError("gradients reach no weight of the model, so it cannot be trained")
    return count
