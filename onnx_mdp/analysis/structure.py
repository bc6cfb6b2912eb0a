"""Dimensions and residual blocks: what of a model can be pruned, and why the rest cannot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.blocks import Block, find_blocks
from onnx_mdp.analysis.coupling import Grid
from onnx_mdp.analysis.labels import LabelledGraph, label_graph
from onnx_mdp.analysis.shadow import Operation, Shadow
from onnx_mdp.analysis.stored_axes import stored_sites
from onnx_mdp.rules import varying

__all__ = [
    "Dimension",
    "Extent",
    "Member",
    "Structure",
    "analyze_shadow",
    "extent",
    "input_extent",
    "label_extent",
    "macs",
    "operation_macs",
]

_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, slots=True)
class Member:
    """One initializer axis that a dimension cuts, and the operation that reads it in ``slot``.

    Between them may stand a chain that turns the stored tensor into a weight.
    """

    tensor: str
    axis: int
    operation: int
    slot: int
    role: str


@dataclass(frozen=True, slots=True)
class Dimension:
    """Units (classes of indices) that can be removed one by one, in index order.

    ``kind`` is ``channel``, ``embedding`` (a residual stream with layer norms), ``mlp`` (the inside of a
    branch of linear layers), ``heads``, ``qk`` or ``value`` (widths of query and key, and of value).
    ``channels`` is how many channels one unit spans where it is made (1 unless groups couple them);
    ``frozen`` is None or the reason why no unit may go, ``frozen_by`` the operation that froze
    it, if one did; ``block`` names the residual block that holds every member of the dimension; ``producer``
    is the operation that makes the units.

    A width lists its units head by head: ``rows`` heads of equally many units, those of head ``h`` from
    ``h * count`` on. Which ones stay may differ from head to head, how many may not. ``heads`` is the
    dimension of the heads, which take their units with them.
    """

    name: str
    kind: str
    units: tuple[int, ...]
    channels: int
    members: tuple[Member, ...]
    producer: int
    frozen: str | None = None
    block: str | None = None
    rows: int = 1
    heads: int | None = None
    frozen_by: int | None = None

    @property
    def count(self) -> int:
        """How many units there are to choose from, in each head."""
        return len(self.units) // self.rows

    @property
    def size(self) -> int:
        """The full width in channels, in each head."""
        return self.count * self.channels


@dataclass(frozen=True, slots=True)
class Extent:
    """The length of an axis, ``fixed + Σ coefficient · Π kept[dimension]``; heads × width are two factors."""

    fixed: int
    terms: tuple[tuple[tuple[int, ...], int], ...]


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
        return tuple(i for i, d in enumerate(self.dimensions) if d.frozen is None and d.count > 1)

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
    builder = _Builder(graph, find_blocks(shadow))
    groups: list[Grid | tuple[int, ...]] = [*graph.grids, *_groups(graph)]
    for group in sorted(groups, key=_first_unit):
        if isinstance(group, Grid):
            builder.add_grid(group)
        else:
            builder.add(group)
    return builder.structure()


def _first_unit(group: Grid | tuple[int, ...]) -> int:
    return min(int(part.min()) for part in group.parts) if isinstance(group, Grid) else group[0]


def _groups(graph: LabelledGraph) -> list[tuple[int, ...]]:
    """Classes outside of grids that cut a weight, grouped by signature and reason, in graph order."""
    cut = (
        np.unique(np.concatenate([site.labels for site in graph.sites])) if graph.sites else np.zeros(0, int)
    )
    taken = {int(row) for grid in graph.grids for row in grid.rows}
    found: dict[tuple[int, str], list[int]] = {}
    for number in cut[(cut > 0) & (graph.head[cut] == 0)].tolist():
        if number not in taken:
            key = int(graph.signatures[number]), graph.reasons.get(number, "")
            found.setdefault(key, []).append(number)
    return [tuple(units) for units in found.values()]


class _Builder:
    """Collects dimensions; a resource of `analyze_shadow` alone."""

    def __init__(self, graph: LabelledGraph, blocks: tuple[Block, ...]) -> None:
        self.graph = graph
        self.blocks = blocks
        self.dimensions: list[Dimension] = []
        self.owner = np.full(graph.classes, -1, np.int32)
        self.taken: set[str] = set()
        self.normalised = {
            number
            for index, slot in graph.reductions
            if self._is_norm(graph.shadow.operations[index])
            for number in np.unique(graph.tensors[graph.shadow.operations[index].inputs[slot]]).tolist()
        }

    def _is_norm(self, operation: Operation) -> bool:
        """A layer norm, or a mean over the units of each token, which it is made of before opset 17."""
        labels = self.graph.tensors.get(operation.inputs[0])
        last = labels is not None and bool(labels.ndim) and labels.ndim - 1 in varying(labels)
        return operation.op_type in _NORMS or (operation.op_type == "ReduceMean" and last)

    def add_grid(self, grid: Grid) -> None:
        """The heads of a grid, and a width for each of its parts."""
        heads = len(self.dimensions)
        self.add(grid.rows, inner=np.concatenate([part[0] for part in grid.parts]))
        for part in grid.parts:
            self.add(tuple(part.reshape(-1).tolist()), rows=len(grid.rows), heads=heads)

    def add(
        self,
        units: tuple[int, ...],
        rows: int = 1,
        heads: int | None = None,
        inner: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """A dimension of these units; ``inner`` are the units of the first one, if it is a head."""
        self.owner[list(units)] = len(self.dimensions)
        graph, operations = self.graph, self.graph.shadow.operations
        own = [units[0]] if inner is None else [units[0], *inner.tolist()]
        sites = [site for site in graph.sites if bool(np.isin(site.labels, own).any())]
        frozen = graph.reasons.get(units[0])
        if inner is None:
            made = next((s for s in sites if s.role == "out"), sites[0])
            producer, channels = made.operation, int((made.labels == units[0]).sum())
        else:
            producer, channels = self._first_with(units[0]), 1
        holders = {site.operation for site in sites}
        block = next((b for b in self.blocks if holders <= set(b.operations)), None)
        name = operations[producer].name or operations[producer].outputs[0]
        self.dimensions.append(
            Dimension(
                name=_unique(name if inner is None else f"{name}/heads", self.taken),
                kind=self._kind(units[0], producer, block) if inner is None else self._head_kind(units[0]),
                units=units,
                channels=channels,
                members=tuple(
                    Member(operations[c.operation].inputs[c.slot], c.axis, s.operation, s.slot, s.role)
                    for s in sites
                    for c in stored_sites(graph.shadow, [s])
                    if operations[c.operation].inputs[c.slot] in graph.shadow.model.graph.initializers
                ),
                producer=producer,
                frozen=frozen,
                block=None if frozen or block is None else block.name,
                rows=rows,
                heads=heads,
                frozen_by=graph.frozen_by.get(units[0]),
            )
        )

    def _first_with(self, number: int) -> int:
        """The first operation whose output carries a class, or else a unit that it holds."""
        tensors, head = self.graph.tensors, self.graph.head
        made = [
            (op.index, tensors[name])
            for op in self.graph.shadow.operations
            for name in op.outputs
            if name in tensors
        ]
        own = (index for index, labels in made if bool((labels == number).any()))
        held = (index for index, labels in made if bool((head[labels] == number).any()))
        return next(itertools.chain(own, held))

    def _kind(self, number: int, producer: int, block: Block | None) -> str:
        if number in self.graph.kinds:
            return self.graph.kinds[number]
        if block is None:
            return "embedding" if number in self.normalised else "channel"
        linear = self.graph.shadow.operations[producer].op_type in ("MatMul", "Gemm")
        return "mlp" if linear else "channel"

    def _head_kind(self, number: int) -> str:
        """Rows that a product of activations made, or statistics over groups."""
        return self.graph.kinds.get(number, "heads")

    def structure(self) -> Structure:
        """All of it, with the owner of each class."""
        return Structure(self.graph, tuple(self.dimensions), self.blocks, self.owner)


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
    heads = structure.graph.head_axis(name)
    vector = structure.graph.vector(name, axis)
    # Entries of one head show the width; the heads themselves are behind the entries of the other axis.
    return label_extent(structure, structure.graph.head[vector] if heads == axis else vector)


def input_extent(structure: Structure, operation: Operation, slot: int, axis: int) -> Extent:
    """How long an axis of an input is; a constant (learned queries) is cut as this operation reads it."""
    for site in structure.graph.sites:
        if (site.operation, site.slot, site.axis) == (operation.index, slot, axis):
            return label_extent(structure, site.labels)
    return extent(structure, operation.inputs[slot], axis)


def label_extent(structure: Structure, vector: npt.NDArray[np.int32]) -> Extent:
    """How long an axis with these index classes is, given how many units each dimension keeps."""
    owners = np.where(vector > 0, structure.dimension_of[vector], -1)
    terms: list[tuple[tuple[int, ...], int]] = []
    fixed = len(vector)
    for index in np.unique(owners[owners >= 0]).tolist():
        classes, counts = np.unique(vector[owners == index], return_counts=True)
        dimension = structure.dimensions[index]
        rows = len(np.unique(structure.graph.head[classes])) if dimension.heads is not None else 1
        scope = _scope(structure, index, rows)
        if scope:
            units = len(classes) * int(counts[0])
            full = int(np.prod([structure.dimensions[i].count for i in scope]))
            terms.append((scope, units // full))
            fixed -= units
    return Extent(fixed, tuple(terms))


def _scope(structure: Structure, index: int, rows: int) -> tuple[int, ...]:
    """The unfrozen dimensions that an axis of ``rows`` heads of a dimension depends on."""
    dimension = structure.dimensions[index]
    both = [dimension.heads, index] if dimension.heads is not None and rows > 1 else [index]
    return tuple(i for i in both if i is not None and structure.dimensions[i].frozen is None)


def operation_macs(operation: Operation, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates of one operation (0 for all but convolutions, products and attention)."""
    if operation.op_type == "Conv":
        return int(np.prod(shapes[operation.outputs[0]]) * np.prod(shapes[operation.inputs[1]][1:]))
    if operation.op_type == "ConvTranspose":
        return int(np.prod(shapes[operation.inputs[0]]) * np.prod(shapes[operation.inputs[1]][1:]))
    if operation.op_type in ("Gemm", "MatMul"):
        transposed = operation.op_type == "Gemm" and operation.attributes.get("transA", 0)
        inner = shapes[operation.inputs[0]][-2 if transposed else -1]
        return int(np.prod(shapes[operation.outputs[0]]) * inner)
    if operation.op_type == "Attention" and not operation.domain:
        wide = sum(math.prod(shapes[name]) for name in (operation.inputs[0], operation.outputs[0]))
        return wide * shapes[operation.inputs[1]][-2]
    return 0


def macs(shadow: Shadow) -> int:
    """Multiply-accumulates of one inference at the bound shapes."""
    return sum(operation_macs(operation, shadow.shapes) for operation in shadow.operations)
