"""Plain nodes for what hides them: local functions, branches always taken, operators that a runtime fused.

The analysis works on a graph of standard operators. What is replaced here computes the same; a verification
compares both forms. What draws random numbers is refused, since no two of its runs agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnx_mdp.errors import UnsupportedModelError

__all__ = ["inline_functions", "refuse_unknown_form", "unfold"]

_OLDEST_OPSET = 7  # ONNX Runtime has no kernels of earlier forms
_RANDOM = frozenset(
    "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike".split()
)
_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
}


def refuse_unknown_form(model: ir.Model) -> None:
    """Refuse a model of an opset that no installed package knows, or of no definite output.

    That is one that draws random numbers, or whose weights hold NaN.

    Raises:
        UnsupportedModelError: with the remedy.
    """
    opset, newest = model.opset_imports.get("", _OLDEST_OPSET), onnx.defs.onnx_opset_version()
    if opset < _OLDEST_OPSET:
        raise UnsupportedModelError(
            f"the model is of opset {opset}, and ONNX Runtime runs opset {_OLDEST_OPSET} or later; export it "
            "again, or convert it with onnx.version_converter"
        )
    if opset > newest:
        raise UnsupportedModelError(
            f"the model is of opset {opset}, and the installed onnx knows opsets up to {newest}; "
            "install newer versions of onnx and onnxruntime"
        )
    bodies = (node for function in model.functions.values() for node in function.all_nodes())
    for node in (*model.graph.all_nodes(), *bodies):
        if _draws(node) and any(list(v.uses()) or v.is_graph_output() for v in node.outputs):
            raise UnsupportedModelError(
                f"{node.op_type} {node.name or node.outputs[0].name!r} draws random numbers, so that no two "
                "runs agree and nothing could be verified; export the model for inference"
            )
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) > 1 and tensor.dtype.is_floating_point():
            array = tensor.numpy()
            if array.size and np.isnan(array.min()):  # the minimum is NaN wherever one is
                raise UnsupportedModelError(
                    f"weight {name!r} holds NaN, so its outputs mean nothing; export a trained model"
                )


def _draws(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type != "Dropout" or len(node.inputs) < 3:
        return node.op_type in _RANDOM
    ratio, training = (_known(value) for value in node.inputs[1:3])
    return training is not None and bool(training.any()) and (ratio is None or bool(ratio.any()))


def _known(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The value of an initializer or a Constant node."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def inline_functions(model: ir.Model) -> bool:
    """Replace, in place, every call of a local function by its nodes; whether there was any.

    Raises:
        UnsupportedModelError: functions that are of another opset than the model.
    """
    if not model.functions:
        return False
    for function in model.functions.values():
        own, whole = function.opset_imports.get(""), model.opset_imports.get("")
        if own is not None and own != whole:
            raise UnsupportedModelError(
                f"the local function {function.name!r} is of opset {own} and the model of opset {whole}; "
                "inline it with onnx.inliner.inline_local_functions(model, convert_version=True)"
            )
        for domain, version in function.opset_imports.items():
            model.opset_imports.setdefault(domain, version)
    inner = (node for function in model.functions.values() for node in function.all_nodes())
    for node in (*model.graph.all_nodes(), *inner):
        _fit_call(node, model.functions.get(node.op_identifier()))
    try:
        InlinePass()(model)
    except ir.passes.PreconditionError as error:
        raise UnsupportedModelError(
            "the local functions of the model call each other in a circle; export the model again"
        ) from error
    model.functions.clear()
    return True


def _fit_call(node: ir.Node, function: ir.Function | None) -> None:
    """A call may leave out the last outputs; it may not have more of anything than its function."""
    if function is None:
        return
    if len(node.inputs) > len(function.inputs) or len(node.outputs) > len(function.outputs):
        raise UnsupportedModelError(
            f"{node.name!r} calls the local function {function.name!r} with more inputs or outputs "
            "than it has; export the model again"
        )
    node.resize_outputs(len(function.outputs))


def unfold(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Replace, in place, an If whose condition is a constant and what a runtime fused; whether there was any.

    ``shapes`` says what is known of inner tensors. Names of outputs stay.
    """
    found = False
    for node in list(model.graph):
        if node.op_type == "If" and not node.domain:
            found |= _take_branch(model, node)
        elif node.domain == "com.microsoft" and node.op_type in _UNFUSED:
            found |= _UNFUSED[node.op_type](model, node, shapes)
    return found


class _Names:
    """Names that no value of a model has, those in the bodies of its nodes included."""

    def __init__(self, model: ir.Model) -> None:
        self.taken = {str(v.name) for v in _values(model)}

    def new(self, stem: str) -> str:
        name, number = stem, 2
        while name in self.taken:
            name, number = f"{stem}_{number}", number + 1
        self.taken.add(name)
        return name


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from (*graph.inputs, *graph.initializers.values())
        yield from (value for node in graph for value in node.outputs)


def _take_branch(model: ir.Model, node: ir.Node) -> bool:
    condition = node.inputs[0]
    tensor = condition.const_value if condition is not None else None
    if tensor is None or condition is None or condition.is_graph_input():
        return False
    branch = node.attributes["then_branch" if tensor.numpy().any() else "else_branch"].as_graph()
    names = _Names(model)
    made = list(branch.outputs)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        del branch.initializers[str(value.name)]
        if str(value.name) in model.graph.initializers:
            value.name = names.new(f"{node.outputs[0].name}/{value.name}")
        model.graph.register_initializer(value)
    nodes = list(branch)
    branch.remove(nodes)
    for inner in nodes:
        inner.name = f"{node.name}/{inner.name}" if node.name and inner.name else inner.name
        for value in inner.outputs:
            # Branches are scopes of their own: both may give one name to different values.
            value.name = names.new(f"{node.outputs[0].name}/{value.name}") if value.name else value.name
    model.graph.insert_before(node, nodes)
    for value, result in zip(made, node.outputs, strict=True):
        _stand_in(model, node, result, value)
    model.graph.remove(node, safe=True)
    return True


def _stand_in(model: ir.Model, node: ir.Node, result: ir.Value, value: ir.Value) -> None:
    """Let ``value`` go by the name of ``result``, an output of ``node`` that goes."""
    copy = ir.Node("", "Identity", [value])
    copy.outputs[0].type, copy.outputs[0].shape = result.type, result.shape
    model.graph.insert_before(node, copy)
    _take_over(result, copy.outputs[0])


def _take_over(result: ir.Value, value: ir.Value) -> None:
    """Let ``value`` have the name, the type and the readers of ``result``."""
    name = result.name
    result.name = f"{name}__before"
    value.name = name
    value.type, value.shape = result.type, result.shape
    result.replace_all_uses_with(value, replace_graph_outputs=True)


def _replace(model: ir.Model, node: ir.Node, nodes: list[ir.Node]) -> bool:
    """Put nodes in the place of one that a runtime fused; the last of them makes what it made."""
    names = _Names(model)
    output = str(node.outputs[0].name)
    for inner in nodes[:-1]:
        inner.outputs[0].name = names.new(f"{output}/{inner.op_type}")
    for inner in nodes:
        inner.name = f"{node.name}/{inner.op_type}" if node.name else ""
    model.graph.insert_before(node, nodes)
    _take_over(node.outputs[0], nodes[-1].outputs[0])
    model.graph.remove(node, safe=True)
    return True


def _attributes(node: ir.Node, *left_out: str) -> list[ir.Attr]:
    return [attribute for name, attribute in node.attributes.items() if name not in left_out]


def _activated(value: ir.Value, activation: str, numbers: list[float]) -> list[ir.Node] | None:
    """The nodes of the activation of a fused operator; None for one that is not known."""
    if not activation:
        return []
    if activation == "Clip" and len(numbers) == 2:
        bounds = [ir.tensor(np.asarray(number, np.float32)) for number in numbers]
        constants = [ir.Node("", "Constant", [], [ir.AttrTensor("value", bound)]) for bound in bounds]
        return [*constants, ir.Node("", "Clip", [value, *(constant.outputs[0] for constant in constants)])]
    if activation not in _ACTIVATIONS:
        return None
    keys = _ACTIVATIONS[activation]
    given = [ir.AttrFloat32(key, number) for key, number in zip(keys, numbers, strict=False)]
    return [ir.Node("", activation, [value], given)]


def _unfuse_conv(model: ir.Model, node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """``activation(Conv(x, w, b) + z)``."""
    nodes = [ir.Node("", "Conv", node.inputs[:3], _attributes(node, "activation", "activation_params"))]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], node.inputs[3]]))
    activation = node.attributes.get_string("activation", "") or ""
    numbers = list(node.attributes.get_floats("activation_params", ()) or ())
    more = _activated(nodes[-1].outputs[0], activation, numbers)
    return more is not None and _replace(model, node, nodes + more)


def _unfuse_gemm(model: ir.Model, node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """``activation(Gemm(a, b, c))``."""
    own = [name for name in node.attributes if name.startswith("activation")]
    gemm = ir.Node("", "Gemm", node.inputs, _attributes(node, *own))
    activation = node.attributes.get_string("activation", "") or ""
    numbers = [
        node.attributes[key].as_float()
        for key in ("activation_alpha", "activation_beta")
        if key in node.attributes
    ]
    more = _activated(gemm.outputs[0], activation, numbers)
    return more is not None and _replace(model, node, [gemm, *more])


def _unfuse_matmul(model: ir.Model, node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """``alpha · A' B'``, whose last two axes may be transposed."""
    if any(node.attributes.get_int(key, 0) for key in ("transBatchA", "transBatchB")):
        return False
    nodes: list[ir.Node] = []
    factors: list[ir.Value | None] = list(node.inputs)
    for slot, key in enumerate(("transA", "transB")):
        value = node.inputs[slot]
        shape = shapes.get(str(value.name)) if value is not None else None
        if shape is None:
            return False
        if node.attributes.get_int(key, 0) and len(shape) > 1:
            order = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
            nodes.append(ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", order)]))
            factors[slot] = nodes[-1].outputs[0]
    nodes.append(ir.Node("", "MatMul", factors))
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha != 1.0:
        number = ir.AttrTensor("value", ir.tensor(np.asarray(alpha, np.float32)))
        nodes.insert(0, ir.Node("", "Constant", [], [number]))
        nodes.append(ir.Node("", "Mul", [nodes[-1].outputs[0], nodes[0].outputs[0]]))
    return _replace(model, node, nodes)


_UNFUSED = {"FusedConv": _unfuse_conv, "FusedGemm": _unfuse_gemm, "FusedMatMul": _unfuse_matmul}
