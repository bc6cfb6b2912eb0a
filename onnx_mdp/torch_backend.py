"""Whether torch, an extra of the package, is there for what needs it."""

from __future__ import annotations

import importlib.util
import sys

from onnx_mdp.errors import MissingBackendError

__all__ = ["has_torch", "require_torch"]


def has_torch() -> bool:
    """Whether torch can be found, without loading it."""
    if "torch" in sys.modules:
        return sys.modules["torch"] is not None
    return importlib.util.find_spec("torch") is not None


def require_torch(what: str) -> None:
    """Raise ``MissingBackendError``, which names ``what`` needs torch, where there is none."""
    if not has_torch():
        raise MissingBackendError(f"{what} needs torch: run `pip install 'onnx-mdp[torch]'`.")
