"""Settle what the rules found: classes of indices, and the grids of heads × width among them.

Where labels vary along two axes, the tensor stays a rectangle only if every row that is kept keeps as many
entries. A **grid** is the case in which that can be planned: the rows are heads that go as a whole, the
entries of a row are its widths, each head has the same number of them, and which ones are kept may differ
from head to head. Whatever does not fit this form is coupled, axis by axis, until it does: the j-th entries
of all rows then leave together, or rows do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_mdp.rules import Labelling, Labels, couple, squash, varying

__all__ = ["Coupling", "Grid", "settle"]

Classes = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Grid:
    """Heads, the classes of ``rows``, and their widths: an ``int32[rows, width]`` of classes for each part.

    Query and key widths, which meet in a product, are one part; value widths another.
    """

    rows: tuple[int, ...]
    parts: tuple[Classes, ...]


@dataclass(frozen=True, slots=True)
class Coupling:
    """``classes`` of atoms, the ``head`` of each class (0: none), the grids, and signatures of classes."""

    classes: Classes
    head: Classes
    grids: tuple[Grid, ...]
    signatures: npt.NDArray[np.uint64]


def settle(state: Labelling) -> Coupling:
    """Join atoms into classes, and couple on until every tensor is planned by lines or by grids."""
    while True:
        classes = _components(state)
        held = _held(state, classes)
        before = len(state.edges)
        _merge_heads(state, held)
        if len(state.edges) > before:
            continue
        head = np.zeros(int(classes.max()) + 1, np.int32)
        head[held[1]] = held[0]
        _couple_improper(state, classes, head)
        if len(state.edges) > before:
            continue
        _couple_split_rows(state, classes, head)
        if len(state.edges) > before:
            continue
        signatures = _signatures(state, classes)
        members = _members(head)
        _couple_uneven(state, classes, head, members, signatures)
        if len(state.edges) > before:
            continue
        _couple_narrow_rows(state, classes, members, signatures)
        if len(state.edges) == before:
            return Coupling(classes, head, tuple(_grids(members, signatures)), signatures)


def _components(state: Labelling) -> Classes:
    """``int32[atoms]``: the class of each atom, numbered by first atom; atom 0 is class 0."""
    root = np.arange(state.atoms, dtype=np.int32)
    ends = np.concatenate([np.zeros((2, 0), np.int32), *state.edges], axis=1)
    while (ends := ends[:, ends[0] != ends[1]]).size:
        # The larger root of an edge gets the smallest that it meets, then each atom the root of its root.
        np.minimum.at(root, ends.max(0), ends.min(0))
        while (root != root[root]).any():
            root = root[root]
        ends = root[ends]
    return np.asarray(np.unique(root, return_inverse=True)[1], np.int32)


def _held(state: Labelling, classes: Classes) -> Classes:
    """``int32[2, n]``: the distinct (row, unit) pairs of classes."""
    pairs = classes[np.concatenate([np.zeros((2, 0), np.int32), *state.held], axis=1)]
    return np.asarray(np.unique(pairs[:, pairs[0] != pairs[1]], axis=1), np.int32)


def _merge_heads(state: Labelling, held: Classes) -> None:
    """A unit has one head: heads that share a unit are one, and a head that is a unit is no head."""
    rows, units = held
    order = np.argsort(units, kind="stable")
    shared = np.flatnonzero(units[order][1:] == units[order][:-1])
    pairs = np.stack([rows[order][shared], rows[order][shared + 1]])
    nested = np.flatnonzero(np.isin(units, rows))
    pairs = np.concatenate([pairs, np.stack([rows[nested], units[nested]])], axis=1)
    if pairs.shape[1]:
        atoms = _first_atoms(state)
        state.edges.append(np.asarray(atoms[pairs], np.int32))


def _first_atoms(state: Labelling) -> Classes:
    """The first atom of each class."""
    return np.asarray(np.unique(_components(state), return_index=True)[1], np.int32)


def _rectangles(state: Labelling, classes: Classes) -> Iterator[tuple[Labels, Labels]]:
    """(atoms, classes) of every tensor or view that varies along two axes or more; equal ones once."""
    seen: set[tuple[tuple[int, ...], bytes]] = set()
    for labels in (*state.tensors.values(), *state.views):
        if len(varying(labels)) < 2:
            continue
        key = (labels.shape, labels.tobytes())
        if key not in seen:
            seen.add(key)
            found = squash(classes[labels])
            if len(varying(found)) > 1:
                yield labels, found


def _head_axis(labels: Labels, head: Classes) -> int | None:
    """The only axis along which the heads of these classes vary; None if a class has no head."""
    heads = head[labels]
    axes = varying(squash(heads))
    return axes[0] if len(axes) == 1 and bool((heads > 0).all()) else None


def _join(state: Labelling, classes: Classes, labels: Labels, axes: tuple[int, ...], why: str) -> bool:
    """Couple along axes, and say whether that joins classes; if not, only fixed indices differ."""
    before = len(state.edges)
    for axis in axes:
        labels = couple(state, labels, axis, why)
    joins = any(bool((classes[a] != classes[b]).any()) for a, b in state.edges[before:])
    if not joins:
        del state.edges[before:]
    return joins


def _couple_improper(state: Labelling, classes: Classes, head: Classes) -> None:
    """Tensors that are no grid lose the smallest of the axes that are not the heads'."""
    for labels, found in _rectangles(state, classes):
        rows = _head_axis(found, head)
        if rows is not None and len(varying(found)) == 2:
            continue
        others = [axis for axis in varying(found) if axis != rows]
        for axis in sorted(others, key=lambda a: found.shape[a]):
            why = "a tensor mixes fixed and prunable indices along two axes"
            if _join(state, classes, labels, (axis,), why):
                break


def _couple_split_rows(state: Labelling, classes: Classes, head: Classes) -> None:
    """Where an operator treats an axis as whole and it is not the heads', all along the others is coupled."""
    for labels, axis in state.wholes:
        found = squash(classes[labels])
        if axis not in varying(found) or len(varying(found)) == 1 or _head_axis(found, head) == axis:
            continue
        others = tuple(other for other in varying(found) if other != axis)
        _join(state, classes, labels, others, "an operator picks fixed and prunable indices")


def _members(head: Classes) -> Mapping[int, Classes]:
    """The units of each head, ascending."""
    units = np.flatnonzero(head)
    order = units[np.argsort(head[units], kind="stable")].astype(np.int32)
    rows, starts = np.unique(head[order], return_index=True)
    parts = np.split(order, starts[1:]) if len(rows) else []
    return dict(zip(rows.tolist(), parts, strict=True))


def _signatures(state: Labelling, classes: Classes) -> npt.NDArray[np.uint64]:
    """``uint64[classes]``: equal for classes that occur equally often at the same places.

    A random linear hash of the occurrence counts: two different signatures collide with
    probability 2⁻⁶⁴, and the seed is fixed.
    """
    rng = np.random.default_rng(20260101)
    count = int(classes.max()) + 1
    total = np.zeros(count, np.uint64)
    arrays = [site.labels for site in state.sites] + list(state.tensors.values())
    for labels in arrays:
        counts = np.bincount(squash(classes[labels]).reshape(-1), minlength=count).astype(np.uint64)
        total += counts * rng.integers(1, 2**63, dtype=np.uint64)
    return total


def _couple_uneven(
    state: Labelling,
    classes: Classes,
    head: Classes,
    members: Mapping[int, Classes],
    signatures: npt.NDArray[np.uint64],
) -> None:
    """Every row of a grid holds one part of its head, whole, and all heads have the same parts."""
    for labels, found in _rectangles(state, classes):
        rows = _head_axis(found, head)
        if rows is None:  # it holds fixed indices, and the rest is frozen
            continue
        lines = np.moveaxis(found, rows, 0).reshape(found.shape[rows], -1)
        keys = {_row_key(line, int(head[line[0]]), members, signatures) for line in lines}
        if len(keys) > 1 or None in keys:
            _join(state, classes, labels, (rows,), "a tensor is no grid of heads and widths")


def _couple_narrow_rows(
    state: Labelling, classes: Classes, members: Mapping[int, Classes], signatures: npt.NDArray[np.uint64]
) -> None:
    """A row that holds not all widths of its head could lose what it holds, and stay: it is one with that."""
    pairs = np.concatenate([np.zeros((2, 0), np.int32), *state.held], axis=1)
    inside = np.unique(np.stack([pairs[0], classes[pairs[1]]]), axis=1)
    inside = inside[:, classes[inside[0]] != inside[1]]
    order = np.lexsort((signatures[inside[1]], inside[0]))
    rows, marks = inside[0][order], signatures[inside[1]][order]
    first = np.flatnonzero(np.r_[True, (rows[1:] != rows[:-1]) | (marks[1:] != marks[:-1])][: len(rows)])
    counts = np.diff(np.r_[first, len(rows)])
    whole = [
        int((signatures[members[int(classes[row])]] == mark).sum())
        for row, mark in zip(rows[first], marks[first], strict=True)
    ]
    narrow = rows[first][counts < np.asarray(whole, np.int64)]
    if len(narrow):
        state.edges.append(pairs[:, np.isin(pairs[0], narrow)])


def _row_key(
    line: Classes, row: int, members: Mapping[int, Classes], signatures: npt.NDArray[np.uint64]
) -> tuple[int, ...] | None:
    """What rows of one grid have in common; None if the line is not one whole part."""
    units, counts = np.unique(line, return_counts=True)
    part = members[row][signatures[members[row]] == signatures[units[0]]]
    if not np.array_equal(units, part) or len(set(counts.tolist())) > 1:
        return None
    return (int(signatures[units[0]]), *_head_key(row, members, signatures))


def _head_key(
    row: int, members: Mapping[int, Classes], signatures: npt.NDArray[np.uint64]
) -> tuple[int, ...]:
    return (int(signatures[row]), *sorted(signatures[members[row]].tolist()))


def _grids(members: Mapping[int, Classes], signatures: npt.NDArray[np.uint64]) -> Iterator[Grid]:
    """Heads with equal keys, in class order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in members:
        groups.setdefault(_head_key(row, members, signatures), []).append(row)
    for rows in groups.values():
        parts = []
        for mark in dict.fromkeys(signatures[members[rows[0]]].tolist()):
            parts.append(np.stack([members[row][signatures[members[row]] == mark] for row in rows]))
        yield Grid(tuple(rows), tuple(parts))
