"""States: inputs and outputs that are one memory, an output of this frame and an input of the next.

A pair is pruned together, so that the file that comes out can still be fed with what it returned. What is
kept of a memory is kept of what goes in and of what comes out; nothing else of the boundary changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.labels import LabelledGraph, keep_vector
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.rules import varying

__all__ = ["kept_feeds", "kept_part", "kept_shapes", "resize_states"]

Mask = npt.NDArray[np.bool_]


def kept_part(
    graph: LabelledGraph, name: str, value: npt.NDArray[np.generic], removed: Mask
) -> npt.NDArray[np.generic]:
    """What stays of a tensor's value when the classes in ``removed`` go."""
    labels = graph.tensors.get(name)
    if labels is None or not removed[labels].any():
        return value
    # Heads first: in each of them other widths may stay.
    first = graph.head_axis(name) or 0
    mask = np.moveaxis(np.broadcast_to(keep_vector(labels, removed), value.shape), first, 0)
    extents = list(value.shape)
    for axis in varying(labels):
        extents[axis] = int(graph.keep(name, axis, removed).sum())
    extents.insert(0, extents.pop(first))
    return np.moveaxis(np.moveaxis(value, first, 0)[mask].reshape(extents), 0, first)


def kept_feeds(
    structure: Structure, feeds: Mapping[str, npt.NDArray[np.generic]], removed: Mask
) -> dict[str, npt.NDArray[np.generic]]:
    """The inputs of the pruned model: what stays of its states, and all of the others."""
    return {
        name: kept_part(structure.graph, name, value, removed) if name in structure.shadow.states else value
        for name, value in feeds.items()
    }


def kept_shapes(structure: Structure, removed: Mask) -> dict[str, tuple[int, ...]]:
    """The bound shapes of the pruned model's inputs."""
    return {
        name: tuple(int(structure.graph.keep(name, axis, removed).sum()) for axis in range(len(shape)))
        for name, shape in structure.shadow.inputs.items()
    }


def resize_states(model: ir.Model, structure: Structure, removed: Mask) -> None:
    """Give the inputs and outputs of a model, in place, the shapes of what stays of its states."""
    states = structure.shadow.states
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = str(value.name)
        labels = structure.graph.tensors.get(name)
        if name not in (*states, *states.values()) or labels is None or value.shape is None:
            continue
        sizes = list(value.shape)
        for axis in varying(labels):
            if isinstance(sizes[axis], int):
                sizes[axis] = int(structure.graph.keep(name, axis, removed).sum())
        value.shape = ir.Shape(sizes)
