"""``python -m onnx_mdp``, and ``onnx-mdp``: the command line in a process that is watched."""

from onnx_mdp.cli import main
from onnx_mdp.supervision import supervise

__all__ = ["start"]


def start() -> None:
    """Run the command line."""
    supervise(main)


if __name__ == "__main__":
    start()
