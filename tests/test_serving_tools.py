"""What `export` writes is read by the tools that it is for; `.ci/run` installs them, else this is skipped."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from test_export import DEMO

from onnx_mdp.model_io import load_model
from onnx_mdp.running.runtime import runtime
from onnx_mdp.serving.triton import configuration, served

HOSTILE = 'x"\n} model_warmup { name: "é\\\0'
TYPES = "BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 FLOAT16 FLOAT DOUBLE STRING".split()


def parsed(text: str) -> Any:
    """The configuration as Triton's own schema reads it; skips without ``tritonclient``."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse(text, schema.ModelConfig())


def identities(types: dict[str, int], shape: list[int]) -> onnx.ModelProto:
    """A model that returns its inputs, named and typed so."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_"]) for name in types]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, kind in types.items()]
    outputs = [helper.make_tensor_value_info(f"{name}_", kind, shape) for name, kind in types.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def test_tritons_schema_reads_the_whole_configuration() -> None:
    found = parsed(configuration(served(load_model(DEMO), "shapes", runtime("tensorrt", 2), max_batch=4)))
    assert (found.name, found.backend, found.max_batch_size) == ("shapes", "onnxruntime", 4)
    assert [list(i.dims) for i in (*found.input, *found.output)] == [[3, 64, 64], [10]]
    assert [w.batch_size for w in found.model_warmup] == [1, 4]
    assert list(found.model_warmup[0].inputs["image"].dims) == [3, 64, 64]
    assert found.parameters["intra_op_thread_count"].string_value == "2"
    (accelerator,) = found.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, accelerator.parameters["precision_mode"]) == ("tensorrt", "FP32")


@pytest.mark.parametrize("shape", [[], [2]])
def test_tritons_schema_knows_every_type_that_is_written(shape: list[int]) -> None:
    model = identities({name: getattr(TensorProto, name) for name in TYPES}, shape)
    found = parsed(configuration(served(load_model(model), "m", runtime())))
    assert [(i.name, list(i.dims)) for i in found.input] == [(name, shape or [1]) for name in TYPES]
    assert len({i.data_type for i in found.input}) == len(TYPES)
    assert all(i.HasField("reshape") == (not shape) for i in (*found.input, *found.output))


def test_tritons_schema_reads_every_name_as_it_is() -> None:
    found = parsed(configuration(served(load_model(identities({HOSTILE: 1}, [1])), "m", runtime())))
    assert [i.name for i in found.input] == list(found.model_warmup[0].inputs) == [HOSTILE]
    assert len(found.model_warmup) == 1
