"""What execution providers are called, where each comes from, and how one of a library of its own joins.

A provider is part of the ONNX Runtime that is installed, or a *plugin*: a shared library, from a package or
your own (``--ep-library``), that is registered first and then offers devices.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx_mdp.errors import MissingBackendError

__all__ = ["SHORT_NAMES", "add_plugin", "missing_provider", "plugin_library"]

SHORT_NAMES = {
    "coreml": "CoreMLExecutionProvider",
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}

_EXTRAS = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "gpu",
    "OpenVINOExecutionProvider": "openvino",
    "TensorrtExecutionProvider": "gpu",
}
# Packages that carry nothing but a plugin: (module, what to install).
_PLUGINS = {
    "NvTensorRTRTXExecutionProvider": (
        "onnxruntime_ep_nv_tensorrt_rtx",
        "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    ),
}


def plugin_library(provider: str, library: str) -> str | None:
    """The shared library of a plugin provider: `library`, else that of its package; None if it is built in.

    Raises ``MissingBackendError`` if there is no such file.
    """
    module = _PLUGINS.get(provider, ("", ""))[0]
    if not library and module and importlib.util.find_spec(module) is not None:
        return str(importlib.import_module(module).get_library_path())
    if library and not Path(library).is_file():
        raise MissingBackendError(f"There is no provider library '{library}': correct --ep-library.")
    return str(Path(library).resolve()) if library else None


def add_plugin(
    ort: Any, session_options: Any, provider: str, library: str, options: Mapping[str, str]
) -> None:
    """Register the plugin `library` once a process, and have a session use all its devices.

    Raises ``MissingBackendError`` if it is no plugin, is another provider, or offers no device here.
    """
    if not hasattr(ort, "register_execution_provider_library"):
        raise MissingBackendError(
            f"ONNX Runtime {ort.__version__} takes no plugin providers: install 1.23 or later."
        )
    if not _devices(ort, provider):
        before = {device.ep_name for device in ort.get_ep_devices()}
        try:
            ort.register_execution_provider_library(provider, library)
        except Exception as error:
            if "already" not in str(error):
                reason = str(error).strip().splitlines()[0]
                raise MissingBackendError(
                    f"'{Path(library).name}' is no provider library that ONNX Runtime {ort.__version__} "
                    f"loads: {reason.rstrip('.')}."
                ) from error
        if not _devices(ort, provider):
            others = sorted({device.ep_name for device in ort.get_ep_devices()} - before)
            fact = f"offers {', '.join(others)}" if others else "offers no device on this machine"
            raise MissingBackendError(
                f"'{Path(library).name}' {fact}, not {provider}: choose another provider or library."
            )
    session_options.add_provider_for_devices(_devices(ort, provider), dict(options))


def _devices(ort: Any, provider: str) -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == provider]


def missing_provider(provider: str, fact: str) -> MissingBackendError:
    """The error for a provider that is not there, with the command that installs it."""
    if provider in _EXTRAS:
        remedy = f"install it with `pip install onnx-mdp[{_EXTRAS[provider]}]` and its drivers"
    elif provider in _PLUGINS:
        remedy = f"install it with `pip install {_PLUGINS[provider][1]}` and its drivers"
    else:
        remedy = "install the ONNX Runtime build that contains it, or give its plugin with --ep-library"
    return MissingBackendError(f"{provider} {fact}: {remedy}, or choose another provider.")
