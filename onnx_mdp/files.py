"""Outputs in one step: a reader, a full disk or a killed run never meets half a file.

A file is written under a temporary name in its own folder, brought to the disk, and renamed. Several files
of one result are renamed after the last of them is whole. A temporary file or folder is locked while it is in
use, so that a later run can tell what a killed one left behind, and removes it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

from onnx_mdp.errors import OutputError

__all__ = ["Content", "check_output", "make_folder", "scratch_folder", "write_files", "write_text"]

Content: TypeAlias = "bytes | Callable[[BinaryIO], None]"

_PREFIX, _SUFFIX = ".onnx-mdp-", ".part"
_SCRATCH = "onnx-mdp-scratch-"
_YOUNG_S = 2.0  # what is younger may not be locked yet


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse early an output that exists or cannot be written.

    Raises:
        OutputError: with the remedy.
    """
    try:
        _check_output(path, overwrite)
    except OSError as error:  # a name that is too long
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another name") from error


def _check_output(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give a file name")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; choose another output or pass --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(f"cannot write {path}: permission denied; choose a writable folder")


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it; one that exists is left as it is.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror}; choose another folder") from error


def write_text(text: str, path: Path, *, overwrite: bool = False) -> None:
    """Write UTF-8 text to ``path`` in one step."""
    check_output(path, overwrite=overwrite)
    write_files({path: text.encode()})


def write_files(contents: Mapping[Path, Content]) -> None:
    """Write files, and rename all of them, in the order given, once the last one is on the disk.

    A content is the bytes, or a function that writes them to a binary file. Files that exist are replaced.

    Raises:
        OutputError: a file cannot be written; then none is.
    """
    with ExitStack() as stack:
        drafts = []
        for path, content in contents.items():
            with _sentence(path):
                draft, file = stack.enter_context(_draft(path.parent))
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
                if sys.platform == "win32":
                    file.close()  # an open file cannot be renamed there
                drafts.append((draft, path))
        for draft, path in drafts:
            with _sentence(path):
                os.replace(draft, path)
        for folder in {path.parent for path in contents}:
            _flush_folder(folder)


@contextmanager
def _sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; free some space or choose another folder"
        ) from error


@contextmanager
def _draft(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new locked file; nothing of it is left unless it was renamed."""
    _sweep(folder, f"{_PREFIX}*{_SUFFIX}")
    path = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
    file = path.open("xb")
    try:
        _lock(file.fileno())
        yield path, file
    finally:
        with suppress(OSError):  # a full disk, again
            file.close()
        path.unlink(missing_ok=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for what only this run needs; those that killed runs left are removed.

    Raises:
        OutputError: the folder for temporary files cannot be written.
    """
    base = Path(tempfile.gettempdir())
    _sweep(base, f"{_SCRATCH}*")
    with _sentence(base):
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH))
    descriptor = None if sys.platform == "win32" else os.open(folder, os.O_RDONLY)
    try:
        if descriptor is not None:
            _lock(descriptor)
        yield folder
    finally:
        if descriptor is not None:
            os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _lock(descriptor: int, *, wait: bool = True) -> bool:
    """Whether the file is ours now; a file system without locks says no, and nothing is swept there."""
    if sys.platform == "win32":
        return True  # what is open there cannot be removed
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sweep(folder: Path, pattern: str) -> None:
    """Remove what runs that were killed have left in a folder."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _YOUNG_S:
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    # Neither a link nor a pipe of that name may lead or hold us.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags)
    try:
        if not _lock(descriptor, wait=False):
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """Bring the new names to the disk, where the system can."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
