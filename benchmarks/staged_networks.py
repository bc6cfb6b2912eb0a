"""A network of the zoo through its stages: pruned to a measured latency, refitted, distilled; all is kept."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.finetuned import finetuned
from benchmarks.harness import note
from benchmarks.kept_models import Kept, Made
from benchmarks.model_files import model_path
from benchmarks.samples import samples_for, save_training_images
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.gradient_scores import GRADIENT_CRITERIA
from onnx_mdp.importance.scoring import CRITERIA, Criterion, Feeds, Progress, Scores, gradient_criterion
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.pipeline import analyze, prune
from onnx_mdp.planning.closed_loop import Request
from onnx_mdp.repairing.repair import repair
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.tables.lut_store import open_store

if TYPE_CHECKING:
    from onnx_mdp.training.finetuning import FinetuneRequest

__all__ = ["StagedNetwork"]

_RANKED_BY, _UNLABELLED = 64, 500


class StagedNetwork:
    """A model of the zoo, what it is pruned and trained to, and where that is kept."""

    def __init__(self, name: str, given: argparse.Namespace, kept: Kept, folder: Path) -> None:
        self._name, self._given, self._kept, self._folder = name, given, kept, folder
        self._model = load_model(model_path(name))
        self.base = model_bytes(self._model)
        self._criteria: dict[str, Criterion] = {}

    @cached_property
    def _structure(self) -> Structure:
        return analyze(self._model, {})

    @property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._structure.shadow.inputs

    @cached_property
    def _feeds(self) -> Feeds:
        return samples_for(self._name, 1, _UNLABELLED).calibration

    def pruned(self, criterion: str, ratio: float) -> Made:
        """The model before any repair, with its measured ratio and the noise of that."""
        return self._kept.made(self._label(criterion, ratio), lambda: self._prune(criterion, ratio))

    def refitted(self, criterion: str, ratio: float) -> bytes:
        """The pruned model after a repair by ``lstsq``."""
        self.pruned(criterion, ratio)  # which keeps this one first
        model, _ = self._kept.made(f"{self._label(criterion, ratio)}-lstsq", _never)
        return model

    def distilled(self, criterion: str, ratio: float) -> tuple[bytes, float]:
        """The refitted model after training, and the seconds that it took."""
        given, refitted = self._given, self.refitted(criterion, ratio)

        def train() -> Made:
            note(f"{self._name}, {criterion} at {ratio:g}: {given.steps} steps")
            model, seconds = finetuned(
                refitted, self.base, self._shapes, self._training(), self._kept.unfinished(label)
            )
            return model, {"seconds": seconds}

        label = f"{self._label(criterion, ratio)}-{given.steps}x{given.batch}-{given.lr:g}-{given.seed}"
        model, numbers = self._kept.made(label, train)
        return model, numbers["seconds"]

    def _label(self, criterion: str, ratio: float) -> str:
        return f"{self._name}-{criterion}-{ratio:g}"

    def _prune(self, criterion: str, ratio: float) -> Made:
        note(f"{self._name}, {criterion} at {ratio:g}: prune")
        request = Request(
            target_ratio=ratio,
            runtime=Runtime(threads=self._given.threads),
            criterion=self._criteria.setdefault(criterion, _scored_once(criterion)),
            seed=self._given.seed,
        )
        ranked = self._feeds[:: _UNLABELLED // _RANKED_BY][:_RANKED_BY]
        with open_store(self._folder / "store.sqlite") as store:
            found = prune(self._model, self._structure, request, store, feeds=ranked)
        if found.plan is None or found.model is None or found.measured_ms is None:
            raise UsageError(f"no plan of {self._name} reaches {ratio:g} of the latency")
        numbers = {"measured": found.measured_ms / found.base_ms, "noise": found.noise}
        note(f"{self._name}, {criterion} at {ratio:g}: lstsq")
        refit = repair(self._structure, found.plan, found.model, self._feeds, ("lstsq",))
        self._kept.made(f"{self._label(criterion, ratio)}-lstsq", lambda: (model_bytes(refit.model), numbers))
        return model_bytes(found.model), numbers

    def _training(self) -> FinetuneRequest:
        from onnx_mdp.training.data import DataOptions
        from onnx_mdp.training.finetuning import FinetuneRequest
        from onnx_mdp.training.recipes import recipe

        given = self._given
        archive, preprocess = save_training_images(self._name, self._folder / f"{self._name}.npz")
        options = DataOptions(
            str(archive), preprocess=preprocess, augment="crop", batch=given.batch, seed=given.seed
        )
        asked = {"steps": given.steps, "batch": given.batch, "lr": given.lr, "weights": "last"}
        # By KL divergence the network forgets the classes that no image is of; logits tell of all.
        return FinetuneRequest(recipe("default", asked), options, distances="mse")


def _scored_once(name: str) -> Criterion:
    """A criterion that is always asked about the same model and inputs."""
    criterion = gradient_criterion(name) if name in GRADIENT_CRITERIA else CRITERIA[name]
    found: list[Scores] = []

    def scored(structure: Structure, feeds: Feeds, progress: Progress) -> Scores:
        if not found:
            found.append(criterion(structure, feeds, progress))
        return found[0]

    scored.__name__ = name
    return scored


def _never() -> Made:
    raise UsageError("--kept holds a pruned model without its repair; give an empty folder")
