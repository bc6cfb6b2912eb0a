"""What related networks share: a layer that another model of the same device has was measured already.

Layers of one shape cost the same wherever they stand. Where another model in the store has most of a model's
shape keys, as a ResNet-50 has of a ResNet-101, its runs join the fit, and few variants of the model itself
are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx_mdp.tables.cost_terms import CostTerm
from onnx_mdp.tables.lut_store import LutStore, Run

__all__ = ["OWN_VARIANTS", "Fit", "Related", "related_runs"]

_ENOUGH = 0.8  # of the shape keys
OWN_VARIANTS = 4  # the unpruned model, the smallest, and two at random


@dataclass(frozen=True, slots=True)
class Fit:
    """What a calibration belongs to, beside its model: other seeds or variants have other coefficients.

    ``method`` numbers the ways in which coefficients were found by one version after another.
    """

    seed: int
    variants: int
    method: int = 0

    def name(self, key: str, related: Related | None) -> str:
        """The name under which the calibration is kept."""
        method = f".fit{self.method}" if self.method else ""
        return f"{key}.{self.seed}.{self.variants}{method}" + (f".{related.model_hash}" if related else "")


@dataclass(frozen=True, slots=True)
class Related:
    """The model that shares the most, the share of the shape keys that it has, and its runs."""

    model_hash: str
    share: float
    runs: tuple[Run, ...]


def related_runs(
    store: LutStore, context: Mapping[str, str | int], key: str, terms: Iterable[CostTerm], fit: Fit
) -> Related | None:
    """The model of this context that has the most of the shape keys of ``terms``, if these are enough.

    A model that was calibrated together with another stays with it, so that a table does not change with what
    else is measured; one that has all variants of its own needs none. Only a model that has all of its own is
    asked, so that no fit leans on one that leans itself.
    """
    if len(_runs(store, context, key, fit)) >= fit.variants:
        return None
    wanted = {term.key for term in terms}
    found = []
    for other in store.models(context):
        runs = _runs(store, context, other, fit)
        shared = wanted & {sample.key for run in runs for sample in run.samples}
        share = len(shared) / max(1, len(wanted))
        if other != key and len(runs) >= fit.variants and share >= _ENOUGH:
            found.append(Related(other, share, runs))
    return max(found, key=lambda r: (_calibrated(store, context, key, fit, r), r.share), default=None)


def _runs(store: LutStore, context: Mapping[str, str | int], key: str, fit: Fit) -> tuple[Run, ...]:
    return tuple(r for r in store.runs(context, key) if r.seed == fit.seed and r.variant < fit.variants)


def _calibrated(
    store: LutStore, context: Mapping[str, str | int], key: str, fit: Fit, related: Related
) -> bool:
    return store.get_calibration(context, fit.name(key, related)) is not None
