"""Masks on a network that trains: which units are silent, what each unit does to the loss, and when the
structure is decided anew.

The score of a unit or block in a step is ``(∂L/∂g)²`` at its gate, L the loss of the batch: of one that is
there, g = 1, what would be lost with it, and of one that is masked, g = 0, what would be won with it, both to
first order. Squares add up as what units do does where they are independent (the diagonal of Fisher's
matrix), so that a block compares with its units; ``|∂L/∂g|`` is noise of the batch for the most part, which
does not, and gave a worse structure. Scores are averaged exponentially over about twice as many steps as lie
between two decisions, K, and go on through decisions:

    m ← m + max(1/n, 1/2K) ((∂L/∂g)² - m)        n: steps so far

Where the importance of the whole model was measured (``drift`` and what is scaled by it), these scores only
order the units of a dimension, and the unit of each rank, and each block, keeps the worth that it had: slopes
tell little of what many units cost together, and by them alone the structure at half of the latency of the
CIFAR ResNet-20 ended 15 points lower.

In a block that is masked no unit has a slope but the block has: its units keep the means of when they were
there. What a mask hides learns nothing: its weights stay, but for weight decay and what momentum is left, and
so do not compete with what is in use (slopes that pass a mask as if it were open, the straight-through form
of SMCP, cost most of the accuracy where no BatchNorm takes up the difference). A normalisation of a masked
channel goes on to follow its own activations; that of a living one sees what it will see in the slim model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.scoring import Importance, Scores, rescaled, score
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.surgery.gating import gated_model
from onnx_mdp.training.batchnorm import insert_batchnorm
from onnx_mdp.training.bridge import to_torch
from onnx_mdp.training.distributed import Group
from onnx_mdp.training.gradients import held_units
from onnx_mdp.training.interpreter import OnnxModule

__all__ = ["MODES", "Decide", "Decision", "MaskedNetwork", "Masks", "Schedule"]

MODES = ("iterative", "one-shot", "soft")
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the structure is decided, and how far the budget has come down by then.

    ``one-shot`` decides before the first step, ``iterative`` and ``soft`` every ``redecide`` steps until
    ``settle`` of all steps have gone by. The budget comes down by ``1 - (1 - t)³`` until ``tighten`` of the
    steps (Zhu & Gupta 2017). Units may come back in ``soft`` alone, where the score of what is masked counts
    ``comeback`` of its value: without this, units of like scores change places at every decision, and
    training never gets used to any structure.
    """

    mode: str = "soft"
    redecide: int = 50
    tighten: float = 1 / 3
    settle: float = 2 / 3
    comeback: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: with the remedy.
        """
        if self.mode not in MODES:
            raise UsageError(f"--mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if self.redecide < 1:
            raise UsageError(f"--redecide {self.redecide} is not a number of steps; choose 1 or more")
        if not 0 < self.tighten <= self.settle < 1:
            raise UsageError(
                "--schedule needs two shares of the steps, 0 < TIGHTEN <= SETTLE < 1, "
                f"not {self.tighten:g} and {self.settle:g}"
            )

        if not 0 < self.comeback <= 1:
            raise UsageError(f"comeback is a share above 0 and up to 1, not {self.comeback:g}")

    def settled(self, steps: int) -> int:
        """The step of the last decision, of ``steps``."""
        return 0 if self.mode == "one-shot" else max(1, round(self.settle * steps))

    def due(self, step: int, steps: int) -> bool:
        """Whether the structure is decided after ``step`` steps.

        >>> [step for step in range(30) if Schedule(redecide=8).due(step, 30)]
        [8, 16, 20]
        """
        last = self.settled(steps)
        return step == last or (0 < step < last and step % self.redecide == 0)

    def share(self, step: int, steps: int) -> float:
        """How much of the way from the unpruned latency to the target the budget has come.

        >>> [Schedule().share(step, 30) for step in (5, 10, 20)]
        [0.875, 1.0, 1.0]
        """
        if self.mode == "one-shot":
            return 1.0
        return float(1 - (1 - min(1.0, step / (self.tighten * steps))) ** 3)


class MaskedNetwork(nn.Module):
    """A model as a `batched.Network`, with a gate for each unit and block: 1, or 0 where it is masked."""

    def __init__(
        self, structure: Structure, device: torch.device, norms: Mapping[str, Array] | None = None
    ) -> None:
        """Compile the model with its gates; its weights have the names of ``structure.shadow.model``.

        With the inputs ``norms``, `insert_batchnorm` gives layers a BatchNorm that is measured on them.

        Raises:
            UsageError: no layer takes a BatchNorm.
            UnsupportedModelError: an operator has no form in torch here, or the model is quantized.
        """
        super().__init__()
        gated = gated_model(structure)
        model = gated.model
        if norms is not None:
            model = insert_batchnorm(model, [{**norms, **gated.feeds(np.ones(structure.graph.classes))}])
        self.module: OnnxModule = to_torch(model).to(device)
        self._places = {name: _tensor(labels).long().to(device) for name, labels in gated.units.items()}
        self._blocks = tuple(gated.blocks.values())
        self._classes = structure.graph.classes
        self.gates = torch.ones(self._classes + len(self._blocks), device=device)

    def set_gates(self, values: Tensor, *, scored: bool) -> None:
        """Set the gates, ``[classes + blocks]``; ``scored`` asks for their gradients."""
        self.gates = values.detach().to(self.gates, copy=True).requires_grad_(scored)

    def run(
        self, feeds: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None = None, also: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """The outputs by name, and the inner tensors that are named."""
        return self.module.run({**feeds, **self._masks()}, gates, also)

    def fix_sizes(self, feeds: Mapping[str, Tensor]) -> None:
        """See `interpreter.OnnxModule.fix_sizes`."""
        self.module.fix_sizes({**feeds, **self._masks()})

    def _masks(self) -> dict[str, Tensor]:
        masks = {name: self.gates[place] for name, place in self._places.items()}
        masks.update(zip(self._blocks, self.gates[self._classes :], strict=True))
        return masks

    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by initializer."""
        return self.module.weights()

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics, by initializer."""
        return self.module.statistics()


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided after ``step`` steps: units that are masked, were masked now, and came back."""

    step: int
    share: float
    masked: int
    left: int
    returned: int
    blocks: tuple[str, ...]


Decide = Callable[[Importance, float, PruningPlan | None, bool], PruningPlan]
"""From the importance, the share of the way that the budget has come, the plan of before where nothing may
come back, and whether this decision is the last."""


class Masks:
    """The masks of a network while it trains; a resource of a training run."""

    def __init__(
        self,
        structure: Structure,
        network: MaskedNetwork,
        schedule: Schedule,
        steps: int,
        decide: Decide,
        group: Group,
        first: Importance | None = None,
        scale: Importance | None = None,
    ) -> None:
        """Begin with all units; ``first`` are the scores of the first decision, where slopes tell nothing,
        ``scale`` what units are worth by their rank.
        """
        self.structure, self.network, self.schedule, self.steps = structure, network, schedule, steps
        self.decide, self.group, self.first, self.scale = decide, group, first, scale
        self.plan = PruningPlan(keep={})
        self.decisions: list[Decision] = []
        self._means = torch.zeros_like(network.gates, dtype=torch.float64)
        self._seen = 0
        self._heads = tuple(_tensor(part).to(network.gates.device) for part in held_units(structure))
        self._inside = _inside(structure, network.gates.device)
        self._mask(network.gates, step=0)

    @property
    def settled(self) -> int:
        """The step from which the masks stay."""
        return self.schedule.settled(self.steps)

    def advance(self, step: int) -> None:
        """After ``step`` steps: take the gradients of the last one, and decide if it is time."""
        self._observe()
        if self.schedule.due(step, self.steps):
            self._decide(step)

    def importance(self) -> Importance:
        """What the means say now, the less of what is masked."""
        weight = torch.where(self.network.gates.detach() == 0, self.schedule.comeback, 1.0)
        means = (self._means * weight).cpu().numpy()
        classes, blocks = means[: self.structure.graph.classes], means[self.structure.graph.classes :]
        slopes = score(self.structure, lambda structure, feeds, progress: _scores(structure, classes, blocks))
        return slopes if self.scale is None else rescaled(self.structure, slopes, self.scale)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which `restore` goes on."""
        state = {
            "seen": self._seen,
            "decisions": [asdict(decision) for decision in self.decisions],
            "plan": asdict(self.plan),
        }
        return {"means": self._means, "gates": self.network.gates}, state

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self._means = tensors["means"].to(self._means)
        self._seen = state["seen"]
        self.decisions = [Decision(**{**d, "blocks": tuple(d["blocks"])}) for d in state["decisions"]]
        self.plan = _plan(state["plan"])
        self._mask(tensors["gates"], self.decisions[-1].step if self.decisions else 0)

    def _observe(self) -> None:
        found = self.network.gates.grad
        if found is None:
            return
        self.network.gates.grad = None
        slopes = self.group.total(found.double()) / self.group.share.size
        # The slope of a maximum at a gate of 0 is not finite; such a unit is worth what it was.
        told = slopes.isfinite() & self._alive()
        slopes = torch.where(told, slopes, 0.0)
        rows, held = self._heads
        slopes.index_put_((rows,), slopes[held], accumulate=True)
        self._seen += 1
        rate = max(1 / self._seen, 1 / (2 * self.schedule.redecide))
        self._means = torch.where(told, self._means.lerp(slopes.square(), rate), self._means)

    def _alive(self) -> Tensor:
        """Which units and blocks are told about: not those in a masked block."""
        silent = self.network.gates[self.structure.graph.classes :] == 0
        return ~(self._inside & silent).any(1)

    def _decide(self, step: int) -> None:
        """One process decides, for measurements and time limits differ, and tells the others."""
        importance = self.importance() if self.decisions or self.first is None else self.first
        share, last = self.schedule.share(step, self.steps), step == self.settled
        before = self.network.gates.detach()
        gates = torch.zeros_like(before)
        if self.group.main:
            held = None if self.schedule.mode == "soft" else self.plan
            self.plan = self.decide(importance, share, held, last)
            gates = self._gates_of(self.plan).to(before)
        gates = self.group.total(gates)
        units = slice(self.structure.graph.classes)
        gone, came = gates[units] < before[units], gates[units] > before[units]
        self.decisions.append(
            Decision(
                step,
                share,
                int((gates[units] == 0).sum()),
                int(gone.sum()),
                int(came.sum()),
                tuple(self.plan.removed_blocks),
            )
        )
        self._mask(gates, step)

    def _gates_of(self, plan: PruningPlan) -> Tensor:
        kept = ~removed_classes(plan, self.structure)
        kept[0] = True
        blocks = np.asarray([block.name not in plan.removed_blocks for block in self.structure.blocks], bool)
        gates = _tensor(np.concatenate([kept, blocks])).to(self._inside.device)
        return gates & ~(self._inside & ~gates[len(kept) :]).any(1)

    def _mask(self, gates: Tensor, step: int) -> None:
        self.network.set_gates(gates, scored=step < self.settled)


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array))


def _plan(values: Mapping[str, Any]) -> PruningPlan:
    """The plan as it was before it went through JSON."""
    keep = {name: tuple(units) for name, units in values["keep"].items()}
    return PruningPlan(**{**values, "keep": keep, "removed_blocks": tuple(values["removed_blocks"])})


def _inside(structure: Structure, device: torch.device) -> Tensor:
    """``bool[classes + blocks, blocks]``: which units are inside of which block."""
    inside = np.zeros((structure.graph.classes + len(structure.blocks), len(structure.blocks)), bool)
    names = [block.name for block in structure.blocks]
    for dimension in structure.dimensions:
        if dimension.block is not None:
            inside[list(dimension.units), names.index(dimension.block)] = True
    return _tensor(inside).to(device)


def _scores(structure: Structure, classes: Array, blocks: Array) -> Scores:
    """A head is worth what it does beyond its widths, and a block what it does beyond its units."""
    units = classes.copy()
    inner = {block.name: 0.0 for block in structure.blocks}
    for index in structure.prunable:
        dimension = structure.dimensions[index]
        own = units[list(dimension.units)]
        for other in structure.dimensions:
            if other.heads == index:
                own = own - classes[list(other.units)].reshape(other.rows, -1).sum(1)
        units[list(dimension.units)] = np.maximum(own, 0.0)
        if dimension.block is not None:
            inner[dimension.block] += float(np.maximum(own, 0.0).sum())
    pairs = zip(structure.blocks, blocks, strict=True)
    return Scores(units, {block.name: float(value) - inner[block.name] for block, value in pairs})
