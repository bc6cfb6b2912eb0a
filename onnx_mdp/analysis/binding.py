"""What a user says of a model's inputs: their shapes, and which are states that an output carries on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnx_mdp.errors import UsageError
from onnx_mdp.untrusted import MOST_TENSOR_BYTES

__all__ = ["bind_shapes", "bind_states", "doubled_shapes", "graph_inputs", "with_batch"]


def graph_inputs(model: ir.Model) -> tuple[ir.Value, ...]:
    """The inputs that a caller must feed (old files list their weights as inputs too)."""
    return tuple(v for v in model.graph.inputs if v.name not in model.graph.initializers)


def bind_shapes(
    model: ir.Model, input_shapes: Mapping[str, Sequence[int]], batch: int = 1
) -> dict[str, tuple[int, ...]]:
    """Concrete input shapes: what the user gave, and ``batch`` for a symbolic first dimension.

    Raises:
        UsageError: an unknown input, a shape that contradicts the file, or a symbolic dimension
            other than the batch that was not given.
    """
    inputs = {str(v.name): v for v in graph_inputs(model)}
    for name in input_shapes:
        if name not in inputs:
            raise UsageError(f"the model has no input {name!r}; its inputs are {', '.join(inputs)}")
    shapes = {
        name: _bind_one(value, tuple(input_shapes.get(name, ())), batch) for name, value in inputs.items()
    }
    for name, shape in shapes.items():
        if 4 * math.prod(shape) > MOST_TENSOR_BYTES:
            raise UsageError(
                f"input {name!r} has the shape {list(shape)}, {4e-9 * math.prod(shape):.1f} GB: "
                "choose a smaller one with --input-shape, or check the file"
            )
    return shapes


def _bind_one(value: ir.Value, given: tuple[int, ...], batch: int) -> tuple[int, ...]:
    if value.shape is None:
        if given:
            return given
        raise UsageError(
            f"input {value.name!r} has no shape; give it with --input-shape {value.name}:1,3,224,224"
        )
    dims = [d if isinstance(d, int) and d > 0 else None for d in value.shape]
    if given:
        clash = len(given) != len(dims) or any(d not in (None, g) for d, g in zip(dims, given, strict=False))
        if clash or min(given, default=1) < 1:
            raise UsageError(
                f"--input-shape gives {given} for input {value.name!r}, whose shape is {value.shape}"
            )
        return given
    bound = [batch if i == 0 and d is None else d for i, d in enumerate(dims)]
    if any(d is None for d in bound):
        example = ",".join(str(d or 224) for d in bound)
        raise UsageError(
            f"input {value.name!r} has the symbolic shape {value.shape}; "
            f"say which size to prune for, such as --input-shape {value.name}:{example}"
        )
    return tuple(d for d in bound if d is not None)


def bind_states(
    model: ir.Model, states: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The states of a model, input to output, if there are such; ``shapes`` are those of all tensors.

    Raises:
        UsageError: an unknown input or output, one that is named twice, or two of different shape or type.
    """
    inputs = {str(v.name): v for v in graph_inputs(model)}
    outputs = {str(v.name): v for v in model.graph.outputs}
    for source, target in states.items():
        for kind, name, known in (("input", source, inputs), ("output", target, outputs)):
            if name not in known:
                raise UsageError(
                    f"--state {source}={target}: the model has no {kind} {name!r}; "
                    f"its {kind}s are {', '.join(known)}"
                )
        if list(states.values()).count(target) > 1:
            raise UsageError(f"--state names output {target!r} twice; an output carries one state")
        before, after = shapes[source], shapes.get(target)
        if before != after or inputs[source].dtype != outputs[target].dtype:
            raise UsageError(
                f"--state {source}={target}: the input is {inputs[source].dtype} {list(before)}, the output "
                f"{outputs[target].dtype} {None if after is None else list(after)}; a state is one memory"
            )
    return dict(states)


def with_batch(
    model: ir.Model, shapes: Mapping[str, tuple[int, ...]], most: int
) -> dict[str, tuple[int, ...]]:
    """The input shapes with at most so many rows, where a symbolic first dimension is common to all."""
    inputs = {str(v.name): v.shape[0] if v.shape else 1 for v in graph_inputs(model)}
    common = len({(str(first), *shapes[name][:1]) for name, first in inputs.items()}) == 1
    if not common or any(isinstance(first, int) for first in inputs.values()):
        return dict(shapes)
    return {name: (min(most, shape[0]), *shape[1:]) for name, shape in shapes.items()}


def doubled_shapes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The input shapes with every symbolic dimension twice as large."""
    return {str(v.name): _doubled(v, shapes[str(v.name)]) for v in graph_inputs(model)}


def _doubled(value: ir.Value, shape: tuple[int, ...]) -> tuple[int, ...]:
    if value.shape is None:
        return shape
    return tuple(
        s if isinstance(d, int) and d > 0 else 2 * s for d, s in zip(value.shape, shape, strict=True)
    )
