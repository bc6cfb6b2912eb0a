"""Pruning to a latency as a pass of Olive, for workflows that go on to quantize and evaluate.

A pass that cannot reach its target raises, and never returns the model as it was: a search then drops that
branch, and a run without a search ends with the sentence. A model that meets its target already is returned.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.common.config_utils import validate_config
from olive.common.utils import format_data
from olive.data.config import DataConfig
from olive.hardware import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.onnx.common import model_has_adapters, model_proto_to_olive_model
from olive.passes.pass_config import BasePassConfig, PassConfigParam

import onnx_mdp
from onnx_mdp.errors import MdpError
from onnx_mdp.files import write_text
from onnx_mdp.importance.gradient_scores import GRADIENT_CRITERIA
from onnx_mdp.integrations.olive_parameters import parameters, validators
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import PruneResult, analyze
from onnx_mdp.plan import plan_identity, plan_json
from onnx_mdp.planning.ignored_scope import IgnoredScope, held_by
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.reports.documents import prune_document
from onnx_mdp.running.runtime import Runtime, runtime

if TYPE_CHECKING:
    from onnx_mdp.training.finetuning import FinetuneResult

__all__ = ["OnnxMDPPruning"]

_log = logging.getLogger("olive.onnx_mdp")  # what Olive shows is below its own name


class OnnxMDPPruning(Pass):  # type: ignore[misc]
    """Prune an ONNX model until it runs in a given time on the accelerator of the workflow."""

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: AcceleratorSpec) -> bool:
        """Whether another accelerator would get the same model: it has other latencies."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters()

    @classmethod
    def _validators(cls) -> dict[str, Any]:
        return validators()

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        if not isinstance(model, ONNXModelHandler):
            raise ValueError("OnnxMDPPruning takes ONNX models: put a pass that converts to ONNX before it")
        if model_has_adapters(model.model_path):
            raise ValueError("OnnxMDPPruning takes no model with adapters: prune before they are extracted")
        # Of most other errors Olive makes a line in the log and goes on, without an output model.
        try:
            if config.finetune_data_config is not None:
                _check_training(model, config)
            result = _pruned(model, config, _runtime(config, self.accelerator_spec))
            if result.status == "nothing_to_do":
                _log.warning("nothing to prune: %.3f ms meet %.3f ms", result.base_ms, result.target_ms)
                return model
            if result.status != "met":
                raise ValueError(_why(result))
            if config.finetune_data_config is None:
                return _written(result, model, config, output_model_path)
            trained = _trained(result, model, config)
        except MdpError as error:
            raise ValueError(str(error)) from error
        scores = {"before": asdict(trained.run.before), "after": asdict(trained.run.after)}
        result = replace(result, model=trained.model)
        return _written(result, model, config, output_model_path, {"finetuning": scores})


def _runtime(config: BasePassConfig, accelerator: AcceleratorSpec) -> Runtime:
    provider = config.provider or accelerator.execution_provider
    if provider is None:
        raise ValueError("the workflow names no execution provider: add one to the accelerator of its system")
    return runtime(
        str(provider),
        config.threads,
        list((config.provider_options or {}).items()),
        precision=config.provider_precision,
        allow_fallback=config.allow_fallback,
        store=config.store or "",
    )


def _pruned(model: ONNXModelHandler, config: BasePassConfig, where: Runtime) -> PruneResult:
    data = None
    if config.data_config is not None:
        data = _batches(model, config.data_config, config.criterion in GRADIENT_CRITERIA)
    return onnx_mdp.prune(
        model.model_path,
        target_ms=config.target_ms,
        target_ratio=config.target_ratio,
        data=data,
        samples=config.samples,
        criterion=config.criterion,
        ep=where,
        choices=config.choices,
        rules=_rules(model, config),
        repair=tuple(config.repair or ()),
        input_shapes=config.input_shapes,
        batch=config.batch,
        states=config.states,
        seed=config.seed,
        store=config.store,
        progress=lambda stage, done, total: _log.debug("%s: %d of %d", stage, done, total),
    )


def _rules(model: ONNXModelHandler, config: BasePassConfig) -> WidthRules:
    scope = IgnoredScope(
        tuple(config.ignored_names or ()),
        tuple(config.ignored_patterns or ()),
        tuple(config.ignored_types or ()),
    )
    rules = WidthRules(
        exclude=tuple(config.exclude or ()),
        least=tuple((config.min_widths or {}).items()),
        multiple=config.multiple,
    )
    if scope == IgnoredScope():
        return rules
    original = load_model(model.model_path)
    structure = analyze(original, config.input_shapes or {}, config.batch, config.states)
    return replace(rules, held=held_by(original, structure, scope))


def _batches(model: ONNXModelHandler, source: Any, labelled: bool) -> Iterator[Any]:
    """What a data config loads, as Olive feeds it to a model; with labels, where there are some."""
    for batch in validate_config(source, DataConfig).to_data_container().create_dataloader():
        inputs, labels = batch if isinstance(batch, (list, tuple)) and len(batch) == 2 else (batch, None)
        arrays = format_data(inputs, model.io_config)
        yield (arrays, labels) if labelled and labels is not None else arrays


def _check_training(model: ONNXModelHandler, config: BasePassConfig) -> None:
    """Refuse before minutes of measuring what could not be trained."""
    onnx_mdp.to_torch(model.model_path)
    from onnx_mdp.training.recipes import recipe

    recipe(config.recipe, config.finetune or {})


def _trained(result: PruneResult, model: ONNXModelHandler, config: BasePassConfig) -> FinetuneResult:
    """The pruned weights, trained on the labels of the data or, without any, on what the original says."""
    learn, check = config.finetune_data_config, config.validation_data_config or config.finetune_data_config
    assert result.model is not None

    def batches(request: onnx_mdp.LoaderRequest) -> Iterator[Any]:
        return _batches(model, learn if request.split == "train" else check, True)

    return onnx_mdp.finetune(
        result.model,
        model.model_path,
        data=batches,
        recipe=config.recipe,
        overrides=config.finetune,
        input_shapes=config.input_shapes,
        seed=config.seed,
        report=_log.info,
    )


def _why(result: PruneResult) -> str:
    """Why there is no model, and what to do."""
    if result.status == "infeasible":
        return (
            f"the target of {result.target_ms:.3f} ms is below the smallest reachable latency, "
            f"{result.fastest_ms or 0:.3f} ms (base {result.base_ms:.3f} ms): raise the target"
        )
    return (
        f"the target of {result.target_ms:.3f} ms was missed: the best of {result.iterations} models takes "
        f"{result.measured_ms:.3f} ms (base {result.base_now_ms:.3f} ms): raise the target, or run again on "
        "a quiet machine"
    )


def _written(
    result: PruneResult,
    model: ONNXModelHandler,
    config: BasePassConfig,
    output_model_path: str,
    more: Mapping[str, Any] | None = None,
) -> ONNXModelHandler:
    """The pruned model as Olive writes models, with the plan and the figures as files that go along."""
    assert result.model is not None
    assert result.plan is not None
    source = Path(model.model_path)
    # Where files go along, Olive keeps a folder and a name, and takes the name for a path if there is such a
    # file in the working directory: of the original's name, the next pass would get the original.
    path = Path(resolve_onnx_path(output_model_path, f"{source.stem}.{plan_identity(result.plan)}.onnx"))
    plan, figures = path.with_suffix(".plan.json"), path.with_suffix(".pruning.json")
    output = model_proto_to_olive_model(onnx_mdp.to_proto(result.model), path, config)
    document = prune_document(result, (None, None, None)) | dict(more or {})
    write_text(plan_json(result.plan), plan, overwrite=True)
    write_text(json.dumps(document, indent=2) + "\n", figures, overwrite=True)
    held = dict(model.model_attributes or {})
    if set(held) - {"additional_files", "onnx_mdp"}:
        _log.warning("the attributes of the model, such as its heads, are those of the original")
    if config.carry_files:
        files = {*held.get("additional_files", ()), str(plan), str(figures)}
        output.model_attributes = held | {"onnx_mdp": document, "additional_files": sorted(files)}
    _log.info("pruned to %.3f ms, from %.3f", result.measured_ms, result.base_now_ms)
    return output
