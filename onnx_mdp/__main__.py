"""``python -m onnx_mdp``, and ``onnx-mdp``: the command line in a process that is watched."""

import importlib.util
import sys

from onnx_mdp.errors import MissingBackendError
from onnx_mdp.supervision import supervise

__all__ = ["start"]


def start() -> None:
    """Run the command line."""
    if importlib.util.find_spec("typer") is None:
        sys.stderr.write("error: the command line needs typer: run `pip install typer`\n")
        sys.exit(MissingBackendError.exit_code)
    from onnx_mdp.cli.app import main

    supervise(main)


if __name__ == "__main__":
    start()
