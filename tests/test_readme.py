"""The README promises the commands that CI runs; all others are in tests/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

from onnx_mdp.analysis.operator_coverage import operators_markdown

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATORS = ROOT / "onnx_mdp" / "docs" / "operators.md"
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_readme_test_command() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert SHELL[1].strip() in ci


def test_the_first_command_ends_in_the_demo() -> None:
    assert SHELL[0].strip().endswith("onnx-mdp demo")


def test_the_table_of_operators_is_the_one_that_the_registry_makes() -> None:
    lines = OPERATORS.read_text(encoding="utf-8").splitlines()
    table = "\n".join(line for line in lines if line.startswith("|"))
    assert table == operators_markdown(), "replace it by what `onnx-mdp operators` prints"
