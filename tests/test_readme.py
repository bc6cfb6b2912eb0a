"""The README promises commands; CI runs the one for tests, and every file and option named exists."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import onnx_mdp
from onnx_mdp.analysis.operator_coverage import operators_markdown
from onnx_mdp.cli.app import app
from onnx_mdp.model_io import content_hash, load_model

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path(onnx_mdp.__file__).parent / "demo_model" / "shapes_resnet.onnx"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"^onnx-mdp (\w+)", "\n".join(SHELL), re.MULTILINE)))


def test_ci_runs_the_readme_test_command() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert SHELL[1].strip() in ci


def test_the_first_command_ends_in_the_demo() -> None:
    assert SHELL[0].strip().endswith("onnx-mdp demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_options_exist(command: str) -> None:
    lines = [line for line in "\n".join(SHELL).replace("\\\n", " ").splitlines()]
    used = [line.split("#")[0] for line in lines if line.startswith(f"onnx-mdp {command} ")]
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", " ".join(used)):
        assert option in shown


@pytest.mark.usefixtures("one_torch_thread")
def test_the_training_loop_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    shutil.copy(DEMO, "slim.onnx")
    section = README.split("### Training in your own loop\n")[1].split("\n## ")[0]
    images, labels = torch.randn(2, 3, 64, 64), torch.arange(2)
    known = {"batches": [(images, labels)] * 2, "feeds": [{"image": images.numpy()}]}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(code, known)
        trained = Path("trained.onnx")
        assert content_hash(load_model(trained)) != content_hash(load_model("slim.onnx"))
        trained.unlink()


def test_named_files_exist() -> None:
    named = re.findall(r"`((?:benchmarks|models|tests)/[\w./]+)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_table_of_operators_is_the_one_that_the_registry_makes() -> None:
    section = README.split("## Operator coverage\n")[1].split("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert table == operators_markdown(), "replace it by what `onnx-mdp operators` prints"
