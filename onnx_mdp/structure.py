"""Dimensions and residual blocks: what of a model can be pruned, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_mdp.blocks import Block, find_blocks
from onnx_mdp.labels import LabelledGraph, label_graph
from onnx_mdp.rules import Labels, varying
from onnx_mdp.shadow import Operation, Shadow

__all__ = [
    "Dimension",
    "Extent",
    "Member",
    "Structure",
    "analyze_shadow",
    "extent",
    "label_extent",
    "macs",
    "operation_macs",
]


@dataclass(frozen=True, slots=True)
class Member:
    """One initializer axis that a dimension cuts, as operation ``operation`` reads it in ``slot``."""

    tensor: str
    axis: int
    operation: int
    slot: int
    role: str


@dataclass(frozen=True, slots=True)
class Dimension:
    """Units (classes of indices) that can be removed one by one, in index order.

    ``channels`` is how many channels one unit spans where it is made (1 unless groups couple them);
    ``frozen`` is None or the reason why no unit may go; ``block`` names the residual block that holds
    every member of the dimension; ``producer`` is the operation that makes the units.
    """

    name: str
    kind: str
    units: tuple[int, ...]
    channels: int
    members: tuple[Member, ...]
    producer: int
    frozen: str | None = None
    block: str | None = None

    @property
    def size(self) -> int:
        """The full width in channels."""
        return len(self.units) * self.channels


@dataclass(frozen=True, slots=True)
class Extent:
    """The length of an axis as a function of kept units: ``fixed + Σ coefficient · kept[dimension]``."""

    fixed: int
    terms: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Structure:
    """All that can be pruned in a model: the result of the analysis."""

    graph: LabelledGraph
    dimensions: tuple[Dimension, ...]
    blocks: tuple[Block, ...]
    dimension_of: npt.NDArray[np.int32]

    @property
    def shadow(self) -> Shadow:
        """The normalised model that the analysis ran on."""
        return self.graph.shadow

    @property
    def prunable(self) -> tuple[int, ...]:
        """Indices of the dimensions that are not frozen and have more than one unit."""
        return tuple(i for i, d in enumerate(self.dimensions) if d.frozen is None and len(d.units) > 1)

    def index(self, name: str) -> int:
        """The position of the dimension called ``name``.

        Raises:
            KeyError: no such dimension.
        """
        for i, dimension in enumerate(self.dimensions):
            if dimension.name == name:
                return i
        raise KeyError(name)


def analyze_shadow(shadow: Shadow) -> Structure:
    """Label the graph, then group classes of equal signature into dimensions."""
    graph = label_graph(shadow)
    blocks = find_blocks(shadow)
    groups = _groups(graph)
    owner = np.full(graph.classes, -1, np.int32)
    dimensions: list[Dimension] = []
    taken: set[str] = set()
    for units in groups:
        owner[list(units)] = len(dimensions)
        dimensions.append(_dimension(graph, units, taken, blocks))
    return Structure(graph, tuple(dimensions), blocks, owner)


def _signatures(graph: LabelledGraph) -> npt.NDArray[np.uint64]:
    """``uint64[classes]``: equal for classes that occur equally often at the same places.

    A random linear hash of the occurrence counts: two different signatures collide with
    probability 2⁻⁶⁴, and the seed is fixed.
    """
    rng = np.random.default_rng(20260101)
    total = np.zeros(graph.classes, np.uint64)
    vectors: list[Labels] = [site.labels for site in graph.sites]
    for name, labels in graph.tensors.items():
        vectors += [graph.vector(name, axis) for axis in varying(labels)] or [labels.reshape(-1)]
    for vector in vectors:
        counts = np.bincount(vector, minlength=graph.classes).astype(np.uint64)
        total += counts * rng.integers(1, 2**63, dtype=np.uint64)
    return total


def _groups(graph: LabelledGraph) -> list[tuple[int, ...]]:
    """Classes that cut a weight, grouped by signature and by why they are frozen, in graph order."""
    cut = (
        np.unique(np.concatenate([site.labels for site in graph.sites])) if graph.sites else np.zeros(0, int)
    )
    signatures = _signatures(graph)
    found: dict[tuple[int, str], list[int]] = {}
    for number in cut[cut > 0].tolist():
        found.setdefault((int(signatures[number]), graph.reasons.get(number, "")), []).append(number)
    return [tuple(units) for units in found.values()]


def _dimension(
    graph: LabelledGraph, units: tuple[int, ...], taken: set[str], blocks: Iterable[Block]
) -> Dimension:
    sites = [site for site in graph.sites if bool(np.isin(site.labels, units[0]).any())]
    operations = graph.shadow.operations
    made = next((s for s in sites if s.role == "out"), sites[0])
    producer = operations[made.operation]
    name = _unique(producer.name or producer.outputs[0], taken)
    holders = {site.operation for site in sites}
    frozen = graph.reasons.get(units[0])
    block = next((b.name for b in blocks if holders <= set(b.operations)), None)
    return Dimension(
        name=name,
        kind="channel",
        units=units,
        channels=int((made.labels == units[0]).sum()),
        members=tuple(
            Member(operations[s.operation].inputs[s.slot], s.axis, s.operation, s.slot, s.role) for s in sites
        ),
        producer=made.operation,
        frozen=frozen,
        block=None if frozen else block,
    )


def _unique(name: str, taken: set[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}#{number}", number + 1
    taken.add(candidate)
    return candidate


def extent(structure: Structure, name: str, axis: int) -> Extent:
    """How long an axis of an activation is, given how many units each dimension keeps."""
    size = structure.shadow.shapes[name][axis]
    labels = structure.graph.tensors.get(name)
    if labels is None or axis not in varying(labels):
        return Extent(size, ())
    return label_extent(structure, structure.graph.vector(name, axis))


def label_extent(structure: Structure, vector: npt.NDArray[np.int32]) -> Extent:
    """How long an axis with these index classes is, given how many units each dimension keeps."""
    owners = np.where(vector > 0, structure.dimension_of[vector], -1)
    terms = []
    for index in np.unique(owners[owners >= 0]).tolist():
        dimension = structure.dimensions[index]
        if dimension.frozen is None:
            terms.append((index, int((owners == index).sum()) // len(dimension.units)))
    fixed = len(vector) - sum(c * len(structure.dimensions[i].units) for i, c in terms)
    return Extent(fixed, tuple(terms))


def operation_macs(operation: Operation, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates of one operation (0 for all but Conv, ConvTranspose, Gemm and MatMul)."""
    if operation.op_type == "Conv":
        return int(np.prod(shapes[operation.outputs[0]]) * np.prod(shapes[operation.inputs[1]][1:]))
    if operation.op_type == "ConvTranspose":
        return int(np.prod(shapes[operation.inputs[0]]) * np.prod(shapes[operation.inputs[1]][1:]))
    if operation.op_type in ("Gemm", "MatMul"):
        transposed = operation.op_type == "Gemm" and operation.attributes.get("transA", 0)
        inner = shapes[operation.inputs[0]][-2 if transposed else -1]
        return int(np.prod(shapes[operation.outputs[0]]) * inner)
    return 0


def macs(shadow: Shadow) -> int:
    """Multiply-accumulates of one inference at the bound shapes."""
    return sum(operation_macs(operation, shadow.shapes) for operation in shadow.operations)
