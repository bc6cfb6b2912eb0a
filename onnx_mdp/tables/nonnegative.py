"""Least squares with non-negative coefficients, for a handful of columns, in numpy: boards have no scipy.

The active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23): a coefficient
enters where the error falls fastest, and those that would become negative leave again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["nonnegative_least_squares"]

Vector = npt.NDArray[np.float64]

_MOST_STEPS = 3  # for each column


def nonnegative_least_squares(system: npt.NDArray[np.float64], target: Vector) -> Vector:
    """The ``float64[n]`` x >= 0 with the least ``|system @ x - target|``; ``system`` is ``float64[m, n]``."""
    count = system.shape[1]
    solution, active = np.zeros(count), np.zeros(count, np.bool_)
    tolerance = 10 * np.finfo(np.float64).eps * np.abs(system).sum(0).max(initial=0.0) * max(system.shape)
    for _ in range(_MOST_STEPS * count):
        slope = system.T @ (target - system @ solution)
        slope[active] = -np.inf
        enters = int(np.argmax(slope))
        if slope[enters] <= tolerance * np.abs(target).max(initial=0.0):
            break
        active[enters] = True
        while True:
            wanted = np.zeros(count)
            wanted[active] = np.linalg.lstsq(system[:, active], target, rcond=None)[0]
            falls = active & (wanted <= 0.0)
            if not falls.any():
                break
            step = (solution[falls] / np.maximum(solution[falls] - wanted[falls], 1e-300)).min()
            solution = solution + step * (wanted - solution)
            active &= solution > np.finfo(np.float64).eps * solution.max()
            solution[~active] = 0.0
        solution = wanted
    return solution
