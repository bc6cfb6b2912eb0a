"""A folded, shape-concrete copy of a model, on which the analysis runs.

*Binding dims* gives every symbolic input dimension a number. *Observing* runs the model once, without
optimisation, and reads the shape of every tensor and the value of every tensor that depends on no input
value (shape arithmetic, weight-only data movement, Constant nodes). *Folding* turns those values into
initializers of a **normalised** model, unless they change with a symbolic dimension: these stay computed
at run time, so that dynamic batch and image sizes stay dynamic. Fused query/key/value projections are then
split into one for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.binding import bind_states, doubled_shapes
from onnx_mdp.analysis.normal_form import inline_functions, refuse_unknown_form, unfold
from onnx_mdp.analysis.projections import FusedProjection, Known, split_projections
from onnx_mdp.analysis.static_shapes import doubled_sizes, infer_statically
from onnx_mdp.analysis.stored_weights import separate_readers, stored_outputs
from onnx_mdp.errors import MdpError, MeasurementError
from onnx_mdp.model_io import clone, content_hash, model_proto
from onnx_mdp.numerics.independence import independent_outputs, subgraphs
from onnx_mdp.numerics.integer_form import is_quantized
from onnx_mdp.numerics.precision import as_stored, has_halves, in_float32, tensor_types
from onnx_mdp.numerics.qdq_form import in_qdq_form
from onnx_mdp.running.computation import Computation, weightless
from onnx_mdp.running.runtime import has_onnxruntime, one_line
from onnx_mdp.running.timing import random_feeds

__all__ = ["Operation", "Shadow", "add_initializer", "drop_unread", "prepare", "unique_name"]

Array = npt.NDArray[Any]

_FOLDED_BYTES = 2**20  # a folded value may be this large, or as large as what it was made from
_OBSERVED_BYTES = 2**28  # values of constants held, beside four times the weights


@dataclass(frozen=True, slots=True)
class Operation:
    """One node of the normalised model; ``index`` is its position there."""

    index: int
    name: str
    op_type: str
    domain: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    captured: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The operator and its name, as error messages and reports show it."""
        return f"{self.op_type} {self.name or self.outputs[0]!r}"


@dataclass(frozen=True, slots=True)
class Shadow:
    """What the analysis knows: operations in order, concrete shapes, and constant values.

    ``model`` is the normalised model, the one that the rewriter edits; ``shapes`` holds every tensor;
    ``constants`` the values that depend on no input value; ``dynamic`` marks the entries of those that
    change with a symbolic dimension (``bool`` of the value's shape); ``independent`` names what nodes compute
    from no input value, be it too large to hold in ``constants``; ``inputs`` maps each graph input to
    its bound shape; ``source`` is the content hash of the file that was prepared; ``split`` are the fused
    projections that became several, and ``unsplit`` the normalised model in which they are one; ``types`` are
    the element types of the tensors of a model in half precision (of another model, nothing); ``chains`` are
    the tensors between a stored weight and its reader; ``states`` maps inputs to the outputs that become them
    in the next frame; ``unfolded`` says whether functions, branches or fused operators gave way to plain
    nodes.
    """

    model: ir.Model
    operations: tuple[Operation, ...]
    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, Array]
    dynamic: Mapping[str, npt.NDArray[np.bool_]]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    source: str
    unsplit: ir.Model
    split: tuple[FusedProjection, ...] = ()
    independent: frozenset[str] = frozenset()
    types: Mapping[str, ir.DataType] = field(default_factory=dict)
    chains: frozenset[str] = frozenset()
    states: Mapping[str, str] = field(default_factory=dict)
    unfolded: bool = False

    @property
    def plain(self) -> bool:
        """Whether all is float32: nothing in half precision, nothing quantized."""
        return not self.types and not self.chains and not is_quantized(self.model)

    @property
    def rearranged(self) -> bool:
        """Whether the analysed nodes are others than those of the file, beside what was folded."""
        return self.unfolded or bool(self.split)

    def consumers(self) -> Mapping[str, tuple[tuple[int, int], ...]]:
        """For every tensor, the (operation, input slot) pairs that read it."""
        uses: dict[str, list[tuple[int, int]]] = {}
        for operation in self.operations:
            for slot, name in enumerate(operation.inputs):
                uses.setdefault(name, []).append((operation.index, slot))
        return {name: tuple(pairs) for name, pairs in uses.items()}


def prepare(
    model: ir.Model, shapes: Mapping[str, tuple[int, ...]], states: Mapping[str, str] | None = None
) -> Shadow:
    """Normalise a copy of ``model`` for the input shapes ``shapes`` and describe it.

    ``states`` maps inputs to the outputs that become them in the next frame.

    Raises:
        UsageError: a state that the model does not have.
        UnsupportedModelError: the model draws random numbers, or is of an opset that nothing runs.
        MeasurementError: ONNX Runtime cannot run the model.
    """
    refuse_unknown_form(model)
    source = content_hash(model)
    model = clone(model)
    _hide_weights_from_inputs(model)
    unfolded = inline_functions(model)
    model = in_qdq_form(model)
    while True:
        pure = independent_outputs(model)
        types = tensor_types(model) if has_halves(model) else {}
        observed, values = _observe(model, shapes, pure)
        values = as_stored(values, types)
        stored = stored_outputs(model, pure, types)
        folded = _foldable(model, {name: value for name, value in values.items() if name not in stored})
        dynamic = _dynamic(model, shapes, folded, types, observed)
        _fold(model, {name: value for name, value in folded.items() if name not in dynamic})
        sizes = {name: tuple(tensor.shape.numpy()) for name, tensor in _weights(model).items()}
        if not unfold(model, {**observed, **sizes, **shapes}):
            break
        unfolded = True
    initial = {name: _initial_value(v) for name, v in model.graph.initializers.items()}
    constants = {**folded, **{name: value for name, value in initial.items() if value is not None}}
    constants |= {name: values[name] for name in stored if name in values}
    chains = {name for name, follows in stored.items() if follows}
    for name, source_name in separate_readers(model, chains).items():
        constants[name] = constants[source_name]
        chains.add(name)
    held = {**observed, **{name: value.shape for name, value in constants.items()}, **shapes}
    unsplit = clone(model)
    split = split_projections(model, Known(held, constants, dynamic))
    drop_unread(model)
    return Shadow(
        model=model,
        operations=tuple(_operations(model)),
        shapes=held,
        constants=constants,
        dynamic=dynamic,
        inputs=dict(shapes),
        outputs=tuple(str(v.name) for v in model.graph.outputs),
        source=source,
        unsplit=unsplit,
        split=split,
        independent=frozenset(pure),
        unfolded=unfolded,
        types=types,
        chains=frozenset(chains),
        states=bind_states(model, states or {}, held),
    )


def _weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    stored = model.graph.initializers.items()
    return {name: value.const_value for name, value in stored if value.const_value is not None}


def _hide_weights_from_inputs(model: ir.Model) -> None:
    """Files before IR version 4 list their weights as inputs, with shapes that pruning would change."""
    listed = [v for v in model.graph.inputs if v.name in model.graph.initializers]
    for value in listed:
        model.graph.inputs.remove(value)
    if listed:
        model.ir_version = max(model.ir_version, 4)


def _initial_value(value: ir.Value) -> Array | None:
    return None if value.const_value is None else value.const_value.numpy()


def _observe(
    model: ir.Model, shapes: Mapping[str, tuple[int, ...]], pure: Sequence[str], *, all_shapes: bool = True
) -> tuple[dict[str, tuple[int, ...]], dict[str, Array]]:
    """Run the model as written; return the shapes of all tensors and the values of the pure ones.

    Where there is no ONNX Runtime they are inferred.
    """
    wanted = [str(v.name) for n in model.graph for v in n.outputs if v.name] if all_shapes else list(pure)
    if not wanted:
        return {}, {}
    if not has_onnxruntime():
        return infer_statically(model_proto(in_float32(model)), shapes, wanted, pure)
    computation = Computation(model, wanted, shapes)
    feeds = random_feeds(computation.inputs, shapes, seed=0)
    tensors = set(computation.tensors)
    measured = [name for name in wanted if name in tensors]
    try:
        seen = Computation(model, (), shapes, measured, alone=True).shapes(feeds)
        kept = list(_fitting(model, seen, pure))
        values = Computation(model, kept, shapes, alone=True).run(kept, feeds) if kept else []
    except MdpError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
        raise MeasurementError(
            f"ONNX Runtime cannot run the model at these input shapes: {one_line(error)[:200]}"
        ) from error
    return seen, {name: np.asarray(value) for name, value in zip(kept, values, strict=True)}


def _fitting(model: ir.Model, seen: Mapping[str, tuple[int, ...]], pure: Sequence[str]) -> Iterator[str]:
    """Copies of constants could be many times as large as the file: the first that may be held."""
    room = _OBSERVED_BYTES + 4 * sum(w.nbytes for w in _weights(model).values())
    for name in pure:
        size = math.prod(seen.get(name, ())) * 4
        if name in seen and size <= room:
            room -= size
            yield name


def _foldable(model: ir.Model, values: Mapping[str, Array]) -> dict[str, Array]:
    """The values to fold: not those that a small constant was expanded into."""
    sizes = {name: weight.nbytes for name, weight in _weights(model).items()}
    folded: dict[str, Array] = {}
    for node in model.graph:
        inputs = [str(v.name) for v in node.inputs if v is not None]
        if not all(str(v.name) in values for v in node.outputs if v.name):
            continue
        if node.op_type not in ("Shape", "Size") and not all(name in sizes for name in inputs):
            continue
        limit = max(_FOLDED_BYTES, sum(sizes.get(name, 0) for name in inputs))
        made = {str(v.name): values[str(v.name)] for v in node.outputs if v.name}
        if node.op_type == "Constant" or sum(a.nbytes for a in made.values()) <= limit:
            folded.update(made)
            sizes.update({name: a.nbytes for name, a in made.items()})
    return folded


def _dynamic(
    model: ir.Model,
    shapes: Mapping[str, tuple[int, ...]],
    folded: Mapping[str, Array],
    types: Mapping[str, ir.DataType],
    observed: Mapping[str, tuple[int, ...]],
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which entries of which folded values change when every symbolic dimension is doubled."""
    doubled = doubled_shapes(model, shapes)
    if doubled == dict(shapes) or not any(n.op_type in ("Shape", "Size") for n in model.graph):
        return {}
    computed = _shape_derived(model) & set(folded)
    try:
        values = as_stored(_observe(model, doubled, tuple(computed), all_shapes=False)[1], types)
    except MeasurementError:
        # The file promises a symbolic size that it cannot run at: only the arithmetic is evaluated there.
        values = doubled_sizes(weightless(model)[0], observed, folded, tuple(computed))
    changed = {name: _changed(folded[name], values.get(name)) for name in computed}
    return {name: mask for name, mask in changed.items() if mask.any()}


def _shape_derived(model: ir.Model) -> set[str]:
    derived: set[str] = set()
    for node in model.graph:
        reads = any(v is not None and v.name in derived for v in node.inputs)
        if reads or node.op_type in ("Shape", "Size"):
            derived.update(str(v.name) for v in node.outputs if v.name)
    return derived


def _changed(a: Array, b: Array | None) -> npt.NDArray[np.bool_]:
    if b is None or a.shape != b.shape:
        return np.ones(a.shape, np.bool_)
    same = (a == b) | ((a != a) & (b != b))  # NaN equals NaN here
    return np.asarray(~same, np.bool_)


def _fold(model: ir.Model, values: Mapping[str, Array]) -> None:
    """Replace folded values by initializers, in place, and drop the nodes that nobody reads any more."""
    graph_outputs = {v.name for v in model.graph.outputs}
    dead: list[ir.Node] = []
    for node in model.graph:
        names = [str(v.name) for v in node.outputs if v.name]
        if not names or not all(n in values for n in names) or graph_outputs & set(names):
            continue
        for value in node.outputs:
            if value.name and list(value.uses()):
                _replace_by_initializer(model, value, np.asarray(values[str(value.name)]))
        dead.append(node)
    for node in reversed(dead):
        model.graph.remove(node, safe=True)
    drop_unread(model)


def _replace_by_initializer(model: ir.Model, value: ir.Value, array: Array) -> None:
    name = str(value.name)
    constant = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=value.type, const_value=ir.tensor(array, name=name)
    )
    constant.dtype = ir.DataType.from_numpy(array.dtype)
    value.name = f"{name}__folded"
    value.replace_all_uses_with(constant)
    model.graph.register_initializer(constant)


def add_initializer(model: ir.Model, stem: str, array: Array) -> ir.Value:
    """Give a model one more constant, called ``stem`` or that with a number."""
    name, number = stem, 2
    taken = set(model.graph.initializers)
    if name in taken:  # with a number it may be the name of anything
        taken |= {str(v.name) for n in model.graph for v in n.outputs} | {
            str(v.name) for v in model.graph.inputs
        }
    while name in taken:
        name, number = f"{stem}{number}", number + 1
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    model.graph.register_initializer(value)
    return value


def unique_name(model: ir.Model, stem: str) -> str:
    """``stem``, or that with a number: a name that no node and no computed value of the model has."""
    taken = {v.name for n in model.graph for v in n.outputs} | {n.name for n in model.graph}
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}_{number}", number + 1
    return name


def drop_unread(model: ir.Model) -> None:
    """Remove, in place, the nodes and initializers whose values nobody reads."""
    outputs = {id(v) for v in model.graph.outputs}
    for node in reversed(list(model.graph)):
        if not any(id(v) in outputs or list(v.uses()) for v in node.outputs):
            model.graph.remove(node, safe=True)
    read = {id(v) for v in model.graph.outputs} | {id(v) for v in model.graph.inputs}
    for name, value in list(model.graph.initializers.items()):
        if not list(value.uses()) and id(value) not in read:
            del model.graph.initializers[name]


def _operations(model: ir.Model) -> Iterator[Operation]:
    for index, node in enumerate(model.graph):
        yield Operation(
            index=index,
            name=node.name or "",
            op_type=node.op_type,
            domain="" if node.domain == "ai.onnx" else node.domain,
            version=model.opset_imports.get(node.domain, model.opset_imports.get("", 1)),
            inputs=tuple("" if v is None else str(v.name) for v in node.inputs),
            outputs=tuple(str(v.name or "") for v in node.outputs),
            attributes={k: _plain(a) for k, a in node.attributes.items() if isinstance(a, ir.Attr)},
            captured=tuple(sorted(_captured(node))),
        )


def _plain(attribute: ir.Attr) -> Any:
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return None
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().numpy()
    return attribute.value


def _captured(node: ir.Node) -> set[str]:
    """Outer tensors that the subgraphs of a node read, or return as they are."""
    graphs = subgraphs(node)
    inner = [n for g in graphs for n in g.all_nodes()]
    bodies = [*graphs, *(g for n in inner for g in subgraphs(n))]
    made = {id(v) for n in inner for v in n.outputs}
    made |= {id(v) for g in bodies for v in (*g.inputs, *g.initializers.values())}
    read = [v for n in inner for v in n.inputs] + [v for g in bodies for v in g.outputs]
    return {str(v.name) for v in read if v is not None and id(v) not in made}
