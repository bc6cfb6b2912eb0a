"""What surrounds a run of training: bound shapes, a teacher that fits, failures in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_mdp.analysis.binding import bind_shapes, graph_inputs
from onnx_mdp.data.feeds import input_types
from onnx_mdp.errors import MdpError, UsageError

__all__ = ["check_teacher", "failures_in_a_sentence", "training_inputs"]

_Shapes = Mapping[str, tuple[int, ...]]
_Types = Mapping[str, np.dtype[Any]]
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)


def training_inputs(model: ir.Model, shapes: _Shapes) -> tuple[_Shapes, _Types]:
    """Shapes with a batch of one wherever the file leaves it open, and types with halves as float32."""
    bound = bind_shapes(model, shapes, 1)
    for value in graph_inputs(model):
        name, first = str(value.name), None if value.shape is None or not len(value.shape) else value.shape[0]
        if bound[name] and not (isinstance(first, int) and first > 0):
            bound[name] = (1, *bound[name][1:])
    single = np.dtype(np.float32)
    return bound, {n: single if t == np.float16 else t for n, t in input_types(model).items()}


def check_teacher(teacher: ir.Model, shapes: _Shapes) -> None:
    """Refuse a teacher that one batch cannot feed beside a model of these input shapes.

    Raises:
        UsageError: it takes another input, or the input in another shape.
    """
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


@contextmanager
def failures_in_a_sentence() -> Iterator[None]:
    """What torch raises as one sentence.

    Raises:
        MdpError: torch failed, out of memory for example.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().split("\n")[0][:300]
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            text = f"torch cannot compile this model here; leave --compile out ({text})"
        elif _OUT_OF_MEMORY.search(text):
            text = f"the memory of the device is exhausted; choose a smaller --batch-size ({text})"
        else:
            text = f"torch could not train this model: {text}"
        raise MdpError(text) from error
