"""Pruning while training, as a part of `prune --finetune`: masks that the solver decides again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.cli.finetune_commands import (
    FinetuneOptions,
    Trained,
    training_process,
    training_summary,
)
from onnx_mdp.cli.options import Options
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.scoring import score
from onnx_mdp.large_models import for_session
from onnx_mdp.pipeline import PruneResult, stamp, with_model
from onnx_mdp.planning.closed_loop import Request, tolerance
from onnx_mdp.tables.variants import measure_models

if TYPE_CHECKING:
    from onnx_mdp.training.masks import Schedule
    from onnx_mdp.training.soft_masking import MaskedResult

__all__ = ["MaskOptions", "check_masking", "prune_in_training"]

_ONE_SHOT = "one-shot"
_MEASURE_S = 4.5

Feeds = Sequence[Mapping[str, npt.NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """How structure and training meet; ``shares`` is ``TIGHTEN,SETTLE``, None for the default."""

    mode: str = _ONE_SHOT
    redecide: int | None = None
    shares: str | None = None
    resume: bool = False

    @property
    def masked(self) -> bool:
        """Whether the model is pruned while it trains, and not before."""
        return self.mode != _ONE_SHOT

    def check(self, *, finetune: bool) -> None:
        """Refuse options that go with none of the others.

        Raises:
            UsageError: with the remedy.
        """
        if self != MaskOptions() and not finetune:
            raise UsageError("--mode, --redecide, --schedule and --resume need --finetune; pass it")
        if not self.masked and self != MaskOptions(self.mode):
            raise UsageError("--redecide, --schedule and --resume need --mode soft or iterative; pass one")

    def schedule(self) -> Schedule:
        """The same for the library.

        Raises:
            UsageError: an option is wrong.
        """
        from onnx_mdp.training.masks import Schedule

        given: dict[str, Any] = {} if self.redecide is None else {"redecide": self.redecide}
        if self.shares is not None:
            try:
                tighten, settle = map(float, self.shares.split(","))
            except ValueError as error:
                raise UsageError(
                    f"--schedule {self.shares!r} is not TIGHTEN,SETTLE, such as 0.33,0.67"
                ) from error
            given |= {"tighten": tighten, "settle": settle}
        return Schedule(self.mode, **given)


def check_masking(structure: Structure, wanted: FinetuneOptions, masks: MaskOptions) -> None:
    """Refuse what could not be pruned in training, before minutes of measuring.

    Raises:
        UsageError, UnsupportedModelError: with the remedy.
    """
    from onnx_mdp.training.soft_masking import require_maskable

    masks.schedule()
    require_maskable(structure, wanted.features)


def prune_in_training(
    model: ir.Model,
    result: PruneResult,
    request: Request,
    shapes: Mapping[str, tuple[int, ...]],
    feeds: Feeds,
    options: Options,
    wanted: FinetuneOptions,
    masks: MaskOptions,
) -> tuple[PruneResult, Trained]:
    """Prune a model again, while it trains, to the target that an ordinary prune has met.

    Raises:
        MdpError: one of many; see `soft_masking.train_with_masks`.
    """
    from onnx_mdp.training.preparation import training_inputs
    from onnx_mdp.training.soft_masking import Budgets, train_with_masks

    training = replace(wanted, resume=masks.resume).request(options.seed, overwrite=True)
    structure, schedule = result.structure, masks.schedule()
    assert result.table is not None
    bound, types = training_inputs(model, shapes)
    with training_process(options, wanted) as (group, screen), screen.progress() as progress:
        budgets = Budgets(structure, result.table, request, result.base_ms, progress)
        found = train_with_masks(
            structure,
            model,
            bound,
            types,
            training,
            schedule,
            budgets,
            group,
            progress,
            screen.note,
            first=lambda: score(structure, request.criterion, feeds, progress),
            feeds=feeds[:2],
        )
    line, document = training_summary(found.training, training, group)
    document |= {"masks": asdict(schedule), "decisions": [asdict(d) for d in found.decisions]}
    returned = sum(decision.returned for decision in found.decisions)
    line += f" · {len(found.decisions)} decisions, {returned} units came back"
    return _measured(model, result, request, found), Trained(line, document, main=True)


def _measured(model: ir.Model, result: PruneResult, request: Request, found: MaskedResult) -> PruneResult:
    """The result with the trained model in place of the first one, measured beside the original."""
    assert found.evidence is not None
    slim = stamp(found.training.model, found.plan)
    timing = measure_models(
        [for_session(model), for_session(slim)],
        result.structure.shadow.inputs,
        request.runtime,
        seed=request.seed,
        budget_s=_MEASURE_S,
    )
    measured = timing.ms[1] * result.base_ms / timing.ms[0]
    return replace(
        with_model(result, slim, found.plan, found.evidence),
        status="met" if measured <= result.target_ms * (1 + tolerance(timing.noise)) else "missed",
        base_now_ms=timing.ms[0],
        measured_ms=measured,
        noise=timing.noise,
        rounds=(),
        programs=None,
    )
