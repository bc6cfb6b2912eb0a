"""Models by size, among them a detector whose number of heads is a dial, and a table that nobody measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.harness import ROOT
from benchmarks.model_files import model_path
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.tables.calibrating import Calibration
from onnx_mdp.tables.cost_terms import cost_terms
from onnx_mdp.tables.granularity import unit_choices
from onnx_mdp.tables.latency import LatencyTable, table_key

__all__ = ["detector_with_heads", "made_up_table", "sized_model"]

_CHANNELS, _SIDE, _OUT = 64, 16, 8


def detector_with_heads(count: int) -> onnx.ModelProto:
    """``image`` float32[1, 3, 16, 16] to ``head_0`` … float32[1, 8, 16, 16]; random weights."""
    rng = np.random.default_rng(0)
    weights: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def convolution(source: str, target: str, cin: int, cout: int) -> None:
        weight = rng.standard_normal((cout, cin, 3, 3)) * np.sqrt(2 / (9 * cin))
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"{target}.weight"))
        conv = [source, f"{target}.weight"]
        nodes.append(helper.make_node("Conv", conv, [target], name=target, pads=[1, 1, 1, 1]))

    source, cin = "image", 3
    for layer in range(3):
        convolution(source, f"stem_{layer}", cin, _CHANNELS)
        nodes.append(helper.make_node("Relu", [f"stem_{layer}"], [f"stem_{layer}_relu"]))
        source, cin = f"stem_{layer}_relu", _CHANNELS
    for head in range(count):
        convolution(source, f"hidden_{head}", _CHANNELS, _CHANNELS)
        nodes.append(helper.make_node("Relu", [f"hidden_{head}"], [f"hidden_{head}_relu"]))
        convolution(f"hidden_{head}_relu", f"head_{head}", _CHANNELS, _OUT)
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, _SIDE, _SIDE])
    outputs = [
        helper.make_tensor_value_info(f"head_{head}", TensorProto.FLOAT, [1, _OUT, _SIDE, _SIDE])
        for head in range(count)
    ]
    graph = helper.make_graph(nodes, "detector", [image], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def sized_model(name: str) -> Path:
    """The file of an export, or of ``heads_<count>``, made once."""
    kind, _, count = name.partition("_")
    if kind != "heads":
        return model_path(name)
    path = ROOT / "out" / "models" / f"{name}.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(detector_with_heads(int(count)), path)
    return path


def made_up_table(structure: Structure) -> LatencyTable:
    """A table in proportion to multiply-accumulates, with channels in blocks of 8."""
    terms = cost_terms(structure)
    keys = dict.fromkeys(term.key for term in terms)
    return LatencyTable(
        context={"device": "made up", "provider": "none", "threads": 1},
        key=table_key(structure),
        granularity=8,
        terms=terms,
        coefficients={key: (1e-3, 1e-4, 1e-4, 1e-3, 1e-3, 1e-3) for key in keys},
        calibration=Calibration(1.0, 0.0, 1.0, 0.0, 0.0, 0.0),
        choices={i: unit_choices(structure.dimensions[i], 8, 16) for i in structure.prunable},
        measured=0,
        seconds=0.0,
    )
