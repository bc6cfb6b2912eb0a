"""Where the options of `prune` stand in a recipe, and how those are written there that hold several values.

An option has one place. What it is called, what it does, its default and its limits are the command's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field

__all__ = ["FORMS", "LAYOUT", "SECTIONS", "Form", "leaves", "placed"]

_Layout: TypeAlias = "Mapping[str, str | _Layout]"

# section → key → parameter of the command
LAYOUT: _Layout = {
    "model": "model",
    "seed": "seed",
    "target": {
        "ms": "target_ms",
        "ratio": "target_ratio",
        "also": "also",
        "max_params": "max_params",
        "max_macs": "max_macs",
        "max_memory": "max_memory",
    },
    "inputs": {"shapes": "input_shape", "batch": "batch", "states": "state"},
    "device": {
        "provider": "ep",
        "options": "ep_option",
        "precision": "ep_precision",
        "library": "ep_library",
        "allow_fallback": "allow_fallback",
        "threads": "threads",
        "store": "store",
        "choices": "choices",
        "table": "lut",
        "handover": "handover",
    },
    "data": {
        "calibration": "data",
        "preprocess": "preprocess",
        "samples": "samples",
        "labels": "labels",
    },
    "importance": {"criterion": "criterion", "loss": "loss", "scores": "scores"},
    "pruning": {
        "exclude": "exclude",
        "ignored": {"names": "ignore_name", "patterns": "ignore_pattern", "types": "ignore_type"},
        "min_width": "min_width",
        "width": "width",
        "multiple": "multiple",
        "tie_blocks": "tie_blocks",
        "rescale_attention": "rescale_attention",
    },
    "solver": {"name": "solver", "time_limit": "time_limit", "gap": "gap"},
    "repair": "repair",
    "finetune": {
        "enabled": "finetune",
        "data": "train",
        "preprocess": "train_preprocess",
        "validation": "val",
        "validation_share": "val_share",
        "augment": "augment",
        "preset": "recipe",
        "epochs": "epochs",
        "steps": "steps",
        "batch_size": "batch_size",
        "lr": "lr",
        "optimizer": "optimizer",
        "momentum": "momentum",
        "weight_decay": "weight_decay",
        "decay": "decay",
        "warmup": "warmup",
        "ema": "ema",
        "clip": "clip",
        "label_smoothing": "label_smoothing",
        "precision": "precision",
        "alpha": "alpha",
        "temperature": "temperature",
        "features": "features",
        "feature_weight": "feature_weight",
        "distill": "distill",
        "freeze_bn": "freeze_bn",
        "insert_bn": "insert_bn",
        "compile": "compiled",
        "patience": "patience",
        "weights": "weights",
        "checkpoint": "checkpoint",
        "checkpoint_every": "checkpoint_every",
        "device": "device",
        "mode": "mode",
        "redecide": "redecide",
        "schedule": "schedule",
        "resume": "resume",
    },
    "output": {
        "model": "output",
        "report": "report",
        "overwrite": "overwrite",
        "dry_run": "dry_run",
        "as_json": "as_json",
        "quiet": "quiet",
    },
}

# What a section is about, by its dotted name.
SECTIONS: Mapping[str, str] = {
    "target": "What the pruned model has to meet; exactly one of ms and ratio.",
    "inputs": "The inputs that the model is pruned for.",
    "device": "What latencies are measured on, or the table that holds them.",
    "data": "Calibration inputs.",
    "importance": "How units are ranked.",
    "pruning": "What may be cut.",
    "pruning.ignored": "Nodes of the file that are left as they are, as in NNCF's ignored scope.",
    "solver": "How the plan is searched.",
    "finetune": "Training of the pruned model, with the original as teacher.",
    "output": "What is written and printed.",
}


@dataclass(frozen=True, slots=True)
class Form:
    """How a value is written in a recipe: its type, what the command takes, and the way back.

    Without ``optional`` there is always a value, be it an empty one.
    """

    type: Any
    to_option: Callable[[Any], Any]
    from_option: Callable[[Any], Any]
    optional: bool = False


def _pairs(value: Any, number: Callable[[str], Any], *, first: bool = False) -> Form:
    """``NAME=VALUE`` texts as a mapping; the ``first`` or else the last equals sign divides them."""

    def mapping(texts: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for text in texts:
            name, _, after = text.partition("=") if first else text.rpartition("=")
            found.pop(name, None)  # of two the later one holds, at its place
            found[name] = number(after)
        return found

    return Form(dict[str, value], lambda given: [f"{name}={after}" for name, after in given.items()], mapping)


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def _shape_texts(shapes: dict[str, list[int]] | list[int]) -> list[str]:
    if isinstance(shapes, list):
        return [",".join(map(str, shapes))] if shapes else []
    return [f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items()]


def _shapes(texts: list[str]) -> dict[str, list[int]] | list[int]:
    parts = [text.rpartition(":") for text in texts]
    found = {name: [int(size) for size in sizes.split(",")] for name, _, sizes in parts}
    return found[""] if list(found) == [""] else found


_LIST = Form(list[str], lambda given: given, list)

# Of the parameters that are written otherwise than as one text, number or truth value.
FORMS: Mapping[str, Form] = {
    "also": _pairs(int | float, _number),
    "ep_option": _pairs(str | int | float, str, first=True),
    "exclude": _LIST,
    "features": _LIST,
    "ignore_name": _LIST,
    "ignore_pattern": _LIST,
    "ignore_type": _LIST,
    "input_shape": Form(dict[str, list[int]] | list[int], _shape_texts, _shapes),
    "min_width": _pairs(int | float, _number),
    "repair": Form(
        list[str],
        lambda methods: ",".join(methods) or "none",
        lambda text: [] if text == "none" else [method.strip() for method in text.split(",")],
    ),
    "schedule": Form(
        Annotated[list[float], Field(min_length=2, max_length=2)],
        lambda shares: ",".join(map(str, shares)),
        lambda text: [float(share) for share in text.split(",")],
        optional=True,
    ),
    "state": _pairs(str, str, first=True),
    "width": _pairs(int, lambda text: int(float(text))),
}


def leaves(layout: _Layout = LAYOUT, section: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, parameter) of every option."""
    for key, inner in layout.items():
        if isinstance(inner, str):
            yield section + key, inner
        else:
            yield from leaves(inner, f"{section}{key}.")


def placed(parameter: str, value: Any, folder: Path) -> Any:
    """An option whose relative paths start from ``folder``; texts that may be something else stay that."""
    if parameter == "also":
        return [str(folder / text) for text in value]
    function = parameter in ("train", "val") and ":" in value
    table = parameter != "labels" or Path(value).suffix in (".csv", ".json")
    return value if function or not table else str(folder / value)
