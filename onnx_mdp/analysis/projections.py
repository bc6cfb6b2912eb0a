"""Split fused projections: one linear layer for query, key and value becomes one for each.

    x W + b, reshaped to [..., 3, H, d], part k selected   =   x W_k + b_k, reshaped to [..., H, d]

Fused, the parts lie in one rectangular tensor, so value width could not differ from query and key width.
The split copies columns and moves no number: every output keeps its value up to the rounding of the runtime.
Only what is certain is split: a constant weight, intermediate results that nobody else reads, and an axis
of extent 2 or 3 from which every reader selects single indices. All else stays fused, which ties the widths.
What was split is remembered, so that it can be fused again where the widths stay equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["FusedProjection", "Known", "split_projections"]

Array = npt.NDArray[Any]

_PARTS = (2, 3)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a model's tensors; `split_projections` adds the tensors that it makes.

    ``shapes`` and constant ``values`` by name, and which entries of a value are ``dynamic``.
    """

    shapes: MutableMapping[str, tuple[int, ...]]
    values: MutableMapping[str, Array]
    dynamic: MutableMapping[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class FusedProjection:
    """A projection that was split, by the names of tensors of the model before the split.

    ``linear``, ``bias`` (of its Add, if any) and ``reshape`` are outputs of nodes, ``axis`` is the axis of
    the ``parts`` after the reshape, and ``selected`` are the tensors that hold one part each, (part, name) in
    the order in which they were split.
    """

    linear: str
    bias: str | None
    reshape: str
    axis: int
    parts: int
    selected: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class _Fused:
    """A linear layer (with the Add of its bias, if any) whose output is reshaped, transposed and selected.

    ``axis`` is the axis of the parts after the reshape; ``order`` how the other axes are transposed, by
    ``transpose``; ``selected`` the tensors by part; ``measured`` the nodes that ask how many tokens it has.
    """

    linear: ir.Node
    bias: ir.Node | None
    reshape: ir.Node
    transpose: ir.Node | None
    order: tuple[int, ...]
    axis: int
    parts: int
    selected: tuple[tuple[int, ir.Value], ...]
    measured: tuple[ir.Node, ...]


def split_projections(model: ir.Model, known: Known) -> tuple[FusedProjection, ...]:
    """Split, in place, every fused projection; return what they were. Dead nodes are left behind."""
    found = [_match(node, known) for node in model.graph if node.op_type == "Reshape"]
    split = []
    for fused in found:
        if fused is not None:
            split.append(_names(fused))
            for node in fused.measured:
                node.replace_input_with(0, fused.linear.inputs[0])
            for part, value in fused.selected:
                _build(model, known, fused, part, value)
    return tuple(split)


def _names(fused: _Fused) -> FusedProjection:
    return FusedProjection(
        linear=str(fused.linear.outputs[0].name),
        bias=None if fused.bias is None else str(fused.bias.outputs[0].name),
        reshape=str(fused.reshape.outputs[0].name),
        axis=fused.axis,
        parts=fused.parts,
        selected=tuple((part, str(value.name)) for part, value in fused.selected),
    )


def _match(reshape: ir.Node, known: Known) -> _Fused | None:
    source = reshape.inputs[0]
    if source is None or reshape.inputs[1] is None or source.name not in known.shapes:
        return None
    width = known.shapes[str(source.name)][-1:]
    after = known.shapes.get(str(reshape.outputs[0].name), ())
    axes = [q for q in range(len(after)) if (math.prod(after[q:]),) == width and after[q] in _PARTS]
    layer, measured = _linear(source, known), _measured(source, known)
    if not axes or layer is None or str(reshape.inputs[1].name) not in known.values:
        return None
    axis = axes[0]
    value, moved, transpose = _moved(reshape.outputs[0], len(after), known)
    if None in moved:
        return None
    order = tuple(a - (a > axis) for a in moved if a is not None and a != axis)
    selected = _selected(value, moved.index(axis), known)
    parts = [part for part, _ in selected]
    if not parts or len(set(parts)) < len(parts) or value.is_graph_output():
        return None
    return _Fused(*layer, reshape, transpose, order, axis, after[axis], selected, measured)


def _moved(value: ir.Value, rank: int, known: Known) -> tuple[ir.Value, list[int | None], ir.Node | None]:
    """Where transposes, and axes of extent 1 that come and go, leave the axes; None is such an axis."""
    moved: list[int | None] = list(range(rank))
    transpose = None
    while _private(value):
        (node,) = (use.node for use in value.uses())
        if node.op_type == "Transpose":
            transpose, moved = node, [moved[a] for a in node.attributes["perm"].as_ints()]
        elif node.op_type == "Unsqueeze":
            places = _axes(node, 1, len(known.shapes[str(node.outputs[0].name)]), known)
            for place in sorted(places):
                moved.insert(place, None)
        elif node.op_type == "Squeeze":
            places = _axes(node, 1, len(moved), known)
            if not places or any(moved[place] is not None for place in places):
                break
            moved = [a for place, a in enumerate(moved) if place not in places]
        else:
            break
        value = node.outputs[0]
    return value, moved, transpose


def _linear(source: ir.Value, known: Known) -> tuple[ir.Node, ir.Node | None] | None:
    """The MatMul or Gemm with a constant weight that makes ``source``, and the Add of its bias."""
    maker, bias = source.producer(), None
    if len(list(source.uses())) - len(_measured(source, known)) > 1 or source.is_graph_output():
        return None
    if maker is not None and maker.op_type == "Add":
        inputs = [v for v in maker.inputs if v is not None and v.name not in known.values]
        bias, maker = maker, inputs[0].producer() if len(inputs) == 1 else None
        source = inputs[0] if inputs else source
    if maker is None or maker.domain not in ("", "ai.onnx") or (bias is not None and not _private(source)):
        return None
    gemm = maker.op_type == "Gemm"
    plain = all(
        maker.attributes[name].as_float() == 1.0 for name in ("alpha", "beta") if name in maker.attributes
    )
    weight = maker.inputs[1] if len(maker.inputs) > 1 else None
    if maker.op_type not in ("MatMul", "Gemm") or weight is None or not (plain or not gemm):
        return None
    if weight.const_value is None or len(known.shapes.get(str(weight.name), ())) != 2:
        return None
    return maker, bias


def _measured(source: ir.Value, known: Known) -> tuple[ir.Node, ...]:
    """The Shape nodes that read a tensor, if nobody takes the last extent from them."""
    last = len(known.shapes[str(source.name)]) - 1
    nodes = tuple(use.node for use in source.uses() if use.node.op_type == "Shape")
    if any(_int(n, "start", 0) or "end" in n.attributes or n.outputs[0].is_graph_output() for n in nodes):
        return ()
    readers = [use.node for node in nodes for use in node.outputs[0].uses()]
    return nodes if all(last not in _taken(reader, last, known) for reader in readers) else ()


def _taken(reader: ir.Node, last: int, known: Known) -> range | list[int]:
    """Which entries of a shape a node takes; all of them if it does not say so."""
    given = [_constant(reader, slot, known) for slot in (1, 2)]
    if reader.op_type == "Gather" and given[0] is not None:
        return [int(index) % (last + 1) for index in given[0].reshape(-1)]
    steps = _constant(reader, 4, known)
    if reader.op_type != "Slice" or steps is not None or any(g is None or g.size != 1 for g in given):
        return range(last + 1)
    start, stop = (int(g.reshape(-1)[0]) for g in given if g is not None)
    return range(last + 1)[start:stop]


def _private(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _selected(value: ir.Value, axis: int, known: Known) -> tuple[tuple[int, ir.Value], ...]:
    """(part, tensor) for every reader; none where one of them does something else."""
    found: list[tuple[int, ir.Value]] = []
    shape = known.shapes[str(value.name)]
    for use in value.uses():
        node = use.node
        if node.op_type == "Gather" and _int(node, "axis", 0) % len(shape) == axis:
            index = _constant(node, 1, known)
            if use.idx or index is None or index.ndim or node.outputs[0].is_graph_output():
                return ()
            found.append((int(index) % shape[axis], node.outputs[0]))
            continue
        for part, single in _singles(node, axis, len(shape), known):
            if part is None or single.is_graph_output():
                return ()
            for squeeze in (u.node for u in single.uses()):
                named = squeeze.op_type == "Squeeze" and _axes(squeeze, 1, len(shape), known) == (axis,)
                if not named or squeeze.outputs[0].is_graph_output():
                    return ()
                found.append((part, squeeze.outputs[0]))
    return tuple(found)


def _singles(node: ir.Node, axis: int, rank: int, known: Known) -> Iterator[tuple[int | None, ir.Value]]:
    """The outputs of a Split or Slice that hold one part each; part None if they do not."""
    if node.op_type == "Split" and _int(node, "axis", 0) % rank == axis:
        single = all(known.shapes.get(str(v.name), (0,) * rank)[axis] == 1 for v in node.outputs)
        yield from ((place if single else None, value) for place, value in enumerate(node.outputs))
        return
    start = _constant(node, 1, known) if node.op_type == "Slice" else None
    steps = _constant(node, 4, known) if node.op_type == "Slice" else None
    made = node.outputs[0]
    single = (
        start is not None
        and start.size == 1
        and _axes(node, 3, rank, known) == (axis,)
        and (steps is None or steps.reshape(-1).tolist() == [1])
        and known.shapes[str(made.name)][axis] == 1
    )
    extent = known.shapes[str(node.inputs[0].name)][axis] if node.inputs[0] is not None else 1
    yield (int(start.reshape(-1)[0]) % extent if single and start is not None else None), made


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _constant(node: ir.Node, slot: int, known: Known) -> Array | None:
    value = node.inputs[slot] if slot < len(node.inputs) else None
    return None if value is None else known.values.get(str(value.name))


def _axes(node: ir.Node, slot: int, rank: int, known: Known) -> tuple[int, ...]:
    listed = _constant(node, slot, known)
    if listed is None and "axes" in node.attributes:
        listed = np.asarray(node.attributes["axes"].as_ints())
    return () if listed is None else tuple(int(axis) % rank for axis in listed.reshape(-1))


def _build(model: ir.Model, known: Known, fused: _Fused, part: int, selected: ir.Value) -> None:
    """Make ``selected`` from a projection of its own."""
    data, weight = fused.linear.inputs[0], fused.linear.inputs[1]
    assert data is not None
    assert weight is not None
    transposed = fused.linear.op_type == "Gemm" and _int(fused.linear, "transB", 0)
    inputs = [data, _cut(model, known, weight, fused, part, 0 if transposed else 1), *fused.linear.inputs[2:]]
    if len(inputs) > 2 and inputs[2] is not None:
        inputs[2] = _cut(model, known, inputs[2], fused, part, -1)
    before = known.shapes[str(fused.linear.outputs[0].name)]
    shape = (*before[:-1], before[-1] // fused.parts)
    value = _add(fused, known, fused.linear, inputs, part, shape)
    if fused.bias is not None:
        operands = [
            _cut(model, known, v, fused, part, -1) if v is not None and v.name in known.values else value
            for v in fused.bias.inputs
        ]
        before = known.shapes[str(fused.bias.outputs[0].name)]
        value = _add(fused, known, fused.bias, operands, part, (*before[:-1], before[-1] // fused.parts))
    after = known.shapes[str(fused.reshape.outputs[0].name)]
    shape = (*after[: fused.axis], *after[fused.axis + 1 :])
    value = _add(fused, known, fused.reshape, [value, _target(model, known, fused, part)], part, shape)
    if fused.transpose is not None:
        value = _add(fused, known, fused.transpose, [value], part, tuple(shape[a] for a in fused.order))
        copy = value.producer()
        assert copy is not None
        copy.attributes["perm"] = ir.AttrInt64s("perm", fused.order)
    name = str(selected.name)
    selected.replace_all_uses_with(value)
    selected.name = f"{name}__fused"
    known.shapes[name] = known.shapes.pop(str(value.name))
    value.name = name


def _add(
    fused: _Fused,
    known: Known,
    like: ir.Node,
    inputs: list[ir.Value | None] | list[ir.Value],
    part: int,
    shape: tuple[int, ...],
) -> ir.Value:
    """A copy of a node for one part, placed before the reshape of them all."""
    node = ir.Node("", like.op_type, inputs, attributes=list(like.attributes.values()))
    node.name = f"{like.name or like.outputs[0].name}/part_{part}"
    made = node.outputs[0]
    made.name, made.type = f"{like.outputs[0].name}/part_{part}", like.outputs[0].type
    assert fused.reshape.graph is not None
    fused.reshape.graph.insert_before(fused.reshape, node)
    known.shapes[str(made.name)] = shape
    return made


def _cut(model: ir.Model, known: Known, value: ir.Value, fused: _Fused, part: int, axis: int) -> ir.Value:
    """The part's share of a constant along the axis that holds all parts."""
    array = known.values[str(value.name)]
    if not array.ndim or array.shape[axis] == 1:
        return value
    share = np.ascontiguousarray(np.split(array, fused.parts, axis)[part])
    return _constant_of(model, known, f"{value.name}/part_{part}", share)


def _target(model: ir.Model, known: Known, fused: _Fused, part: int) -> ir.Value:
    """The reshape's target without the entry of the parts, computed at run time where it was."""
    target = fused.reshape.inputs[1]
    assert target is not None
    name = str(target.name)
    others = [place for place in range(len(known.values[name])) if place != fused.axis]
    entries = known.values[name][others]
    if name not in known.dynamic:
        return _constant_of(model, known, f"{name}/part", entries)
    places = _constant_of(model, known, f"{name}/others", np.asarray(others, np.int64))
    node = ir.Node("", "Gather", [target, places])
    node.name = f"{fused.reshape.name}/target_{part}"
    made = node.outputs[0]
    made.name, made.type = f"{name}/part_{part}_of_{fused.reshape.outputs[0].name}", target.type
    assert fused.reshape.graph is not None
    fused.reshape.graph.insert_before(fused.reshape, node)
    known.shapes[str(made.name)] = entries.shape
    known.values[str(made.name)] = entries
    known.dynamic[str(made.name)] = known.dynamic[name][others]
    return made


def _constant_of(model: ir.Model, known: Known, stem: str, array: Array) -> ir.Value:
    """An initializer called ``stem``, or that with a number; layers that share a constant share its parts."""
    name, number = stem, 2
    while name in known.shapes:
        if name in model.graph.initializers and np.array_equal(known.values[name], array):
            return model.graph.initializers[name]
        name, number = f"{stem}_{number}", number + 1
    value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    model.graph.register_initializer(value)
    known.shapes[name], known.values[name] = array.shape, array
    return value
