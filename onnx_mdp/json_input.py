"""JSON documents from elsewhere: plain files of bounded size and of the expected form, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from onnx_mdp.errors import UsageError

__all__ = ["read_document", "read_text"]

_MOST_BYTES = 2**28  # plans and tables of large models have some 100 kB, exports of stores some MB

_Form = TypeVar("_Form", bound=BaseModel)


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


def read_document(path: Path, form: type[_Form], name: str, what: str) -> _Form:
    """Read a JSON file of a form that is called ``name``.

    Raises:
        UsageError: the file cannot be read or has another form; the first fault is named.
    """
    text = read_text(path, what)
    try:
        return form.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:80] or "the document"
        raise UsageError(f"{path} is not {name}: {place}: {first['msg']}; {what}") from error
