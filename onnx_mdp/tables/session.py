"""Which session measured something, kept with each measurement: a merged table says where it is from."""

from __future__ import annotations

import functools
import platform
import secrets

import numpy as np
import onnx

from onnx_mdp._version import __version__

__all__ = ["session"]


@functools.cache
def session() -> dict[str, str]:
    """An identity of this process, the name of the machine, and versions beside that of the runtime."""
    return {
        "host": platform.node(),
        "id": secrets.token_hex(6),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnx_mdp": __version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
