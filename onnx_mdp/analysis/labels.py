"""Run the rules over a model: which indices of which axes live and die together, and what is frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.coupling import Coupling, Grid, settle
from onnx_mdp.analysis.shadow import Operation, Shadow
from onnx_mdp.analysis.stored_axes import blocked_sites, stored_sites
from onnx_mdp.rules import Labelling, Labels, Site, squash, varying

__all__ = ["LabelledGraph", "keep_vector", "label_graph"]


@dataclass(frozen=True, slots=True)
class LabelledGraph:
    """A model whose indices carry class numbers; indices of one class are removed together or not at all.

    ``tensors`` maps activations to squashed ``int32`` class arrays (0: fixed); ``sites`` are the cut
    initializer axes, ``cuts`` the same where the file stores the weights; ``reductions`` the
    (operation, slot) pairs that sum over a labelled axis;
    ``reasons`` says for each frozen class why, ``frozen_by`` which operation froze it, where one did;
    ``unsupported`` names operators without a rule that touched something prunable. ``grids`` are the classes
    of heads and their widths, ``head`` the head that
    each class belongs to (``int32[classes]``, 0: none), ``kinds`` what the rules call a class.
    ``signatures`` (``uint64[classes]``) are equal for classes that occur equally often everywhere.
    """

    shadow: Shadow
    tensors: Mapping[str, Labels]
    sites: tuple[Site, ...]
    cuts: tuple[Site, ...]
    reductions: tuple[tuple[int, int], ...]
    reasons: Mapping[int, str]
    frozen_by: Mapping[int, int]
    unsupported: Mapping[str, str]
    classes: int
    grids: tuple[Grid, ...]
    head: npt.NDArray[np.int32]
    kinds: Mapping[int, str]
    signatures: npt.NDArray[np.uint64]

    def vector(self, name: str, axis: int) -> Labels:
        """Class numbers along one axis of a tensor, ``int32[extent]``; of two axes, the first line."""
        labels = self.tensors[name]
        index = tuple(slice(None) if a == axis else 0 for a in range(labels.ndim))
        return np.broadcast_to(labels[index], self.shadow.shapes[name][axis])

    def keep(self, name: str, axis: int, removed: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """``bool[extent]``: which indices of an axis stay when the classes in ``removed`` go.

        Of heads × width, the heads with any unit left, and the units of one head that stays: as many as
        in any other.
        """
        labels = self.tensors.get(name)
        if labels is None or axis not in varying(labels):
            return np.ones(self.shadow.shapes[name][axis], np.bool_)
        lines = np.moveaxis(keep_vector(labels, removed), axis, 0).reshape(labels.shape[axis], -1)
        if self.head_axis(name) == axis:
            return np.asarray(lines.any(1))
        return np.asarray(lines[:, lines.sum(0).argmax()])

    def read(self, operation: Operation, slot: int) -> Labels | None:
        """The classes of an input as an operation reads it; those of learned queries are a site."""
        name = operation.inputs[slot]
        for site in self.sites:
            if (site.operation, site.slot) == (operation.index, slot):
                rank = len(self.shadow.shapes[name])
                return site.labels.reshape([-1 if axis == site.axis else 1 for axis in range(rank)])
        return self.tensors.get(name)

    def head_axis(self, name: str) -> int | None:
        """Which of two labelled axes counts heads; None where at most one axis is labelled."""
        labels = self.tensors[name]
        axes = varying(labels)
        heads = varying(squash(self.head[labels]))
        return heads[0] if len(axes) == 2 and heads else None


def label_graph(shadow: Shadow) -> LabelledGraph:
    """Label every tensor of a model and join what the operators couple."""
    state = _labelled(shadow)
    for site, why in blocked_sites(shadow, state.sites):
        state.freeze(site.labels, why)
    coupling = settle(state)
    classes = coupling.classes
    kinds: dict[int, str] = {}
    # Statistics over the width of a head leave its row too, so the name of the product goes first.
    for atoms, kind in sorted(state.kinds, key=lambda pair: pair[1] == "groups"):
        for number in np.unique(classes[atoms]):
            kinds.setdefault(int(number), kind)
    sites = tuple(replace(site, labels=classes[site.labels]) for site in state.sites)
    reasons = _reasons(state.frozen, coupling)
    return LabelledGraph(
        shadow=shadow,
        tensors={name: squash(classes[labels]) for name, labels in state.tensors.items()},
        sites=sites,
        cuts=stored_sites(shadow, sites),
        reductions=tuple(state.reductions),
        reasons={number: why for number, (why, _) in reasons.items()},
        frozen_by={number: by for number, (_, by) in reasons.items() if by is not None},
        unsupported=dict(state.unsupported),
        classes=int(classes.max()) + 1,
        grids=coupling.grids,
        head=coupling.head,
        kinds=kinds,
        signatures=coupling.signatures,
    )


def _labelled(shadow: Shadow) -> Labelling:
    """The labels after all rules; a state has units along the axes along which its output has them.

    An output that only hands another state on gets units once that one has them, so this is repeated.
    """
    known: dict[str, tuple[int, ...]] = {}
    while True:
        state = Labelling(shadow, known)
        state.run()
        shapes = {s: state.labels(t).shape for s, t in shadow.states.items() if varying(state.labels(t))}
        fresh = {s: shape for s, shape in shapes.items() if s not in known and _is_fixed(shadow, s, shape)}
        if not fresh:
            return state
        known |= fresh


def _is_fixed(shadow: Shadow, name: str, labels: tuple[int, ...]) -> bool:
    """Whether the file states the size of an input along every axis that is labelled."""
    declared = next(v.shape for v in shadow.model.graph.inputs if v.name == name)
    return declared is not None and all(
        isinstance(size, int) for size, extent in zip(declared, labels, strict=True) if extent > 1
    )


def _reasons(
    frozen: Iterable[tuple[npt.NDArray[np.int32], str, int | None]], coupling: Coupling
) -> dict[int, tuple[str, int | None]]:
    """Why classes are frozen: a fixed entry fixes the whole part, for counts agree, and its heads."""
    reasons: dict[int, tuple[str, int | None]] = {}
    for atoms, why, by in frozen:
        for number in np.unique(coupling.classes[atoms]):
            reasons.setdefault(int(number), (why, by))
    for grid in coupling.grids:
        stuck = []
        for part in grid.parts:
            fixed = next((reasons[c] for c in part.reshape(-1).tolist() if c in reasons), None)
            if fixed is not None:
                stuck.append(fixed)
                reasons.update(dict.fromkeys(part.reshape(-1).tolist(), fixed))
        stuck = [*(reasons[row] for row in grid.rows if row in reasons), *stuck]
        if stuck:
            reasons.update(dict.fromkeys(grid.rows, stuck[0]))
    return reasons


def keep_vector(labels: Labels, removed: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which indices stay when the classes in ``removed`` (``bool[classes]``) go."""
    return np.asarray(~removed[labels] | (labels == 0))
