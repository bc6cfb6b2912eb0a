"""Models whose weights do not fit into one protobuf: weights beside it, in a file or in memory.

Protobuf ends at 2 GB. What is larger is written as a model and one file of external data, whose name holds a
hash of the model: a new file never takes the place of one that an old model still needs. The runtime takes
such a model from memory, without a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from onnx_mdp.files import Content, check_output, write_files
from onnx_mdp.model_io import clone, content_hash, is_large, model_bytes, model_proto

__all__ = ["LargeModel", "for_session", "save_model"]

_INLINE_BYTES = 2**12  # shapes and the like, which a runtime wants to see when it loads the model
_ALIGNMENT = 2**12  # so that pages of the file can be mapped

_Tensors = Mapping[str, tuple[int, ir.TensorProtocol]]


@dataclass(frozen=True, slots=True)
class LargeModel:
    """A serialised model that refers to its weights, and the weights by name."""

    data: bytes
    weights: Mapping[str, ir.TensorProtocol]


def for_session(model: ir.Model, outputs: Sequence[str] = ()) -> bytes | LargeModel:
    """A model as ``open_session`` takes it, with further ``outputs``; a large one shares its weights."""
    proto, tensors = _apart(model, "weights") if is_large(model) else (model_proto(model), {})
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in known)
    data: bytes = proto.SerializeToString()
    return LargeModel(data, {name: tensor for name, (_, tensor) in tensors.items()}) if tensors else data


def save_model(
    model: ir.Model, path: Path, *, overwrite: bool = False, beside: Mapping[Path, Content] | None = None
) -> None:
    """Write a model, and what belongs ``beside`` it, in one step: a reader never sees half a result.

    Weights of more than 2 GB go to ``<name>.<hash>.data`` in the same folder.
    """
    contents = dict(beside or {})
    for output in (*contents, path):
        check_output(output, overwrite=overwrite)
    kept = ""
    if is_large(model):
        kept = f"{path.name}.{content_hash(model)}.data"
        proto, tensors = _apart(model, kept)
        contents[path.with_name(kept)] = _writer(tensors)
        contents[path] = proto.SerializeToString()
    else:
        contents[path] = model_bytes(model)
    write_files(contents)
    stale = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    for other in path.parent.iterdir():
        if stale.fullmatch(other.name) and other.name != kept:
            with suppress(OSError):
                other.unlink()


def _apart(model: ir.Model, location: str) -> tuple[onnx.ModelProto, _Tensors]:
    """A model that refers to its larger weights in a file, and these with their offsets there."""
    bare, offset = clone(model), 0
    tensors: dict[str, tuple[int, ir.TensorProtocol]] = {}
    for name, value in bare.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _INLINE_BYTES or tensor.dtype == ir.DataType.STRING:
            continue
        tensors[name] = offset, tensor
        value.const_value = ir.ExternalTensor(
            location, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return ir.to_proto(bare), tensors


def _writer(tensors: _Tensors) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        for offset, tensor in tensors.values():
            file.seek(offset)
            file.write(tensor.tobytes())

    return write
