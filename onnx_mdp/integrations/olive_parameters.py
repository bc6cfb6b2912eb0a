"""What `OnnxMDPPruning` takes in a workflow of Olive, and what it refuses before anything is run."""

from __future__ import annotations

import math
from typing import Any

from olive.data.config import DataConfig
from olive.passes.onnx.common import get_external_data_config
from olive.passes.pass_config import PassConfigParam, PassParamDefault
from olive.search.search_parameter import Categorical
from pydantic import model_validator

__all__ = ["parameters", "validators"]

_DATA = DataConfig | dict
# Olive searches a list only where there are search defaults, and those wherever nothing is given: None.
_ONLY_IF_GIVEN = Categorical([None])


def parameters() -> dict[str, PassConfigParam]:
    """The parameters by name; the first three take a list to search."""
    return {
        "target_ms": _searched(float, "Latency to reach, in milliseconds."),
        "target_ratio": _searched(float, "Instead: latency to reach, relative to the input model's."),
        "criterion": _searched(
            str,
            "How units are ranked; by default drift, refit for the repair lstsq, or magnitude without data.",
        ),
        "data_config": _given(_DATA, None, "Calibration inputs that units are ranked by."),
        "samples": _given(int, 64, "Of the calibration inputs, at most so many."),
        "input_shapes": _given(dict[str, list[int]], None, "Shapes of inputs that are symbolic in the file."),
        "batch": _given(int, 1, "The first axis of a symbolic input, where no shape is given."),
        "states": _given(dict[str, str], None, "Inputs, and the outputs that they are one frame later."),
        "provider": _given(str, None, "Execution provider; by default that of the workflow's accelerator."),
        "provider_options": _given(dict[str, str], None, "Options of the execution provider."),
        "provider_precision": _given(str, "float32", "What the provider is told to compute in."),
        "allow_fallback": _given(bool, False, "Accept that part of the model runs on the CPU instead."),
        "threads": _given(int, 1, "Threads of the provider, as the model will be run later."),
        "exclude": _given(list[str], None, "Patterns of dimensions and blocks that stay as they are."),
        "ignored_names": _given(list[str], None, "Nodes that stay as they are."),
        "ignored_patterns": _given(list[str], None, "Nodes whose names match one of these in full."),
        "ignored_types": _given(list[str], None, "Nodes of these operators."),
        "min_widths": _given(dict[str, float], None, "By pattern: least channels, or a share below 1."),
        "multiple": _given(int, 1, "Widths are multiples of this."),
        "choices": _given(int, 16, "The most widths that are offered of a dimension."),
        "repair": _given(list[str], None, "Of bias, bn and lstsq: refit the weights on the data, in order."),
        "finetune_data_config": _given(_DATA, None, "Then train the weights on this, by the original."),
        "validation_data_config": _given(_DATA, None, "Keep the weights that are best on this."),
        "recipe": _given(str, "default", "How the weights are trained."),
        "finetune": _given(dict[str, Any], None, "Fields of the recipe, such as epochs and lr."),
        "seed": _given(int, 0, "Seed of random inputs and of training."),
        "store": _given(str, None, "File that keeps measured latencies; by default the user's."),
        "carry_files": _given(bool, True, "Plan and figures go along with the model to the output folder."),
        **get_external_data_config(),
    }


def validators() -> dict[str, Any]:
    """Checks of a whole configuration."""
    return {
        "names": model_validator(mode="before")(_check_names),
        "targets": model_validator(mode="after")(_check_targets),
    }


def _given(type_: Any, default: Any, description: str) -> PassConfigParam:
    return PassConfigParam(type_=type_, default_value=default, description=description)


def _searched(type_: Any, description: str) -> PassConfigParam:
    return PassConfigParam(type_=type_, search_defaults=_ONLY_IF_GIVEN, description=description)


def _check_names(cls: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Olive only warns of names that a pass does not know, and a limit that is misspelt is no limit."""
    unknown = sorted(set(given) - set(cls.model_fields))
    if unknown:
        known = ", ".join(cls.model_fields)
        raise ValueError(f"OnnxMDPPruning has no parameter {unknown[0]!r}; it takes {known}")
    return given


def _check_targets(config: Any) -> Any:
    given = [target for target in (config.target_ms, config.target_ratio) if _is_given(target)]
    if len(given) != 1:
        raise ValueError("give exactly one of target_ms and target_ratio")
    values = given[0].get_support() if isinstance(given[0], Categorical) else given
    if any(isinstance(value, (int, float)) and not 0 < value < math.inf for value in values):
        raise ValueError("the target must be a number larger than 0")
    return config


def _is_given(value: Any) -> bool:
    searched_in_vain = isinstance(value, Categorical) and value.get_support() == [None]
    return value is not None and not isinstance(value, PassParamDefault) and not searched_in_vain
