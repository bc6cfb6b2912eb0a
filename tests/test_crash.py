"""The law of a kill: files are whole, the store opens, and the next run goes on."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import xml.dom.minidom
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from test_cli import TINY
from zoo import text_model

from onnx_mdp.files import scratch_folder, write_files
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.plan import load_plan
from onnx_mdp.surgery.verification import verify
from onnx_mdp.tables.latency import VARIANTS
from onnx_mdp.tables.lut_store import open_store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a child dies with its parent on Linux")

# The command with few rounds of measuring, and with pauses where files are written, to be hit there.
COMMAND = """
import os, time
import onnx_mdp.running.timing as timing

full = timing.measure
timing.measure = lambda sessions, feeds, **options: full(sessions, feeds, **{**options, "rounds": 6})
sync, replace = os.fsync, os.replace
os.fsync = lambda descriptor: (time.sleep(PAUSE), sync(descriptor))
os.replace = lambda source, target: (time.sleep(PAUSE), replace(source, target), time.sleep(PAUSE))

from onnx_mdp.__main__ import start
start()
"""
ARGUMENTS = (
    "prune",
    "model.onnx",
    "--target-ratio",
    "0.85",
    "--choices",
    "4",
    "-o",
    "out.onnx",
    "--overwrite",
)
OUTPUTS = {"out.onnx", "out.plan.json", "out.structure.svg", "out.recipe.yaml"}
STAGES = ("", "profiling", "profiling", "calibrating", "measuring", "verifying", "write", "write", "write")
PAUSE_S = 0.03
LONG_S = 120.0


@dataclass
class Tally:
    """What happened over many kills."""

    kills: int = 0
    while_writing: int = 0
    finished: int = 0
    outputs_found: int = 0
    runs_kept: list[int] = field(default_factory=list)


class Story:
    """A folder in which one prune is started, killed and started again until it has finished."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder, folder / "scratch"
        self.scratch.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(text_model(TINY).SerializeToString())
        self.store, self.errors = folder / "lut.sqlite", self.scratch / "errors.txt"

    def start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "ONNX_MDP_STORE": str(self.store), "TMPDIR": str(self.scratch)}
        code = COMMAND.replace("PAUSE", str(PAUSE_S))
        with self.errors.open("w") as errors:
            return subprocess.Popen(
                [sys.executable, "-c", code, *ARGUMENTS],
                cwd=self.folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def kill_after(self, stage: str, seconds: float) -> tuple[int, str]:
        """Run the command and kill it so long after a stage has begun; return its exit code and stderr."""
        before = self.parts()
        with self.start() as child:
            limit = time.monotonic() + LONG_S
            while child.poll() is None and time.monotonic() < limit:
                written = bool(self.parts() - before)
                if written if stage == "write" else stage in self.errors.read_text():
                    time.sleep(seconds)
                    break
                time.sleep(0.002)
            child.kill()
            # The child of the child holds the pipe: its end is the end of both.
            child.communicate(timeout=LONG_S)
        return child.returncode, self.errors.read_text()

    def parts(self) -> set[str]:
        return {path.name for path in self.folder.glob(".onnx-mdp-*.part")}

    def rows(self) -> set[tuple[int, str]]:
        """The variants in the store and when they were measured."""
        if not self.store.exists():
            return set()
        with open_store(self.store), closing(sqlite3.connect(self.store)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            return set(connection.execute("SELECT variant, created FROM runs"))

    def check_files(self) -> set[str]:
        """Every file is whole; return the outputs that are there."""
        there = {path.name for path in self.folder.iterdir() if path.is_file()} - self.parts()
        assert there <= OUTPUTS | {"model.onnx", "lut.sqlite", "lut.sqlite-wal", "lut.sqlite-shm"}
        found = there & OUTPUTS
        plan = load_plan(self.folder / "out.plan.json") if "out.plan.json" in found else None
        if "out.structure.svg" in found:
            xml.dom.minidom.parse(str(self.folder / "out.structure.svg"))
        if "out.onnx" in found:
            assert plan is not None, "the model comes last"
            original = load_model(self.folder / "model.onnx")
            slim = load_model(self.folder / "out.onnx")
            assert verify(original, analyze(original, {}), slim, plan).verified
        return found


def one_story(folder: Path, rng: np.random.Generator, tally: Tally, most: int) -> None:
    """Kill one prune at random moments until it finishes by itself, or ``most`` times."""
    story = Story(folder)
    known: set[tuple[int, str]] = set()
    code = -signal.SIGKILL
    while tally.kills < most and code == -signal.SIGKILL:
        stage = str(rng.choice(STAGES))
        seconds = float(rng.uniform(0, 9 * PAUSE_S if stage == "write" else 1.0))
        code, err = story.kill_after(stage, seconds)
        assert "Traceback" not in err, err
        rows = story.rows()
        assert known <= rows, "what was measured is kept"
        assert len({variant for variant, _ in rows}) == len(rows) <= VARIANTS, "and not measured again"
        if len(known) == VARIANTS:
            assert "profiling" not in err
        known = rows
        tally.outputs_found += len(story.check_files())
        tally.kills += code == -signal.SIGKILL
        tally.while_writing += code == -signal.SIGKILL and stage == "write"
        tally.runs_kept.append(len(rows))
    for _ in range(4):  # a loaded machine may miss the target
        with story.start() as child:
            child.communicate(timeout=LONG_S)
        if child.returncode != 1:
            break
    assert child.returncode == 0, story.errors.read_text()
    assert known <= story.rows()
    assert story.check_files() == OUTPUTS
    tally.finished += 1
    check_leftovers(story)


def check_leftovers(story: Story) -> None:
    """What killed runs have left is gone with the next output."""
    for path in (*story.folder.glob(".onnx-mdp-*"), *story.scratch.glob("onnx-mdp-*")):
        os.utime(path, (time.time() - 60,) * 2)
    write_files({story.folder / "another": b"output"})
    assert not story.parts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(story.scratch))
        with scratch_folder() as mine:
            assert list(story.scratch.glob("onnx-mdp-*")) == [mine]


def run_stories(folder: Path, seed: int, kills: int) -> Tally:
    rng, tally = np.random.default_rng(seed), Tally()
    number = 0
    while tally.kills < kills:
        one_story(folder / str(number), rng, tally, kills)
        shutil.rmtree(folder / str(number))
        number += 1
    return tally


@pytest.mark.slow
def test_a_prune_that_is_killed_goes_on(tmp_path: Path) -> None:
    tally = run_stories(tmp_path, seed=0, kills=2)
    assert tally.finished


@pytest.mark.slow
@pytest.mark.long
def test_a_hundred_kills(tmp_path: Path) -> None:
    started = time.monotonic()
    tally = run_stories(tmp_path, seed=1, kills=100)
    print(tally, f"{time.monotonic() - started:.0f} s")
    assert tally.while_writing >= 10
    assert tally.outputs_found >= 10
