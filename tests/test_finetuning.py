"""Fine-tuning pruned models for real: accuracy rises, the file stays what it was but for its weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Run, is_refused, patiently
from onnx import numpy_helper
from zoo import analyse, text_model

from onnx_mdp import torch_backend
from onnx_mdp.demo import accuracy
from onnx_mdp.files import write_text
from onnx_mdp.model_io import load_model, topology_hash
from onnx_mdp.pipeline import apply_plan
from onnx_mdp.plan import PruningPlan, plan_json
from onnx_mdp.shapes_data import shapes

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DEMO = Path(str(files("onnx_mdp") / "demo_model" / "shapes_resnet.onnx"))
LEARNED, CHECKED = 240, 120

NORMED = """
(float[n,3,8,8] x) => (float[n,4] y)
<float[6,3,3,3] w0, float[6] s, float[6] b, float[6] m, float[6] var, float[4,6] w1>
{
  a = Conv (x, w0)
  c = BatchNormalization (a, s, b, m, var)
  d = Relu (c)
  e = GlobalAveragePool (d)
  f = Flatten (e)
  y = Gemm <transB: int = 1> (f, w1)
}
"""
# The batch is in the file twice: as the input's and in the Reshape.
FIXED = (
    NORMED.replace("float[n,", "float[1,")
    .replace("Flatten (e)", "Reshape (e, shape)")
    .replace("float[4,6] w1>", "float[4,6] w1, int64[2] shape = {1, 6}>")
)


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with half of the channels inside its blocks, which names one picture in six."""
    model, structure = analyse(DEMO)
    inner = [d for d in structure.dimensions if not d.frozen and "branch/a" in d.name]
    assert len(inner) == 6
    plan = PruningPlan(keep={d.name: tuple(range(d.size // 2)) for d in inner})
    pruned, _ = apply_plan(model, structure, plan)
    path: Path = tmp_path_factory.mktemp("slim") / "slim.onnx"
    ir.save(pruned, path)
    write_text(plan_json(plan), path.with_name("plan.json"))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, count, seed in (("train", LEARNED, 11), ("val", CHECKED, 12)):
        images, labels = shapes(count, seed)
        np.savez(folder / f"{name}.npz", image=images, labels=labels)
        np.savez(folder / f"{name}_unlabelled.npz", image=images)
    return folder


def weights(path: Path) -> dict[str, np.ndarray]:
    initializers = load_model(path).graph.initializers
    return {name: v.const_value.numpy() for name, v in initializers.items() if v.const_value is not None}


def small(text: str, path: Path, seed: int = 0) -> Path:
    """A text model with drawn weights, at ``path``."""
    onnx.save(text_model(text, seed=seed), path)
    return path


def half(text: str, path: Path, seed: int) -> Path:
    """The same in float16."""
    model = text_model(text, seed=seed)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("labelled", [True, False], ids=["labels and original", "original alone"])
def test_accuracy_rises_and_only_weights_change(
    run: Run, tmp_path: Path, slim: Path, pictures: Path, labelled: bool
) -> None:
    kind = "" if labelled else "_unlabelled"
    data = ("--data", pictures / f"train{kind}.npz", "--val", pictures / f"val{kind}.npz")
    how = ("--steps", 30, "--batch-size", 16, "--lr", 5e-4)
    found = run("finetune", slim, "--teacher", DEMO, *data, *how, "-o", "out.onnx", "--json")
    assert found.code == 0, found.err
    document = found.document
    assert document["metric"] == ("top1" if labelled else "agreement")
    assert document["after"]["accuracy"] > document["before"]["accuracy"] + 0.3
    assert document["max_error"] < 1e-5
    images, names = shapes(CHECKED, 12)
    before, after = (accuracy(path, images, names) for path in (slim, tmp_path / "out.onnx"))
    assert after > before + 0.3
    if labelled:
        assert (before, after) == pytest.approx(
            [document[k]["accuracy"] for k in ("before", "after")], abs=0.005
        )
    old, new = load_model(slim), load_model(tmp_path / "out.onnx")
    assert topology_hash(old) == topology_hash(new)
    assert dict(old.metadata_props).items() <= dict(new.metadata_props).items()
    assert "onnx_mdp.plan" in new.metadata_props
    assert new.metadata_props["onnx_mdp.weights"].startswith("fine-tuned: ")
    checked = run("verify", DEMO, "out.onnx", slim.with_name("plan.json"))
    assert checked.code == 0, checked.err


def table(folder: Path, **arrays: Any) -> Path:
    rng = np.random.default_rng(0)
    np.savez(folder / "d.npz", x=rng.standard_normal((40, 3, 8, 8)).astype(np.float32), **arrays)
    return folder / "d.npz"


@pytest.mark.parametrize("freeze", [False, True])
def test_batch_norms_follow_the_data_unless_they_are_frozen(run: Run, tmp_path: Path, freeze: bool) -> None:
    model = small(NORMED, tmp_path / "m.onnx")
    teacher = small(NORMED, tmp_path / "t.onnx", seed=1)
    more = ("--freeze-bn",) if freeze else ()
    found = run(
        "finetune",
        model,
        "--data",
        table(tmp_path),
        "--teacher",
        teacher,
        "--steps",
        8,
        *more,
        "-o",
        "o.onnx",
    )
    assert found.code == 0, found.err
    old, new = weights(model), weights(tmp_path / "o.onnx")
    assert set(old) == set(new)
    assert not np.array_equal(old["w0"], new["w0"])
    assert np.array_equal(old["m"], new["m"]) == freeze


def test_batch_norms_that_were_folded_are_trained_and_folded_again(run: Run, tmp_path: Path) -> None:
    plain = NORMED.replace("  c = BatchNormalization (a, s, b, m, var)\n  d = Relu (c)", "  d = Relu (a)")
    plain = plain.replace("float[6] s, float[6] b, float[6] m, float[6] var, ", "")
    model, teacher = small(plain, tmp_path / "m.onnx"), small(plain, tmp_path / "t.onnx", seed=1)
    how = ("--data", table(tmp_path), "--teacher", teacher, "--steps", 30, "--lr", 1e-2, "--insert-bn")
    found = run("finetune", model, *how, "-o", "o.onnx", "--json")
    assert found.code == 0, found.err
    assert found.document["after"]["loss"] < 0.8 * found.document["before"]["loss"]
    assert found.document["max_error"] < 1e-5
    nodes = [node.op_type for node in load_model(tmp_path / "o.onnx").graph]
    assert nodes == [node.op_type for node in load_model(model).graph]
    assert set(weights(tmp_path / "o.onnx")) - set(weights(model)) == {"w0__bias"}


def test_a_file_of_a_fixed_batch_is_trained_sample_by_sample(run: Run, tmp_path: Path) -> None:
    model, teacher = small(FIXED, tmp_path / "m.onnx"), small(FIXED, tmp_path / "t.onnx", seed=1)
    data = ("--data", table(tmp_path), "--batch-size", 8, "--steps", 30, "--lr", 1e-2)
    found = run("finetune", model, *data, "--teacher", teacher, "-o", "o.onnx", "--json")
    assert found.code == 0, found.err
    assert "the file fixes its batch at 1" in found.err
    assert found.document["after"]["loss"] < 0.8 * found.document["before"]["loss"]
    assert load_model(tmp_path / "o.onnx").graph.inputs[0].shape == [1, 3, 8, 8]


def test_half_precision_is_trained_in_float32_and_stored_as_it_was(run: Run, tmp_path: Path) -> None:
    model, teacher = (half(NORMED, tmp_path / name, seed) for name, seed in (("m.onnx", 0), ("t.onnx", 1)))
    how = ("--data", table(tmp_path), "--teacher", teacher, "--steps", 30, "--lr", 1e-2)
    found = run("finetune", model, *how, "-o", "o.onnx", "--json")
    assert found.code == 0, found.err
    assert found.document["after"]["loss"] < 0.8 * found.document["before"]["loss"]
    assert {array.dtype for array in weights(tmp_path / "o.onnx").values()} == {np.dtype(np.float16)}


LOADER = """
import numpy as np

def batches(request):
    rng = np.random.default_rng((request.seed, request.epoch, request.split == "val"))
    for _ in range(4):
        rows = rng.standard_normal((request.batch, *request.shapes["x"]))
        yield rows.astype(np.float32), rng.integers(0, 4, request.batch)
"""


def test_a_function_of_the_users_makes_the_batches(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(LOADER)
    model = small(NORMED, tmp_path / "m.onnx")
    how = ("finetune", model, "--data", "mine.py:batches", "--batch-size", 8, "-o", "o.onnx", "--json")
    is_refused(run(*how, "--epochs", 1, "-q"), 2, "does not say how many batches it has; give --steps")
    found = run(*how, "--steps", 6)
    assert found.code == 0, found.err
    assert found.document["metric"] == "top1"
    assert [entry["epoch"] for entry in found.document["history"]] == [0, 0, 0, 0, 0, 1, 1]


def test_features_of_equal_width_are_matched(run: Run, tmp_path: Path) -> None:
    model, teacher = small(NORMED, tmp_path / "m.onnx"), small(NORMED, tmp_path / "t.onnx", seed=1)
    how = ("--data", table(tmp_path), "--steps", 4, "--features", "[cd]", "--teacher", teacher)
    found = run("finetune", model, *how, "-o", "o.onnx", "--json")
    assert found.code == 0, found.err
    assert found.document["objective"].endswith("features c, d of the original by relative MSE")


REFUSED: dict[str, tuple[tuple[object, ...], int, str]] = {
    "nothing to learn from": ((), 2, "pass --teacher ORIGINAL.onnx, or labels"),
    "another teacher": (("--teacher", "wide.onnx"), 2, "the teacher takes 'x' as ['n', 5, 8, 8]"),
    "other outputs": (("--teacher", "deep.onnx"), 2, "the teacher has no output y of the shape"),
    "no batch": (("--teacher", "f.onnx", "--insert-bn"), 2, "the file fixes its batch at 1"),
    "no feature": (("--teacher", "t.onnx", "--features", "z*"), 2, "--features 'z*': no tensor of that name"),
    "recipe": (("--recipe", "best"), 2, "no recipe is called 'best'"),
    "distance": (("--distill", "l1"), 2, "--distill 'l1' is unknown"),
    "resume without folder": (("--resume",), 2, "need the folder of --checkpoint"),
    "nothing to resume": (("--checkpoint", "c", "--resume"), 2, "c holds no checkpoint"),
    "device": (("--device", "tpu"), 2, "choose auto, cpu or cuda"),
    "rate": (
        ("--teacher", "t.onnx", "--lr", "1e30", "--clip", "0", "--optimizer", "sgd"),
        1,
        "choose a smaller --lr",
    ),
    "exists": (("--teacher", "t.onnx", "-o", "m.onnx"), 2, "m.onnx exists"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_sentence(run: Run, tmp_path: Path, case: str) -> None:
    given, code, message = REFUSED[case]
    small(NORMED, tmp_path / "m.onnx")
    small(NORMED, tmp_path / "t.onnx", seed=1)
    small(NORMED.replace("n,3,8,8", "n,5,8,8").replace("6,3,3,3", "6,5,3,3"), tmp_path / "wide.onnx")
    small(NORMED.replace("n,4]", "n,5]").replace("4,6", "5,6"), tmp_path / "deep.onnx")
    small(FIXED, tmp_path / "f.onnx")
    if case == "no batch":
        small(FIXED.replace("BatchNormalization (a, s, b, m, var)", "Relu (a)"), tmp_path / "m.onnx")
    output = () if "-o" in given else ("-o", "o.onnx")
    found = run("finetune", "m.onnx", "--data", table(tmp_path), "--steps", 20, "-q", *given, *output)
    is_refused(found, code, message)
    assert not (tmp_path / "o.onnx").exists()


def test_without_torch_the_install_command_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "has_torch", lambda: False)
    found = run("finetune", small(NORMED, tmp_path / "m.onnx"), "--data", "d.npz", "-o", "o.onnx")
    is_refused(found, 3, "pip install 'onnx-mdp[torch]'")


@pytest.mark.parametrize("given", [("--epochs", 3), ("--augment", "flip"), ("--train", "d.npz")], ids=str)
def test_training_options_without_finetune_are_refused(
    run: Run, tmp_path: Path, given: tuple[object, ...]
) -> None:
    found = run("prune", small(NORMED, tmp_path / "m.onnx"), "--target-ratio", 0.5, *given)
    is_refused(found, 2, "need --finetune")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "pass --train or --data"),
        (("--train", "none.npz"), "none.npz does not exist"),
        (("--train", "d.npz", "--augment", "turn"), "--augment 'turn' is unknown"),
        (("--train", "d.npz", "--recipe", "best"), "no recipe is called 'best'"),
    ],
    ids=str,
)
def test_pruning_measures_nothing_before_its_training_is_checked(
    run: Run, tmp_path: Path, given: tuple[object, ...], message: str
) -> None:
    table(tmp_path)
    model = small(NORMED, tmp_path / "m.onnx")
    is_refused(run("prune", model, "--target-ratio", 0.5, "--finetune", "-q", *given), 2, message)
    assert not (tmp_path / "lut.sqlite").exists()


@pytest.mark.slow
def test_pruning_and_training_in_one_command(run: Run, tmp_path: Path, pictures: Path) -> None:
    how = ("--data", pictures / "train.npz", "--finetune", "--steps", 20, "--val", pictures / "val.npz")
    command = ("prune", DEMO, "--target-ratio", 0.6, *how, "-o", "slim.onnx", "--json")
    found = patiently(lambda: run(*command))
    assert found.code == 0, found.err
    assert found.document["verified"]
    trained = found.document["finetuning"]
    assert trained["metric"] == "top1"
    assert trained["after"]["accuracy"] >= trained["before"]["accuracy"]
    again = run("apply", DEMO, "slim.plan.json", "-o", "untrained.onnx")
    assert again.code == 0, again.err
    new, old = load_model(tmp_path / "slim.onnx"), load_model(tmp_path / "untrained.onnx")
    assert topology_hash(new) == topology_hash(old)
    assert new.metadata_props["onnx_mdp.plan"] == old.metadata_props["onnx_mdp.plan"]


def command(*arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-m", "onnx_mdp", *map(str, arguments)]
    return subprocess.Popen(
        line,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background inherits an ignored SIGINT, and so would the child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_stopped_goes_on_to_the_same_bits(tmp_path: Path, how: signal.Signals) -> None:
    model, teacher = small(NORMED, tmp_path / "m.onnx"), small(NORMED, tmp_path / "t.onnx", seed=1)
    base = (
        "finetune",
        model,
        "--data",
        table(tmp_path),
        "--teacher",
        teacher,
        "--steps",
        900,
        "--ema",
        0.9,
    )
    folder = tmp_path / "kept"
    kept = ("--checkpoint", folder, "--checkpoint-every", 50)
    stopped = command(*base, *kept, "-o", tmp_path / "a.onnx")
    file = folder / "checkpoint.safetensors"
    while not file.is_file():  # written before the first step
        time.sleep(0.02)
    first = file.stat().st_mtime_ns
    while file.stat().st_mtime_ns == first:
        time.sleep(0.02)
    stopped.send_signal(how)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == (130 if how == signal.SIGINT else -how)
    assert how == signal.SIGKILL or "the same with --resume goes on" in errors
    assert not (tmp_path / "a.onnx").exists()
    resumed = command(*base, *kept, "--resume", "-o", tmp_path / "a.onnx")
    whole = command(*base, "-o", tmp_path / "b.onnx")
    for process in (resumed, whole):
        finish(process)
    ours, theirs = weights(tmp_path / "a.onnx"), weights(tmp_path / "b.onnx")
    assert {n: a.tobytes() for n, a in ours.items()} == {n: a.tobytes() for n, a in theirs.items()}


@pytest.mark.slow
def test_the_same_command_under_torchrun(tmp_path: Path) -> None:
    """Two processes, one result: the weights of one process, printed and written once."""
    model, teacher = small(NORMED, tmp_path / "m.onnx"), small(NORMED, tmp_path / "t.onnx", seed=1)
    how = ("--data", table(tmp_path), "--teacher", teacher, "--steps", 20, "--batch-size", 8, "--freeze-bn")
    options = (*how, "--optimizer", "sgd", "--lr", 0.05)
    alone = command("finetune", model, *options, "-o", tmp_path / "a.onnx")
    finish(alone)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*torchrun, "-m", "onnx_mdp", "finetune", model, *options, "-o", tmp_path / "b.onnx"]
    done = subprocess.run(list(map(str, line)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("FINETUNED") == 1
    ours, theirs = weights(tmp_path / "a.onnx"), weights(tmp_path / "b.onnx")
    assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours) <= 1e-5
