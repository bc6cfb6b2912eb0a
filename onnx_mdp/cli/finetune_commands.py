"""Fine-tuning as a command: options in, a file with better weights and a line of figures out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnx_mdp.api.training import require_training
from onnx_mdp.cli.console import Screen
from onnx_mdp.cli.options import Options, PlanOptions, parse_shapes
from onnx_mdp.errors import UsageError
from onnx_mdp.files import check_output
from onnx_mdp.large_models import save_model
from onnx_mdp.model_io import load_model
from onnx_mdp.running.runtime import import_onnxruntime

if TYPE_CHECKING:
    from onnx_mdp.training.distributed import Group
    from onnx_mdp.training.finetuning import FinetuneRequest, FinetuneResult

__all__ = [
    "FinetuneOptions",
    "Trained",
    "check_finetuning",
    "finetune_model",
    "run_finetune",
    "training_of",
    "training_process",
    "training_summary",
]

_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """What fine-tuning is told; ``overrides`` are fields of `recipes.Recipe`, None where not given."""

    data: str = ""
    validation: str | None = None
    validation_share: float = 0.1
    labels: str | None = None
    preprocess: str | None = None
    augment: str = "none"
    recipe: str = "default"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    distill: str = "auto"
    freeze_bn: bool = False
    insert_bn: bool = False
    compiled: bool = False
    checkpoint: Path | None = None
    every: int | None = None
    resume: bool = False
    device: str = "auto"

    def request(self, seed: int, *, overwrite: bool) -> FinetuneRequest:
        """The same for the library.

        Raises:
            UsageError, MissingBackendError: an option is wrong, or a package is missing.
        """
        require_training()
        from onnx_mdp.training.data import DataOptions
        from onnx_mdp.training.finetuning import FinetuneRequest
        from onnx_mdp.training.recipes import recipe

        if self.distill not in ("auto", "mse"):
            raise UsageError(f"--distill {self.distill!r} is unknown; choose auto or mse")
        if self.checkpoint is None and (self.resume or self.every is not None):
            raise UsageError("--resume and --checkpoint-every need the folder of --checkpoint")
        chosen = recipe(self.recipe, self.overrides)
        data = DataOptions(
            self.data,
            self.validation,
            self.validation_share,
            self.labels,
            self.preprocess,
            self.augment,
            chosen.batch,
            seed,
        )
        return FinetuneRequest(
            chosen,
            data,
            self.features,
            self.distill,
            self.freeze_bn,
            self.insert_bn,
            self.checkpoint,
            self.every,
            self.resume,
            overwrite,
            self.compiled,
        )


def training_of(
    training: FinetuneOptions, data: str | None, preprocess: str | None, plan: PlanOptions, *, wanted: bool
) -> FinetuneOptions | None:
    """What `prune` fine-tunes with: its calibration inputs and their preprocessing, unless others are named.

    Raises:
        UsageError: there is none, or it is named in vain.
    """
    if not wanted:
        given = [v for v in (data, preprocess, *training.overrides.values()) if v is not None]
        shared = FinetuneOptions(overrides=training.overrides, labels=training.labels)
        if given or training != shared:
            raise UsageError("options of training need --finetune; pass it, or leave them out")
        return None
    chosen = data or (None if plan.data is None else str(plan.data))
    if chosen is None:
        raise UsageError("--finetune needs inputs to train on; pass --train or --data")
    how = preprocess or plan.preprocess
    return replace(training, data=chosen, preprocess=None if how == "none" else how)


@dataclass(frozen=True, slots=True)
class Trained:
    """A line and a document for the result; ``main`` is false in the processes that only help."""

    line: str
    document: Mapping[str, Any]
    main: bool


def run_finetune(
    path: Path,
    teacher: Path | None,
    output: Path,
    options: Options,
    wanted: FinetuneOptions,
    *,
    overwrite: bool,
) -> int:
    """Train the weights of a model, and write it with the best of them."""
    check_output(output, overwrite=overwrite)
    model = load_model(path)
    original = None if teacher is None else load_model(teacher)
    shapes = parse_shapes(options.input_shapes, model)
    trained = finetune_model(model, original, shapes, output, options, wanted, overwrite=overwrite)
    if trained.main:
        options.screen.result(trained.line, dict(trained.document))
    return 0


def finetune_model(
    model: ir.Model,
    teacher: ir.Model | None,
    shapes: _Shapes,
    output: Path,
    options: Options,
    wanted: FinetuneOptions,
    *,
    overwrite: bool,
) -> Trained:
    """Train a model from memory and write it.

    Raises:
        MdpError: one of many; see `finetuning.finetune`.
    """
    request = wanted.request(options.seed, overwrite=overwrite)
    import_onnxruntime()
    from onnx_mdp.training.finetuning import finetune
    from onnx_mdp.training.preparation import check_teacher, training_inputs

    bound, types = training_inputs(model, shapes)
    if teacher is not None:
        check_teacher(teacher, bound)
    with training_process(options, wanted) as (group, screen):
        with screen.progress() as progress:
            result = finetune(model, teacher, bound, types, request, group, progress, screen.note)
        if group.main:
            save_model(result.model, output, overwrite=overwrite)
        line, document = training_summary(result, request, group)
        return Trained(f"{line} → {output}", document | {"output": str(output)}, group.main)


@contextmanager
def training_process(options: Options, wanted: FinetuneOptions) -> Iterator[tuple[Group, Screen]]:
    """The group to train in, and a screen that is silent in processes that only help.

    Raises:
        MdpError: torch fails, out of memory for example.
        KeyboardInterrupt: after a note of how to go on.
    """
    from onnx_mdp.training.distributed import process_group
    from onnx_mdp.training.preparation import failures_in_a_sentence

    with process_group(wanted.device) as group, failures_in_a_sentence():
        screen = options.screen if group.main else replace(options.screen, quiet=True)
        try:
            yield group, screen
        except KeyboardInterrupt:
            if wanted.checkpoint is not None:
                screen.note(f"{wanted.checkpoint} holds the run; the same with --resume goes on")
            raise


def check_finetuning(
    model: ir.Model, shapes: _Shapes, options: Options, wanted: FinetuneOptions, *, overwrite: bool
) -> None:
    """Refuse what could not be fine-tuned, before minutes of measuring.

    Raises:
        UsageError, OutputError, MissingBackendError, UnsupportedModelError: with the remedy.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "prune measures latency, which one process must do: prune first, then torchrun finetune"
        )
    request = wanted.request(options.seed, overwrite=overwrite)
    from onnx_mdp.training.batches import Share
    from onnx_mdp.training.bridge import to_torch
    from onnx_mdp.training.checkpoint import check_folder
    from onnx_mdp.training.data import open_data
    from onnx_mdp.training.preparation import training_inputs

    if request.checkpoint is not None:
        check_folder(request.checkpoint, resume=request.resume, overwrite=overwrite)
    open_data(request.data, *training_inputs(model, shapes), Share())
    to_torch(model)


def training_summary(
    result: FinetuneResult, request: FinetuneRequest, group: Group
) -> tuple[str, dict[str, Any]]:
    """A line and a document for what a run came to."""
    place = {"device": str(group.device), "processes": group.share.size}
    return _line(result, request, str(group.device)), _document(result, request) | place


def _metric(result: FinetuneResult) -> str:
    return "top-1" if result.labelled else "agreement with the original"


def _line(result: FinetuneResult, request: FinetuneRequest, device: str) -> str:
    run = result.run
    before, after = run.before, run.after
    scores = f"validation loss {before.loss:.4g} → {after.loss:.4g}"
    if before.accuracy is not None and after.accuracy is not None:
        scores = f"{_metric(result)} {before.accuracy:.2%} → {after.accuracy:.2%} · {scores}"
    if request.recipe.weights == "last":
        written = f"the last of {run.steps} steps"
    elif run.best_step:
        written = f"best at step {run.best_step} of {run.steps}"
    else:
        written = "no step was better (images of the original's training flatter what came: --val, --weights)"
    early = ", stopped early" if run.stopped_early else ""
    return (
        f"{'FINETUNED' if run.best_step else 'NO BETTER'}  {scores} · {written}{early} · "
        f"{run.seconds:.1f} s, {run.samples_per_second:.0f} samples/s on {device} · "
        f"ONNX Runtime = torch to {result.error:.1e}"
    )


def _document(result: FinetuneResult, request: FinetuneRequest) -> dict[str, Any]:
    run = result.run
    return {
        "schema_version": 1,
        "metric": "top1" if result.labelled else "agreement" if run.before.accuracy is not None else "loss",
        "before": asdict(run.before),
        "after": asdict(run.after),
        "best_step": run.best_step,
        "steps": run.steps,
        "stopped_early": run.stopped_early,
        "seconds": run.seconds,
        "samples_per_second": run.samples_per_second,
        "history": [dict(entry) for entry in run.history],
        "objective": result.objective,
        "data": result.data,
        "recipe": asdict(request.recipe),
        "seed": request.data.seed,
        "max_error": result.error,
        "notes": list(result.notes),
    }
