"""ONNX Runtime sessions that run where they were asked to run, or not at all.

ONNX Runtime lists providers that cannot start and then falls back to the CPU with a log line
at most, so a session counts only after it has named the wanted provider itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from onnx_mdp.errors import MdpError, MeasurementError, MissingBackendError, UsageError
from onnx_mdp.large_models import LargeModel
from onnx_mdp.running.accelerators import gpu_of
from onnx_mdp.running.provider_options import check_precision, computes_on_cpu, session_provider_options
from onnx_mdp.running.providers import SHORT_NAMES, add_plugin, missing_provider, plugin_library
from onnx_mdp.supervision import deadline

__all__ = [
    "InferenceSession",
    "NodeArg",
    "Runtime",
    "context",
    "device_name",
    "has_onnxruntime",
    "import_onnxruntime",
    "one_line",
    "open_session",
    "run_model",
    "runtime",
]

_ERROR_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (?:Fatal error: )?")
_SOURCE_LOCATION = re.compile(r"\S+\.(?:cc|cpp|cu|cuh|h):\d+\s*")
_SIGNATURE = re.compile(r"^[^()]*\bonnxruntime::[^()]*\([^()]*\)(?: const)?\s*")
_NO_KERNEL = re.compile(r"is not a registered function/op|Could not find an implementation for")
_FALLBACK = "fallback to CPU EP has been explicitly disabled"
_FATAL = 4
# Raised when latencies or their keys mean something else. Before 2, models were timed half warm; before 3, a
# sum that is normalised next was one with the sums that are not.
_PROTOCOL = 3
_MOST_SECONDS = 3600.0  # compilers of engines may take minutes


class NodeArg(Protocol):
    """An input or output of a session, as ONNX Runtime describes it."""

    name: str
    type: str
    shape: list[int | str | None]


class InferenceSession(Protocol):
    """The part of ``onnxruntime.InferenceSession`` that onnx-mdp uses (it ships no type stubs)."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]:
        """Compute the outputs."""

    def get_inputs(self) -> list[NodeArg]:
        """Describe the inputs that a feed must hold."""

    def get_outputs(self) -> list[NodeArg]:
        """Describe the outputs in the order of ``run``."""

    def get_providers(self) -> list[str]:
        """Name the providers that really run the session, the preferred one first."""

    def end_profiling(self) -> str:
        """Write the profile and return its file name."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where models run: a provider by its full name, its options sorted by key, its threads.

    ``precision`` is what the provider is told to compute in, whatever the types of the model;
    ``library`` is the file of a plugin provider, empty for one that ONNX Runtime contains;
    ``allow_fallback`` accepts that part of a model runs on the CPU instead; compiled engines are kept
    beside ``store``, if empty the default one.
    """

    provider: str = "CPUExecutionProvider"
    options: tuple[tuple[str, str], ...] = ()
    threads: int = 1
    precision: str = "float32"
    library: str = ""
    allow_fallback: bool = False
    store: str = ""

    @property
    def on_cpu(self) -> bool:
        """Whether the processor itself computes, whatever the provider."""
        return computes_on_cpu(self.provider, self.options)


def runtime(
    name: str = "cpu",
    threads: int = 1,
    options: Sequence[tuple[str, str]] = (),
    *,
    precision: str = "float32",
    library: str = "",
    allow_fallback: bool = False,
    store: str = "",
) -> Runtime:
    """Make a ``Runtime`` from a short name such as ``cpu``, or a full provider name.

    >>> runtime("cpu").provider
    'CPUExecutionProvider'

    Raises ``UsageError`` for an unknown name, a precision that it has no flag for, or fewer than one
    thread. Whether the provider is installed is found out by ``open_session``.
    """
    provider = SHORT_NAMES.get(name.lower(), name)
    if not provider.endswith("ExecutionProvider"):
        raise UsageError(
            f"Unknown provider '{name}': use one of {', '.join(SHORT_NAMES)} or a full name such as "
            "CPUExecutionProvider."
        )
    if threads < 1:
        raise UsageError(f"A model cannot run on {threads} threads: use at least 1.")
    pairs = tuple(sorted((str(key), str(value)) for key, value in options))
    check_precision(provider, precision)
    return Runtime(provider, pairs, threads, precision, library, allow_fallback, store)


def has_onnxruntime() -> bool:
    """Whether ONNX Runtime is there; a broken one counts, so that its fault is named."""
    if "onnxruntime" in sys.modules:
        return sys.modules["onnxruntime"] is not None
    return importlib.util.find_spec("onnxruntime") is not None


def import_onnxruntime() -> Any:
    """Return the ``onnxruntime`` module; ``MissingBackendError`` names the install command."""
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        raise MissingBackendError(
            "ONNX Runtime is not installed: run `pip install onnx-mdp[cpu]` "
            "(or [gpu] or [openvino], exactly one of them)."
        ) from error
    except ImportError as error:
        raise MissingBackendError(
            f"ONNX Runtime is installed but cannot be imported ({one_line(error)}): "
            "reinstall it with `pip install --force-reinstall onnx-mdp[cpu]`."
        ) from error


def open_session(
    model: bytes | LargeModel | str | Path,
    runtime: Runtime,
    *,
    optimize: bool = True,
    fallback: bool = True,
    profile_prefix: str | None = None,
    optimized_model_path: Path | None = None,
) -> InferenceSession:
    """Open a silent session of `model` (serialised bytes or a file) that runs on `runtime`.

    `optimize=False` disables every graph optimisation; `fallback=False` refuses a model of which ONNX
    Runtime gives a node to the CPU instead; `profile_prefix` switches the profiler on
    and starts its file name; `optimized_model_path` receives the optimised model.
    Raises ``MissingBackendError`` if the provider is absent or does not start, ``MeasurementError``
    if the model cannot be loaded.
    """
    ort = import_onnxruntime()
    library = plugin_library(runtime.provider, runtime.library)
    if library is None and runtime.provider not in ort.get_available_providers():
        raise missing_provider(runtime.provider, "is not part of this ONNX Runtime")
    # Providers that fail to start complain through the process-wide logger, not the session's.
    ort.set_default_logger_severity(_FATAL)
    options = _session_options(ort, runtime, optimize, profile_prefix, optimized_model_path)
    if not fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = _create(ort, model, runtime, options)
    except MissingBackendError:
        raise
    except Exception as error:
        reason = one_line(error, model)
        if not _starts(ort, runtime):
            why = "and leaves all to the CPU" if _FALLBACK in reason else f"({reason.rstrip('.')})"
            raise _refused(ort, runtime, f"does not start {why}") from error
        name = "the model" if isinstance(model, (bytes, LargeModel)) else f"'{Path(model).name}'"
        if _NO_KERNEL.search(reason):
            reason += (
                " What is pruned is measured and verified by running it: cut the graph before this operator, "
                "and prune what is left."
            )
        if "bfloat16" in reason:
            reason += " It has no kernels for bfloat16: measure with --ep where there are."
        raise MeasurementError(f"ONNX Runtime cannot load {name} on {runtime.provider}: {reason}") from error
    if runtime.provider not in session.get_providers():
        fact = f"did not start and fell back to {session.get_providers()[0]}"
        raise _refused(ort, runtime, fact)
    return session


def run_model(
    session: InferenceSession, feeds: Mapping[str, Any], names: Sequence[str] | None = None
) -> list[Any]:
    """Compute the outputs, all or those named; ``MeasurementError`` if the model does not run."""
    try:
        return session.run(names, feeds)
    except Exception as error:
        raise MeasurementError(f"ONNX Runtime cannot run the model: {one_line(error)}") from error


def _create(
    ort: Any, model: bytes | LargeModel | str | Path, runtime: Runtime, options: Any
) -> InferenceSession:
    if isinstance(model, LargeModel):
        arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in model.weights.items()}
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        options.add_external_initializers(list(arrays), values)
        model = model.data
    library = plugin_library(runtime.provider, runtime.library)
    told = session_provider_options(
        runtime.provider,
        runtime.options,
        threads=runtime.threads,
        precision=runtime.precision,
        store=runtime.store,
        model=model if isinstance(model, bytes) else str(model).encode(),
    )
    if library is not None:
        add_plugin(ort, options, runtime.provider, library, told)
    providers = None if library is not None else [(runtime.provider, told)]
    with deadline(_MOST_SECONDS):
        session: InferenceSession = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=providers,
            # On by default, it prints to stdout and retries on the CPU.
            enable_fallback=0,
        )
    return session


def _starts(ort: Any, runtime: Runtime) -> bool:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", [value], [result])
    probe = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    try:
        options = _session_options(ort, runtime, True, None, None)
        return runtime.provider in _create(ort, probe.SerializeToString(), runtime, options).get_providers()
    except Exception:
        return False


def _refused(ort: Any, runtime: Runtime, fact: str) -> MdpError:
    """Why a provider does not start: the precision alone, or all of it."""
    if runtime.precision != "float32" and _starts(ort, replace(runtime, precision="float32")):
        return UsageError(
            f"{runtime.provider} does not compute in {runtime.precision} on this device: "
            "leave --ep-precision out."
        )
    return missing_provider(runtime.provider, fact)


def _session_options(
    ort: Any, runtime: Runtime, optimize: bool, profile_prefix: str | None, optimized_model_path: Path | None
) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = runtime.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    # Sessions that look at values are not timed; an arena would double the memory of a large model.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = optimize
    if not optimize:  # what takes the shape of a tensor then runs at once, before the tensor is forgotten
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if optimized_model_path is not None:
        options.optimized_model_filepath = str(optimized_model_path)
    return options


def one_line(error: BaseException, model: bytes | LargeModel | str | Path = b"") -> str:
    """Return the reason in ONNX Runtime's message: its first line without codes and paths."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = _SIGNATURE.sub("", _SOURCE_LOCATION.sub("", _ERROR_PREFIX.sub("", lines[0])))
    if isinstance(model, (str, Path)):
        reason = reason.replace(str(model), Path(model).name)
    return reason.rstrip(" .") + "."


def device_name() -> str:
    """Return the processor's model name and its number of logical CPUs."""
    return f"{_cpu_model()} ({os.cpu_count()} cpus)"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # ARM kernels have no "model name" line, only codes; the platform names the architecture.
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def context(runtime: Runtime) -> dict[str, str | int]:
    """Return everything that a latency depends on besides the model: the key of stored measurements."""
    gpu = gpu_of(runtime.provider, runtime.options)
    found: dict[str, str | int] = {} if gpu is None else {"driver": gpu.driver}
    return found | {
        "device": device_name() if gpu is None else gpu.name,
        "options": ",".join(f"{key}={value}" for key, value in runtime.options),
        "ort_version": str(import_onnxruntime().__version__),
        "precision": runtime.precision,
        "provider": runtime.provider,
        "threads": runtime.threads,
        "timing": _PROTOCOL,
    }
