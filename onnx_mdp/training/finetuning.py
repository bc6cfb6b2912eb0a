"""Fine-tuning: a pruned model, and what it was pruned from, to the same file with better weights.

::

    Model ─to_torch→ student ─┐
    original ─to_torch→ teacher ─┼─train→ best weights ─write_back→ Model ─compare→ in ONNX Runtime
    data ─────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from onnx_mdp.errors import UsageError
from onnx_mdp.model_io import content_hash
from onnx_mdp.plan import PruningPlan
from onnx_mdp.surgery.changed_weights import mark_weights
from onnx_mdp.training.agreement import require_agreement
from onnx_mdp.training.batched import Batched, freeze_unreached, takes_batches
from onnx_mdp.training.batches import Batch, placed
from onnx_mdp.training.batchnorm import fold_batchnorm, insert_batchnorm
from onnx_mdp.training.bridge import to_torch, write_back
from onnx_mdp.training.checkpoint import as_run, prepare_folder
from onnx_mdp.training.data import DataOptions, TrainingData, open_data
from onnx_mdp.training.distributed import Group
from onnx_mdp.training.interpreter import OnnxModule
from onnx_mdp.training.loop import Run, TrainResult, total_steps, train
from onnx_mdp.training.losses import Objective, kinds_of, labelled_output
from onnx_mdp.training.masks import MaskedNetwork, Masks
from onnx_mdp.training.recipes import Recipe

__all__ = ["FinetuneRequest", "FinetuneResult", "Masking", "finetune"]

Feeds = dict[str, Tensor]
Arrays = Mapping[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]
_COMPARED = 8


@dataclass(frozen=True, slots=True)
class FinetuneRequest:
    """How to fine-tune; ``features`` are patterns of tensor names, ``distances`` is ``auto`` or ``mse``.

    ``frozen_statistics`` keeps batch norms as they are, ``insert_norms`` trains with some that are folded
    away again. ``checkpoint`` is a folder, written after every validation and every ``every`` steps.
    ``compiled`` has `torch.compile` make what runs on whole batches.
    """

    recipe: Recipe
    data: DataOptions
    features: tuple[str, ...] = ()
    distances: str = "auto"
    frozen_statistics: bool = False
    insert_norms: bool = False
    checkpoint: Path | None = None
    every: int | None = None
    resume: bool = False
    overwrite: bool = False
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Masking:
    """How a model is pruned while it trains.

    ``network`` makes the network, with inserted batch norms where it is given inputs; ``masks`` its masks for
    a number of steps, with labels or without; ``slim`` the file from the trained model and the plan that the
    masks came to. ``identity`` must be equal for a checkpoint to be resumed.
    """

    network: Callable[[Mapping[str, Any] | None], MaskedNetwork]
    masks: Callable[[MaskedNetwork, int, bool], Masks]
    slim: Callable[[ir.Model, PruningPlan], ir.Model]
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """The trained model, how the run went, and how far ONNX Runtime is from torch, relative to the scale."""

    model: ir.Model
    run: TrainResult
    objective: str
    data: str
    labelled: bool
    error: float
    notes: tuple[str, ...] = field(default=())


def finetune(
    model: ir.Model,
    teacher: ir.Model | None,
    shapes: Shapes,
    dtypes: Mapping[str, np.dtype[Any]],
    request: FinetuneRequest,
    group: Group,
    progress: Callable[[str, int, int], None],
    report: Callable[[str], None],
    masking: Masking | None = None,
) -> FinetuneResult:
    """Train the weights of ``model``, which is not changed, and return it with the best ones.

    ``shapes`` are the bound shapes of the inputs, beginning with the batch. With ``masking``, a network of
    this model is pruned as it trains, and what is returned is slim in the process that decides.

    Raises:
        UsageError: the data does not fit, or there is nothing to learn from.
        UnsupportedModelError: an operator has no gradient here.
        MdpError: the loss is not finite any more.
        VerificationError: the written model does not compute what was trained.
    """
    if request.checkpoint is not None and group.main:
        prepare_folder(request.checkpoint, resume=request.resume, overwrite=request.overwrite)
    options = replace(request.data, batch=request.recipe.batch)
    data = open_data(options, shapes, dtypes, group.share)
    probe = data.probe()
    feeds = {name: placed(array, group.device) for name, array in probe.inputs.items()}
    names = () if teacher is None else _features(model, teacher, request.features)
    rows = next(iter(shapes.values()))[0]
    network = _trainable(model, request, probe, rows, masking)
    student = _batched(network, names, feeds, rows, group)
    expert = None if teacher is None else _batched(to_torch(teacher), names, feeds, rows, group)
    if expert is not None:
        expert.requires_grad_(False)
    objective = _objective(request, student, expert, feeds, probe, data, names)
    freeze_unreached(student, {n: f[: max(rows, 2)] for n, f in feeds.items()})
    notes = _notes(student, rows)
    for note in notes:
        report(note)
    report(f"learning from {objective.words()}; {data.description}")
    masks = None
    if masking is not None and isinstance(network, MaskedNetwork):
        masks = masking.masks(network, total_steps(request.recipe, data), objective.labelled is not None)
    run = Run(
        student,
        expert,
        objective,
        request.recipe,
        group,
        seed=request.data.seed,
        statistics=not request.frozen_statistics and student.rows is None,
        folder=request.checkpoint,
        resume=request.resume,
        every=request.every,
        identity=_identity(model, teacher, request, data, group) | dict(masking.identity if masking else {}),
        masks=masks,
        compiled=request.compiled,
    )
    result = train(run, data, progress, report)
    module = network.module if isinstance(network, MaskedNetwork) else network
    trained = (fold_batchnorm if request.insert_norms else write_back)(model, module)
    if masking is not None and masks is not None and group.main:
        trained = masking.slim(trained, masks.plan)
    if result.best_step:
        mark_weights(trained, f"fine-tuned: {result.best_step} steps")
    error = 0.0
    if masks is None or group.main:  # a process that only helps has no slim file to compare
        error = require_agreement(trained, student, _few(probe, student, rows), rows)
    labelled = objective.labelled is not None
    return FinetuneResult(trained, result, objective.words(), data.description, labelled, error, notes)


def _trainable(
    model: ir.Model, request: FinetuneRequest, probe: Batch, rows: int, masking: Masking | None
) -> OnnxModule | MaskedNetwork:
    module = to_torch(model) if masking is None else masking.network(None)
    if not request.insert_norms:
        return module
    if not takes_batches(module, {n: torch.from_numpy(a) for n, a in probe.inputs.items()}, rows):
        raise UsageError(
            f"--insert-bn: the file fixes its batch at {rows}, and statistics need more; export it with a "
            "symbolic batch"
        )
    if masking is not None:
        return masking.network(probe.inputs)
    return to_torch(insert_batchnorm(model, [probe.inputs]))


def _batched(module: torch.nn.Module, also: Sequence[str], feeds: Feeds, rows: int, group: Group) -> Batched:
    module = module.to(group.device)
    return Batched(module, None if takes_batches(module, feeds, rows) else rows, also)


def _few(batch: Batch, student: Batched, rows: int) -> Arrays:
    """The first rows of a batch, as many as the file takes some times."""
    few = max(rows, min(_COMPARED, batch.rows) // rows * rows) if student.rows is None else rows
    return {name: array[:few] for name, array in batch.inputs.items()}


def _features(model: ir.Model, teacher: ir.Model, patterns: Sequence[str]) -> tuple[str, ...]:
    """The tensors that match a pattern and are in both graphs."""
    names: dict[str, None] = {}
    for pattern in patterns:
        there = [_made(graph, pattern) for graph in (model, teacher)]
        both = [name for name in there[0] if name in set(there[1])]
        if not both:
            raise UsageError(
                f"--features {pattern!r}: no tensor of that name is in both models; it matches "
                f"{len(there[0])} in the pruned one and {len(there[1])} in the original"
            )
        names.update(dict.fromkeys(both))
    return tuple(names)


def _made(model: ir.Model, pattern: str) -> list[str]:
    outputs = (str(value.name) for node in model.graph for value in node.outputs if value.name)
    return [name for name in outputs if fnmatchcase(name, pattern)]


def _objective(
    request: FinetuneRequest,
    student: Batched,
    expert: Batched | None,
    feeds: Feeds,
    probe: Batch,
    data: TrainingData,
    names: Sequence[str],
) -> Objective:
    """Say what is learned from, by the shapes of one batch."""
    with torch.no_grad():
        ours = student.eval()(feeds)
        theirs = ours if expert is None else expert.eval()(feeds)
    kinds = kinds_of({n: t for n, t in ours.items() if n not in names}, request.distances)
    labelled = None
    if probe.targets is not None:
        labelled = labelled_output(kinds, torch.from_numpy(probe.targets), data.classes)
    if expert is None:
        if labelled is None:
            raise UsageError("there is nothing to learn from: pass --teacher ORIGINAL.onnx, or labels")
        return Objective(request.recipe, (), (), labelled)
    distilled = kinds_of({n: theirs[n] for n in _shared(ours, theirs, names)}, request.distances)
    matched = kinds_of(_equally_wide(ours, theirs, names), "mse")
    return Objective(request.recipe, distilled, matched, labelled)


def _shared(ours: Feeds, theirs: Feeds, names: Sequence[str]) -> list[str]:
    """The outputs, which the two models must have in common."""
    for name, tensor in ours.items():
        if name not in names and (name not in theirs or theirs[name].shape != tensor.shape):
            raise UsageError(
                f"the teacher has no output {name} of the shape {list(tensor.shape)}; "
                "pass the model that this one was pruned from"
            )
    return [name for name in ours if name not in names]


def _equally_wide(ours: Feeds, theirs: Feeds, names: Sequence[str]) -> Feeds:
    wide = {n: theirs[n] for n in names if ours[n].shape == theirs[n].shape and ours[n].is_floating_point()}
    if names and not wide:
        raise UsageError(
            f"--features: {', '.join(names)}: all are narrower in the pruned model; name tensors that are not"
        )
    return wide


def _notes(student: Batched, rows: int) -> tuple[str, ...]:
    if student.rows is None:
        return ()
    return (
        f"the file fixes its batch at {rows}: samples are run {rows} at a time, and batch norms keep their "
        "statistics; export it with a symbolic batch to train faster",
    )


def _identity(
    model: ir.Model, teacher: ir.Model | None, request: FinetuneRequest, data: TrainingData, group: Group
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be resumed."""
    return as_run(
        {
            "model": content_hash(model),
            "teacher": None if teacher is None else content_hash(teacher),
            "data": data.description,
            "seed": request.data.seed,
            "augment": request.data.augment,
            "processes": group.share.size,
            "features": request.features,
            "frozen statistics": request.frozen_statistics,
            "inserted norms": request.insert_norms,
            "compiled": request.compiled,
            **asdict(request.recipe),
        }
    )
