"""Scripts that reproduce the claims of speed and accuracy; each states its claim and checks it.

Run from the repository root, for example ``python -m benchmarks.latency_prediction``. Exit codes: 0 the
claim holds, or the machine was too noisy to say (*inconclusive*) · 1 it does not · 2 wrong usage.
"""

from __future__ import annotations

__all__: list[str] = []
