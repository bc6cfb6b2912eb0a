"""Drafts of pruning problems whose latencies come from a model of a device and not from a measurement.

A GPU works in tiles and waves, a CPU in padded vectors; both move memory, and both have 1 % noise. Importance
is a cumulated, sorted lognormal score of every unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnx_mdp.planning.problem import Block, Factor, PruningProblem, Variable

__all__ = ["Device", "Draft"]

Device = Literal["gpu", "cpu", "params", "macs"]
Floats = NDArray[np.float64]

_NOISE = 0.01
_TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.85), (64, 64, 0.7), (64, 32, 0.5))


@dataclass
class Draft:
    """A problem being drawn; a resource of the builders of instances."""

    device: Device
    rng: np.random.Generator
    variables: list[Variable] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def dimension(self, name: str, full: int, group: int, *, removable: bool = False) -> int:
        widths = [*range(group, full, group), full]
        self.variables.append(Variable(name, tuple([0, *widths] if removable else widths)))
        return len(self.variables) - 1

    def widths(self, variable: int) -> Floats:
        return np.asarray(self.variables[variable].widths, np.float64)

    def worth(self, variable: int, scale: float, gate: int | None = None, sigma: float = 1.2) -> None:
        """What the units of a variable are worth, if the block of ``gate`` is there."""
        widths = self.widths(variable).astype(int)
        scores = np.sort(self.rng.lognormal(0.0, sigma, widths[-1]))[::-1]
        line = np.append(0.0, np.cumsum(scores / scores.sum() * scale))[widths]
        if gate is None:
            self.factors.append(Factor((variable,), line))
        else:
            there = self.widths(gate) > 0
            self.factors.append(Factor((gate, variable), there[:, None] * line[None]))

    def cost(self, scope: tuple[int, ...], microseconds: Floats) -> None:
        noise = self.rng.normal(0.0, _NOISE, microseconds.shape) if self.device in ("gpu", "cpu") else 0.0
        table = np.rint(1e3 * microseconds * np.exp(noise)).astype(np.int64)
        self.factors.append(Factor(scope, cost_ns=table))

    def product(self, rows: float, columns: Floats, inner: Floats) -> Floats:
        """Microseconds of a matrix product; no time where a width is 0."""
        columns, inner = np.broadcast_arrays(columns, inner)
        if self.device == "gpu":
            best = np.full(columns.shape, np.inf)
            for high, wide, share in _TILES:
                waves = np.ceil(np.ceil(rows / high) * np.ceil(columns / wide) / 80)
                best = np.minimum(best, waves * high * wide * np.ceil(inner / 32) * 64 / (1.3e6 * share))
            moved = 2 * (rows * inner + inner * columns + rows * columns)
            time = np.maximum(best, moved / 7.5e5) + 2.0
        elif self.device == "cpu":
            padded = 2 * np.ceil(rows / 6) * 6 * np.ceil(columns / 16) * 16 * np.ceil(inner / 4) * 4
            time = np.maximum(padded / 6e4, 4 * (rows * inner + inner * columns + rows * columns) / 1e4) + 1.0
        elif self.device == "params":
            time = columns * inner / 1e3
        else:
            time = 2 * rows * columns * inner / 1e6
        return np.where((columns <= 0) | (inner <= 0), 0.0, time)

    def layer(self, reads: int, makes: int, rows: float, kernel: int = 1) -> None:
        """A convolution or linear layer between two variables."""
        table = self.product(rows, self.widths(makes)[None], self.widths(reads)[:, None] * kernel**2)
        self.cost((reads, makes), table)

    def depthwise(self, variable: int, rows: float) -> None:
        widths = self.widths(variable)
        if self.device in ("params", "macs"):
            self.cost((variable,), widths * 9 / 1e3 if self.device == "params" else 18 * rows * widths / 1e6)
            return
        gpu = self.device == "gpu"
        padded = rows * np.ceil(widths / (32 if gpu else 16)) * (32 if gpu else 16)
        time = padded * (4 / 7.5e5 + 18 / 3e6 if gpu else 8 / 1e4 + 18 / 2e4) + 1.0
        self.cost((variable,), np.where(widths > 0, time, 0.0))

    def problem(self) -> PruningProblem:
        return PruningProblem(tuple(self.variables), tuple(self.factors), (), tuple(self.blocks))
