"""The command line: every refusal is one sentence and an exit code, every result one document."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

# Here, because Pyomo keeps the stderr of its first import, which a test's capture would close.
import pyomo.environ  # noqa: F401
import pytest
import typer.main
import yaml
from command_line import Outcome, Run, is_refused
from onnx import numpy_helper
from zoo import text_model

from onnx_mdp import pipeline
from onnx_mdp.cli import app as cli
from onnx_mdp.errors import MeasurementError, VerificationError
from onnx_mdp.model_io import load_model
from onnx_mdp.planning import closed_loop
from onnx_mdp.running.timing import Timing
from onnx_mdp.tables import latency

TINY = """
(float[1,3,32,32] x) => (float[1,10] y)
<float[32,3,3,3] w0, float[32] b0, float[48,32,3,3] w1, float[32,48,3,3] w2, float[64,32,3,3] w3,
 float[10,64] w4>
{
  a = Conv <pads: ints = [1,1,1,1]> (x, w0, b0)
  b = Relu (a)
  c = Conv <pads: ints = [1,1,1,1]> (b, w1)
  d = Relu (c)
  e = Conv <pads: ints = [1,1,1,1]> (d, w2)
  f = Add (b, e)
  g = Conv <pads: ints = [1,1,1,1]> (f, w3)
  h = Relu (g)
  i = GlobalAveragePool (h)
  j = Flatten (i)
  y = Gemm <transB: int = 1> (j, w4)
}
"""

ANALYZE_KEYS = {"dimensions", "blocks", "frozen_ops", "prunable_params_share", "prunable_macs_share"}
DIMENSION_KEYS = {"name", "kind", "size", "step", "frozen", "members", "share_params", "share_macs"}
PROFILE_KEYS = {
    "provider",
    "device",
    "threads",
    "batch",
    "granularity",
    "entries",
    "seconds",
    "base_ms",
    "calibration",
}
PRUNE_KEYS = {
    "status",
    "target_ms",
    "base_ms",
    "predicted_ms",
    "measured_ms",
    "noise",
    "iterations",
    "params",
    "macs",
    "verified",
    "max_error",
    "gap",
    "solver",
    "output",
    "plan",
    "report",
    "seconds",
}
PLAN_KEYS = {
    "keep",
    "removed_blocks",
    "predicted_ms",
    "importance_share",
    "status",
    "bound",
    "gap",
    "solver",
    "seconds",
    "fastest_ms",
    "provenance",
    "schema_version",
}
VERIFY_KEYS = {
    "verified",
    "max_error",
    "scale",
    "inputs_tried",
    "constant_outputs",
    "drift",
    "measured_ms",
}


def save(model: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def tiny(name: str = "model.onnx", seed: int = 0) -> Path:
    return save(text_model(TINY, seed=seed), name)


def files() -> set[str]:
    """All files below the current folder but the store's."""
    found = (p.as_posix() for p in Path().rglob("*") if p.is_file())
    return {p for p in found if not p.startswith("lut.sqlite")}


def measured_nothing() -> bool:
    """Whether no command has opened the store."""
    return not Path("lut.sqlite").exists()


# --- models that cannot be read, or cannot be pruned -------------------------------------------------


def test_missing_file(run: Run) -> None:
    outcome = run("prune", "nope.onnx", "--target-ratio", 0.5)
    is_refused(outcome, 2, "nope.onnx does not exist")
    assert outcome.err.count("\n") == 1
    assert files() == set()


def test_a_folder_is_no_model(run: Run) -> None:
    Path("folder.onnx").mkdir()
    is_refused(run("analyze", "folder.onnx"), 2, "folder.onnx is a folder")


@pytest.mark.parametrize("command", ["analyze", "profile", "prune"])
def test_text_file_renamed(run: Run, command: str) -> None:
    Path("notes.onnx").write_text("These are my notes, and no model at all.\n" * 20)
    options = ["--target-ratio", 0.5] if command == "prune" else []
    is_refused(run(command, "notes.onnx", *options), 2, "notes.onnx is not", "ONNX model")
    assert files() == {"notes.onnx"}
    assert measured_nothing()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(run: Run, share: float) -> None:
    data = text_model(TINY).SerializeToString()
    Path("cut.onnx").write_bytes(data[: int(share * len(data))])
    is_refused(run("prune", "cut.onnx", "--target-ratio", 0.5), 2, "cut.onnx is not")
    assert files() == {"cut.onnx"}


def test_nothing_prunable(run: Run) -> None:
    save(text_model("(float[1,3,8,8] x) => (float[1,3,8,8] y) <float[3,3,1,1] w> { y = Conv (x, w) }"))
    outcome = run("prune", "model.onnx", "--target-ratio", 0.5)
    is_refused(outcome, 2, "no prunable dimension")
    assert files() == {"model.onnx"}


SYMBOLIC = TINY.replace("float[1,3,32,32] x", 'float["n",3,"h","w"] x').replace(
    "float[1,10] y", 'float["n",10] y'
)


def test_symbolic_sizes_need_input_shape(run: Run) -> None:
    save(text_model(SYMBOLIC))
    for command in (["analyze"], ["profile"], ["prune", "--target-ratio", 0.5]):
        is_refused(run(command[0], "model.onnx", *command[1:]), 2, "--input-shape", "x")
    assert measured_nothing()
    given = run("analyze", "model.onnx", "--input-shape", "1,3,32,32", "--json")
    assert given.code == 0
    assert given.document["inputs"] == {"x": [1, 3, 32, 32]}
    assert "symbolic" in given.err


@pytest.mark.parametrize(
    "shape",
    ["x:1,3,32", "x:1,4,32,32", "x:1,3,a,b", "nope:1,3,32,32", "x:", "x:1,3,0,32", "x:1,3,-4,32", "x=1,3"],
)
def test_wrong_input_shape(run: Run, shape: str) -> None:
    save(text_model(SYMBOLIC))
    outcome = run("prune", "model.onnx", "--target-ratio", 0.5, "--input-shape", shape)
    is_refused(outcome, 2)
    assert files() == {"model.onnx"}


def test_an_operator_without_a_kernel_is_named(run: Run) -> None:
    text = TINY.replace("h = Relu (g)", "h = acme.Magic (g)")
    save(text_model(text, domains={"acme": 1}))
    for command in (("analyze", "model.onnx"), ("prune", "model.onnx", "--target-ratio", 0.5)):
        is_refused(run(*command), 1, "acme:Magic", "cut the graph before this operator")
    assert files() == {"model.onnx"}


def test_an_unknown_operator_is_named_and_the_rest_is_prunable(run: Run) -> None:
    text = TINY.replace(
        "h = Relu (g)", "q = SequenceConstruct (g) k = Constant<value_int = 0>() h = SequenceAt (q, k)"
    )
    save(text_model(text))
    outcome = run("analyze", "model.onnx", "--json")
    assert outcome.code == 0
    assert "no rule for operator SequenceConstruct" in outcome.err
    assert list(outcome.document["frozen_ops"]) == ["SequenceConstruct"]
    frozen = {d["name"]: d["frozen"] for d in outcome.document["dimensions"]}
    assert "SequenceConstruct" in frozen["conv_6"]
    assert frozen["conv_0"] is None
    assert frozen["conv_2"] is None
    assert "SequenceConstruct" in run("analyze", "model.onnx").out


def test_control_characters_are_escaped(run: Run) -> None:
    is_refused(run("analyze", "evil\x1b[31m\x07.onnx"), 2, r"evil\x1b[31m\x07.onnx does not exist")
    model = text_model(
        TINY.replace(
            "h = Relu (g)", "q = SequenceConstruct (g) k = Constant<value_int = 0>() h = SequenceAt (q, k)"
        )
    )
    model.graph.node[0].name = "evil\x1b[2J"
    save(model)
    outcome = run("analyze", "model.onnx")
    assert outcome.code == 0
    assert "\x1b" not in outcome.out + outcome.err
    assert r"evil\x1b[2J" in outcome.out


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ((), "exactly one of --target-ms and --target-ratio"),
        (("--target-ms", 1, "--target-ratio", 0.5), "exactly one of --target-ms and --target-ratio"),
        (("--target-ms", -3), "larger than 0"),
        (("--target-ratio", 0), "larger than 0"),
        (("--target-ms", "nan"), "larger than 0"),
        (("--target-ms", "inf"), "larger than 0"),
        (("--target-ratio", 0.5, "--solver", "magic"), "unknown solver 'magic'; choose one of"),
        (("--target-ratio", 0.5, "--criterion", "magic"), "unknown criterion 'magic'; choose one of"),
        (("--target-ratio", 0.5, "--criterion", "activation"), "pass --data"),
        (("--target-ratio", 0.5, "--criterion", "drift"), "pass --data"),
        (("--target-ratio", 0.5, "--ep", "magic"), "Unknown provider 'magic'"),
        (("--target-ratio", 0.5, "--ep-option", "novalue"), "KEY=VALUE"),
        (("--target-ratio", 0.5, "--data", "nope.npz"), "nope.npz does not exist"),
        (("--target-ratio", 0.5, "--data", "notes.npz"), "no readable .npz"),
        (("--target-ratio", 0.5, "--data", "wrong.npz"), ""),
        (("--target-ratio", 0.5, "--data", "empty", "--preprocess", "imagenet"), "no image"),
        (("--target-ratio", 0.5, "--data", "empty"), "needs --preprocess"),
        (("--target-ratio", 0.5, "--preprocess", "imagenet"), "--data"),
        (("--target-ratio", 0.5, "--data", "good.npz", "--preprocess", "imagenet"), "--preprocess"),
        (("--target-ratio", 0.5, "-o", "missing/out.onnx"), "folder missing does not exist"),
        (("--target-ratio", 0.5, "-o", "empty"), "empty"),
        (("--target-ratio", 0.5, "-o", "empty", "--overwrite"), "empty is a folder"),
    ],
)
def test_wrong_arguments_are_refused_before_any_measurement(
    run: Run, options: tuple[object, ...], fragment: str
) -> None:
    tiny()
    Path("empty").mkdir()
    Path("notes.npz").write_text("no archive")
    np.savez("good.npz", x=np.zeros((4, 3, 32, 32), np.float32))
    np.savez("wrong.npz", x=np.zeros((4, 3, 16, 16), np.float32))
    before = files()
    is_refused(run("prune", "model.onnx", *options), 2, fragment)
    assert files() == before
    assert measured_nothing()


def test_an_absent_provider_names_the_install_command(run: Run) -> None:
    tiny()
    for command in (["profile"], ["prune", "--target-ratio", 0.5]):
        outcome = run(command[0], "model.onnx", *command[1:], "--ep", "tensorrt")
        is_refused(outcome, 3, "TensorrtExecutionProvider", "pip install onnx-mdp[gpu]")
    assert files() == {"model.onnx"}


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("prune", "model.onnx", "--bogus"), "--bogus"),
        (("frobnicate",), "frobnicate"),
        (("prune",), "MODEL.onnx"),
        (("prune", "model.onnx", "--target-ms", "fast"), "--target-ms"),
        (("prune", "model.onnx", "--target-ms", "1", "--threads", "0"), "--threads"),
        (("lut", "frobnicate"), "frobnicate"),
        (("apply", "model.onnx", "plan.json"), "--output"),
    ],
)
def test_a_misspelt_command_line_says_so(run: Run, arguments: tuple[str, ...], fragment: str) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert fragment in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("existing", ["out.onnx", "out.plan.json", "out.structure.svg", "out.recipe.yaml"])
def test_an_existing_output_is_refused_before_any_measurement(run: Run, existing: str) -> None:
    tiny()
    Path(existing).write_text("mine")
    outcome = run("prune", "model.onnx", "--target-ratio", 0.5, "-o", "out.onnx")
    is_refused(outcome, 2, existing, "--overwrite")
    assert Path(existing).read_text() == "mine"
    assert measured_nothing()


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = getattr(group, "commands", {})
    return [path, *(found for name, c in inner.items() for found in commands(c, (*path, name)))]


@pytest.mark.parametrize("path", commands(typer.main.get_command(cli.app)), ids=" ".join)
def test_every_command_has_help(run: Run, path: tuple[str, ...]) -> None:
    outcome = run(*path, "--help")
    assert outcome.code == 0
    assert "Usage: " in outcome.out
    assert outcome.err == ""


def test_version(run: Run) -> None:
    from onnx_mdp._version import __version__

    assert run("--version") == Outcome(0, f"{__version__}\n", "")


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")
def test_help_takes_less_than_300_ms_of_cpu() -> None:
    spent = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-m", "onnx_mdp", "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        spent.append(usage.ru_utime + usage.ru_stime)
    assert min(spent) < 0.3


# --- the happy path, once ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """A folder in which one model was profiled twice and pruned, and what the commands said."""

    folder: Path
    outcomes: Mapping[str, Outcome]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story") / "a folder" / "модель ü"
    folder.mkdir(parents=True)
    (folder / "my model.onnx").write_bytes(text_model(TINY).SerializeToString())
    environment = {**os.environ, "ONNX_MDP_STORE": str(folder / "lut.sqlite")}
    outcomes = {}
    for name, arguments in {
        "profile": ("profile", "my model.onnx", "--json"),
        "again": ("profile", "my model.onnx", "--json"),
        "prune": ("prune", "my model.onnx", "--target-ratio", "0.6", "-o", "slim model.onnx", "--json"),
    }.items():
        done = subprocess.run(
            [sys.executable, "-m", "onnx_mdp", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        outcomes[name] = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcomes["prune"].code == 0, outcomes["prune"]
    return Story(folder, outcomes)


@pytest.fixture
def kit(story: Story, run: Run) -> Run:
    """Like ``run``, in a copy of the story's folder: the table is in the store."""
    for file in story.folder.iterdir():
        shutil.copy(file, Path().resolve())
    return run


def test_profile_document(story: Story) -> None:
    assert story.outcomes["profile"].code == 0
    document = story.outcomes["profile"].document
    assert document.keys() >= PROFILE_KEYS
    assert document["calibration"].keys() >= {"median_error", "worst_error", "noise"}
    assert document["memory"].keys() == {"cache_mb", "ms_per_mb", "reread"}
    assert (document["memory"]["cache_mb"] is None) == (document["memory"]["ms_per_mb"] == 0)
    assert document["profiled"] == latency.VARIANTS
    assert document["threads"] == document["batch"] == 1


def test_the_second_profile_measures_nothing(story: Story) -> None:
    first, second = (story.outcomes[name].document for name in ("profile", "again"))
    assert second["profiled"] == 0
    assert second["seconds"] < first["seconds"]
    varying = {"profiled", "seconds"}
    assert {k: v for k, v in first.items() if k not in varying} == {
        k: v for k, v in second.items() if k not in varying
    }
    assert "profiling" in story.outcomes["profile"].err
    assert "profiling" not in story.outcomes["again"].err


def test_prune_document(story: Story) -> None:
    document = story.outcomes["prune"].document
    assert document.keys() >= PRUNE_KEYS
    assert document["status"] == "met"
    assert document["verified"] is True
    assert document["measured_ms"] <= document["target_ms"] * (1 + max(0.02, 2 * document["noise"]))
    assert document["target_ms"] == pytest.approx(0.6 * document["base_ms"])
    assert document["params"][1] < document["params"][0]
    assert document["macs"][1] < document["macs"][0]
    assert "profiling" not in story.outcomes["prune"].err
    for name in ("output", "plan", "report"):
        assert (story.folder / document[name]).is_file()


def test_the_plan_file_keeps_its_contract(story: Story) -> None:
    plan = json.loads((story.folder / "slim model.plan.json").read_text())
    assert plan.keys() >= PLAN_KEYS
    assert plan["keep"] or plan["removed_blocks"]
    assert {"model", "table", "seed", "version", "command"} <= plan["provenance"].keys()


def test_nothing_but_the_outputs_is_written(story: Story) -> None:
    names = {p.name for p in story.folder.iterdir()} - {"lut.sqlite", "lut.sqlite-wal", "lut.sqlite-shm"}
    outputs = {f"slim model.{end}" for end in ("onnx", "plan.json", "structure.svg", "recipe.yaml")}
    assert names == {"my model.onnx", *outputs}


def test_the_recipe_says_what_the_command_was_told_and_no_folder(story: Story) -> None:
    text = (story.folder / "slim model.recipe.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    assert story.outcomes["prune"].document["recipe"] == "slim model.recipe.yaml"
    assert (recipe["model"], recipe["target"]["ratio"]) == ("my model.onnx", 0.6)
    assert recipe["solver"]["name"] == "exact"
    plan = json.loads((story.folder / "slim model.plan.json").read_text())
    assert recipe["made_by"]["model"] == plan["provenance"]["model"]
    assert str(story.folder) not in text


def test_analyze_document(kit: Run) -> None:
    document = kit("analyze", "my model.onnx", "--json").document
    assert document.keys() >= ANALYZE_KEYS
    assert all(dimension.keys() >= DIMENSION_KEYS for dimension in document["dimensions"])
    assert all(member.keys() >= {"tensor", "axis"} for d in document["dimensions"] for member in d["members"])
    assert [block.keys() >= {"name", "kind", "nodes", "removable"} for block in document["blocks"]] == [True]
    assert 0 < document["prunable_params_share"] <= 1


def test_apply_reproduces_the_file_bit_for_bit(kit: Run) -> None:
    outcome = kit("apply", "my model.onnx", "slim model.plan.json", "-o", "replayed.onnx", "--json")
    assert outcome.code == 0
    assert outcome.document.keys() >= VERIFY_KEYS | {"output"}
    assert Path("replayed.onnx").read_bytes() == Path("slim model.onnx").read_bytes()
    again = kit("apply", "my model.onnx", "slim model.plan.json", "-o", "replayed.onnx")
    is_refused(again, 2, "replayed.onnx exists", "--overwrite")


def test_verify_passes_on_the_pruned_file(kit: Run) -> None:
    outcome = kit("verify", "my model.onnx", "slim model.onnx", "slim model.plan.json", "--json")
    assert outcome.code == 0
    assert outcome.document.keys() >= VERIFY_KEYS
    assert outcome.document["verified"] is True
    assert outcome.document["drift"]["y"].keys() >= {"cosine", "max_abs"}


def test_verify_compares_on_given_inputs_too(kit: Run) -> None:
    files_ = ("my model.onnx", "slim model.onnx", "slim model.plan.json")
    alone = kit("verify", *files_, "--json").document
    np.savez("given.npz", x=np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32))
    given = kit("verify", *files_, "--data", "given.npz", "--json").document
    assert given["inputs_tried"] == alone["inputs_tried"] + 2
    assert given["constant_outputs"] == []
    is_refused(kit("verify", *files_, "--data", "missing.npz"), 2, "missing.npz does not exist")


def test_verify_fails_on_a_tampered_file(kit: Run) -> None:
    model = onnx.load("slim model.onnx")
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[np.unravel_index(np.abs(weight).argmax(), weight.shape)] *= 1.5
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, model.graph.initializer[0].name))
    save(model, "tampered.onnx")
    outcome = kit("verify", "my model.onnx", "tampered.onnx", "slim model.plan.json", "--json")
    assert outcome.code == 1
    assert outcome.document["verified"] is False
    assert kit("verify", "my model.onnx", "tampered.onnx", "slim model.plan.json").out.startswith("FAIL")


def test_verify_fails_on_another_signature_and_on_too_slow(kit: Run) -> None:
    other = save(
        text_model("(float[1,3,8,8] x) => (float[1,2,8,8] z) <float[2,3,1,1] w> { z = Conv (x, w) }")
    )
    is_refused(kit("verify", "my model.onnx", other, "slim model.plan.json"), 1, "other inputs or outputs")
    files_ = ("my model.onnx", "slim model.onnx", "slim model.plan.json")
    slow = kit("verify", *files_, "--max-ms", 1e-6)
    assert slow.code == 1
    assert "above --max-ms" in slow.out
    fast = kit("verify", *files_, "--max-ms", 1e6, "--json")
    assert fast.code == 0
    assert fast.document["measured_ms"] > 0


def test_a_plan_for_another_model_is_refused(kit: Run) -> None:
    tiny("other.onnx", seed=1)
    outcome = kit("apply", "other.onnx", "slim model.plan.json", "-o", "out.onnx")
    is_refused(outcome, 2, "another model")
    assert "out.onnx" not in files()


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("not json", "is not a pruning plan"),
        ("[]", "is not a pruning plan"),
        ('{"schema_version": 1}', "keep"),
        ('{"schema_version": 1, "keep": {}, "kep": {}}', "kep"),
        ('{"schema_version": 1, "keep": {"conv_0": 3}}', "conv_0"),
        ('{"schema_version": 1, "keep": {"conv_0": "3-1"}}', "3-1"),
        ('{"schema_version": 1, "keep": {"conv_0": "0-99"}}', "conv_0"),
        ('{"schema_version": 1, "keep": {"conv_0": ""}}', ""),
        ('{"schema_version": 9, "keep": {}}', "newer"),
        ('{"schema_version": 1, "keep": {"nonesuch": "0-3"}}', "nonesuch"),
        ('{"schema_version": 1, "keep": {}, "removed_blocks": ["nonesuch"]}', "nonesuch"),
        ('{"schema_version": 1, "keep": {"y\\u001b[2J": "0"}}', r"y\x1b[2J"),
    ],
)
def test_malformed_plans_are_refused(run: Run, text: str, fragment: str) -> None:
    tiny()
    Path("plan.json").write_text(text)
    outcome = run("apply", "model.onnx", "plan.json", "-o", "out.onnx")
    is_refused(outcome, 2, fragment)
    assert "\x1b" not in outcome.err
    is_refused(run("verify", "model.onnx", "model.onnx", "plan.json"), 2, fragment)
    assert files() == {"model.onnx", "plan.json"}


def test_a_missing_plan_is_refused(run: Run) -> None:
    tiny()
    is_refused(run("apply", "model.onnx", "nope.json", "-o", "out.onnx"), 2, "nope.json")


# --- targets ----------------------------------------------------------------------------------------


def test_a_target_below_the_reachable_says_what_is_reachable(kit: Run) -> None:
    before = files()
    outcome = kit("prune", "my model.onnx", "--target-ratio", 0.001, "-o", "out.onnx", "--json")
    assert outcome.code == 4
    document = outcome.document
    assert document["status"] == "infeasible"
    assert 0.001 * document["base_ms"] < document["fastest_ms"] < document["base_ms"]
    assert document["output"] is None
    text = kit("prune", "my model.onnx", "--target-ms", 1e-6, "-o", "out.onnx").out
    assert re.search(r"INFEASIBLE .*smallest reachable latency, 0\.\d+ ms", text.splitlines()[-1])
    assert files() == before


def test_a_target_above_the_base_is_nothing_to_do(run: Run) -> None:
    tiny()
    outcome = run("prune", "model.onnx", "--target-ms", 1e6)
    assert outcome.code == 0
    assert outcome.out.startswith("NOTHING TO DO")
    assert "warning: " in outcome.err
    document = run("prune", "model.onnx", "--target-ratio", 1.0, "--json").document
    assert document["status"] == "nothing_to_do"
    assert document.keys() >= PRUNE_KEYS
    assert files() == {"model.onnx"}


def test_a_missed_target_writes_nothing(kit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files()
    for module in (pipeline, closed_loop):
        monkeypatch.setattr(
            module,
            "measure_models",
            lambda models, *_, **__: Timing((1.0, 0.99)[: len(models)], 0.0, 4, ((), ())),
        )
    outcome = kit("prune", "my model.onnx", "--target-ratio", 0.5, "-o", "out.onnx", "--json")
    assert outcome.code == 1
    assert outcome.document["status"] == "missed"
    assert outcome.document["output"] is outcome.document["plan"] is outcome.document["report"] is None
    missed = kit("prune", "my model.onnx", "--target-ratio", 0.5, "-o", "out.onnx")
    assert missed.code == 1
    assert missed.out.splitlines()[-1].startswith("MISSED")
    assert files() == before


@pytest.mark.parametrize("failure", [VerificationError("it differs"), MeasurementError("it stopped")])
def test_a_failed_gate_writes_nothing(kit: Run, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise failure

    before = files()
    monkeypatch.setattr(pipeline, "verify", refuse)
    outcome = kit("prune", "my model.onnx", "--target-ratio", 0.6, "-o", "out.onnx")
    is_refused(outcome, 1, str(failure))
    assert files() == before


def test_dry_run_writes_nothing(kit: Run) -> None:
    before = files()
    outcome = kit("prune", "my model.onnx", "--target-ratio", 0.6, "-o", "out.onnx", "--dry-run", "--json")
    assert outcome.document["output"] is outcome.document["plan"] is outcome.document["report"] is None
    assert outcome.document["measured_ms"] > 0
    assert files() == before


def test_a_second_prune_profiles_nothing_and_replaces_on_request(
    kit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("profiled again")

    monkeypatch.setattr(latency, "profile_variant", refuse)
    monkeypatch.setattr(latency, "calibrate_in_place", refuse)
    Path("slim model.onnx").write_text("old")
    np.savez("data.npz", anything=np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32))
    outcome = kit(
        "prune",
        "my model.onnx",
        "--target-ratio",
        0.6,
        "-o",
        "slim model.onnx",
        "--overwrite",
        "--data",
        "data.npz",
        "--json",
    )
    assert outcome.code == 0
    assert "profiling" not in outcome.err
    assert "warning" not in outcome.err
    assert "calibration: 6 of 6 samples" in outcome.err
    load_model("slim model.onnx")
    plan = json.loads(Path("slim model.plan.json").read_text())
    assert plan["provenance"]["criterion"] not in ("", "magnitude")


# --- the store --------------------------------------------------------------------------------------


def test_lut_round_trip(kit: Run) -> None:
    listed = kit("lut", "ls", "--json").document["tables"]
    assert [row["runs"] for row in listed] == [latency.VARIANTS]
    exported = kit("lut", "export", "lut.jsonl", "--json").document
    assert exported["records"] >= latency.VARIANTS
    is_refused(kit("lut", "export", "lut.jsonl"), 2, "lut.jsonl exists", "--overwrite")
    merged = kit("lut", "merge", "lut.jsonl", "--store", "other.sqlite", "--json").document
    assert (merged["added"], merged["skipped"]) == (exported["records"], 0)
    assert kit("lut", "ls", "--store", "other.sqlite", "--json").document["tables"] == listed
    again = kit("lut", "merge", "lut.jsonl", "--store", "other.sqlite", "--json").document
    assert (again["added"], again["skipped"]) == (0, exported["records"])
    assert f"{latency.VARIANTS} runs" in kit("lut", "ls").out
    assert kit("profile", "my model.onnx", "--store", "other.sqlite", "--json").document["profiled"] == 0


def test_lut_gc(kit: Run) -> None:
    table = kit("lut", "ls", "--json").document["tables"][0]
    assert table["hosts"] == [platform.node()]
    is_refused(kit("lut", "gc"), 2, "--only", "--older-than")
    assert kit("lut", "gc", "--older-than", 1, "--json").document["removed"] == 0
    assert kit("lut", "gc", "--only", "nowhere", "--json").document["removed"] == 0
    would = kit("lut", "gc", "--only", "cpuexec", "--dry-run", "--json").document
    assert (would["removed"], would["dry_run"]) == (1, True)
    assert (
        kit("lut", "gc", "--only", table["model_hash"], "--older-than", 0, "--json").document["removed"] == 1
    )
    assert kit("lut", "ls").out == "the store is empty\n"
    assert kit("lut", "ls", "--only", "tpu").out == "the store holds nothing that matches 'tpu'\n"


def test_lut_refusals(run: Run) -> None:
    assert run("lut", "ls").out == "the store is empty\n"
    is_refused(run("lut", "merge", "nope.jsonl"), 2, "nope.jsonl")
    Path("bad.jsonl").write_text("no json\n")
    is_refused(run("lut", "merge", "bad.jsonl"), 2, "bad.jsonl")
    Path("bad.sqlite").write_text("no database, but long enough to be mistaken for one " * 40)
    is_refused(run("lut", "ls", "--store", "bad.sqlite"), 2, "bad.sqlite")


# --- signals and terminals --------------------------------------------------------------------------


def stored_runs(path: Path) -> int:
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM runs").fetchone()[0])
    except sqlite3.OperationalError:  # the table is not made yet
        return 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupted_profile_goes_on_where_it_stopped(run: Run, tmp_path: Path) -> None:
    path = tiny()
    child = subprocess.Popen(
        [sys.executable, "-m", "onnx_mdp", "profile", str(path), "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background inherits an ignored SIGINT, and so would the child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while stored_runs(tmp_path / "lut.sqlite") < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if "interrupted" in line] == err.splitlines()[-1:]
    kept = stored_runs(tmp_path / "lut.sqlite")
    assert 2 <= kept < latency.VARIANTS
    resumed = run("profile", "model.onnx", "--json")
    assert resumed.code == 0
    assert resumed.document["profiled"] == latency.VARIANTS - kept
    assert files() == {"model.onnx"}


COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-8]|4[0-8]|9[0-7])[0-9;]*m")


def test_no_color(kit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save(
        text_model(
            TINY.replace(
                "h = Relu (g)",
                "q = SequenceConstruct (g) k = Constant<value_int = 0>() h = SequenceAt (q, k)",
            )
        )
    )
    assert "\x1b" not in kit("analyze", "model.onnx").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert COLOUR.search(kit("analyze", "model.onnx").out)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.search(kit("analyze", "model.onnx").out)


def test_quiet_json_is_silent(run: Run) -> None:
    tiny()
    outcome = run("analyze", "model.onnx", "--json", "-q")
    assert outcome.err == ""
    assert outcome.document["inputs"] == {"x": [1, 3, 32, 32]}


def test_debug_shows_the_error_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["onnx-mdp", "--debug", "analyze", "nope.onnx"])
    with pytest.raises(Exception, match=r"nope\.onnx does not exist"):
        cli.main()


def test_the_demo_prunes_and_names_the_accuracy(run: Run) -> None:
    outcome = run("demo", "-o", "out", "--json")
    assert outcome.code == 0, outcome
    assert outcome.document["status"] == "met"
    found = re.search(r"accuracy (\d+\.\d)% → (\d+\.\d)% without", outcome.err)
    assert found is not None
    assert float(found[1]) > 60
    names = {Path(outcome.document[key]).name for key in ("output", "plan", "report")}
    assert names < {p.name for p in Path("out").iterdir()}
    is_refused(run("demo", "-o", "out"), 2, "--overwrite")
    Path("file").write_text("mine")
    is_refused(run("demo", "-o", "file"), 2, "file is a file")
    is_refused(run("demo", "-o", "file/out"), 2, "file/out")


def test_surgeon_free_import() -> None:
    """The command line starts without the heavy packages."""
    heavy = "{'numpy', 'onnx', 'onnxruntime', 'scipy'}"
    code = f"import sys, onnx_mdp.cli.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_operators_are_listed_as_a_table_and_as_a_document(run: Run) -> None:
    assert "| `Conv` |" in run("operators").out
    listed = {entry["operator"]: entry for entry in run("operators", "--json").document["operators"]}
    assert listed["Softmax"]["versions"] == [1, 11, 13]
    assert listed["GroupNormalization"]["versions"] == [21]
    assert "weight is computed" in listed["Conv"]["frozen"]
