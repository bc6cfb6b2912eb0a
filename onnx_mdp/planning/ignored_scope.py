"""Nodes of a model's file that a user wants left as they are, and the dimensions and blocks that they hold.

Nodes are named as in the file. What the analysis works on is a normal form of it, where functions are
unfolded, constants folded and fused projections split; so a node is found there again by its tensors: it is
all that lies between its outputs and the next tensors that the file names. A tensor that the normal form
lacks was merged with what makes and reads it, and these nodes are held as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import onnx_ir as ir

from onnx_mdp.analysis.blocks import Block
from onnx_mdp.analysis.shadow import Operation, Shadow
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.numerics.independence import subgraphs

__all__ = ["Held", "IgnoredScope", "held_by"]


@dataclass(frozen=True, slots=True)
class IgnoredScope:
    """Nodes by exact name, by regular expressions that match from the start of a name, by operator type.

    A node without a name goes by that of its first output.
    """

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    types: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything is ignored."""
        return bool(self.names or self.patterns or self.types)


@dataclass(frozen=True, slots=True)
class Held:
    """How many ``nodes`` are ignored, and the names of the dimensions and blocks that stay for their sake."""

    nodes: int = 0
    dimensions: frozenset[str] = frozenset()
    blocks: frozenset[str] = frozenset()


def held_by(model: ir.Model, structure: Structure, scope: IgnoredScope) -> Held:
    """What stays as it is so that the ignored nodes of ``model``, as it was loaded, do.

    A node inside of a body or of a local function stands for the node that holds the body or calls the
    function.

    Raises:
        UsageError: a name, a pattern or a type that no node has.
    """
    ignored = _ignored(model, scope)
    if not ignored:
        return Held()
    place = _Place(model, structure.shadow)
    names, operations = place.of(ignored)
    dimensions = _carried(structure, names, operations) & set(structure.prunable)
    blocks = [b for b in structure.blocks if operations & {*b.operations, b.joint}]
    blocks += _readers(structure, operations, blocks)
    return Held(
        len(ignored),
        frozenset(structure.dimensions[i].name for i in dimensions),
        frozenset(block.name for block in blocks),
    )


# -- nodes of the file --------------------------------------------------------------------------------------


def _ignored(model: ir.Model, scope: IgnoredScope) -> list[ir.Node]:
    """The nodes of the main graph that are, or hold, one that is ignored; in graph order."""
    named = [(holder, _name(node), node.op_type) for holder, node in _nodes(model)]
    names, types = {name for _, name, _ in named}, {kind for _, _, kind in named}
    for what, given, known in (("name", scope.names, names), ("type", scope.types, types)):
        for text in given:
            if text not in known:
                raise UsageError(
                    f"no node of the model has the ignored {what} {text!r}{_nearest(text, known)}"
                )
    patterns = [_compiled(text) for text in scope.patterns]
    for pattern in patterns:
        if not any(map(pattern.match, names)):
            raise UsageError(
                f"the ignored pattern {pattern.pattern!r} matches no node of the model; it is a regular "
                "expression that has to match from the start of a name"
            )
    found = {
        id(holder): holder
        for holder, name, kind in named
        if name in scope.names or kind in scope.types or any(p.match(name) for p in patterns)
    }
    return list(found.values())


def _nodes(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Every node with the node of the main graph that holds it, be it itself."""
    for holder in model.graph:
        seen: set[ir.OperatorIdentifier] = set()
        stack = [holder]
        while stack:
            node = stack.pop()
            yield holder, node
            stack.extend(inner for graph in subgraphs(node) for inner in graph)
            function = model.functions.get(node.op_identifier())
            if function is not None and node.op_identifier() not in seen:
                seen.add(node.op_identifier())
                stack.extend(function)


def _name(node: ir.Node) -> str:
    return node.name or next((str(v.name) for v in node.outputs if v.name), "")


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"the ignored pattern {text!r} is no regular expression: {error}") from error


def _nearest(text: str, known: Iterable[str]) -> str:
    near = get_close_matches(text, sorted(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


# -- where they are in the normal form ----------------------------------------------------------------------


class _Place:
    """Where the nodes of a file are in its normal form; a resource of `held_by` alone."""

    def __init__(self, model: ir.Model, shadow: Shadow) -> None:
        self.shadow = shadow
        self.makers: Mapping[str, Operation] = {o: op for op in shadow.operations for o in op.outputs if o}
        self.known = {*self.makers, *shadow.inputs, *map(str, shadow.model.graph.initializers)}
        self.given = {str(v.name) for v in (*model.graph.inputs, *model.graph.initializers.values())}
        self.given |= {name for node in model.graph for name in _outputs(node)}

    def of(self, nodes: Sequence[ir.Node]) -> tuple[frozenset[str], frozenset[int]]:
        """The tensors that the nodes read and make, and the operations that they became."""
        names: set[str] = set()
        operations: set[int] = set()
        stack, seen = list(nodes), {id(node) for node in nodes}
        while stack:
            node = stack.pop()
            names.update(_inputs(node), _outputs(node))
            operations |= self._between(node)
            for more in self._merged(node):
                if id(more) not in seen:
                    seen.add(id(more))
                    stack.append(more)
        return frozenset(names), frozenset(operations)

    def _between(self, node: ir.Node) -> set[int]:
        """The operations between the outputs of a node and the next tensors that the file names."""
        own, found = set(_outputs(node)), set[int]()
        stack = [name for name in own if name in self.makers]
        while stack:
            operation = self.makers[stack.pop()]
            if operation.index in found:
                continue
            found.add(operation.index)
            stack.extend(
                name
                for name in (*operation.inputs, *operation.captured)
                if name in self.makers and (name in own or name not in self.given)
            )
        return found

    def _merged(self, node: ir.Node) -> Iterator[ir.Node]:
        """The nodes that read what is lacking of the outputs, and that make what is of the inputs."""
        for value in node.outputs:
            if value.name and value.name not in self.known:
                yield from (use.node for use in value.uses() if use.node.graph is node.graph)
        for source in node.inputs:
            maker = source.producer() if source is not None else None
            if source is None or maker is None or source.name in self.known:
                continue
            if source.name not in self.shadow.constants and maker.graph is node.graph:
                yield maker


def _inputs(node: ir.Node) -> list[str]:
    return [str(v.name) for v in node.inputs if v is not None]


def _outputs(node: ir.Node) -> list[str]:
    return [str(v.name) for v in node.outputs if v.name]


def _carried(structure: Structure, names: frozenset[str], operations: frozenset[int]) -> set[int]:
    """The dimensions of the units that these tensors have and these operations read in weights."""
    graph, every = structure.graph, structure.shadow.operations
    own = {*names, *(name for i in operations for name in (*every[i].inputs, *every[i].outputs))}
    labels = [graph.tensors[name] for name in own if name in graph.tensors]
    for site in (*graph.sites, *graph.cuts):
        if site.operation in operations or every[site.operation].inputs[site.slot] in names:
            labels.append(site.labels)
    numbers = np.unique(np.concatenate([np.zeros(1, np.int32), *(array.reshape(-1) for array in labels)]))
    numbers = np.union1d(numbers, graph.head[numbers])
    owners = np.unique(structure.dimension_of[numbers[numbers > 0]])
    return set(owners[owners >= 0].tolist())


# -- what reads them ----------------------------------------------------------------------------------------


def _readers(structure: Structure, operations: frozenset[int], held: Sequence[Block]) -> list[Block]:
    """Blocks more that have to stay, for without them nothing would read what the operations make.

    The memory of a decoder is an example: no block holds it, and all cross-attentions together do.
    """
    names = {block.name for block in held}
    free, found = [b for b in structure.blocks if b.name not in names], list[Block]()
    while lost := operations - _alive(structure.shadow, free):
        after = _downstream(structure.shadow, lost)
        block = next((b for b in free if after & set(b.operations)), None)
        if block is None:  # the original does not read them either
            break
        free.remove(block)
        found.append(block)
    return found


def _alive(shadow: Shadow, gone: Sequence[Block]) -> set[int]:
    """The operations that the outputs depend on once some blocks are bypassed."""
    makers = {o: op for op in shadow.operations for o in op.outputs if o}
    bypass = {block.joint: (block.shortcut,) for block in gone}
    alive: set[int] = set()
    stack = list(shadow.outputs)
    while stack:
        operation = makers.get(stack.pop())
        if operation is not None and operation.index not in alive:
            alive.add(operation.index)
            stack.extend(bypass.get(operation.index, (*operation.inputs, *operation.captured)))
    return alive


def _downstream(shadow: Shadow, operations: Iterable[int]) -> set[int]:
    """The operations, and all that depend on them."""
    found, names = set(operations), set[str]()
    for operation in shadow.operations:
        if operation.index in found or names & {*operation.inputs, *operation.captured}:
            found.add(operation.index)
            names.update(filter(None, operation.outputs))
    return found
