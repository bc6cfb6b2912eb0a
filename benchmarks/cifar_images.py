"""CIFAR-10 as the zoo's script writes it: images to rank units by, to train on, and to test on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnx_mdp.data.images import PREPROCESSINGS
from onnx_mdp.errors import UsageError
from onnx_mdp.running.runtime import Runtime, open_session

__all__ = ["BATCH", "PREPROCESSING", "Cifar"]

BATCH = 64
PREPROCESSING = "imagenet-nocrop"  # what the zoo's networks were trained with
_RANKED_BY = 1024


class Cifar:
    """CIFAR-10 from the archive that the zoo's script writes.

    ``archive`` are all training images in a random order, ``sample`` those of them that units are ranked by.
    """

    def __init__(self, path: Path, folder: Path, seed: int) -> None:
        if not path.is_file():
            raise UsageError(f"no file {path}; write it with `python ../shared/zoo/get_cifar10.py {path}`")
        with np.load(path) as held:
            self.train, labels = held["train_x"], held["train_y"]
            self.test, self.test_labels = held["test_x"], held["test_y"]
        order = np.random.default_rng(seed).permutation(len(labels))
        some = order[:_RANKED_BY]
        self.archive, self.sample = folder / "train.npz", folder / "sample.npz"
        for archive, rows in ((self.archive, order), (self.sample, some)):
            written = archive.with_name(f"{archive.stem}-{os.getpid()}.npz")  # others may read the archive
            np.savez(written, input=self.train[rows], labels=labels[rows])
            written.replace(archive)
        self.ranked, self.ranked_labels = self.inputs(self.train[some]), labels[some]

    @staticmethod
    def inputs(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """``uint8[n, h, w, 3]`` to what the networks take."""
        recipe = PREPROCESSINGS[PREPROCESSING]
        mean, std = np.asarray(recipe.mean, np.float32), np.asarray(recipe.std, np.float32)
        return np.ascontiguousarray(((levels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))

    def batches(self) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        """The images that units are ranked by."""
        for start in range(0, _RANKED_BY, BATCH):
            some = slice(start, start + BATCH)
            yield self.ranked[some], self.ranked_labels[some]

    def accuracy(self, model: bytes) -> float:
        """Top-1 on the test images."""
        session = open_session(model, Runtime(threads=2))
        name, hits = session.get_inputs()[0].name, 0
        for start in range(0, len(self.test), 500):
            scores = session.run(None, {name: self.inputs(self.test[start : start + 500])})[0]
            hits += int((scores.argmax(1) == self.test_labels[start : start + 500]).sum())
        return hits / len(self.test)
