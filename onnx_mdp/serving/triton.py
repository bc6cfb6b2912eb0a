r"""A model repository of Triton Inference Server: ``REPOSITORY/NAME/config.pbtxt`` and ``NAME/1/model.onnx``.

The configuration says what the graph says, so that a server with auto-completion switched off takes it, and
what was measured: provider, precision and threads. Its fields are those of ``model_config.proto``, version 1,
and the parameters those of Triton's ONNX Runtime backend.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnx_mdp.analysis.binding import bind_shapes
from onnx_mdp.errors import UnsupportedModelError, UsageError
from onnx_mdp.files import check_output, make_folder
from onnx_mdp.large_models import save_model
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.serving.batching import require_batches
from onnx_mdp.serving.signature import Port, Signature, provenance, signature

__all__ = ["Served", "configuration", "served", "write_repository"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_TYPES = {
    ir.DataType.FLOAT: "FP32",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.DOUBLE: "FP64",
} | {
    ir.DataType[name]: name
    for name in "BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 STRING".split()
}
_GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
_ACCELERATORS = {
    "CPUExecutionProvider": None,
    "CUDAExecutionProvider": None,
    "OpenVINOExecutionProvider": ("cpu_execution_accelerator", "openvino"),
    "TensorrtExecutionProvider": ("gpu_execution_accelerator", "tensorrt"),
}
_PRECISIONS = {"float32": "FP32", "float16": "FP16", "int8": "INT8"}


@dataclass(frozen=True, slots=True)
class Served:
    """A model as a server runs it.

    ``max_batch`` is the most samples that the server joins into one batch, 0 if it joins none; ``warm_up``
    holds the shape of each input that an instance computes before it takes requests.
    """

    name: str
    ports: Signature
    runtime: Runtime
    max_batch: int
    warm_up: Mapping[str, tuple[int, ...]]
    notes: Mapping[str, str]


def served(
    model: ir.Model,
    name: str,
    runtime: Runtime,
    *,
    max_batch: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Served:
    """Check that Triton can serve a model so; ``input_shapes`` are those of the warm-up.

    Raises:
        UsageError: a name that is no folder, a provider that Triton has not, or no batch to join.
        UnsupportedModelError: an input or output of a type that Triton has not.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a served model: pass --name with letters, digits, dots, dashes and "
            "underscores, not beginning with a dot or dash"
        )
    ports = signature(model)
    for port in (*ports.inputs, *ports.outputs):
        if port.dtype not in _TYPES:
            raise UnsupportedModelError(
                f"{port.name!r} is {port.dtype}, which Triton's ONNX Runtime backend does not pass; give the "
                "model float32 or float16 inputs and outputs"
            )
    _check_runtime(runtime)
    shapes = bind_shapes(model, input_shapes or {})
    if max_batch:
        _check_batch(ports)
        require_batches(model, shapes)
    return Served(name, ports, runtime, max_batch, shapes, provenance(model))


def _check_runtime(runtime: Runtime) -> None:
    if runtime.provider not in _ACCELERATORS:
        raise UsageError(
            f"Triton's ONNX Runtime backend has no {runtime.provider}: "
            "use --ep cpu, openvino, cuda or tensorrt"
        )
    if runtime.provider == "OpenVINOExecutionProvider" and runtime.precision != "float32":
        raise UsageError("Triton tells OpenVINO no precision: leave --ep-precision out")


def _check_batch(ports: Signature) -> None:
    """The first size of every input and output must be open, and the same one where the inputs name it."""
    for port in (*ports.inputs, *ports.outputs):
        if not port.shape or isinstance(port.shape[0], int):
            raise UsageError(
                f"--max-batch needs an open first dimension, but {port.name!r} has the shape "
                f"{list(port.shape)}; leave it out, or export the model with a symbolic batch"
            )
    named = {str(port.shape[0]) for port in ports.inputs} - {""}
    if len(named) > 1:
        raise UsageError(
            f"--max-batch needs one batch dimension, but the inputs begin with {', '.join(sorted(named))}; "
            "leave it out"
        )


def configuration(served: Served) -> str:
    """The text of ``config.pbtxt``."""
    return "".join(f"{line}\n" for line in _lines(served))


def _lines(served: Served) -> Iterator[str]:
    yield f"name: {_quoted(served.name)}"
    yield 'backend: "onnxruntime"'
    yield 'default_model_filename: "model.onnx"'
    yield f"max_batch_size: {served.max_batch}"
    for kind, ports in (("input", served.ports.inputs), ("output", served.ports.outputs)):
        for port in ports:
            yield f"{kind} {{ name: {_quoted(port.name)} {_type(port)} {_dims(port, served.max_batch)} }}"
    yield "version_policy { latest { num_versions: 1 } }"
    kind = "KIND_GPU" if served.runtime.provider in _GPU_PROVIDERS else "KIND_CPU"
    yield f"instance_group {{ count: 1 kind: {kind} }}"
    if served.max_batch:
        yield "dynamic_batching { }"
    yield from _accelerator(served.runtime)
    threads = {"intra_op_thread_count": str(served.runtime.threads), "inter_op_thread_count": "1"}
    for key, text in (threads | dict(served.notes)).items():
        yield f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(text)} }} }}"
    for batch in sorted({1, served.max_batch or 1}):
        yield from _warm_up(served, batch)


def _accelerator(runtime: Runtime) -> Iterator[str]:
    chosen = _ACCELERATORS[runtime.provider]
    if chosen is None:
        return
    field, name = chosen
    precision = f' parameters {{ key: "precision_mode" value: "{_PRECISIONS[runtime.precision]}" }}'
    options = precision if name == "tensorrt" else ""
    yield f'optimization {{ execution_accelerators {{ {field} {{ name: "{name}"{options} }} }} }}'


def _warm_up(served: Served, batch: int) -> Iterator[str]:
    """Zeros, which every embedding and every float takes; Triton repeats them to fill the batch."""
    yield "model_warmup {"
    yield f'  name: "zeros, batch {batch}"'
    yield f"  batch_size: {batch}"
    for port in served.ports.inputs:
        shape = served.warm_up[port.name][1 if served.max_batch else 0 :]
        sizes = " ".join(f"dims: {size}" for size in shape or (1,))
        yield f"  inputs {{ key: {_quoted(port.name)} value {{ {_type(port)} {sizes} zero_data: true }} }}"
    yield "}"


def _type(port: Port) -> str:
    return f"data_type: TYPE_{_TYPES[port.dtype]}"


def _dims(port: Port, max_batch: int) -> str:
    """The sizes without the batch; a scalar is one value of no dimension."""
    dims = port.dims[1 if max_batch else 0 :]
    return f"dims: [ {', '.join(map(str, dims))} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"


def _quoted(text: str) -> str:
    r"""A string of protobuf's text format, with every byte that is not plain as an octal escape.

    >>> print(_quoted('a"b\n'))
    "a\042b\012"
    """
    plain = set(range(32, 127)) - set(b"\"\\'")
    return '"' + "".join(chr(b) if b in plain else f"\\{b:03o}" for b in text.encode()) + '"'


def write_repository(model: ir.Model, served: Served, repository: Path, *, overwrite: bool = False) -> Path:
    """Write the model's folder into a repository, and return it; other models there stay as they are.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    folder = repository / served.name
    config, path = folder / "config.pbtxt", folder / "1" / "model.onnx"
    if folder.is_dir():
        for output in filter(lambda output: output.parent.is_dir(), (config, path)):
            check_output(output, overwrite=overwrite)
    make_folder(path.parent)
    beside = {config: configuration(served).encode()}
    save_model(model, path, overwrite=overwrite, beside=beside)
    return folder
