"""Random graphs in half precision and quantized: the law holds as it does in float32."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from random_graphs import random_model
from test_precision import in_halves, with_casts
from test_random_graphs import check_same, feeds
from zoo import analyse, random_plan

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.numerics.integer_form import without_rounding
from onnx_mdp.numerics.precision import in_float32
from onnx_mdp.running.computation import Computation
from onnx_mdp.surgery.masking import masked_model
from onnx_mdp.surgery.rewriting import rewrite

GRAPHS = 150


class Quantizer:
    """Stores weights of layers as integers and rounds what the layers make, at random."""

    def __init__(self, model: onnx.ModelProto, rng: np.random.Generator) -> None:
        """Work on a copy."""
        self.proto = onnx.ModelProto.FromString(model.SerializeToString())
        self.rng = rng
        self.nodes: list[onnx.NodeProto] = []
        self.count = 0

    def run(self) -> onnx.ModelProto:
        """The quantized model."""
        stored = {t.name: t for t in self.proto.graph.initializer if len(t.dims) > 1}
        outputs = {o.name for o in self.proto.graph.output}
        for node in self.proto.graph.node:
            layer = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and self.rng.random() < 0.8
            for slot, name in enumerate(node.input[:2]):
                if layer and name in stored:
                    node.input[slot] = self.weight(numpy_helper.to_array(stored[name]))
            made = node.output[0]
            if layer and made not in outputs:
                node.output[0] = f"{made}_real"
            self.nodes.append(node)
            if node.output[0] != made:
                scale = self.constant(np.float32(0.05)), self.constant(np.int8(self.rng.integers(-5, 5)))
                self.add("QuantizeLinear", [node.output[0], *scale], f"{made}_integers")
                self.add("DequantizeLinear", [f"{made}_integers", *scale], made)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        del self.proto.graph.node[:], self.proto.graph.value_info[:]
        self.proto.graph.node.extend(copies)
        return self.proto

    def weight(self, array: np.ndarray) -> str:
        """One scale, or one for each index of an axis; with zero points or without."""
        axis = int(self.rng.integers(array.ndim)) if self.rng.random() < 0.6 else None
        others = tuple(a for a in range(array.ndim) if a != axis)
        largest = np.abs(array).max(axis=None if axis is None else others, keepdims=axis is not None)
        scale = np.asarray(largest / 127 + 1e-3, np.float32)
        integers = np.clip(np.round(array / scale), -120, 120).astype(np.int8)
        flat = scale.reshape(-1) if axis is not None else scale
        inputs = [self.constant(integers), self.constant(flat)]
        if self.rng.random() < 0.5:
            inputs.append(self.constant(self.rng.integers(-3, 4, flat.shape).astype(np.int8)))
        along = {} if axis is None else {"axis": axis}
        return self.add("DequantizeLinear", inputs, f"weight_{self.count}", **along)

    def constant(self, array: np.ndarray | np.generic) -> str:
        """A new initializer."""
        self.count += 1
        name = f"constant_{self.count}"
        self.proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, op_type: str, inputs: list[str], output: str, **attributes: int) -> str:
        """A new node; the name of what it makes."""
        self.nodes.append(helper.make_node(op_type, inputs, [output], f"node_of_{output}", **attributes))
        return output


FORMS: dict[str, Callable[[onnx.ModelProto, np.random.Generator], onnx.ModelProto]] = {
    "float16": lambda model, rng: in_halves(model, "float16"),
    "bfloat16": lambda model, rng: in_halves(model, "bfloat16"),
    "casts": lambda model, rng: with_casts(model, "float16"),
    "integers": lambda model, rng: Quantizer(model, rng).run(),
}


def in_real_numbers(model: ir.Model, structure: Structure) -> ir.Model:
    ranks = {name: len(shape) for name, shape in structure.shadow.shapes.items()}
    return in_float32(without_rounding(model, ranks))


def converted(form: str, rng: np.random.Generator) -> tuple[onnx.ModelProto, tuple[int, ...]] | None:
    """A random graph in another precision, where ONNX allows it and the runtime runs it."""
    proto, shape = random_model(lambda n: int(rng.integers(n)))
    with contextlib.suppress(Exception):
        other = FORMS[form](proto, rng)
        onnx.checker.check_model(other, full_check=True)
        computation = Computation(load_model(other))
        computation.run(computation.outputs, {"x": np.ones(shape, np.float32)})
        return other, shape
    return None


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_random_graphs_in_another_precision(form: str) -> None:
    seen: Counter[str] = Counter()
    for number in range(GRAPHS):
        rng = np.random.default_rng(number)
        made = converted(form, rng)
        if made is None:
            continue
        model, structure = analyse(made[0], {"x": made[1]})
        plan = random_plan(structure, rng)
        pruned = rewrite(structure, plan)
        onnx.checker.check_model(model_bytes(pruned), full_check=True)
        pair = [in_real_numbers(m, structure) for m in (masked_model(model, structure, plan), pruned)]
        check_same(*pair, feeds(pair[0], made[1]), f"graph {number}")
        seen["pruned"] += bool(plan.keep)
    assert seen["pruned"] > GRAPHS / 8
