"""Training as functions: fine-tuning in one call, or a module and back for a loop of the caller's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_mdp.api.stages import Progress, silent
from onnx_mdp.errors import MissingBackendError
from onnx_mdp.model_io import ModelLike, load_model
from onnx_mdp.running.runtime import import_onnxruntime
from onnx_mdp.torch_backend import require_torch

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnx_mdp.training.finetuning import FinetuneResult
    from onnx_mdp.training.interpreter import OnnxModule

__all__ = ["finetune", "require_training", "to_torch", "write_back"]


def to_torch(model: ModelLike) -> OnnxModule:
    """The model as a ``torch.nn.Module`` in evaluation mode, for a training loop of your own.

    Raises:
        MissingBackendError: torch is not installed.
        UnsupportedModelError: an operator has no form in torch here, or the model is quantized.
    """
    require_torch("to_torch")
    from onnx_mdp.training import bridge

    return bridge.to_torch(model)


def write_back(model: ModelLike, module: OnnxModule) -> ir.Model:
    """A copy of the model with the weights and statistics of a module that `to_torch` made of it.

    Raises:
        MissingBackendError: torch is not installed.
        UsageError: the module has a tensor that the model lacks, or has in another shape.
    """
    require_torch("write_back")
    from onnx_mdp.training import bridge

    return bridge.write_back(model, module)


def finetune(
    model: ModelLike,
    teacher: ModelLike | None = None,
    *,
    data: str | Callable[..., Any],
    validation: str | Callable[..., Any] | None = None,
    validation_share: float = 0.1,
    labels: str | None = None,
    preprocess: str | None = None,
    augment: str = "none",
    recipe: str = "default",
    overrides: Mapping[str, Any] | None = None,
    features: Sequence[str] = (),
    distances: str = "auto",
    frozen_statistics: bool = False,
    insert_norms: bool = False,
    compiled: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    report: Callable[[str], None] = lambda text: None,
) -> FinetuneResult:
    """Train the weights of a model, by its original as ``teacher``, by labels, or by both.

    ``data`` is a path (an ``.npz`` or a folder of images), or a function that is called once an epoch with a
    `LoaderRequest` and returns batches. ``overrides`` are fields of `onnx_mdp.training.recipes.Recipe`, such
    as ``{"epochs": 3, "lr": 1e-3}``. ``report`` is called with what a person would be told. The trained model
    is ``result.model``; under torchrun, what the main process returns.

    Raises:
        MissingBackendError: torch or safetensors is not installed.
        UsageError: the data does not fit, or there is nothing to learn from.
        UnsupportedModelError: an operator has no gradient here.
        MdpError: torch failed, or the loss is not finite any more.
    """
    require_training()
    import_onnxruntime()
    from onnx_mdp.training import finetuning
    from onnx_mdp.training.data import DataOptions
    from onnx_mdp.training.distributed import process_group
    from onnx_mdp.training.preparation import check_teacher, failures_in_a_sentence, training_inputs
    from onnx_mdp.training.recipes import recipe as recipe_of

    slim = load_model(model)
    expert = None if teacher is None else load_model(teacher)
    chosen = recipe_of(recipe, overrides or {})
    shapes = {name: tuple(map(int, shape)) for name, shape in (input_shapes or {}).items()}
    bound, types = training_inputs(slim, shapes)
    if expert is not None:
        check_teacher(expert, bound)
    source = DataOptions(data, validation, validation_share, labels, preprocess, augment, chosen.batch, seed)
    request = finetuning.FinetuneRequest(
        chosen,
        source,
        tuple(features),
        distances,
        frozen_statistics,
        insert_norms,
        None if checkpoint is None else Path(checkpoint),
        every,
        resume,
        overwrite,
        compiled,
    )
    with process_group(device) as group, failures_in_a_sentence():
        return finetuning.finetune(slim, expert, bound, types, request, group, progress, report)


def require_training() -> None:
    """Refuse where the packages for training are missing.

    Raises:
        MissingBackendError: with the command that installs them.
    """
    import importlib.util

    require_torch("fine-tuning")
    if importlib.util.find_spec("safetensors") is None:
        raise MissingBackendError("fine-tuning needs safetensors: run `pip install 'onnx-mdp[torch]'`.")
