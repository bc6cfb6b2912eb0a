"""Laws of a training run: resumed, it ends with the same bits; processes that share a batch train as one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_mdp.errors import MdpError, UsageError
from onnx_mdp.training.recipes import RECIPES, Recipe, learning_rate, recipe

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from onnx_mdp.training.batched import Batched, freeze_unreached, takes_batches  # noqa: E402
from onnx_mdp.training.batches import Share  # noqa: E402
from onnx_mdp.training.data import DataOptions, TrainingData, open_data  # noqa: E402
from onnx_mdp.training.distributed import Group, process_group  # noqa: E402
from onnx_mdp.training.loop import Run, TrainResult, train  # noqa: E402
from onnx_mdp.training.losses import Objective, kinds_of, labelled_output  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ALONE = Group(Share(), torch.device("cpu"))
QUICK = Recipe(steps=12, batch=16, lr=0.02, warmup=0.2, ema=0.9)


class Tiny(nn.Module):
    """Two layers with a batch norm between them, as `OnnxModule` presents them."""

    def __init__(self, seed: int, *, norm: bool = True, rows: int | None = None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(4, 12, generator=draw) / 2)
        self.scale = nn.Parameter(torch.ones(12))
        self.shift = nn.Parameter(torch.zeros(12))
        self.last = nn.Parameter(torch.randn(12, 3, generator=draw) / 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(12))
        self.register_buffer("variance", torch.ones(12))
        self.norm, self.rows = norm, rows

    def run(
        self, feeds: Mapping[str, Tensor], gates: None = None, also: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        hidden = feeds["x"] @ self.first
        if self.norm:
            hidden = functional.batch_norm(
                hidden, self.mean, self.variance, self.scale, self.shift, self.training, 0.1
            )
        logits = functional.relu(hidden) @ self.last
        if self.rows is not None:
            logits = logits.reshape(self.rows, 3)
        return {"y": logits, "hidden": hidden}

    def weights(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def statistics(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    return open_data(
        DataOptions(points(tmp_path), batch=16), {"x": (1, 4)}, {"x": np.dtype("float32")}, Share()
    )


def points(folder: Path) -> str:
    """Three classes of points that a line parts."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((160, 4)).astype(np.float32)
    np.savez(folder / "points.npz", x=x, labels=(x @ rng.standard_normal((4, 3))).argmax(1))
    return str(folder / "points.npz")


def a_run(
    data: TrainingData,
    chosen: Recipe,
    *,
    teacher: bool = False,
    labels: bool = True,
    norm: bool = True,
    **more: Any,
) -> Run:
    network = Tiny(0, norm=norm)
    student = Batched(network)
    expert = Batched(Tiny(5, norm=norm)).eval() if teacher else None
    probe = data.probe()
    feeds = {"x": torch.from_numpy(probe.inputs["x"])}
    with torch.no_grad():
        kinds = kinds_of({"y": student.eval()(feeds)["y"]})
    assert probe.targets is not None
    labelled = labelled_output(kinds, torch.from_numpy(probe.targets), data.classes) if labels else None
    freeze_unreached(student, feeds)
    objective = Objective(chosen, kinds if teacher else (), (), labelled)
    return Run(student, expert, objective, chosen, more.pop("group", ALONE), **more)


def trained(run: Run, data: TrainingData, stop: int | None = None) -> TrainResult:
    def progress(stage: str, done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    return train(run, data, progress, lambda line: None)


def bits(run: Run) -> dict[str, bytes]:
    held = {**run.network.weights(), **run.network.statistics()}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in held.items()}


@pytest.mark.parametrize(
    ("optimizer", "stop"), [*(("adamw", stop) for stop in range(1, 12)), ("sgd", 1), ("sgd", 8)]
)
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, data: TrainingData, optimizer: str, stop: int
) -> None:
    chosen = replace(QUICK, optimizer=optimizer)
    whole = a_run(data, chosen, teacher=True)
    result = trained(whole, data)
    folder = tmp_path / "kept"
    folder.mkdir()
    every = 1 if stop % 2 else 3  # killed right after a checkpoint, or some steps later
    with pytest.raises(KeyboardInterrupt):
        trained(a_run(data, chosen, teacher=True, folder=folder, every=every), data, stop)
    again = a_run(data, chosen, teacher=True, folder=folder, every=every, resume=True)
    assert trained(again, data).history == result.history
    assert bits(again) == bits(whole)


@pytest.mark.parametrize(
    "changed", [{"lr": 0.01}, {"ema": 0.5}, {"optimizer": "sgd"}, {"clip": 0.01}, {"warmup": 0.0}], ids=str
)
def test_every_part_of_a_recipe_changes_the_bits(data: TrainingData, changed: dict[str, Any]) -> None:
    ours, theirs = a_run(data, QUICK), a_run(data, replace(QUICK, **changed))
    trained(ours, data)
    trained(theirs, data)
    assert bits(ours) != bits(theirs)


@pytest.mark.parametrize(("teacher", "labels"), [(False, True), (True, False)])
def test_training_brings_down_what_is_measured(data: TrainingData, teacher: bool, labels: bool) -> None:
    run = a_run(data, replace(QUICK, steps=80), teacher=teacher, labels=labels)
    result = trained(run, data)
    assert result.after.loss < 0.7 * result.before.loss
    assert result.after.accuracy is not None
    assert result.before.accuracy is not None
    assert result.after.accuracy > result.before.accuracy
    assert result.samples_per_second > 0


def test_the_best_weights_are_left_even_if_they_are_the_first(data: TrainingData) -> None:
    run = a_run(data, replace(QUICK, lr=5.0, ema=0.0, clip=0.0, optimizer="sgd"), teacher=True, labels=False)
    before = bits(run)
    with torch.no_grad():
        run.network.weights()["last"].copy_(run.teacher.network.weights()["last"])  # type: ignore[union-attr]
        for name, tensor in run.teacher.network.weights().items():  # type: ignore[union-attr]
            run.network.weights()[name].copy_(tensor)
    at_its_best = bits(run)
    result = trained(run, data)
    assert result.best_step == 0
    assert result.after == result.before
    assert bits(run) == at_its_best != before


def test_the_last_weights_are_left_if_asked_for(data: TrainingData) -> None:
    harmful = replace(QUICK, lr=5.0, ema=0.0, clip=0.0, optimizer="sgd")
    best, last = (trained(a_run(data, replace(harmful, weights=w)), data) for w in ("best", "last"))
    assert best.best_step < best.steps == last.best_step == last.steps
    assert last.after.loss > best.after.loss
    assert best.history == last.history


def test_patience_ends_a_run_that_gets_no_better(data: TrainingData) -> None:
    result = trained(a_run(data, replace(QUICK, steps=500, lr=0.0, patience=2)), data)
    assert result.stopped_early
    assert len(result.history) == 3


def test_a_loss_that_is_not_finite_ends_in_a_sentence(data: TrainingData) -> None:
    run = a_run(data, replace(QUICK, lr=1e30, optimizer="sgd", clip=0.0), norm=False)
    with pytest.raises(MdpError, match=r"the loss is not finite any more at step .*smaller --lr"):
        trained(run, data)


def test_a_label_beyond_the_scores_is_refused(tmp_path: Path, data: TrainingData) -> None:
    np.savez(tmp_path / "w.npz", x=np.ones((40, 4), np.float32), labels=np.arange(40))
    wrong = open_data(
        DataOptions(str(tmp_path / "w.npz"), batch=16), {"x": (1, 4)}, {"x": np.dtype("f4")}, Share()
    )
    with pytest.raises(UsageError, match=r"the data has the label \d+, but y scores 3 classes"):
        trained(a_run(data, QUICK), wrong)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, data: TrainingData) -> None:
    trained(a_run(data, QUICK, folder=tmp_path, identity={"lr": 1}), data)
    with pytest.raises(UsageError, match="of another run: lr was 1, is 2"):
        trained(a_run(data, QUICK, folder=tmp_path, identity={"lr": 2}, resume=True), data)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="is no readable checkpoint"):
        trained(a_run(data, QUICK, folder=tmp_path, identity={"lr": 1}, resume=True), data)


def test_weights_that_nothing_depends_on_are_left_alone(data: TrainingData) -> None:
    run = a_run(data, QUICK)
    assert not run.network.weights()["unused"].requires_grad
    trained(run, data)
    assert (run.network.weights()["unused"] == 1).all()


def test_bfloat16_trains_float32_weights(data: TrainingData) -> None:
    run = a_run(data, replace(QUICK, steps=60, precision="bfloat16"))
    result = trained(run, data)
    assert result.after.loss < result.before.loss
    assert all(weight.dtype == torch.float32 for weight in run.network.weights().values())


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_a_module_of_a_fixed_batch_is_run_piece_by_piece(rows: int | None) -> None:
    feeds = {"x": torch.randn(8, 4)}
    fixed, free = Tiny(0, rows=rows).eval(), Tiny(0).eval()
    assert takes_batches(fixed, feeds, rows or 1) == (rows is None)
    batched = Batched(fixed, rows)
    assert torch.allclose(batched(feeds)["y"], free.run(feeds)["y"], atol=1e-6)


LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def objective(tensor: Tensor, **more: Any) -> Objective:
    return Objective(Recipe(**more), kinds_of({"y": tensor}), (), None)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4), (6, 1), (6, 2, 3, 3)])
def test_a_model_is_at_no_distance_from_itself_and_at_some_from_others(shape: tuple[int, ...]) -> None:
    ours, theirs = torch.randn(shape), torch.randn(shape)
    assert float(objective(theirs).loss({"y": theirs}, {"y": theirs}, None)) == pytest.approx(0, abs=1e-6)
    assert float(objective(theirs).loss({"y": ours}, {"y": theirs}, None)) > 0.1


def test_probabilities_cost_what_their_logits_cost() -> None:
    by_logits = objective(LOGITS).loss({"y": OTHER}, {"y": LOGITS}, None)
    soft, other = LOGITS.softmax(1), OTHER.softmax(1)
    assert kinds_of({"y": soft})[0].form == "probabilities"
    assert torch.allclose(objective(soft).loss({"y": other}, {"y": soft}, None), by_logits, atol=1e-5)
    labels = torch.arange(5).repeat(2)[:6]
    for tensor in (LOGITS, soft):
        kind = kinds_of({"y": tensor})
        only = Objective(Recipe(), (), (), kind[0])
        assert torch.allclose(
            only.loss({"y": tensor}, None, labels), functional.cross_entropy(LOGITS, labels), atol=1e-5
        )


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_other_outputs_cost_the_same_in_any_unit(factor: float) -> None:
    theirs, ours = torch.linspace(-1, 1, 60).reshape(6, 10, 1), torch.linspace(-1, 2, 60).reshape(6, 10, 1)
    cost = objective(factor * theirs).loss({"y": factor * ours}, {"y": factor * theirs}, None)
    assert float(cost) == pytest.approx(
        float(objective(theirs).loss({"y": ours}, {"y": theirs}, None)), rel=1e-4
    )


def test_the_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    labels = torch.arange(6) % 5
    kinds = kinds_of({"y": LOGITS})
    both = Objective(Recipe(alpha=0.3, label_smoothing=0.1), kinds, (), kinds[0])
    parts = [both.loss({"y": OTHER[r]}, {"y": LOGITS[r]}, labels[r]) for r in (slice(0, 3), slice(3, 6))]
    assert torch.allclose(both.loss({"y": OTHER}, {"y": LOGITS}, labels), sum(parts) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "shape"), [((6,), (6, 5)), ((6, 3, 3), (6, 5, 3, 3)), ((6, 5), (6, 5)), ((6, 4), (6, 4))]
)
def test_targets_find_their_output(targets: tuple[int, ...], shape: tuple[int, ...]) -> None:
    kinds = kinds_of({"a": torch.randn(6, 7, 2), "b": torch.randn(shape)})
    values = torch.zeros(targets) if targets == shape else torch.zeros(targets, dtype=torch.int64)
    assert labelled_output(kinds, values, None).name == "b"
    with pytest.raises(UsageError, match="fit no output of the model"):
        labelled_output(kinds[:1], values, None)


def test_class_folders_must_be_as_many_as_scores() -> None:
    with pytest.raises(UsageError, match="10 class folders, but output y scores 5 classes"):
        labelled_output(kinds_of({"y": LOGITS}), torch.zeros(6, dtype=torch.int64), 10)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_rates_rise_to_the_base_rate_and_fall(name: str, steps: int) -> None:
    chosen = RECIPES[name]
    rates = [learning_rate(chosen, step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(chosen.lr)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) >= 0


def test_a_recipe_is_a_preset_and_what_overrides_it() -> None:
    assert recipe("resnet50", {"epochs": 3.0, "lr": None}) == replace(RECIPES["resnet50"], epochs=3.0)
    assert recipe("resnet50", {"batch": 256}).lr == pytest.approx(1.024 / 4)
    assert recipe("resnet50", {"batch": 256, "lr": 0.5}).lr == 0.5


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("resnet", {}, "choose one of default, resnet50"),
        ("default", {"epoch": 1}, "a recipe has no 'epoch'; it has optimizer"),
        ("default", {"batch": "64"}, "batch of a recipe is a number, not '64'"),
        ("default", {"epochs": 1.0, "steps": 3}, "not both"),
        ("default", {"optimizer": "adam"}, "choose one of adamw, sgd"),
        ("default", {"lr": math.nan}, "--lr nan is not between"),
        ("default", {"weights": "first"}, "--weights 'first' is unknown; choose one of best, last"),
        ("default", {"weights": "last", "patience": 3}, "leave it out, or --weights last"),
        ("default", {"label_smoothing": 2.0}, "--label-smoothing 2.0 is not between 0 and 1"),
        ("default", {"epochs": 0.0}, "--epochs must be larger than 0"),
    ],
)
def test_a_wrong_recipe_is_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(name, given)


SHARED = Recipe("sgd", 0.05, steps=20, batch=16, ema=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("statistics", [False, True], ids=["norms frozen", "no norms"])
def test_two_processes_train_what_one_trains(tmp_path: Path, data: TrainingData, statistics: bool) -> None:
    """Batch norms that take the statistics of their own half of a batch are the exception."""
    alone = a_run(data, SHARED, teacher=True, norm=not statistics, statistics=statistics)
    result = trained(alone, data)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29655",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = [__file__, str(tmp_path), str(int(statistics))]
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = dict(np.load(tmp_path / "weights.npz"))
    assert theirs.pop("score") == pytest.approx(result.after.loss, rel=1e-5)
    for name, weight in alone.network.weights().items():
        assert np.abs(theirs[name] - weight.detach().numpy()).max() <= 1e-5


def main(folder: Path, statistics: bool) -> None:
    """What each of the two processes runs."""
    with process_group("cpu") as group:
        options = DataOptions(str(folder / "points.npz"), batch=16)
        mine = open_data(options, {"x": (1, 4)}, {"x": np.dtype("float32")}, group.share)
        run = a_run(mine, SHARED, teacher=True, norm=not statistics, statistics=statistics, group=group)
        result = trained(run, mine)
        if group.main:
            weights = {name: weight.detach().numpy() for name, weight in run.network.weights().items()}
            np.savez(folder / "weights.npz", score=result.after.loss, **weights)


if __name__ == "__main__":
    main(Path(sys.argv[1]), bool(int(sys.argv[2])))
