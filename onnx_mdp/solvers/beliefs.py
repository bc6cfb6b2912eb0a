"""Bounds on every tuple of a network by a pool of multipliers, for one budget or several at once.

What a choice through a tuple is worth without its cost, ``max value − λ·cost``, depends on no budget:
``λ·allowance`` is added. So one downward pass, with the multipliers of all budgets as its rows, bounds the
tuples for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_mdp.solvers.buckets import Floats
from onnx_mdp.solvers.network import Network

__all__ = ["Beliefs", "Budgets", "Ints", "Tuples", "find_beliefs"]

Ints = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Budgets:
    """Allowances float64[budgets, resources], multipliers float64[rows, resources], and which of them each
    budget is judged by, intp[budgets, judges], its best first.
    """

    allowances: Floats
    pool: Floats
    judges: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Tuples:
    """The tuples of a bucket that may be part of a choice above the threshold of a budget.

    ``flat`` are their indices and ``budget`` whose they are (a tuple may occur for several); ``upper``
    float64[judges, tuples] is what a choice through them reaches at most, and ``least``
    float64[resources, tuples] what it costs at least.
    """

    flat: Ints
    budget: Ints
    upper: Floats
    least: Floats

    def above(self, thresholds: Floats) -> NDArray[np.bool_]:
        """Which of them may be part of a choice above the threshold, float64[budgets]."""
        reach: NDArray[np.bool_] = self.upper.min(axis=0) > thresholds[self.budget]
        return reach


@dataclass(frozen=True, slots=True, eq=False)
class Beliefs:
    """The tuples of every bucket; the upward messages of the value for each row of the pool,
    float64[rows, separator], and those of the cost, float64[resources, separator].
    """

    network: Network
    budgets: Budgets
    tuples: tuple[Tuples, ...]
    upward: tuple[Floats, ...]
    cheapest: tuple[Floats, ...]

    def surviving(self, thresholds: Floats) -> list[Ints]:
        """The local options of each variable through which a choice above a threshold may lead."""
        kept: list[Ints] = [np.zeros(0, np.intp)] * len(self.network.sizes)
        for bucket, tuples in zip(self.network.buckets, self.tuples, strict=True):
            alive = tuples.flat[tuples.above(thresholds)]
            kept[bucket.scope[0]] = np.unique(alive // max(1, bucket.entries // bucket.shape[0]))
        return kept

    def bounds(self) -> Floats:
        """Upper bounds float64[budgets] of every choice above the thresholds of the beliefs; −inf: none."""
        least = np.full(len(self.budgets.allowances), np.inf)
        for tuples in self.tuples:
            top = np.full(len(least), -np.inf)
            np.maximum.at(top, tuples.budget, tuples.upper.min(axis=0))
            least = np.minimum(least, top)
        return least


def find_beliefs(network: Network, budgets: Budgets, thresholds: Floats) -> Beliefs:
    """Bound every tuple; keep those that may be part of a choice above a threshold, float64[budgets]."""
    rows, resources = budgets.pool.shape
    weights = np.append(np.ones(rows), np.zeros(resources))
    theta = network.theta(np.vstack([budgets.pool, np.eye(resources)]), weights)
    messages = network.ascend(theta, len(weights))
    allowances = budgets.allowances - network.cost
    extra = (budgets.pool[budgets.judges] * allowances[:, None]).sum(axis=2) + network.value
    needed = thresholds - extra[:, 0]
    pieces: list[list[tuple[Ints, Ints, Floats, Floats]]] = [[] for _ in network.buckets]

    def take(index: int, first: int, block: Floats) -> None:
        lines = block.reshape(len(block), -1)
        budget, found = np.nonzero(lines[budgets.judges[:, 0]] > needed[:, None])
        upper = lines[budgets.judges[budget].T, found] + extra[budget].T
        least = network.cost[:, None] - lines[rows:, found]
        promising = (upper > thresholds[budget]).all(axis=0)
        promising &= (least <= budgets.allowances[budget].T).all(axis=0)
        flat = found + first * (lines.shape[1] // block.shape[1])
        pieces[index].append((flat[promising], budget[promising], upper[:, promising], least[:, promising]))

    network.descend(theta, messages, take)
    tuples = tuple(_tuples(piece) for piece in pieces)
    return Beliefs(
        network, budgets, tuples, tuple(m[:rows] for m in messages), tuple(m[rows:] for m in messages)
    )


def _tuples(pieces: Sequence[tuple[Ints, Ints, Floats, Floats]]) -> Tuples:
    flat, budget, upper, least = zip(*pieces, strict=True)
    return Tuples(
        np.concatenate(flat),
        np.concatenate(budget),
        np.concatenate(upper, axis=1),
        np.concatenate(least, axis=1),
    )
