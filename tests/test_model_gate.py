"""A model in continuous integration: what `verify` says in a pull request, and that what runs it can fail."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from command_line import Run, is_refused
from onnx import numpy_helper

from onnx_mdp import PruningPlan, analyze, apply
from onnx_mdp.large_models import save_model
from onnx_mdp.plan import plan_json
from onnx_mdp.reports.markdown_page import markdown_page
from onnx_mdp.reports.verify_summary import verify_page

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path(str(files("onnx_mdp") / "demo_model" / "shapes_resnet.onnx"))
ACTION = yaml.safe_load((ROOT / ".ci" / "action.yml").read_text(encoding="utf-8"))
DOCKERFILES = sorted((ROOT / ".ci").glob("*.Dockerfile"))
HOSTILE = "a|b`<img>@c\n# d"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo model, a plan, what the plan leaves, and that with one weight changed."""
    folder: Path = tmp_path_factory.mktemp("pruned")
    structure = analyze(DEMO)
    dimension = structure.dimensions[structure.prunable[0]]
    plan = PruningPlan(keep={dimension.name: tuple(range(dimension.count // 2))})
    shutil.copy(DEMO, folder / "model.onnx")
    (folder / "slim.plan.json").write_text(plan_json(plan))
    save_model(apply(DEMO, plan), folder / "slim.onnx")
    damaged = onnx.load(folder / "slim.onnx")
    weight = next(t for t in damaged.graph.initializer if len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    onnx.save(damaged, folder / "damaged.onnx")
    return folder


@pytest.fixture
def verify(run: Run, pruned: Path) -> Run:
    """Verify a file of that folder."""
    return lambda name, *more: run(
        "verify", pruned / "model.onnx", pruned / name, pruned / "slim.plan.json", *more
    )


def test_the_summary_is_made_of_the_document(verify: Run) -> None:
    outcome = verify("slim.onnx", "--max-ms", 1e6, "--json", "--markdown", "summary.md")
    assert outcome.code == 0, outcome
    text = Path("summary.md").read_text()
    assert text == summary_of(json.loads(outcome.out))
    assert text.startswith("# onnx-mdp verify: slim.onnx\n\n**PASS** Made from model.onnx")
    assert "❌" not in text
    assert re.search(
        r"\| latency \| ✅ \| \d+\.\d+ ms on CPUExecutionProvider.*\| 1e\+06 ms, with noise", text
    )
    assert outcome.document["files"] == {
        "original": "model.onnx", "pruned": "slim.onnx", "plan": "slim.plan.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more", "row"),
    [
        ("damaged.onnx", (), "pruned = masked original | ❌"),
        ("slim.onnx", ("--max-ms", 1e-6), "latency | ❌"),
    ],
)
def test_a_gate_that_fails_says_so_too(verify: Run, name: str, more: tuple[object, ...], row: str) -> None:
    outcome = verify(name, *more, "--markdown", "summary.md")
    assert outcome.code == 1
    assert outcome.out.startswith("FAIL")
    text = Path("summary.md").read_text()
    assert text.startswith(f"# onnx-mdp verify: {name}\n\n**FAIL** ")
    assert row in text


def test_what_cannot_be_compared_fails_in_the_summary(verify: Run, pruned: Path) -> None:
    model = onnx.load(DEMO)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "other"
    onnx.save(model, pruned / "other.onnx")
    is_refused(verify("other.onnx", "--markdown", "summary.md"), 1, "other inputs or outputs")
    assert re.match(r"\*\*FAIL\*\* .*Not verified: ", Path("summary.md").read_text().splitlines()[2])


def test_the_summary_goes_to_stdout_alone(verify: Run) -> None:
    outcome = verify("slim.onnx", "--markdown", "-")
    assert outcome.code == 0
    assert outcome.out.startswith("# onnx-mdp verify")
    assert "\nPASS" not in outcome.out
    is_refused(verify("slim.onnx", "--markdown", "-", "--json"), 2, "--markdown", "--json")
    is_refused(verify("slim.onnx", "--markdown", "no/folder.md"), 2, "no/folder.md")


def summary_of(found: dict[str, Any]) -> str:
    return markdown_page(verify_page(found))


def document(**changes: Any) -> dict[str, Any]:
    return {
        "passed": True,
        "fast": True,
        "verified": True,
        "max_error": 1e-7,
        "scale": 1.0,
        "inputs_tried": 3,
        "checker": None,
        "constant_outputs": [],
        "judged": None,
        "drift": {},
        "measured_ms": None,
        "max_ms": None,
        "limit_ms": None,
        "context": None,
        "params": [100, 60],
        "weights": None,
        "files": {"original": "a.onnx", "pruned": "b.onnx", "plan": "p.json"},
    } | changes


def test_names_in_a_summary_stay_names() -> None:
    drift = {HOSTILE: {"cosine": 1.0, "max_abs": 0.0}}
    names = dict.fromkeys(("original", "pruned", "plan"), HOSTILE)
    text = summary_of(document(files=names, drift=drift, constant_outputs=[HOSTILE], judged=HOSTILE))
    plain = summary_of(document(drift={"y": drift[HOSTILE]}, constant_outputs=["y"], judged="y"))
    assert len(text.splitlines()) == len(plain.splitlines())
    for line in text.splitlines():
        unmarked = re.sub(r"\\.|(`+) .*? \1", "", line)  # without escapes and spans of code
        assert not set(unmarked) & set("<>`"), line
        assert unmarked.count("|") in (0, 3, 4, 5), line


def test_a_summary_says_what_the_law_leaves_out() -> None:
    assert "Not covered: accuracy" in summary_of(document())
    changed = {"how": "repaired: lstsq", "changed": 3, "total": 9}
    assert "Not covered: 3 of 9 float tensors" in summary_of(document(weights=changed))
    assert "Not timed" in summary_of(document())


def test_the_action_gives_its_inputs_as_variables_and_never_as_text() -> None:
    steps = ACTION["runs"]["steps"]
    used = {value for step in steps for value in step.get("env", {}).values()}
    assert used == {f"${{{{ inputs.{name} }}}}" for name in ACTION["inputs"]}
    for step in steps:
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"
        assert set(re.findall(r"\$\{?([A-Z][A-Z_]+)", step["run"])) <= {
            *step.get("env", ()), "RUNNER_TEMP", "GITHUB_ACTION_PATH", "GITHUB_STEP_SUMMARY"
        }  # fmt: skip
    assert {n for n, i in ACTION["inputs"].items() if "default" not in i} == {"original", "pruned", "plan"}


def test_the_workflow_of_the_page_names_inputs_of_the_action() -> None:
    page = (ROOT / "onnx_mdp" / "docs" / "ci.md").read_text(encoding="utf-8")
    (workflow,) = re.findall(r"```yaml\n(jobs:\n.*?)```", page, re.DOTALL)
    (given,) = [s["with"] for s in yaml.safe_load(workflow)["jobs"]["model"]["steps"] if ".ci@" in s["uses"]]
    assert given.keys() <= ACTION["inputs"].keys()
    assert given.keys() >= {"original", "pruned", "plan"}


@pytest.fixture
def act(pruned: Path, tmp_path: Path) -> Any:
    """Run the Action's last step as a runner would, on files of the folder."""
    program = tmp_path / "onnx-mdp" / "bin" / "onnx-mdp"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m onnx_mdp "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    summary = tmp_path / "step-summary.md"
    summary.write_text("before\n")

    def acted(**inputs: str) -> tuple[subprocess.CompletedProcess[str], str]:
        step = ACTION["runs"]["steps"][-1]
        defaults = {name: entry.get("default", "") for name, entry in ACTION["inputs"].items()}
        given = defaults | {"original": "model.onnx", "plan": "slim.plan.json"} | inputs
        variables = {
            key: given[value.removeprefix("${{ inputs.").removesuffix(" }}")]
            for key, value in step["env"].items()
        }
        runner = {"RUNNER_TEMP": str(tmp_path), "GITHUB_STEP_SUMMARY": str(summary), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]],
            env={**os.environ, **runner, **variables},
            cwd=pruned,
            capture_output=True,
            text=True,
        )
        return done, summary.read_text()

    return acted


def test_the_action_passes_and_adds_to_the_summary(act: Any, pruned: Path) -> None:
    np.savez(pruned / "my images.npz", image=np.zeros((2, 3, 64, 64), np.float32))
    more = "--data=my images.npz\n\n--allow-fallback\n"
    done, summary = act(pruned="slim.onnx", **{"max-ms": "1e6", "args": more})
    assert done.returncode == 0, done.stderr
    assert summary.startswith("before\n# onnx-mdp verify: slim.onnx\n\n**PASS**")
    assert "2 of 2 samples in my images.npz" in done.stderr


def test_the_action_fails_where_the_model_does(act: Any) -> None:
    done, summary = act(pruned="damaged.onnx")
    assert done.returncode == 1
    assert "**FAIL**" in summary


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs", [{"pruned": "missing.onnx"}, {"pruned": "--help"}, {"pruned": "slim.onnx", "max-ms": "--help"}]
)
def test_the_action_takes_no_input_for_an_option(act: Any, inputs: dict[str, str]) -> None:
    assert act(**inputs)[0].returncode == 2


def test_the_action_runs_nothing_that_an_input_says(act: Any, pruned: Path) -> None:
    attack = '$(touch hacked) `touch hacked` "; touch hacked; "'
    done, _ = act(pruned="slim.onnx", args=attack, original=attack)
    assert done.returncode == 2
    assert not (pruned / "hacked").exists()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_a_dockerfile_names_what_is_there(path: Path) -> None:
    text = path.read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert ":" in base
    assert not base.endswith(":latest")
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split())
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (extra,) = re.findall(r"/source\[(\w+)\]", text)
    assert extra in setup["options.extras_require"]
    assert text.rindex("\nUSER pruner\n") < text.index('\nENTRYPOINT ["onnx-mdp"]\n')


def test_there_are_dockerfiles() -> None:
    assert [path.stem for path in DOCKERFILES] == ["cpu", "tensorrt"]
