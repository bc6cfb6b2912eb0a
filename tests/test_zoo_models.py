"""The law on small networks of many architectures, exporters and opsets, 9 to 24.

Each is analysed and pruned under random constrained plans: as many units in every head, a multiple of the
channel block in some, with and without removed blocks. Each result must be smaller, valid, and equal to its
masked original. ``pytest -m slow tests/test_zoo_models.py -s`` runs all of them and prints the figures.
"""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from zoo import SMALL_MODELS, SmallModel, analyse, operands, random_plan, small_model

from onnx_mdp.model_io import model_bytes
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import verify

MULTIPLES = (1, 4, 2, 8, 1)  # of the units that stay, for each plan
CPU_SECONDS = 720  # two cores for six minutes
QUICK = {"paddle_mobilenet-imitation-11", "torch_one_detector-imitation-9", "tf_attention-imitation-13"}
QUICK |= {"keras_cnn-imitation-9", "shufflenet_v2_small-torchscript-9", "deit_micro-torchscript-14"}
MODELS = [pytest.param(model, id=str(model)) for model in SMALL_MODELS if str(model) in QUICK]


@dataclass(frozen=True)
class Figures:
    """For each plan the share of the weights that went, the error, and whether the law holds."""

    removed: tuple[float, ...]
    errors: tuple[float, ...]
    verified: tuple[bool, ...]
    seconds: float

    @property
    def pruned(self) -> bool:
        """Whether most plans removed something, and one of them more than a tenth."""
        return max(self.removed) > 0.1 and sum(share > 0 for share in self.removed) > len(self.removed) / 2


def weights_read(model: ir.Model) -> int:
    """Bytes of the weights, once for each node that reads them: levels that share a head are cut apart."""
    return sum(len(data) for _, _, data in operands(model))


@functools.cache
def examine(made: SmallModel) -> Figures:
    """Prune a model under every plan; an invalid result raises."""
    started = time.process_time()
    removed, errors, verified = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        model, structure = analyse(small_model(made, Path(folder)))
        for seed, multiple in enumerate(MULTIPLES):
            rng = np.random.default_rng(seed)
            plan = random_plan(structure, rng, blocks=seed % 2 == 1, least=0.2, multiple=multiple)
            pruned = rewrite(structure, plan)
            evidence = verify(model, structure, pruned, plan, seeds=(seed,))
            data = model_bytes(pruned)
            onnx.checker.check_model(data, full_check=True)
            session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            outputs = session.run(None, random_feeds(session, structure.shadow.inputs, seed))
            assert all(np.isfinite(output).all() for output in outputs)
            removed.append(1 - weights_read(pruned) / weights_read(structure.shadow.model))
            errors.append(evidence.worst)
            verified.append(evidence.verified)
    return Figures(tuple(removed), tuple(errors), tuple(verified), time.process_time() - started)


@pytest.mark.parametrize("made", MODELS)
def test_a_small_network_is_pruned_and_equals_its_masked_original(made: SmallModel) -> None:
    figures = examine(made)
    assert all(figures.verified), figures.errors
    assert figures.pruned, figures.removed


@pytest.mark.slow
def test_figures_of_all_small_networks() -> None:
    found = {made: examine(made) for made in SMALL_MODELS}
    assert [str(made) for made, f in found.items() if not all(f.verified)] == []
    smaller = sum(f.pruned for f in found.values())
    plans = [held for f in found.values() for held in f.verified]
    seconds = sum(f.seconds for f in found.values())
    kinds = len({made.architecture for made in found})
    worst = max(max(f.errors) for f in found.values())
    print(
        f"\n{len(found)} models of {kinds} architectures: {smaller} pruned, {sum(plans)} of {len(plans)} "
        f"plans verified, the largest error {worst:.1e}, {seconds:.0f} s of CPU"
    )
    assert len(found) >= 60
    assert smaller >= 0.95 * len(found)
    assert seconds <= CPU_SECONDS
