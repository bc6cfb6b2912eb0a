"""A board has numpy, onnx, onnx-ir, an ONNX Runtime, and for the command line typer; nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from scipy.optimize import nnls
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from test_cli import TINY
from zoo import text_model

from onnx_mdp.analysis.coupling import settle
from onnx_mdp.analysis.shadow import Shadow
from onnx_mdp.rules import Labelling
from onnx_mdp.tables.nonnegative import nonnegative_least_squares

# What a board lacks; a package that is imported all the same is an error that names it.
LACKING = ("PIL", "highspy", "matplotlib", "platformdirs", "pyomo", "scipy", "threadpoolctl", "torch", "yaml")
LACKING_TO_A_LIBRARY = (*LACKING, "pydantic", "rich", "typer")
BOARD = """
import sys
class Lacking:
    def find_spec(self, name, *more):
        if name.partition(".")[0] in {}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Lacking())
"""
COMMAND = BOARD.format(LACKING) + "from onnx_mdp.__main__ import start; start()"
LIBRARY = f"""
{BOARD.format(LACKING_TO_A_LIBRARY)}
from pathlib import Path
from onnx_mdp.tables.latency import build_table
from onnx_mdp.tables.lut_store import open_store
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.tables.table_file import table_json

structure = analyze(load_model("model.onnx"), {{}})
with open_store() as store:
    table = build_table(structure, Runtime(), store, variants=4)
Path("table.json").write_text(table_json(structure, table))
"""


def python(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "ONNX_MDP_STORE": str(folder / "board.sqlite")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (arguments, done.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(text_model(TINY).SerializeToString())
    return tmp_path


@pytest.mark.slow
def test_a_board_measures_a_table_that_others_solve_by(folder: Path) -> None:
    python(folder, "-c", COMMAND, "profile", "model.onnx", "-o", "table.json")
    python(folder, "-c", COMMAND, "lut", "ls")
    python(folder, "-c", COMMAND, "lut", "export", "lut.jsonl")
    python(folder, "-c", COMMAND, "lut", "merge", "lut.jsonl")
    python(folder, "-m", "onnx_mdp", "solve", "model.onnx", "table.json", "--target-ratio", "0.7")


def test_a_board_says_what_a_recipe_needs(folder: Path) -> None:
    code = [sys.executable, "-c", COMMAND, "profile", "model.onnx", "--config", "onnx-mdp.yaml"]
    done = subprocess.run(code, cwd=folder, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "error: recipes need pydantic and pyyaml: run `pip install pydantic pyyaml`\n"


@pytest.mark.slow
def test_the_library_measures_without_a_command_line(folder: Path) -> None:
    python(folder, "-c", LIBRARY)
    python(folder, "-m", "onnx_mdp", "solve", "model.onnx", "table.json", "--target-ratio", "0.7")


def test_without_typer_a_command_says_so(folder: Path) -> None:
    code = (
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'typer' else find(name)\n"
        "from onnx_mdp.__main__ import start; start()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "error: the command line needs typer: run `pip install typer`\n"


@pytest.mark.parametrize("seed", range(30))
def test_coefficients_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(1, 40)), int(rng.integers(1, 8))
    system = rng.standard_normal((rows, columns)) + rng.integers(0, 2)
    if seed % 3 == 0:
        system[:, -1] = system[:, 0]  # without full rank the error is still the least
    target = rng.standard_normal(rows) * 10.0 ** int(rng.integers(-6, 6))
    found = nonnegative_least_squares(system, target)
    _, least = nnls(system, target)
    assert (found >= 0).all()
    assert np.linalg.norm(system @ found - target) <= least * (1 + 1e-9) + 1e-12 * np.linalg.norm(target)


@pytest.mark.parametrize("seed", range(10))
def test_classes_are_the_connected_components_numbered_by_first_atom(seed: int) -> None:
    rng = np.random.default_rng(seed)
    state = Labelling(cast(Shadow, None))
    state.atoms = int(rng.integers(1, 200))
    count = int(rng.integers(0, state.atoms))
    joins = int(rng.integers(3))
    state.edges = [rng.integers(0, state.atoms, (2, count), dtype=np.int32) for _ in range(joins)]
    pairs = np.concatenate([np.zeros((2, 0), np.int32), *state.edges], axis=1)
    matrix = coo_matrix((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(state.atoms,) * 2)
    _, expected = connected_components(matrix, directed=False)
    assert settle(state).classes.tolist() == expected.tolist()
