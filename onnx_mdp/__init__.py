"""Prune ONNX vision models to a latency, with proof."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_mdp._version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnx_mdp.model_io import ModelLike
    from onnx_mdp.training.interpreter import OnnxModule

__all__ = ["__version__", "to_torch", "write_back"]

# Imports are inside of functions: a command forks a child before anything is loaded, and torch is an extra.


def to_torch(model: ModelLike) -> OnnxModule:
    """The model as a ``torch.nn.Module`` in evaluation mode, for a training loop of your own.

    Raises:
        MissingBackendError: torch is not installed.
        UnsupportedModelError: an operator has no form in torch here, or the model is quantized.
    """
    from onnx_mdp.torch_backend import require_torch

    require_torch("to_torch")
    from onnx_mdp.training import bridge

    return bridge.to_torch(model)


def write_back(model: ModelLike, module: OnnxModule) -> ir.Model:
    """A copy of the model with the weights and statistics of a module that `to_torch` made of it.

    Raises:
        MissingBackendError: torch is not installed.
        UsageError: the module has a tensor that the model lacks, or has in another shape.
    """
    from onnx_mdp.torch_backend import require_torch

    require_torch("write_back")
    from onnx_mdp.training import bridge

    return bridge.write_back(model, module)
