"""One training run: steps, a moving average, validation, the best weights, and checkpoints to go on from.

A run is a function of the model, the data, the recipe and the seed: whatever is random in step t depends on
the seed and t, so a run that was killed and resumed ends with the same bits (on one machine, on a CPU). The
moving average is ::

    a ← d a + (1 - d) w        d = min(ema, (1 + t) / (10 + t))

and where there is one, it is what is validated and written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onnx_mdp.errors import MdpError, UsageError
from onnx_mdp.training.batched import Batched, Network
from onnx_mdp.training.batches import Batch, placed
from onnx_mdp.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from onnx_mdp.training.data import TrainingData
from onnx_mdp.training.distributed import Group
from onnx_mdp.training.interruption import interrupts
from onnx_mdp.training.losses import Objective
from onnx_mdp.training.masks import Masks
from onnx_mdp.training.optimizers import make_optimizer, optimizer_tensors, restore_optimizer
from onnx_mdp.training.recipes import Recipe, learning_rate

__all__ = ["Run", "Score", "TrainResult", "total_steps", "train"]

Progress = Callable[[str, int, int], None]
_LOOK = 10  # steps between looks at the loss, which make a GPU wait
_FEWEST, _MOST = 5, 100  # validations of a run; between these, one each epoch


@dataclass(frozen=True, slots=True)
class Score:
    """A validation: the mean loss, and the share of labels (or of the teacher's classes) that are named."""

    loss: float
    accuracy: float | None

    def better(self, other: Score | None, *, labelled: bool) -> bool:
        """By accuracy where there are labels, then by loss."""
        if other is None:
            return True
        if labelled and self.accuracy != other.accuracy:
            return (self.accuracy or 0.0) > (other.accuracy or 0.0)
        return self.loss < other.loss


@dataclass(frozen=True, slots=True)
class Run:
    """What a run is besides its model and data.

    ``network`` is trained in place; ``statistics`` says whether batch norms take the statistics of each
    batch. ``identity`` must be equal for a checkpoint to be resumed. ``every`` steps a checkpoint is written,
    besides those after validation. ``masks`` are what the network is masked with, if it is.
    """

    student: Batched
    teacher: Batched | None
    objective: Objective
    recipe: Recipe
    group: Group
    seed: int = 0
    statistics: bool = True
    folder: Path | None = None
    resume: bool = False
    every: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    masks: Masks | None = None
    compiled: bool = False

    @property
    def network(self) -> Network:
        """The module that is trained."""
        return self.student.network


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to; the network holds the best weights."""

    before: Score
    after: Score
    best_step: int
    steps: int
    seconds: float
    samples_per_second: float
    stopped_early: bool
    history: tuple[Mapping[str, Any], ...]


@dataclass(slots=True)
class _State:
    """Counters and scores; what a checkpoint holds besides tensors."""

    step: int = 0
    epoch: int = 0
    offset: int = 0
    stale: int = 0
    best_step: int = 0
    seconds: float = 0.0
    samples: int = 0
    scores: list[dict[str, Any]] = field(default_factory=list)
    masks: dict[str, Any] = field(default_factory=dict)


def total_steps(recipe: Recipe, data: TrainingData) -> int:
    """How many steps a run takes.

    Raises:
        UsageError: the data does not say how long an epoch is, and no steps were given.
    """
    if recipe.steps is not None:
        return recipe.steps
    if data.steps is None:
        raise UsageError(
            f"{data.description} does not say how many batches it has; give --steps, or return a list"
        )
    return max(1, math.ceil(recipe.epochs * data.steps))


def train(run: Run, data: TrainingData, progress: Progress, report: Callable[[str], None]) -> TrainResult:
    """Train, and leave the best weights in the network.

    Raises:
        MdpError: the loss is not finite any more.
        KeyboardInterrupt: after a checkpoint was written, if there is a folder for it.
    """
    trainer = _Trainer(run, data, total_steps(run.recipe, data))
    trainer.begin()
    with interrupts() as asked:
        while trainer.goes_on():
            for batch in data.training(trainer.state.epoch, trainer.state.offset):
                trainer.step(batch)
                trainer.look(progress, report)
                if asked:
                    trainer.save()
                    raise KeyboardInterrupt
                if not trainer.goes_on():
                    break
            else:
                trainer.next_epoch()
    return trainer.finish()


class _Trainer:
    """The tensors of a run while it lasts."""

    def __init__(self, run: Run, data: TrainingData, steps: int) -> None:
        self.run, self.data, self.steps = run, data, steps
        self.state = _State()
        self.weights = {n: w for n, w in run.network.weights().items() if w.requires_grad}
        self.tensors: dict[str, Tensor] = {**self.weights, **run.network.statistics()}
        self.names = {weight: name for name, weight in self.weights.items()}
        self.optimizer = make_optimizer(run.recipe, self.weights)
        self.parallel = run.group.parallel(run.student)
        self.average = self._taken() if run.recipe.ema else {}
        self.best: dict[str, Tensor] = {}
        self.labelled = run.objective.labelled is not None
        self.losses: list[Tensor] = []
        self.compiled = False
        longest, shortest = max(1, steps // _FEWEST), -(-steps // _MOST)
        self.interval = min(longest, max(shortest, data.steps or longest))
        self.clock = time.perf_counter()

    def begin(self) -> None:
        """Validate the weights as they come, or take up a checkpoint."""
        if self.run.resume and self.run.folder is not None:
            self._restore(load_checkpoint(self.run.folder, self.run.identity))
        else:
            if self.run.masks is not None:
                self.run.masks.advance(0)
            self._judge()
            self.save()
        self.clock = time.perf_counter()

    def goes_on(self) -> bool:
        patience = self.run.recipe.patience
        return self.state.step < self.steps and not (patience and self.state.stale >= patience)

    def next_epoch(self) -> None:
        if not self.state.offset:
            raise UsageError(f"{self.data.description} gave no batch to train on")
        self.state.epoch, self.state.offset = self.state.epoch + 1, 0

    def step(self, batch: Batch) -> None:
        """One step of the optimizer."""
        run, state = self.run, self.state
        torch.manual_seed((run.seed * 1_000_003 + state.step) * run.group.share.size + run.group.share.rank)
        self.parallel.train(run.statistics)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(run.recipe, state.step, self.steps)
        feeds, targets = self._on_device(batch)
        if run.compiled and not self.compiled:
            self._compile(feeds)
        theirs = self._teach(feeds)
        with self._autocast():
            ours = self.parallel(feeds)
        loss = run.objective.loss(ours, theirs, targets)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([loss])
        if run.recipe.clip:
            nn.utils.clip_grad_norm_(self.weights.values(), run.recipe.clip)
        self.optimizer.step()
        state.step, state.offset = state.step + 1, state.offset + 1
        state.samples += batch.rows * run.group.share.size
        self._follow()
        if run.masks is not None:
            run.masks.advance(state.step)
        self.losses.append(loss.detach())

    def look(self, progress: Progress, report: Callable[[str], None]) -> None:
        """After a step: is the loss finite, and is it time to validate or to save?"""
        step = self.state.step
        due = step % self.interval == 0 or step == self.steps
        saves = self.run.every is not None and step % self.run.every == 0
        if due or saves or step % _LOOK == 0:
            self._require_finite()
        if due:
            mean = float(torch.stack(self.losses).mean())
            self.losses.clear()
            self._lap()
            self._judge()
            self.clock = time.perf_counter()
            report(self._line(mean))
        if due or saves:
            self.run.group.equalize(self.run.network.statistics().values())
            self.save()
        progress("train", step, self.steps)

    def finish(self) -> TrainResult:
        """Leave the best weights in the network, or the last if the recipe says so."""
        self._put(self.best)
        self.run.student.eval()
        state = self.state
        scores = {entry["step"]: Score(entry["loss"], entry["accuracy"]) for entry in state.scores}
        return TrainResult(
            before=scores[0],
            after=scores[state.best_step],
            best_step=state.best_step,
            steps=state.step,
            seconds=state.seconds,
            samples_per_second=state.samples / state.seconds if state.seconds else 0.0,
            stopped_early=state.step < self.steps,
            history=tuple(state.scores),
        )

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it."""
        self._lap()
        if self.run.folder is None or not self.run.group.main:
            return
        tensors = {f"model:{name}": tensor for name, tensor in self.tensors.items()}
        tensors |= {f"average:{name}": tensor for name, tensor in self.average.items()}
        tensors |= {f"best:{name}": tensor for name, tensor in self.best.items()}
        tensors |= optimizer_tensors(self.optimizer, self.names)
        if self.run.masks is not None:
            held, self.state.masks = self.run.masks.saved()
            tensors |= {f"masks:{name}": tensor for name, tensor in held.items()}
        save_checkpoint(Checkpoint(tensors, asdict(self.state), self.run.identity), self.run.folder)

    def _restore(self, held: Checkpoint) -> None:
        self.state = _State(**held.state)
        self._put(held.group("model"))
        self.average = {n: t.to(self.tensors[n].device) for n, t in held.group("average").items()}
        self.best = held.group("best")
        restore_optimizer(self.optimizer, self.names, held.tensors)
        if self.run.masks is not None:
            self.run.masks.restore(held.group("masks"), self.state.masks)

    def _judge(self) -> None:
        """Validate what would be written, and keep it if it is the best."""
        self.run.group.equalize(self.run.network.statistics().values())
        current = self._taken() if self.average else {}
        self._put(self.average)
        score, state = self._validated(), self.state
        scores = {entry["step"]: Score(entry["loss"], entry["accuracy"]) for entry in state.scores}
        settled = 0 if self.run.masks is None else self.run.masks.settled
        held = scores.get(state.best_step) if state.best_step >= settled else None
        anyway = state.step < settled or self.run.recipe.weights == "last"
        if anyway or score.better(held, labelled=self.labelled):
            self.best, state.best_step, state.stale = self._taken(), state.step, 0
        else:
            state.stale += 1
        state.scores.append({"step": state.step, "epoch": state.epoch, **asdict(score)})
        self._put(current)

    def _validated(self) -> Score:
        run = self.run
        run.student.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=run.group.device)
        with torch.no_grad():
            for batch in self.data.validation():
                feeds, targets = self._on_device(batch)
                theirs = self._teach(feeds)
                with self._autocast():
                    ours = run.student(feeds)
                scored = run.objective.score(ours, theirs, targets)
                sums += torch.stack(
                    [scored.loss, scored.hits.double(), scored.judged.double(), sums.new_tensor(scored.rows)]
                )
        loss, hits, judged, rows = run.group.total(sums).tolist()
        if not rows:
            raise UsageError(f"{self.data.description} gave no batch to validate on")
        return Score(loss / rows, hits / judged if judged else None)

    def _teach(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        if self.run.teacher is None:
            return None
        with torch.no_grad(), self._autocast():
            outputs: dict[str, Tensor] = self.run.teacher(feeds)
        return outputs

    def _compile(self, feeds: Mapping[str, Tensor]) -> None:
        self.run.student.compile_for(feeds, training=self.run.statistics)
        if self.run.teacher is not None:
            self.run.teacher.compile_for(feeds, training=False)
        self.compiled = True

    def _autocast(self) -> torch.autocast:
        on = self.run.recipe.precision == "bfloat16"
        return torch.autocast(self.run.group.device.type, torch.bfloat16, enabled=on)

    def _on_device(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        targets, kind = batch.targets, self.run.objective.labelled
        if kind is not None and targets is None:
            raise UsageError(f"{self.data.description} gives labels with some batches and not with others")
        if (
            kind is not None
            and targets is not None
            and targets.dtype.kind == "i"
            and targets.size
            and not 0 <= targets.min() <= targets.max() < kind.shape[1]
        ):
            worst = int(targets.min()) if targets.min() < 0 else int(targets.max())
            raise UsageError(
                f"the data has the label {worst}, but {kind.name} scores {kind.shape[1]} classes from 0"
            )
        # Convolutions are fastest with channels last on a CPU, and in bfloat16 everywhere.
        place = self.run.group.device
        channels_last = place.type == "cpu" or self.run.recipe.precision == "bfloat16"
        feeds = {n: placed(a, place, channels_last=channels_last) for n, a in batch.inputs.items()}
        return feeds, None if kind is None or targets is None else placed(targets, place)

    def _follow(self) -> None:
        """Move the average towards the weights."""
        keep = min(self.run.recipe.ema, (1 + self.state.step) / (10 + self.state.step))
        with torch.no_grad():
            for name, mean in self.average.items():
                mean.lerp_(self.tensors[name], 1 - keep)

    def _taken(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.tensors[name].copy_(tensor)

    def _require_finite(self) -> None:
        if self.losses and not bool(torch.stack(self.losses).isfinite().all()):
            raise MdpError(
                f"the loss is not finite any more at step {self.state.step} of {self.steps}, and nothing was "
                "written; choose a smaller --lr, a longer --warmup or --clip 1"
            )

    def _lap(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self.clock
        self.clock = now

    def _line(self, loss: float) -> str:
        state = self.state
        last, best = state.scores[-1], state.best_step == state.step
        left = state.seconds / state.step * (self.steps - state.step)
        shown = "" if last["accuracy"] is None else f" · {self._metric()} {last['accuracy']:.2%}"
        return (
            f"step {state.step} of {self.steps} · loss {loss:.4g} · validation {last['loss']:.4g}{shown}"
            f"{' (best)' if best else ''} · {state.samples / state.seconds:.0f} samples/s · {left:.0f} s left"
        )

    def _metric(self) -> str:
        return "top-1" if self.labelled else "agrees with the original"
