"""Run the rules over a model: which indices of which axes live and die together, and what is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from onnx_mdp.rules import Labelling, Labels, Site, squash, varying
from onnx_mdp.shadow import Shadow

__all__ = ["LabelledGraph", "keep_vector", "label_graph"]


@dataclass(frozen=True, slots=True)
class LabelledGraph:
    """A model whose indices carry class numbers; indices of one class are removed together or not at all.

    ``tensors`` maps activations to squashed ``int32`` class arrays (0: fixed); ``sites`` are the cut
    initializer axes; ``reductions`` the (operation, slot) pairs that sum over a labelled axis;
    ``reasons`` says for each frozen class why; ``unsupported`` names operators without a rule that
    touched something prunable.
    """

    shadow: Shadow
    tensors: Mapping[str, Labels]
    sites: tuple[Site, ...]
    reductions: tuple[tuple[int, int], ...]
    reasons: Mapping[int, str]
    unsupported: Mapping[str, str]
    classes: int

    def vector(self, name: str, axis: int) -> Labels:
        """Class numbers along one axis of a tensor, ``int32[extent]``."""
        labels = self.tensors[name]
        index = tuple(slice(None) if a == axis else 0 for a in range(labels.ndim))
        return np.broadcast_to(labels[index], self.shadow.shapes[name][axis])


def label_graph(shadow: Shadow) -> LabelledGraph:
    """Label every tensor of a model and join what the operators couple."""
    state = Labelling(shadow)
    state.run()
    classes = _components(state)
    tensors = {name: squash(classes[labels]) for name, labels in state.tensors.items()}
    reasons: dict[int, str] = {}
    for atoms, why in state.frozen:
        for number in np.unique(classes[atoms]):
            reasons.setdefault(int(number), why)
    for name, labels in tensors.items():
        if len(varying(labels)) > 1:
            for number in np.unique(labels[labels > 0]):
                reasons.setdefault(int(number), f"tensor {name!r} is prunable along two axes")
    return LabelledGraph(
        shadow=shadow,
        tensors=tensors,
        sites=tuple(replace(site, labels=classes[site.labels]) for site in state.sites),
        reductions=tuple(state.reductions),
        reasons=reasons,
        unsupported=dict(state.unsupported),
        classes=int(classes.max()) + 1,
    )


def _components(state: Labelling) -> npt.NDArray[np.int32]:
    """``int32[atoms]``: the class of each atom, numbered by first atom; atom 0 is class 0."""
    pairs = np.concatenate(state.edges, axis=1) if state.edges else np.zeros((2, 0), np.int32)
    matrix = coo_matrix((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(state.atoms,) * 2)
    _, labels = connected_components(matrix, directed=False)
    _, first = np.unique(labels, return_index=True)
    order = np.argsort(np.argsort(first))
    return np.asarray(order[labels], np.int32)


def keep_vector(labels: Labels, removed: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which indices stay when the classes in ``removed`` (``bool[classes]``) go."""
    return np.asarray(~removed[labels] | (labels == 0))
