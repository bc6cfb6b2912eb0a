"""What training brings down: the distance to labels, to the original model's outputs, or to both.

An output ``[n, k]``, k > 1, is taken for the scores of k classes: logits, or probabilities where every row
adds up to one (their logarithms are logits). With teacher scores t, student scores s and temperature T ::

    KL:     T² · Σ softmax(t / T) · (log softmax(t / T) - log softmax(s / T))        averaged over samples
    MSE:    mean (s - t)² / spread          any other float output; spread: the teacher's variance
    labels: cross-entropy with class numbers or soft labels; relative MSE to targets of the output's shape
    total:  (1 - α) · labels + α · mean over outputs (KL or MSE) + β · mean over features (MSE)

The spread is measured once, so that a batch costs the same however it is shared by processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from onnx_mdp.errors import UsageError
from onnx_mdp.training.recipes import Recipe

__all__ = ["Kind", "Objective", "Scored", "kinds_of", "labelled_output"]

_TINY = 1e-12
_ONE = 1e-3  # how far rows of probabilities may be from one
_Form = Literal["logits", "probabilities", "values"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a tensor holds, and the variance of its values."""

    name: str
    form: _Form
    spread: float
    shape: tuple[int, ...]

    @property
    def scores(self) -> bool:
        """Whether it scores classes."""
        return self.form != "values"

    def logits(self, values: Tensor) -> Tensor:
        """Scores whose softmax is the distribution over classes."""
        return values.clamp_min(_TINY).log() if self.form == "probabilities" else values


def kinds_of(tensors: Mapping[str, Tensor], distances: str = "auto") -> tuple[Kind, ...]:
    """The kinds of the float tensors of one batch; with ``distances`` ``mse`` none scores classes."""
    floats = {name: tensor.detach().float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    return tuple(
        Kind(name, _form(tensor) if distances == "auto" else "values", _spread(tensor), tuple(tensor.shape))
        for name, tensor in floats.items()
    )


def _form(values: Tensor) -> _Form:
    if values.dim() != 2 or values.shape[1] < 2:
        return "values"
    whole = (values.sum(1) - 1).abs().max() < _ONE and values.min() >= 0
    return "probabilities" if whole else "logits"


def _spread(values: Tensor) -> float:
    """The variance, or the mean square of what does not vary, or 1 of zeros."""
    finite = values[values.isfinite()].double()
    if not finite.numel():
        return 1.0
    return float(finite.var(correction=0)) or float(finite.square().mean()) or 1.0


@dataclass(frozen=True, slots=True)
class Scored:
    """Sums over the samples of a batch: the loss, hits among ``judged`` labels, and the samples."""

    loss: Tensor
    hits: Tensor
    judged: Tensor
    rows: int


@dataclass(frozen=True, slots=True)
class Objective:
    """The total loss: of outputs ``distilled``, features ``matched``, and the output that is ``labelled``."""

    recipe: Recipe
    distilled: tuple[Kind, ...]
    matched: tuple[Kind, ...]
    labelled: Kind | None

    def loss(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor] | None, targets: Tensor | None
    ) -> Tensor:
        """The mean over the samples of a batch, a float32 scalar."""
        total = torch.zeros((), device=next(iter(student.values())).device)
        alpha = self.recipe.alpha if teacher is not None else 0.0
        if self.labelled is None:
            alpha = 1.0
        if self.labelled is not None and targets is not None and alpha < 1:
            total = total + (1 - alpha) * self._label_loss(student[self.labelled.name].float(), targets)
        if teacher is not None and alpha > 0 and self.distilled:
            total = total + alpha * self._mean(self.distilled, student, teacher)
        if teacher is not None and self.matched:
            total = total + self.recipe.features * self._mean(self.matched, student, teacher)
        return total

    def _mean(
        self, kinds: Sequence[Kind], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> Tensor:
        terms = [self._distance(k, student[k.name].float(), teacher[k.name].float()) for k in kinds]
        return torch.stack(terms).mean()

    def _distance(self, kind: Kind, ours: Tensor, theirs: Tensor) -> Tensor:
        if not kind.scores:
            return functional.mse_loss(ours, theirs) / kind.spread
        heat = self.recipe.temperature
        wanted = functional.log_softmax(kind.logits(theirs) / heat, 1)
        given = functional.log_softmax(kind.logits(ours) / heat, 1)
        return heat**2 * functional.kl_div(given, wanted, log_target=True, reduction="batchmean")

    def _label_loss(self, values: Tensor, targets: Tensor) -> Tensor:
        kind = self.labelled
        assert kind is not None
        if not targets.is_floating_point():
            return functional.cross_entropy(
                _log_scores(kind, values), targets, label_smoothing=self.recipe.label_smoothing
            )
        if kind.scores:
            return functional.cross_entropy(kind.logits(values), targets)
        return functional.mse_loss(values, targets) / kind.spread

    def score(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor] | None, targets: Tensor | None
    ) -> Scored:
        """How good a batch is: by its labels, or where there are none by the teacher's first scores."""
        loss = self.loss(student, teacher, targets)
        rows = len(next(iter(student.values())))
        zero = torch.zeros((), dtype=torch.int64, device=loss.device)
        hits, judged = zero, zero
        if self.labelled is not None and targets is not None and not targets.is_floating_point():
            right = student[self.labelled.name].argmax(1) == targets
            hits, judged = right.sum(), zero + right.numel()
        elif self.labelled is None and teacher is not None:
            for kind in self.distilled[:1]:
                if kind.scores:
                    same = student[kind.name].argmax(1) == teacher[kind.name].argmax(1)
                    hits, judged = same.sum(), zero + same.numel()
        return Scored(loss.detach().double() * rows, hits, judged, rows)

    def words(self) -> str:
        """What is brought near to what."""
        parts = []
        if self.labelled is not None:
            parts.append(f"labels of {self.labelled.name}")
        for name, kinds in (("outputs", self.distilled), ("features", self.matched)):
            if kinds:
                how = sorted({"KL divergence" if kind.scores else "relative MSE" for kind in kinds})
                parts.append(
                    f"{name} {', '.join(k.name for k in kinds)} of the original by {' and '.join(how)}"
                )
        return "; ".join(parts)


def _log_scores(kind: Kind, values: Tensor) -> Tensor:
    return kind.logits(values) if kind.scores else values


def labelled_output(kinds: Sequence[Kind], targets: Tensor, classes: int | None) -> Kind:
    """The output that the targets belong to: the first whose shape fits.

    Raises:
        UsageError: none does, or there are more classes than scores.
    """
    for kind in kinds:
        shape = kind.shape
        if targets.is_floating_point() and tuple(targets.shape[1:]) == shape[1:]:
            return kind
        numbers = not targets.is_floating_point() and len(shape) >= 2
        if numbers and tuple(targets.shape[1:]) == shape[2:] and shape[1] > 1:
            _check_classes(kind, targets, classes)
            return kind
    held = ", ".join(f"{kind.name} {['n', *kind.shape[1:]]}" for kind in kinds)
    raise UsageError(f"targets {['n', *targets.shape[1:]]} fit no output of the model ({held}); give others")


def _check_classes(kind: Kind, targets: Tensor, classes: int | None) -> None:
    scores = kind.shape[1]
    if classes is not None and classes != scores:
        raise UsageError(
            f"the data has {classes} class folders, but output {kind.name} scores {scores} classes; "
            "give their numbers with --labels FILE"
        )
