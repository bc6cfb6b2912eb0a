"""What a user installs: a wheel in an empty environment works, and no extra brings a GPU's packages along."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the README's commands ask for, so that torch is the build for CPUs.
CPU_TORCH = "torch==2.13.0"
GPU_PACKAGES = ("nvidia-", "cuda-", "triton", "tensorrt")

pytestmark = pytest.mark.slow


def ran(*command: str, folder: Path) -> str:
    """What a command prints, away from the checkout and its settings."""
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ONNX_MDP_STORE")}
    done = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    ran(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT), folder=folder)
    (found,) = folder.glob("onnx_mdp-*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    package = ROOT / "onnx_mdp"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == wanted


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    ran(sys.executable, "-m", "venv", "venv", folder=tmp_path)
    python, command = tmp_path / "venv/bin/python", tmp_path / "venv/bin/onnx-mdp"
    ran(str(python), "-m", "pip", "install", "-q", f"{wheel}[cpu]", folder=tmp_path)
    store = str(tmp_path / "store.sqlite")
    printed = ran(
        str(command), "demo", "-o", "demo", "--target-ratio", "0.7", "--store", store, folder=tmp_path
    )
    assert "PASS" in printed
    code = "import onnx_mdp; print(onnx_mdp.verify('m.onnx', 'demo/s.onnx', 'demo/s.plan.json').verified)"
    code = code.replace("demo/s", "demo/shapes_resnet.pruned")
    model = tmp_path / "venv/lib"
    (found,) = model.rglob("shapes_resnet.onnx")
    (tmp_path / "m.onnx").write_bytes(found.read_bytes())
    assert ran(str(python), "-c", code, folder=tmp_path).strip() == "True"


def extras() -> list[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    # A flavour for GPUs is what is asked for there.
    return [name for name in config["options.extras_require"] if name != "gpu"]


@pytest.mark.parametrize("extra", extras())
def test_no_extra_brings_the_packages_of_a_gpu(extra: str, tmp_path: Path) -> None:
    dry = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", "-"]
    report = json.loads(ran(*dry, CPU_TORCH, f"{ROOT}[{extra}]", folder=tmp_path))
    names = [entry["metadata"]["name"].lower() for entry in report["install"]]
    assert "onnx-mdp" in names
    assert [name for name in names if name.startswith(GPU_PACKAGES)] == []
