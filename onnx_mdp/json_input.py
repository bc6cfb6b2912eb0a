"""JSON documents from elsewhere: plain text files of bounded size, or refused."""

from __future__ import annotations

from pathlib import Path

from onnx_mdp.errors import UsageError

__all__ = ["read_text"]

_MOST_BYTES = 2**28  # plans and tables of large models have some 100 kB, exports of stores some MB


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text of a plain file; ``what`` is the clause of an error that says which one to give.

    Raises:
        UsageError: it is no plain file, it is larger than 256 MB, or it cannot be read.
    """
    try:
        if not path.is_file():
            why = "it is no plain file" if path.exists() else "it does not exist"
        elif path.stat().st_size > _MOST_BYTES:
            why = f"it is larger than {_MOST_BYTES >> 20} MB"
        else:
            return path.read_text(encoding="utf-8")
    except OSError as error:
        why = str(error.strerror)
    except UnicodeDecodeError:
        why = "it is not text"
    raise UsageError(f"{path} cannot be read ({why}): {what}")
