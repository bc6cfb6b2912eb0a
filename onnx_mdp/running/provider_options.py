"""What a provider is told besides the user's options: threads, precision, where compiled engines are kept.

The user's own options win. TensorRT finds an engine again by the names in a graph and not by its weights, so
that two widths of one model would share an engine: engines lie in one folder for each model, and only the
cache of kernel timings is shared, by device.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from onnx_mdp.errors import UsageError
from onnx_mdp.running.accelerators import gpu_of

__all__ = [
    "PRECISIONS",
    "check_precision",
    "compiles_slowly",
    "computes_on_cpu",
    "engine_folder",
    "portable_options",
    "session_provider_options",
]

PRECISIONS = ("float32", "float16", "int8")
_FLAGS = {
    ("MIGraphXExecutionProvider", "float16"): {"migraphx_fp16_enable": "1"},
    ("MIGraphXExecutionProvider", "int8"): {"migraphx_int8_enable": "1"},
    ("OpenVINOExecutionProvider", "float16"): {"precision": "FP16"},
    # Some processors would else take bfloat16.
    ("OpenVINOExecutionProvider", "float32"): {"precision": "FP32"},
    ("QNNExecutionProvider", "float16"): {"enable_htp_fp16_precision": "1"},
    ("TensorrtExecutionProvider", "float16"): {"trt_fp16_enable": "1"},
    ("TensorrtExecutionProvider", "int8"): {"trt_int8_enable": "1"},
}
_ENGINES = ("NvTensorRTRTXExecutionProvider", "TensorrtExecutionProvider")


def check_precision(provider: str, precision: str) -> None:
    """Refuse a precision that the provider has no flag for.

    Raises:
        UsageError: with what else can be done.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"Unknown precision '{precision}': use one of {', '.join(PRECISIONS)}.")
    if precision == "float32" or (provider, precision) in _FLAGS:
        return
    others = sorted(name for name, own in _FLAGS if own == precision)
    raise UsageError(
        f"{provider} has no flag for {precision}, only {', '.join(others)} do: convert or quantise the model "
        "itself and leave --ep-precision out."
    )


def computes_on_cpu(provider: str, options: tuple[tuple[str, str], ...]) -> bool:
    """Whether the CPU time of the process tells when another process held the processor."""
    device = dict(options).get("device_type", "CPU")
    return provider == "CPUExecutionProvider" or (provider == "OpenVINOExecutionProvider" and device == "CPU")


def compiles_slowly(provider: str) -> bool:
    """Whether opening a session takes the provider seconds to minutes."""
    return provider in _ENGINES


def engine_folder(provider: str, options: tuple[tuple[str, str], ...], store: str) -> Path:
    """Where engines for this device are kept: beside the latency store."""
    chosen = store or os.environ.get("ONNX_MDP_STORE")
    if chosen:
        folder = Path(chosen).expanduser().parent
    else:
        import platformdirs  # a board may lack it, and has no engines

        folder = Path(platformdirs.user_cache_dir("onnx-mdp"))
    gpu = gpu_of(provider, options)
    device = re.sub(r"\W+", "-", f"{gpu.name} {gpu.driver}") if gpu else "unknown-device"
    return folder / "engines" / device


def portable_options(provider: str, *, threads: int, precision: str) -> dict[str, str]:
    """The options of a provider that name nothing of this machine."""
    told = dict(_FLAGS.get((provider, precision), {}))
    if provider == "OpenVINOExecutionProvider":
        told |= {"device_type": "CPU", "num_of_threads": str(threads)}
    return told


def session_provider_options(
    provider: str,
    options: tuple[tuple[str, str], ...],
    *,
    threads: int,
    precision: str,
    store: str,
    model: bytes,
) -> dict[str, str]:
    """All options of a provider for a session of the serialised ``model``; makes folders that they name."""
    told = portable_options(provider, threads=threads, precision=precision)
    if provider in _ENGINES:
        device = engine_folder(provider, options, store)
        if provider == "TensorrtExecutionProvider":
            own = device / hashlib.sha256(model).hexdigest()[:16]
            told |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(own)}
            told |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(device)}
            own.mkdir(parents=True, exist_ok=True)
        else:
            told["nv_runtime_cache_path"] = str(device)
            device.mkdir(parents=True, exist_ok=True)
    return told | dict(options)
