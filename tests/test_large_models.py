"""Laws of models above protobuf's limit: they are loaded, analysed, pruned and written as any other.

Most tests lower the limit; one meets it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Run, patiently
from onnx import TensorProto, helper
from test_cli import TINY
from zoo import analyse, run, text_model

from onnx_mdp import files, model_io
from onnx_mdp.errors import OutputError
from onnx_mdp.importance.scoring import score
from onnx_mdp.large_models import LargeModel, for_session, save_model
from onnx_mdp.model_io import content_hash, load_model
from onnx_mdp.running.runtime import Runtime, open_session

FEEDS = {"x": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)}


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model with more than 20 kB of weights is large."""
    monkeypatch.setattr(model_io, "_MOST_BYTES", 20_000)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("low_limit")
def test_what_is_saved_in_two_files_is_loaded(tmp_path: Path) -> None:
    model = load_model(text_model(TINY))
    save_model(model, tmp_path / "out.onnx")
    data = f"out.onnx.{content_hash(model)}.data"
    assert names(tmp_path) == ["out.onnx", data]
    assert (tmp_path / "out.onnx").stat().st_size < 10_000
    again = load_model(tmp_path / "out.onnx")
    assert content_hash(again) == content_hash(model)
    plain = onnx.load(tmp_path / "out.onnx")  # others read it, too
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    assert np.array_equal(run(plain, FEEDS)[0], run(text_model(TINY), FEEDS)[0])
    assert open_session(tmp_path / "out.onnx", Runtime())


@pytest.mark.usefixtures("low_limit")
def test_a_new_file_takes_the_old_data_away_and_nothing_else(tmp_path: Path) -> None:
    for name in ("out.onnx.data", "other.onnx.0123456789abcdef.data", "out.onnx.0123456789abcde.data"):
        (tmp_path / name).write_bytes(b"precious")
    before = set(names(tmp_path))
    first, second = (load_model(text_model(TINY, seed=seed)) for seed in (0, 1))
    save_model(first, tmp_path / "out.onnx")
    save_model(second, tmp_path / "out.onnx", overwrite=True)
    assert set(names(tmp_path)) - before == {"out.onnx", f"out.onnx.{content_hash(second)}.data"}
    assert before < set(names(tmp_path))
    assert content_hash(load_model(tmp_path / "out.onnx")) == content_hash(second)


@pytest.mark.usefixtures("low_limit")
@pytest.mark.parametrize("step", [0, 1, 2])
def test_at_no_moment_a_model_lacks_its_data(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the renames is the last one, the old model or the new one is there and whole."""
    first, second = (load_model(text_model(TINY, seed=seed)) for seed in (0, 1))
    save_model(first, tmp_path / "out.onnx")
    replace, done = files.os.replace, []

    def stopping(source: Path, target: Path) -> None:
        if len(done) == step:
            raise OSError(28, "No space left on device")
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", stopping)
    if step < 2:
        with pytest.raises(OutputError, match="No space left"):
            save_model(second, tmp_path / "out.onnx", overwrite=True)
    else:
        save_model(second, tmp_path / "out.onnx", overwrite=True)
    expected = second if step == 2 else first
    assert content_hash(load_model(tmp_path / "out.onnx")) == content_hash(expected)


@pytest.mark.usefixtures("low_limit")
def test_a_session_takes_the_weights_from_memory() -> None:
    model = load_model(text_model(TINY))
    large = for_session(model)
    assert isinstance(large, LargeModel)
    assert len(large.data) < 10_000
    expected = open_session(text_model(TINY).SerializeToString(), Runtime()).run(None, FEEDS)
    assert np.array_equal(open_session(large, Runtime()).run(None, FEEDS)[0], expected[0])


def test_units_are_scored_alike_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    _, structure = analyse(text_model(TINY))
    found = [score(structure, "activation", [FEEDS])]
    monkeypatch.setattr(model_io, "_MOST_BYTES", 20_000)
    found.append(score(structure, "activation", [FEEDS]))
    first, second = ([*importance.units.values()] for importance in found)
    assert all(np.allclose(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("low_limit")
def test_a_large_model_is_pruned_applied_and_verified(run: Run, tmp_path: Path) -> None:
    save_model(load_model(text_model(TINY)), tmp_path / "model.onnx")
    command = ("prune", "model.onnx", "--target-ratio", 0.8, "--choices", 4, "-o", "slim.onnx", "--json")
    pruned = patiently(lambda: run(*command))
    assert pruned.code == 0, pruned
    assert [name for name in names(tmp_path) if name.startswith("slim.onnx.")]
    assert run("verify", "model.onnx", "slim.onnx", "slim.plan.json").code == 0
    applied = run("apply", "model.onnx", "slim.plan.json", "-o", "again.onnx")
    assert applied.code == 0, applied
    assert content_hash(load_model("again.onnx")) == content_hash(load_model("slim.onnx"))


# -- the limit itself ---------------------------------------------------------------------------------------

WIDTH, LAYERS = 8192, 9
PRUNE = """
import json, resource, sys
import numpy as np
from onnx_mdp.large_models import save_model
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze, apply_plan
from onnx_mdp.plan import PruningPlan

model = load_model("model.onnx")
structure = analyze(model, {})
keep = {d.name: tuple(range(0, d.count - d.count // 8)) for d in structure.dimensions if d.frozen is None}
pruned, evidence = apply_plan(model, structure, PruningPlan(keep=keep))
save_model(pruned, __import__("pathlib").Path("slim.onnx"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"cut": len(keep), "verified": bool(evidence.verified), "peak": peak}))
"""


def write_large(path: Path) -> int:
    """A multi-layer perceptron with 2.4 GB of weights in one file beside it."""
    rng = np.random.default_rng(0)
    nodes, tensors, offset = [], [], 0
    with path.with_name("weights.bin").open("wb") as file:
        for layer in range(LAYERS):
            weight = (rng.standard_normal((WIDTH, 64), np.float32) / 90).repeat(WIDTH // 64, axis=1)
            weight *= rng.standard_normal(WIDTH, np.float32)
            file.write(weight.tobytes())
            tensor = TensorProto(name=f"w{layer}", data_type=1, dims=weight.shape, data_location=1)
            for key, value in (("location", "weights.bin"), ("offset", offset), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            offset += weight.nbytes
            tensors.append(tensor)
            nodes += [
                helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"m{layer}"]),
                helper.make_node("Relu", [f"m{layer}"], [f"x{layer + 1}"]),
            ]
    ends = [helper.make_tensor_value_info(name, 1, [1, WIDTH]) for name in ("x0", f"x{LAYERS}")]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], tensors)
    path.write_bytes(helper.make_model(graph, ir_version=8).SerializeToString())
    return offset


@pytest.mark.slow
@pytest.mark.long
def test_a_model_above_two_gigabytes(tmp_path: Path) -> None:
    size = write_large(tmp_path / "model.onnx")
    assert size > 2**31
    command = [sys.executable, "-c", PRUNE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(size, found)
    assert found["verified"]
    assert found["cut"] == LAYERS - 1
    assert found["peak"] < 5 * size
    assert sum(path.stat().st_size for path in tmp_path.glob("slim.onnx*")) < 0.9 * size
    onnx.checker.check_model(str(tmp_path / "slim.onnx"))
