"""A CIFAR ResNet, pruned by every method to a measured speed, and trained; what was made is kept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from benchmarks.cifar_images import PREPROCESSING, Cifar
from benchmarks.contenders import FOR_REFIT
from benchmarks.finetuned import finetuned
from benchmarks.harness import note
from benchmarks.kept_models import Kept, Made
from benchmarks.measuring import table_from_nothing
from benchmarks.model_files import model_path
from benchmarks.pruners import Fast, Planner, Pruner, at_speed, uniforms
from benchmarks.torch_pruning_peer import torch_prunings
from onnx_mdp.importance.gradient_scores import GradientOptions
from onnx_mdp.importance.scoring import Importance, gradient_criterion, score
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.pipeline import analyze
from onnx_mdp.planning.programs import Programs
from onnx_mdp.running.runtime import Runtime

if TYPE_CHECKING:
    from onnx_mdp.training.finetuning import FinetuneRequest

Feed = dict[str, npt.NDArray[np.float32]]

__all__ = ["METHODS", "OURS", "REFITTED", "SHAPES", "CifarNetwork"]

SHAPES = {"input": (1, 3, 32, 32)}
REFITTED = "mdp_lstsq"
OURS = ("mdp", REFITTED, FOR_REFIT)
METHODS = (*OURS, "linear", "greedy", "uniform", "torch_pruning")
_PLANNED = {"mdp": "exact", "linear": "linear", "greedy": "greedy"}


class CifarNetwork:
    """The network of that name; ``given`` are the benchmark's arguments."""

    def __init__(self, name: str, given: argparse.Namespace, images: Cifar, kept: Kept) -> None:
        self.name, self._given, self._images, self._kept = name, given, images, kept
        model = load_model(model_path(name))
        self._structure, self.base = analyze(model, {}), model_bytes(model)
        self._runtime = Runtime(threads=given.threads)

    def fast(self, method: str, speedup: float) -> Fast:
        """The network, pruned by a method until it is as fast as asked."""
        if method == REFITTED:
            self.fast("mdp", speedup)  # which keeps this one first
        model, numbers = self._kept.made(self._label(method, speedup), lambda: self._pruned(method, speedup))
        return Fast(model, numbers["speedup"], numbers["noise"])

    def trained(self, method: str, speedup: float) -> tuple[bytes, float]:
        """The pruned network after training, and the seconds that it took."""
        given = self._given

        def train() -> Made:
            note(f"{self.name}, {method} at {speedup:g} times the speed: {given.steps} steps")
            model = self.fast(method, speedup).model
            unfinished = self._kept.unfinished(label)
            trained, seconds = finetuned(model, self.base, SHAPES, self._request(), unfinished)
            return trained, {"seconds": seconds}

        setting = f"{given.steps}x{given.batch}-{given.lr:g}-{given.precision}-{given.seed}"
        setting += "-whole" * given.whole
        label = f"{self._label(method, speedup)}-{setting}"
        model, numbers = self._kept.made(label, train)
        return model, numbers["seconds"]

    def _label(self, method: str, speedup: float) -> str:
        return f"{self.name}-{method}-{speedup:g}x"

    def _pruned(self, method: str, speedup: float) -> Made:
        note(f"{self.name}, {method} at {speedup:g} times the speed")
        pruners = self._pruners[method]
        fast = at_speed(pruners, self.base, SHAPES, speedup, self._runtime, self._given.seed)
        numbers = {"speedup": fast.speedup, "noise": fast.noise}
        if method not in ("mdp", FOR_REFIT) or not isinstance(pruners[0], Planner):
            return fast.model, numbers
        refitted = pruners[0].refitted(fast.model, self._feeds)
        if method == FOR_REFIT:
            return refitted, numbers
        self._kept.made(self._label(REFITTED, speedup), lambda: (refitted, numbers))
        return fast.model, numbers

    @cached_property
    def _pruners(self) -> dict[str, Sequence[Pruner]]:
        structure = self._structure
        importance = self._importance()
        table = table_from_nothing(structure, self._runtime, self._given.seed)

        def planner(solver: str, importance: Importance) -> Planner:
            return Planner(Programs(structure, importance, table), solver)

        pruners: dict[str, Sequence[Pruner]] = {
            method: [planner(solver, importance)] for method, solver in _PLANNED.items()
        }
        pruners[FOR_REFIT] = [planner("exact", score(structure, "refit", self._feeds))]
        pruners["uniform"] = uniforms(structure, importance, table)
        pruners["torch_pruning"] = torch_prunings(self.name, SHAPES["input"], "taylor", self._images.batches)
        return pruners

    @cached_property
    def _feeds(self) -> list[Feed]:
        return [{"input": image[None]} for image in self._images.ranked]

    def _importance(self) -> Importance:
        """Of the labels' loss, as Torch-Pruning's is."""
        labels = tuple(np.atleast_1d(label) for label in self._images.ranked_labels)
        return score(
            self._structure, gradient_criterion("taylor", GradientOptions(labels=labels)), self._feeds
        )

    def _request(self) -> FinetuneRequest:
        from onnx_mdp.training.data import DataOptions
        from onnx_mdp.training.finetuning import FinetuneRequest
        from onnx_mdp.training.recipes import recipe

        given = self._given
        options = DataOptions(
            str(self._images.archive),
            validation=str(self._images.sample) if given.whole else None,
            preprocess=PREPROCESSING,
            augment="crop",
            seed=given.seed,
            batch=given.batch,
        )
        asked = {"steps": given.steps, "lr": given.lr, "batch": given.batch, "precision": given.precision}
        fixed = {"optimizer": "sgd", "weight_decay": 5e-4, "weights": "last"}
        return FinetuneRequest(recipe("default", asked | fixed), options, insert_norms=True)
