"""Laws of outputs: all files of a result or none, each of them whole, and nothing else is left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from onnx_mdp.errors import OutputError
from onnx_mdp.files import check_output, scratch_folder, write_files, write_text

posix = pytest.mark.skipif(sys.platform == "win32", reason="locks and limits of POSIX")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk on which a file may have ``size`` bytes at most."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_many(file: BinaryIO) -> None:
    for _ in range(1000):
        file.write(bytes(1000))


def test_files_are_written_whole(tmp_path: Path) -> None:
    write_files({tmp_path / "a": b"bytes", tmp_path / "b": write_many})
    assert (tmp_path / "a").read_bytes() == b"bytes"
    assert (tmp_path / "b").read_bytes() == bytes(10**6)
    assert names(tmp_path) == ["a", "b"]


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("precious")
    with pytest.raises(OutputError, match=r"exists; .*--overwrite"):
        write_text("new", path)
    assert path.read_text() == "precious"
    write_text("new", path, overwrite=True)
    assert path.read_text() == "new"


@posix
@pytest.mark.parametrize("size", [10, 10**5], ids=["at the first byte", "in the middle"])
def test_a_full_disk_leaves_the_old_files_and_nothing_else(size: int, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("precious")
    with (
        file_size_limit(size),
        pytest.raises(OutputError, match="File too large; free some"),
    ):
        write_files({old: b"small", tmp_path / "new": write_many})
    assert old.read_text() == "precious"
    assert names(tmp_path) == ["old"]


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_full_when_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device; free some"):
        write_files({tmp_path / "a": b"1"})
    assert names(tmp_path) == []


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write_files({tmp_path / "a": b"1", tmp_path / "b": broken})
    assert names(tmp_path) == []


def test_an_output_that_cannot_be_written_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; create it first"):
        check_output(tmp_path / "none" / "out.onnx", overwrite=False)
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path, overwrite=True)
    check_output(tmp_path / "out.onnx", overwrite=False)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_text("text", tmp_path / ("x" * 300))
    assert names(tmp_path) == []


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    write_text("größer ≤\n", tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_bytes() == "größer ≤\n".encode()


@pytest.mark.skipif(os.name == "nt", reason="no umask there")
def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text("text", tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


# -- what killed runs leave ---------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from onnx_mdp.files import scratch_folder, write_files

def stop(file):
    file.write(b"half")
    file.flush()
    print(flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)

with scratch_folder() as folder:
    (folder / "profile.json").write_text("half")
    write_files({Path("out"): stop})
"""


def older(folder: Path) -> list[Path]:
    """All that is in a folder, as if it were from yesterday."""
    found = list(folder.iterdir())
    for path in found:
        os.utime(path, (time.time() - 86400,) * 2)
    return found


@posix
def test_what_a_killed_run_left_is_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, scratch = tmp_path / "results", tmp_path / "scratch"
    results.mkdir()
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    environment = {**os.environ, "TMPDIR": str(scratch)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=results, env=environment, **pipes) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (part,) = older(results)
        (folder,) = older(scratch)
        write_files({results / "other": b"1"})
        with scratch_folder():
            pass
        assert part.exists(), "a run that goes on loses nothing"
        assert folder.exists()
        child.communicate(b"\n")
    assert part.exists()
    write_files({results / "other": b"2"})
    with scratch_folder() as mine:
        assert names(scratch) == [mine.name]
    assert names(results) == ["other"]
    assert names(scratch) == []


@posix
def test_pipes_and_links_with_the_name_of_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    os.mkfifo(tmp_path / ".onnx-mdp-0.part")
    (tmp_path / ".onnx-mdp-1.part").symlink_to(tmp_path / "precious")
    older(tmp_path)
    write_files({tmp_path / "a": b"1"})
    assert (tmp_path / "precious").read_text() == "precious"
