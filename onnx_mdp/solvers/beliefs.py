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
    """Allowances float64[budgets, resources], and for each the multipliers that it is judged by,
    float64[budgets, rows, resources].
    """

    allowances: Floats
    pool: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Tuples:
    """The tuples of a bucket that may be part of a choice above the threshold of a budget.

    ``flat`` are their indices and ``budget`` whose they are (a tuple may occur for several); ``upper``
    float64[rows, tuples] is what a choice through them reaches at most, ``least`` float64[resources, tuples]
    what it costs at least.
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
    """The tuples of every bucket; the upward messages of the value for each budget and row,
    float64[budgets, rows, separator], and those of the cost, float64[resources, separator].
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
    count, rows, resources = budgets.pool.shape
    pool = budgets.pool.reshape(count * rows, resources)
    weights = np.append(np.ones(len(pool)), np.zeros(resources))
    theta = network.theta(np.vstack([pool, np.eye(resources)]), weights)
    messages = network.ascend(theta, len(weights))
    extra = np.einsum("bpr,br->bp", budgets.pool, budgets.allowances - network.cost) + network.value
    pieces: list[list[tuple[Ints, Ints, Floats, Floats]]] = [[] for _ in network.buckets]

    def take(index: int, first: int, block: Floats) -> None:
        lines = block.reshape(len(block), -1)
        upper = lines[: len(pool)].reshape(count, rows, -1) + extra[..., None]
        least = network.cost[:, None] - lines[len(pool) :]
        promising = (upper > thresholds[:, None, None]).all(axis=1)
        promising &= (least <= budgets.allowances[..., None]).all(axis=1)
        budget, found = np.nonzero(promising)
        flat = found + first * (lines.shape[1] // block.shape[1])
        pieces[index].append((flat, budget, upper[budget, :, found].T, least[:, found]))

    network.descend(theta, messages, take)
    split = [(m[: len(pool)].reshape(count, rows, *m.shape[1:]), m[len(pool) :]) for m in messages]
    tuples = tuple(_tuples(piece) for piece in pieces)
    return Beliefs(network, budgets, tuples, tuple(up for up, _ in split), tuple(low for _, low in split))


def _tuples(pieces: Sequence[tuple[Ints, Ints, Floats, Floats]]) -> Tuples:
    flat, budget, upper, least = zip(*pieces, strict=True)
    return Tuples(
        np.concatenate(flat),
        np.concatenate(budget),
        np.concatenate(upper, axis=1),
        np.concatenate(least, axis=1),
    )
