"""What an ONNX graph is run as: its own nodes in order, each with the kernel that computes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from onnx_mdp.errors import UnsupportedModelError
from onnx_mdp.training.kernels import KERNELS, Call, Kernel
from onnx_mdp.training.trainable import constant_of, operator_key

__all__ = ["Program", "Step", "compiled", "stored_tensor", "with_last"]


@dataclass(frozen=True, slots=True)
class Step:
    """One node: ``calls`` in evaluation and in training mode, and what nothing reads after it."""

    calls: tuple[Call, Call]
    kernel: Kernel | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """A graph: its steps in order, and the constants that it brings along."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    constants: dict[str, Tensor] = field(default_factory=dict)


def compiled(
    graph: ir.Graph, opsets: Mapping[str, int], statistics: frozenset[str], *, main: bool = False
) -> Program:
    steps, constants = [], {}
    for name, value in graph.initializers.items():
        if value.const_value is not None:
            constants[name] = stored_tensor(value.const_value.numpy())
    for node in graph:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            array = constant_of(node)
            if array is None:
                raise UnsupportedModelError(
                    f"the Constant {node.outputs[0].name!r} holds text or a sparse tensor, which have no "
                    "form in torch here: the model can be pruned but not fine-tuned"
                )
            constants[str(node.outputs[0].name)] = stored_tensor(array)
        else:
            steps.append(_step(node, opsets, statistics))
    made = {name for step in steps for name in step.outputs if name}
    made |= {str(value.name) for value in graph.inputs}
    outputs = tuple(str(value.name) for value in graph.outputs)
    return Program(
        tuple(str(value.name) for value in graph.inputs),
        outputs,
        tuple(with_last(steps, made)),
        {} if main else constants,
    )


def _step(node: ir.Node, opsets: Mapping[str, int], statistics: frozenset[str]) -> Step:
    attributes = {name: _attribute(a, opsets, statistics) for name, a in node.attributes.items()}
    names = [str(v.name) if v is not None else "" for v in node.inputs]
    while names and not names[-1]:
        names.pop()
    outputs = [str(v.name or "") for v in node.outputs]
    used = [str(v.name or "") if list(v.uses()) or v.is_graph_output() else "" for v in node.outputs]
    wanted = max((slot + 1 for slot, name in enumerate(used) if name), default=1)
    domain = "" if node.domain == "ai.onnx" else node.domain
    call = Call(
        node.op_type if not domain else f"{domain}::{node.op_type}",
        node.name or outputs[0],
        opsets.get(domain, opsets.get("ai.onnx", 1) if not domain else 1),
        attributes,
        len(outputs) if node.op_type in ("BatchNormalization", "Split") else wanted,
    )
    frozen = node.op_type == "BatchNormalization" and not set(names[3:5]) <= statistics
    training = call if frozen else replace(call, training=True)
    return Step((call, training), KERNELS.get(operator_key(node)), tuple(names), tuple(outputs))


def _attribute(attribute: ir.Attr, opsets: Mapping[str, int], statistics: frozenset[str]) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        return stored_tensor(attribute.as_tensor().numpy())
    if attribute.type == ir.AttributeType.GRAPH:
        return compiled(attribute.as_graph(), opsets, statistics)
    return attribute.value


def with_last(steps: Sequence[Step], made: set[str]) -> Iterator[Step]:
    """The steps of a graph, each with what it is the last to read, or makes for nobody."""
    last: dict[str, int] = {}
    for number, step in enumerate(steps):
        last.update(dict.fromkeys((*step.outputs, *_read(step)), number))
    for number, step in enumerate(steps):
        names = dict.fromkeys((*step.outputs, *_read(step)))
        yield replace(step, last=tuple(name for name in names if name in made and last[name] == number))


def _read(step: Step) -> Iterator[str]:
    yield from step.inputs
    for value in step.calls[0].attributes.values():
        if isinstance(value, Program):
            own = {name for inner in value.steps for name in inner.outputs}
            inside = (name for inner in value.steps for name in _read(inner))
            yield from (name for name in (*inside, *value.outputs) if name not in own)


def stored_tensor(array: npt.NDArray[Any]) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as error:
        raise UnsupportedModelError(
            f"the model stores numbers of the type {array.dtype}, which torch does not compute with: the "
            "model can be pruned but not fine-tuned"
        ) from error
