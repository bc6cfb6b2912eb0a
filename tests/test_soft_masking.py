"""Laws of training with masks: what is trained is what is sliced, and units come back where they may."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Run, is_refused, patiently
from zoo import analyse, random_plan, text_model

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MdpError, UsageError
from onnx_mdp.importance.scoring import Importance, score
from onnx_mdp.model_io import model_bytes
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.planning.closed_loop import Request
from onnx_mdp.shapes_data import shapes
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.calibrating import Calibration
from onnx_mdp.tables.cost_terms import cost_terms
from onnx_mdp.tables.granularity import unit_choices
from onnx_mdp.tables.latency import LatencyTable, predict_ms
from onnx_mdp.tables.variants import full_variant, variant_of_plan

torch = pytest.importorskip("torch")

from onnx_mdp.training.batches import Share  # noqa: E402
from onnx_mdp.training.bridge import to_torch  # noqa: E402
from onnx_mdp.training.data import DataOptions  # noqa: E402
from onnx_mdp.training.distributed import Group, process_group  # noqa: E402
from onnx_mdp.training.finetuning import FinetuneRequest, finetune  # noqa: E402
from onnx_mdp.training.masks import MaskedNetwork, Masks, Schedule  # noqa: E402
from onnx_mdp.training.recipes import Recipe  # noqa: E402
from onnx_mdp.training.soft_masking import Budgets, MaskedResult, train_with_masks  # noqa: E402

NET = """
(float[batch,3,8,8] x) => (float[batch,4] y)
<float[24,3,3,3] w0, float[24] s0, float[24] b0, float[24] mean0, float[24] var0,
 float[32,24,3,3] w1, float[32] s1, float[32] b1, float[32] mean1, float[32] var1,
 float[24,32,3,3] w2, float[24] b2, float[32,24,1,1] w3, float[32] b3, float[4,32] w4, float[4] b4>
{
  a0 = Conv <pads: ints = [1,1,1,1]> (x, w0)
  a1 = BatchNormalization (a0, s0, b0, mean0, var0)
  a = Relu (a1)
  c0 = Conv <pads: ints = [1,1,1,1]> (a, w1)
  c1 = BatchNormalization (c0, s1, b1, mean1, var1)
  c = Relu (c1)
  d = Conv <pads: ints = [1,1,1,1]> (c, w2, b2)
  e = Add (a, d)
  f0 = Conv (e, w3, b3)
  f = Relu (f0)
  g = GlobalAveragePool (f)
  h = Flatten (g)
  y = Gemm <transB: int = 1> (h, w4, b4)
}
"""
pytestmark = pytest.mark.usefixtures("one_torch_thread")

ALONE = Group(Share(), torch.device("cpu"))
QUICK = Recipe(steps=24, batch=16, lr=5e-3, warmup=0.1)
TYPES = {"x": np.dtype("float32")}
STEP = 4
DEMO = Path(str(files("onnx_mdp") / "demo_model" / "shapes_resnet.onnx"))


@functools.cache
def net() -> Structure:
    return analyse(text_model(NET))[1]


@functools.cache
def table() -> LatencyTable:
    """A device whose time is the number of multiplications, in blocks of four channels."""
    structure, areas = net(), {}
    for term in cost_terms(structure):
        operation = structure.shadow.operations[term.operation]
        if operation.op_type in ("Conv", "Gemm"):
            kernel = float(np.prod(structure.shadow.shapes[operation.inputs[1]][2:]))
            areas[term.key] = kernel * (64 if operation.op_type == "Conv" else 1)
    return ideal(structure, areas)


def ideal(structure: Structure, areas: Mapping[str, float]) -> LatencyTable:
    """A table of an exact device; ``areas`` is what each pair of channels takes."""
    coefficients = {key: (0.0, 0.0, 0.0, 1e-6 * STEP * STEP * area, 0.0, 0.0) for key, area in areas.items()}
    choices = {i: unit_choices(structure.dimensions[i], STEP, 16) for i in structure.prunable}
    exact = Calibration(1.0, 0.001, 1.0, 0.0, 0.0, 0.0)
    terms = cost_terms(structure)
    found = LatencyTable({"device": "ideal"}, "table", STEP, terms, coefficients, exact, choices, 0, 0.0)
    base_ms = predict_ms(found, structure, full_variant(structure))
    return replace(found, calibration=replace(exact, base_ms=base_ms))


@functools.cache
def magnitudes() -> Importance:
    return score(net(), "magnitude")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four classes of noisy patterns."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 320)
    patterns = rng.standard_normal((4, 3, 8, 8))
    x = (patterns[labels] + rng.standard_normal((320, 3, 8, 8))).astype(np.float32)
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    np.savez(path, x=x, labels=labels)
    return str(path)


def masked(pictures: str, mode: str = "soft", ratio: float = 0.5, **more: Any) -> MaskedResult:
    stop = more.pop("stop", None)

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == stop:
            raise KeyboardInterrupt

    request = FinetuneRequest(more.pop("recipe", QUICK), DataOptions(pictures, batch=16), **more)
    return train_with_masks(
        net(),
        None,
        net().shadow.inputs,
        TYPES,
        request,
        Schedule(mode, redecide=3),
        Budgets(net(), table(), Request(target_ratio=ratio)),
        ALONE,
        progress,
        lambda line: None,
        first=magnitudes,
    )


def kept(plan: PruningPlan) -> np.ndarray:
    return ~removed_classes(plan, net())


@pytest.mark.parametrize("mode", ["iterative", "one-shot", "soft"])
def test_the_slim_model_is_the_masked_one_and_within_its_budget(pictures: str, mode: str) -> None:
    result = masked(pictures, mode)
    assert result.evidence is not None
    assert result.evidence.verified
    assert result.training.error < 1e-5  # ONNX Runtime of the slim file, torch of the masked network
    full = predict_ms(table(), net(), variant_of_plan(net(), PruningPlan(keep={})))
    assert predict_ms(table(), net(), variant_of_plan(net(), result.plan)) <= 0.5 * full
    run = result.training.run
    assert run.after.loss < run.before.loss
    last = result.decisions[-1]
    assert last.step == (0 if mode == "one-shot" else 16) <= run.best_step
    assert last.masked == int((~kept(result.plan)).sum())


class Drawn(Budgets):
    """Decides at random, for the law holds of any plan."""

    calls = 0

    def __call__(
        self, importance: Importance, share: float, before: PruningPlan | None, last: bool
    ) -> PruningPlan:
        """Without labels the first slopes are those of a model at its own minimum."""
        assert all(np.isfinite(scores).all() for scores in importance.units.values())
        assert importance.total > 1e-9
        assert (importance.criterion == "magnitude") == (self.calls == 0)
        self.calls += 1
        return random_plan(self.structure, np.random.default_rng(round(1000 * share) + last))


@pytest.mark.parametrize("exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_a_transformer_is_trained_as_it_is_sliced(
    exported: Callable[..., Path], tmp_path: Path, exporter: str
) -> None:
    model, structure = analyse(exported("deit_micro", exporter, dynamic_batch=exporter == "torchscript"))
    ((name, shape),) = structure.shadow.inputs.items()
    images = np.random.default_rng(0).standard_normal((40, *shape[1:])).astype(np.float32)
    np.savez(tmp_path / "images.npz", **{name: images})
    request = FinetuneRequest(replace(QUICK, steps=6, batch=4), DataOptions(str(tmp_path / "images.npz")))
    areas = dict.fromkeys((term.key for term in cost_terms(structure)), 1.0)
    result = train_with_masks(
        structure,
        model,
        structure.shadow.inputs,
        {name: np.dtype("float32")},
        request,
        Schedule(redecide=1),
        Drawn(structure, ideal(structure, areas), Request(target_ratio=0.5)),
        ALONE,
        lambda *_: None,
        lambda line: None,
    )
    assert result.evidence is not None
    assert result.evidence.verified
    assert result.training.error < 1e-5
    assert len({structure.dimensions[structure.index(d)].kind for d in result.plan.keep}) >= 3


def test_inserted_batch_norms_fold_back_into_what_is_sliced(pictures: str) -> None:
    result = masked(pictures, insert_norms=True)
    assert result.evidence is not None
    assert result.evidence.verified
    assert result.training.error < 1e-5
    assert result.training.run.after.loss < result.training.run.before.loss


def test_budgets_come_down_to_the_target(pictures: str) -> None:
    result = masked(pictures)
    shares = [decision.share for decision in result.decisions]
    assert [decision.step for decision in result.decisions] == [3, 6, 9, 12, 15, 16]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[2:] == [1.0] * 4


def test_one_shot_is_the_training_of_the_sliced_model(pictures: str) -> None:
    """To rounding, for sums over zeros are sums in another order; AdamW would make signs of it."""
    recipe = replace(QUICK, optimizer="sgd", lr=0.02)
    result = masked(pictures, "one-shot", recipe=recipe)
    slim = rewrite(net(), result.plan)
    request = FinetuneRequest(recipe, DataOptions(pictures, batch=16))
    shapes = net().shadow.inputs
    alone = finetune(slim, None, shapes, TYPES, request, ALONE, lambda *_: None, lambda line: None)
    assert [e["step"] for e in alone.run.history] == [e["step"] for e in result.training.run.history]
    for ours, theirs in zip(result.training.run.history, alone.run.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    trained, wanted = (to_torch(m).weights() for m in (result.training.model, alone.model))
    assert trained.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-3, atol=1e-4)


class Scripted:
    """Takes the same units away in the first decision, and then leaves it to others."""

    def __init__(self, first: PruningPlan, then: Budgets) -> None:
        self.first, self.then, self.calls = first, then, 0

    def __call__(
        self, importance: Importance, share: float, before: PruningPlan | None, last: bool
    ) -> PruningPlan:
        self.calls += 1
        return self.first if self.calls == 1 else self.then(importance, share, before, last)


def rounds(mode: str, first: PruningPlan, ratio: float, scale: Importance | None = None) -> Masks:
    """Decisions without training, on what two batches say."""
    torch.manual_seed(0)
    network = MaskedNetwork(net(), ALONE.device).eval()
    budgets = Budgets(net(), table(), Request(target_ratio=ratio))
    schedule, decide = Schedule(mode, redecide=2), Scripted(first, budgets)
    masks = Masks(net(), network, schedule, 9, decide, ALONE, scale=scale)
    for step in range(1, 7):
        network.run({"x": torch.randn(16, 3, 8, 8)})["y"].square().sum().backward()
        masks.advance(step)
    return masks


def test_a_unit_that_is_worth_most_comes_back(pictures: str) -> None:
    dimension = net().dimensions[net().prunable[0]]
    best = int(np.argmax(rounds("soft", PruningPlan(keep={}), 1.0).importance().units[net().prunable[0]]))
    others = tuple(unit for unit in range(len(dimension.units)) if unit != best)
    masks = rounds("soft", PruningPlan(keep={dimension.name: others}), 0.6)
    first, second = masks.decisions[:2]
    assert (first.masked, first.returned) == (1, 0)
    assert second.returned == 1
    assert best in masks.plan.keep.get(dimension.name, range(99))


def test_a_block_that_is_worth_most_comes_back() -> None:
    block = net().blocks[0].name
    masks = rounds("soft", PruningPlan(keep={}, removed_blocks=(block,)), 0.95)
    assert masks.decisions[0].blocks == (block,)
    assert masks.decisions[-1].blocks == ()


def test_slopes_order_units_and_a_measured_importance_says_what_ranks_are_worth() -> None:
    feeds = [{"x": np.random.default_rng(n).standard_normal((2, 3, 8, 8), np.float32)} for n in range(2)]
    scale = score(net(), "drift", feeds)
    alone, scaled = (rounds("soft", PruningPlan(keep={}), 1.0, how).importance() for how in (None, scale))
    assert scaled.blocks == scale.blocks
    for index, worth in scaled.units.items():
        np.testing.assert_array_equal(np.sort(worth), np.sort(scale.units[index]))
        assert (np.diff(worth[np.argsort(-alone.units[index], kind="stable")]) <= 0).all()


@pytest.mark.parametrize("ratio", [0.95, 0.6, 0.3])
def test_what_went_never_comes_back_where_it_may_not(ratio: float) -> None:
    dimension, block = net().dimensions[net().prunable[0]], net().blocks[0].name
    for first in (
        PruningPlan(keep={dimension.name: tuple(range(1, len(dimension.units)))}),
        PruningPlan(keep={}, removed_blocks=(block,)),
    ):
        masks = rounds("iterative", first, ratio)
        assert len(masks.decisions) == 3
        assert not any(decision.returned for decision in masks.decisions)
        assert not (kept(masks.plan) & ~kept(first)).any()
        assert set(first.removed_blocks) <= set(masks.plan.removed_blocks)


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5, 0.3])
def test_a_way_in_steps_ends_where_one_step_does_as_long_as_scores_stay(ratio: float) -> None:
    decide = Budgets(net(), table(), Request(target_ratio=ratio))
    at_once = decide(magnitudes(), 1.0, PruningPlan(keep={}), True)
    plan = PruningPlan(keep={})
    for share in (0.3, 0.6, 0.9, 1.0):
        plan = decide(magnitudes(), share, plan, share == 1.0)
    np.testing.assert_array_equal(kept(plan), kept(at_once))
    assert set(plan.removed_blocks) == set(at_once.removed_blocks)


def test_scores_are_slopes_of_the_loss_at_the_gates_open_or_shut() -> None:
    network = MaskedNetwork(net(), ALONE.device).eval().double()
    network.gates = network.gates.double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gates = torch.ones(len(network.gates), dtype=torch.float64)
    gates[2:40:5] = 0.0

    def loss(values: Any) -> float:
        network.set_gates(values, scored=False)
        return float(network.run({"x": x})["y"].square().sum())

    unit = int(net().dimensions[net().prunable[0]].units[0])
    for place in (unit, 7, 12, 33, len(gates) - 1):
        network.set_gates(gates, scored=True)
        network.run({"x": x})["y"].square().sum().backward()
        slope = float(network.gates.grad[place])
        moved = [gates.clone(), gates.clone()]
        moved[0][place] += 1e-6
        moved[1][place] -= 1e-6
        with torch.no_grad():
            assert slope == pytest.approx((loss(moved[0]) - loss(moved[1])) / 2e-6, rel=1e-4, abs=1e-6)


def test_the_same_seed_gives_the_same_bits_also_when_killed_and_resumed(
    pictures: str, tmp_path: Path
) -> None:
    whole, again = masked(pictures), masked(pictures)
    assert model_bytes(whole.training.model) == model_bytes(again.training.model)
    for stop in (4, 9, 20):
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            masked(pictures, checkpoint=folder, every=1, stop=stop)
        resumed = masked(pictures, checkpoint=folder, every=1, resume=True)
        assert resumed.decisions == whole.decisions
        assert model_bytes(resumed.training.model) == model_bytes(whole.training.model)
    with pytest.raises(UsageError, match="masks"):
        masked(pictures, "iterative", checkpoint=folder, every=1, resume=True)


def test_a_target_that_nothing_meets_is_refused(pictures: str) -> None:
    with pytest.raises(MdpError, match="no structure takes"):
        masked(pictures, "one-shot", 1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "hard"}, "--mode 'hard' is unknown"),
        ({"redecide": 0}, "--redecide 0"),
        ({"settle": 1.0}, "--schedule needs two shares"),
        ({"tighten": 0.9}, "--schedule needs two shares"),
        ({"comeback": 0.0}, "comeback is a share"),
    ],
)
def test_a_schedule_without_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(Schedule(), **wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--mode", "soft"), "need --finetune"),
        (("--finetune", "--redecide", 5), "need --mode soft or iterative"),
        (("--finetune", "--mode", "hard"), "--mode 'hard' is unknown"),
        (("--finetune", "--mode", "soft", "--schedule", "0.5"), "is not TIGHTEN,SETTLE"),
        (("--finetune", "--mode", "soft", "--schedule", "0.9,0.5"), "--schedule needs two shares"),
        (("--finetune", "--mode", "soft", "--features", "*"), "before they are masked"),
        (("--finetune", "--mode", "soft", "--repair", "bias"), "--repair is for a model that is sliced"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_before_measuring(
    run: Run, pictures: str, tmp_path: Path, given: tuple[object, ...], message: str
) -> None:
    onnx.save(text_model(NET), tmp_path / "m.onnx")
    found = run("prune", "m.onnx", "--target-ratio", 0.5, "--data", pictures, "-q", *given)
    is_refused(found, 2, message)
    assert not (tmp_path / "lut.sqlite").exists()


def another_run(folder: Path) -> None:
    """A folder that holds what looks like a checkpoint."""
    folder.mkdir()
    (folder / "checkpoint.safetensors").touch()


@pytest.mark.parametrize("mode", ["one-shot", "soft"])
def test_the_checkpoint_of_another_run_is_refused_before_measuring(
    run: Run, pictures: str, tmp_path: Path, mode: str
) -> None:
    onnx.save(text_model(NET), tmp_path / "m.onnx")
    another_run(tmp_path / "kept")
    how = ("--data", pictures, "--finetune", "--mode", mode, "--checkpoint", "kept", "-q")
    found = run("prune", "m.onnx", "--target-ratio", 0.5, *how)
    is_refused(found, 2, "kept holds a checkpoint", "--overwrite to begin anew")
    assert not (tmp_path / "lut.sqlite").exists()
    assert os.listdir(tmp_path / "kept") == ["checkpoint.safetensors"]


@pytest.mark.slow
def test_one_command_prunes_while_it_trains_to_the_measured_target(run: Run, tmp_path: Path) -> None:
    images, labels = shapes(200, 7)
    np.savez(tmp_path / "train.npz", image=images, labels=labels)
    how = ("--data", "train.npz", "--finetune", "--steps", 24, "--batch-size", 16, "--samples", 8)
    masked = ("--mode", "soft", "--redecide", 4, "--checkpoint", "kept")
    another_run(tmp_path / "kept")
    command = ("prune", DEMO, "--target-ratio", 0.6, *how, *masked, "-o", "slim.onnx", "--overwrite")
    found = patiently(lambda: run(*command, "--json"))
    assert found.code == 0, found.err
    assert found.document["verified"]
    assert len(found.document["finetuning"]["decisions"]) == 4
    checked = run("verify", DEMO, "slim.onnx", "slim.plan.json")
    assert checked.code == 0, checked.err
    again = patiently(lambda: run(*command, "--resume"))
    assert again.code == 0, again.err


SHARED = replace(QUICK, optimizer="sgd", lr=0.02)


def shared(pictures: str, group: Group) -> MaskedResult:
    """Batch norms keep their statistics, for each process would see those of its own half."""
    request = FinetuneRequest(SHARED, DataOptions(pictures, batch=16), frozen_statistics=True)
    budgets = Budgets(net(), table(), Request(target_ratio=0.5))
    schedule = Schedule(redecide=3)
    inputs = net().shadow.inputs
    return train_with_masks(
        net(), None, inputs, TYPES, request, schedule, budgets, group, lambda *_: None, lambda line: None
    )


@pytest.mark.slow
def test_two_processes_prune_what_one_prunes(pictures: str, tmp_path: Path) -> None:
    alone = shared(pictures, ALONE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"
    line = [*torchrun, __file__, pictures, str(tmp_path / "weights.npz")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = dict(np.load(tmp_path / "weights.npz"))
    ours = to_torch(alone.training.model).weights()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        np.testing.assert_allclose(theirs[name], weight.detach().numpy(), rtol=1e-3, atol=1e-4)


def main(pictures: str, output: str) -> None:
    """What each of the two processes runs."""
    with process_group("cpu") as group:
        result = shared(pictures, group)
        if group.main:
            weights = to_torch(result.training.model).weights()
            np.savez(output, **{name: weight.detach().numpy() for name, weight in weights.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
