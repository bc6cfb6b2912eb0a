"""The algebra of index labels that the operator rules speak.

Every tensor carries an ``int32`` array of its own rank that says to which *atom* (removable unit) each
index belongs; 0 means that the index cannot be removed. Arrays are **squashed**: an axis along which the
labels do not vary has extent 1, so that a ``[1, 64, 112, 112]`` activation costs 64 numbers. Rules create
atoms (`fresh`), say which atoms live and die together (`union`), which never die (`freeze`), which
initializer axes they cut (`site`), and which inputs they reduce over (`reduces`).

Labels may vary along two axes, heads × width, as long as it is known which atoms are the heads: an atom
*holds* the units that leave with it (`holds`). Kept positions may differ from head to head, so an operator
that picks or merges indices says which axis it treats as `whole`; what does not fit is coupled in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.shadow import Operation, Shadow
from onnx_mdp.numerics.precision import is_float

__all__ = [
    "RULES",
    "SINCE",
    "Labelling",
    "Labels",
    "Role",
    "Rule",
    "Site",
    "align",
    "align_shape",
    "couple",
    "expand",
    "rule",
    "squash",
    "varying",
]

Labels = npt.NDArray[np.int32]
Role = Literal["in", "out", "each"]


@dataclass(frozen=True, slots=True)
class Site:
    """Operation ``operation`` reads, in input ``slot``, a constant whose ``axis`` has these atoms.

    The constant is an initializer, or computed at run time from constants and sizes alone; a table of places
    may be computed from inputs.
    ``role`` says what the axis is to the operation: ``out`` makes the indices (rows of a weight),
    ``in`` sums over them (columns), ``each`` holds one parameter for each (bias, scale, depthwise filter).
    """

    operation: int
    slot: int
    axis: int
    labels: Labels
    role: Role = "each"


Rule = Callable[["Labelling", Operation], None]
RULES: dict[str, Rule] = {}
SINCE: dict[str, int] = {}


def rule(*op_types: str, since: int = 1) -> Callable[[Rule], Rule]:
    """Register a rule for operators of the ONNX domain, or ``domain::Operator`` of another one.

    The docstring of the rule is its line in the table of operators: what passes, what is coupled, what is
    frozen. Forms of the operator from before opset ``since`` are treated as operators without a rule.
    """

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            if op_type in RULES:
                raise ValueError(f"two rules for {op_type}")
            RULES[op_type], SINCE[op_type] = function, since
        return function

    return register


def varying(labels: Labels) -> tuple[int, ...]:
    """The axes along which squashed labels vary."""
    return tuple(axis for axis, extent in enumerate(labels.shape) if extent > 1)


def squash(labels: npt.ArrayLike) -> Labels:
    """Reduce every axis along which the labels do not vary to extent 1."""
    array = np.asarray(labels, np.int32)
    for axis in range(array.ndim):
        first = array.take([0], axis) if array.shape[axis] else array
        if array.shape[axis] > 1 and bool((array == first).all()):
            array = first
    return array


def expand(labels: Labels, axis: int, extent: int) -> Labels:
    """Give one axis its full extent."""
    shape = list(labels.shape)
    shape[axis] = extent
    return np.broadcast_to(labels, shape)


def align(labels: Labels, rank: int) -> Labels:
    """Prepend axes of extent 1, as broadcasting does."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def align_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Prepend extents of 1, as broadcasting does."""
    return (1,) * (rank - len(shape)) + shape


def couple(state: Labelling, labels: Labels, axis: int, why: str) -> Labels:
    """Make all labels along ``axis`` live and die together; return them with that axis squashed."""
    joint: Labels = labels.max(axis, keepdims=True)
    mixed = (labels == 0).any(axis, keepdims=True) & (joint > 0)
    state.freeze(np.where(mixed, labels, 0), why)
    state.union(labels, joint)
    return joint


def _distinct_pairs(a: Labels, b: Labels) -> Labels:
    """``int32[2, n]``, sorted; as one number each, pairs sort ten times as fast as columns do."""
    numbers = np.unique((a.astype(np.int64) << 32) | b)
    return np.stack([numbers >> 32, numbers & 0x7FFFFFFF]).astype(np.int32)


class Labelling:
    """The labels of one model while the rules run over it, operation by operation."""

    def __init__(self, shadow: Shadow, states: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Start with unlabelled graph inputs, except for ``states``, whose labels have these shapes."""
        self.shadow = shadow
        self.tensors: dict[str, Labels] = {}
        self.atoms = 1
        self.edges: list[npt.NDArray[np.int32]] = []
        self.frozen: list[tuple[npt.NDArray[np.int32], str, int | None]] = []
        self.at: int | None = None
        self.sites: list[Site] = []
        self.reductions: list[tuple[int, int]] = []
        self.unsupported: dict[str, str] = {}
        self.held: list[npt.NDArray[np.int32]] = []
        self.wholes: list[tuple[Labels, int]] = []
        self.views: list[Labels] = []
        self.repeated: dict[str, tuple[int, ...]] = {}
        self.kinds: list[tuple[npt.NDArray[np.int32], str]] = []
        for name, shape in (states or {}).items():
            self.tensors[name] = self.fresh(math.prod(shape)).reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """The concrete shape of a tensor."""
        return self.shadow.shapes[name]

    def labels(self, name: str) -> Labels:
        """Squashed labels of a tensor; constants and inputs have none."""
        known = self.tensors.get(name)
        if known is not None:
            return known
        return np.zeros((1,) * len(self.shadow.shapes.get(name, ())), np.int32)

    def constant(self, operation: Operation, slot: int) -> npt.NDArray[Any] | None:
        """The value of an input if it depends on no input value, else None."""
        if slot >= len(operation.inputs) or not operation.inputs[slot]:
            return None
        return self.shadow.constants.get(operation.inputs[slot])

    def entry_moves(self, operation: Operation, slot: int, place: int) -> bool:
        """Whether entry ``place`` of a shape operand changes with a symbolic dimension."""
        name = operation.inputs[slot] if slot < len(operation.inputs) else ""
        moving = self.shadow.dynamic.get(name)
        return moving is not None and bool(moving.reshape(-1)[place])

    def is_constant(self, name: str) -> bool:
        """Whether a tensor depends on no input value, nor, if it holds floats, on an input's size."""
        value = self.shadow.constants.get(name)
        return value is not None and (name not in self.shadow.dynamic or not is_float(value.dtype))

    def is_computed(self, name: str) -> bool:
        """Whether nodes compute a tensor from constants and sizes alone: it is cut where it is read."""
        return name in self.shadow.independent and not self.is_constant(name)

    def is_read(self, name: str) -> bool:
        """Whether an operation, or the body of one, reads a tensor, or it is an output."""
        readers = (r for r in self.shadow.operations if name in r.inputs or name in r.captured)
        return bool(name) and (name in self.shadow.outputs or any(True for _ in readers))

    def repeats(self, name: str) -> tuple[int, ...]:
        """Axes of a tensor that hold one index many times, for a single reader: they may be of any length."""
        return self.repeated.get(name, ())

    def fresh(self, count: int) -> Labels:
        """New atoms, one for each of ``count`` indices."""
        first, self.atoms = self.atoms, self.atoms + count
        return np.arange(first, self.atoms, dtype=np.int32)

    def union(self, a: Labels, b: Labels) -> None:
        """Labels that meet at the same position live and die together; 0 meets nothing."""
        a, b = np.broadcast_arrays(a, b)
        met = (a > 0) & (b > 0) & (a != b)
        if met.any():
            self.edges.append(_distinct_pairs(a[met], b[met]))

    def freeze(self, labels: Labels, why: str) -> None:
        """These labels never die; ``why`` is shown to the user."""
        atoms = np.unique(labels[labels > 0])
        if len(atoms):
            self.frozen.append((atoms, why, self.at))

    def freeze_inputs(self, operation: Operation, why: str) -> None:
        """Freeze whatever the operation reads and leave its outputs unlabelled."""
        for name in (*operation.inputs, *operation.captured):
            if name:
                self.freeze(self.labels(name), why)

    def emit(self, operation: Operation, labels: Labels, output: int = 0) -> None:
        """Set the labels of an output."""
        if output < len(operation.outputs) and operation.outputs[output]:
            self.tensors[operation.outputs[output]] = squash(labels)

    def vector(self, labels: Labels, axis: int, extent: int, why: str) -> Labels:
        """The labels along one axis, ``int32[extent]``; variation along others is coupled away."""
        axis %= labels.ndim
        for other in varying(labels):
            if other != axis:
                labels = couple(self, labels, other, why)
        return expand(labels, axis, extent).reshape(-1).copy()

    def site(self, operation: Operation, slot: int, axis: int, labels: Labels, role: Role = "each") -> None:
        """The operation reads a constant that is cut along ``axis`` with these labels."""
        name = operation.inputs[slot] if slot < len(operation.inputs) else ""
        if name and not self.is_constant(name) and not self.is_computed(name):
            why = f"{operation} computes its parameters at run time"
            self.freeze(labels, why)
            self.freeze(self.labels(name), why)
        elif name and (labels > 0).any():
            self.sites.append(Site(operation.index, slot, axis, labels, role))

    def selects(self, operation: Operation, slot: int, axis: int, labels: Labels) -> None:
        """The operation reads a table, computed at run time, that is cut along ``axis`` before it."""
        if (labels > 0).any():
            self.sites.append(Site(operation.index, slot, axis, labels))

    def reduces(self, operation: Operation, slot: int) -> None:
        """The operation sums (or takes statistics) over a labelled axis of this input."""
        self.reductions.append((operation.index, slot))

    def holds(self, rows: Labels, units: Labels) -> None:
        """Where they meet, a unit leaves when its row does: the row is a head, the unit one of its widths."""
        rows, units = np.broadcast_arrays(rows, units)
        met = (rows > 0) & (units > 0)
        if met.any():
            self.held.append(_distinct_pairs(rows[met], units[met]))

    def whole(self, labels: Labels, axis: int) -> None:
        """The operation picks or merges by ``axis``: an index along it stays or goes as a whole."""
        if axis in varying(labels) and len(varying(labels)) > 1:
            self.wholes.append((labels, axis))

    def view(self, labels: Labels, axis: int) -> None:
        """The operation sees a tensor in this form of its own, ``axis`` the outer of those that it splits."""
        if len(varying(labels)) > 1:
            self.views.append(labels)
            self.whole(labels, axis)

    def calls(self, labels: Labels, kind: str) -> None:
        """Name the kind of dimension that these labels belong to."""
        self.kinds.append((np.unique(labels[labels > 0]), kind))

    def single(self, labels: Labels, why: str) -> Labels:
        """Couple labels until they vary along one axis at most."""
        while len(varying(labels)) > 1:
            axis = min(varying(labels), key=lambda a: labels.shape[a])
            labels = squash(couple(self, labels, axis, why))
        return labels

    def run(self) -> None:
        """Apply the rule of every operation; those without one freeze what they touch."""
        for operation in self.shadow.operations:
            self.at = operation.index
            names = [n for n in (*operation.inputs, *operation.captured) if n]
            key = f"{operation.domain}::{operation.op_type}" if operation.domain else operation.op_type
            if operation.op_type != "Size" and all(self.is_constant(o) or not o for o in operation.outputs):
                continue
            if key in RULES and operation.version >= SINCE[key]:
                RULES[key](self, operation)
            else:
                self._refuse(operation, key, names)
        carried = {target: source for source, target in self.shadow.states.items() if source in self.tensors}
        self.at = None
        for name in self.shadow.outputs:
            if name in carried:
                self._carry(carried[name], name)
            else:
                self.freeze(self.labels(name), f"graph output {name}")

    def _carry(self, source: str, target: str) -> None:
        """An input and an output that are one memory live and die together."""
        before, after = self.labels(source), self.labels(target)
        if before.shape != after.shape:
            for labels in (before, after):
                self.freeze(labels, f"state {source} varies along other axes than its output {target}")
            return
        self.union(before, after)
        self.freeze(np.where(after == 0, before, 0), f"state output {target}, which cannot be pruned")

    def _refuse(self, operation: Operation, key: str, names: Sequence[str]) -> None:
        fused = " (a runtime fused it: prune the file from before that)" if _is_fused(operation) else ""
        if key in RULES:
            fused = f" as it was before opset {SINCE[key]} (convert the file to that opset or a later one)"
        touched = any(bool((self.labels(n) > 0).any()) for n in names)
        if touched:
            self.unsupported.setdefault(key, f"no rule for operator {key}{fused}")
        self.freeze_inputs(operation, f"no rule for operator {key}, which {operation} is{fused}")


def _is_fused(operation: Operation) -> bool:
    """Whether the operator is of a domain that ONNX Runtime saves optimised models in."""
    return operation.domain.startswith(("com.microsoft", "com.ms."))
