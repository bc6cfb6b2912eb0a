"""Prune ONNX vision models to a latency, with proof."""

from onnx_mdp._version import __version__

__all__ = ["__version__"]
