"""Iterative deepening: labels above thresholds that fall from the bounds until the best choices appear."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnx_mdp.solvers.beliefs import Beliefs
from onnx_mdp.solvers.incumbent import Incumbent
from onnx_mdp.solvers.network import Network
from onnx_mdp.solvers.pareto_labels import Limits, best_above

__all__ = ["FIRST_STEP", "close"]

FIRST_STEP = 1e-5  # of the bound
# Of the window. With several budgets a step is larger: one that is left costs another run for itself.
_FIRST_SHARE, _FIRST_SHARE_OF_MANY = 0.08, 0.25
_FEW_LABELS = 100
_SLOWEST, _USUAL, _FASTEST = 1.35, 1.8, 3.0  # growth of a step


def close(
    known: Sequence[Incumbent], network: Network, beliefs: Beliefs, limits: Limits, lowest: float
) -> list[Incumbent]:
    """Labels above falling thresholds, until the best choice of each budget of the beliefs is proven.

    Returns the budgets that were given up as crowded. Raises StoppedError when the time is up.
    """
    tops = [one.bound for one in known]
    steps = [max(FIRST_STEP * abs(one.bound), 3 * one.rounding) for one in known]
    share = _FIRST_SHARE if len(known) == 1 else _FIRST_SHARE_OF_MANY
    for index, one in enumerate(known):
        if np.isfinite(one.least):
            steps[index] = max(steps[index], share * (tops[index] - one.least))
    open_ = [index for index, one in enumerate(known) if not one.searched]
    crowded, labels, growth = [], [0] * len(known), [1.0] * len(known)
    while open_:
        thresholds = np.full(len(known), np.inf)
        for index in open_:
            least = known[index].threshold()
            threshold = tops[index] - steps[index]
            thresholds[index] = least if threshold < lowest else max(least, threshold)
        found = best_above(beliefs, thresholds, limits)
        for index in open_:
            one = known[index]
            one.offer(network, found.points[index])
            one.lower(max(float(thresholds[index]), float(found.dropped[index]), one.value))
            growth[index] = _growth(labels[index], int(found.labels[index]), growth[index])
            steps[index] *= growth[index]
            if found.dropped[index] == np.inf:
                crowded.append(one)
        labels = found.labels.tolist()
        open_ = [i for i in open_ if found.dropped[i] == -np.inf and not known[i].searched]
    return crowded


def _growth(before: int, labels: int, growth: float) -> float:
    """How much further to step for about twice as many labels, from what the last growth did to them."""
    if labels < _FEW_LABELS:
        return _FASTEST
    if before < _FEW_LABELS:
        return _USUAL
    slope = math.log(labels / before) / math.log(growth)
    return min(max(_SLOWEST, 2 ** (1 / slope)), _FASTEST) if slope > 0.1 else _FASTEST
