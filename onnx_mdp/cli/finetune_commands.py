"""Fine-tuning as a command: options in, a file with better weights and a line of figures out."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnx_mdp.analysis.binding import bind_shapes, graph_inputs
from onnx_mdp.cli.console import Screen
from onnx_mdp.cli.options import Options, PlanOptions, input_types, parse_shapes
from onnx_mdp.errors import MdpError, MissingBackendError, UsageError
from onnx_mdp.files import check_output
from onnx_mdp.large_models import save_model
from onnx_mdp.model_io import load_model
from onnx_mdp.reports.report import printable
from onnx_mdp.running.runtime import import_onnxruntime
from onnx_mdp.torch_backend import require_torch

if TYPE_CHECKING:
    from onnx_mdp.training.distributed import Group
    from onnx_mdp.training.finetuning import FinetuneRequest, FinetuneResult

__all__ = [
    "FinetuneOptions",
    "Trained",
    "check_finetuning",
    "finetune_model",
    "run_finetune",
    "training_inputs",
    "training_of",
    "training_process",
    "training_summary",
]

_Shapes = Mapping[str, tuple[int, ...]]
_Types = Mapping[str, np.dtype[Any]]


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
    checkpoint: Path | None = None
    every: int | None = None
    resume: bool = False
    device: str = "auto"

    def request(self, seed: int, *, overwrite: bool) -> FinetuneRequest:
        """The same for the library.

        Raises:
            UsageError, MissingBackendError: an option is wrong, or a package is missing.
        """
        _require_packages()
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


def _require_packages() -> None:
    require_torch("fine-tuning")
    if importlib.util.find_spec("safetensors") is None:
        raise MissingBackendError("fine-tuning needs safetensors: run `pip install 'onnx-mdp[torch]'`.")


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

    bound, types = training_inputs(model, shapes)
    if teacher is not None:
        _check_teacher(teacher, bound)
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

    with process_group(wanted.device) as group:
        screen = options.screen if group.main else replace(options.screen, quiet=True)
        try:
            yield group, screen
        except KeyboardInterrupt:
            if wanted.checkpoint is not None:
                screen.note(f"{wanted.checkpoint} holds the run; the same with --resume goes on")
            raise
        except RuntimeError as error:
            raise MdpError(_reason(error)) from error


def check_finetuning(model: ir.Model, shapes: _Shapes, options: Options, wanted: FinetuneOptions) -> None:
    """Refuse what could not be fine-tuned, before minutes of measuring.

    Raises:
        UsageError, MissingBackendError, UnsupportedModelError: with the remedy.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "prune measures latency, which one process must do: prune first, then torchrun finetune"
        )
    request = wanted.request(options.seed, overwrite=True)
    from onnx_mdp.training.batches import Share
    from onnx_mdp.training.bridge import to_torch
    from onnx_mdp.training.data import open_data

    open_data(request.data, *training_inputs(model, shapes), Share())
    to_torch(model)


def training_inputs(model: ir.Model, shapes: _Shapes) -> tuple[_Shapes, _Types]:
    """Shapes with a batch of one wherever the file leaves it open, and types with halves as float32."""
    bound = bind_shapes(model, shapes, 1)
    for value in graph_inputs(model):
        name, first = str(value.name), None if value.shape is None or not len(value.shape) else value.shape[0]
        if bound[name] and not (isinstance(first, int) and first > 0):
            bound[name] = (1, *bound[name][1:])
    single = np.dtype(np.float32)
    return bound, {n: single if t == np.float16 else t for n, t in input_types(model).items()}


def _check_teacher(teacher: ir.Model, shapes: _Shapes) -> None:
    for value in graph_inputs(teacher):
        name = str(value.name)
        if name not in shapes:
            raise UsageError(f"the teacher takes an input {name!r} that the model has not; pass its original")
        held = shapes[name] if value.shape is None else value.shape
        dims = [d if isinstance(d, int) else str(d.value) for d in held]
        fits = len(dims) == len(shapes[name]) and all(
            not isinstance(d, int) or d < 1 or d == s for d, s in zip(dims, shapes[name], strict=True)
        )
        if not fits:
            raise UsageError(
                f"the teacher takes {name!r} as {dims} and the model as {list(shapes[name])}; "
                "one batch cannot feed both"
            )


def _reason(error: RuntimeError) -> str:
    """One sentence of what torch raised."""
    text = printable(str(error).strip().split("\n")[0])[:300]
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        return f"the memory of the device is exhausted; choose a smaller --batch-size ({text})"
    return f"torch could not train this model: {text}"


def training_summary(
    result: FinetuneResult, request: FinetuneRequest, group: Group
) -> tuple[str, dict[str, Any]]:
    """A line and a document for what a run came to."""
    place = {"device": str(group.device), "processes": group.share.size}
    return _line(result, str(group.device)), _document(result, request) | place


def _metric(result: FinetuneResult) -> str:
    return "top-1" if result.labelled else "agreement with the original"


def _line(result: FinetuneResult, device: str) -> str:
    run = result.run
    before, after = run.before, run.after
    scores = f"validation loss {before.loss:.4g} → {after.loss:.4g}"
    if before.accuracy is not None and after.accuracy is not None:
        scores = f"{_metric(result)} {before.accuracy:.2%} → {after.accuracy:.2%} · {scores}"
    best = f"best at step {run.best_step} of {run.steps}" if run.best_step else "no step was better"
    early = ", stopped early" if run.stopped_early else ""
    return (
        f"{'FINETUNED' if run.best_step else 'NO BETTER'}  {scores} · {best}{early} · {run.seconds:.1f} s, "
        f"{run.samples_per_second:.0f} samples/s on {device} · ONNX Runtime = torch to {result.error:.1e}"
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
