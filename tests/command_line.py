"""Run the command line in this process, as a user would see it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from onnx_mdp.cli import app as cli

__all__ = ["Outcome", "Run", "call", "is_refused", "patiently"]

# A target is missed now and then where other tests compute; a test is about its command, not about that.
_TRIES_OF_A_TARGET = 3


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout; json.loads refuses anything beside it."""
        found = json.loads(self.out)
        assert found["schema_version"] == 1
        return dict(found)

    @property
    def missed(self) -> bool:
        """Whether the command measured more than its target, and nothing else was wrong."""
        said = re.search(r'^missed\b|"status": "missed"', self.out + self.err, re.IGNORECASE | re.MULTILINE)
        return self.code == 1 and said is not None


Run = Callable[..., Outcome]


def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Outcome:
    """Call ``main`` in this process; the capture is that of file descriptors, so C code counts too."""
    monkeypatch.setattr(sys, "argv", ["onnx-mdp", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capfd.readouterr()
    return Outcome(int(stop.value.code or 0), captured.out, captured.err)


def patiently(command: Callable[[], Outcome]) -> Outcome:
    """Run a command, and again where a busy machine missed its target."""
    outcome = command()
    for _ in range(_TRIES_OF_A_TARGET - 1):
        if outcome.missed:
            outcome = command()
    return outcome


def is_refused(outcome: Outcome, code: int, *fragments: str) -> None:
    """One error sentence that holds the fragments ends stderr, if need be with an indented list."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    before, _, error = f"\n{outcome.err}".partition("\nerror: ")
    assert "error" not in before
    sentence, *choices = error.splitlines()
    assert all(line.startswith("  ") for line in choices), error
    for fragment in fragments:
        assert fragment in sentence
