"""Run a model piece by piece on many inputs, so that weights may change between the pieces.

Each node runs once for each input. Between two pieces, what later nodes read lies in files, not in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.errors import UnsupportedModelError
from onnx_mdp.large_models import for_session
from onnx_mdp.numerics.independence import subgraphs
from onnx_mdp.running.runtime import Runtime, open_session

__all__ = ["Walk"]

Array = npt.NDArray[Any]


class Walk:
    """One run of a model on each of many feeds, as far as it was asked for."""

    def __init__(self, model: ir.Model, feeds: Sequence[Mapping[str, Array]], folder: Path) -> None:
        """Stand at the inputs; ``folder`` is an empty folder for what lies between two pieces."""
        folder.mkdir()
        self._model, self._folder, self.count = model, folder, len(feeds)
        self._values = {str(v.name): v for v in model.graph.inputs}
        self._values |= {str(v.name): v for node in model.graph for v in node.outputs if v.name}
        self._inputs = tuple(self._values[name] for name in feeds[0]) if feeds else ()
        self._place = {node: place for place, node in enumerate(model.graph)}
        self._done: set[ir.Node] = set()
        self._types: dict[ir.Value, np.dtype[Any]] = {}
        self._shapes: dict[Path, tuple[int, ...]] = {}
        self._numbers: dict[ir.Value, int] = {}
        for place, feed in enumerate(feeds):
            for name, array in feed.items():
                self._keep(self._values[name], place, array)

    def read(self, names: Sequence[str]) -> Iterator[list[Array]]:
        """The tensors ``names`` for each feed, computed with the weights of now and then kept."""
        self.reach(names)
        values = [self._values[name] for name in names]
        for place in range(self.count):
            yield [self._load(value, place) for value in values]

    def peek(self, names: Sequence[str]) -> Iterator[list[Array]]:
        """The tensors ``names`` for each feed as they would be with the weights of now; nothing is kept."""
        values = [self._values[name] for name in names]
        missing = [value for value in values if value not in self._types]
        nodes, border = self._segment(missing)
        found = self._run(nodes, border, missing) if missing else iter([[]] * self.count)
        for place, arrays in enumerate(found):
            made = dict(zip(missing, arrays, strict=True))
            yield [made[v] if v in made else self._load(v, place) for v in values]

    def reach(self, names: Sequence[str]) -> None:
        """Go on until the tensors ``names`` are known, with the weights of now."""
        values = [self._values[name] for name in names]
        missing = [value for value in values if value not in self._types]
        if missing:
            nodes, border = self._segment(missing)
            done = self._done | set(nodes)
            later = (v for n in nodes for v in n.outputs if any(use.node not in done for use in v.uses()))
            outputs = list(dict.fromkeys([*missing, *later]))
            for place, arrays in enumerate(self._run(nodes, border, outputs)):
                for value, array in zip(outputs, arrays, strict=True):
                    self._keep(value, place, array)
            self._done = done
        self._forget({*values, *self._inputs})

    def _segment(self, wanted: Sequence[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        """The nodes between what is kept and what is wanted, in order, and what of the former they read."""
        nodes: set[ir.Node] = set()
        border: dict[ir.Value, None] = {}
        stack = list(wanted)
        while stack:
            value = stack.pop()
            node = value.producer()
            if value in self._types:
                border[value] = None
            elif node is not None and node not in nodes:
                nodes.add(node)
                stack.extend(_read(node))
        return sorted(nodes, key=self._place.__getitem__), list(border)

    def _run(
        self, nodes: Sequence[ir.Node], border: Sequence[ir.Value], outputs: Sequence[ir.Value]
    ) -> Iterator[list[Array]]:
        graph = ir.convenience.extract(self._model.graph, border, outputs)
        for value, kept in zip(graph.inputs, border, strict=True):
            value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(self._types[kept])), None
        for value in graph.outputs:
            value.shape = None
        piece = ir.Model(graph, ir_version=self._model.ir_version)
        session = open_session(for_session(piece), Runtime())
        for arg in session.get_outputs():
            if not arg.type.startswith("tensor("):
                raise UnsupportedModelError(f"{arg.name!r} is no tensor, and such a model cannot be repaired")
        names = [str(value.name) for value in outputs]
        for place in range(self.count):
            feed = {str(value.name): self._load(value, place) for value in border}
            yield [np.asarray(array) for array in session.run(names, feed)]

    def _forget(self, wanted: set[ir.Value]) -> None:
        """Delete what no node to come reads."""
        for value in [v for v in self._types if v not in wanted]:
            if all(use.node in self._done for use in value.uses()):
                for place in range(self.count):
                    self._file(value, place).unlink()
                del self._types[value]

    def _file(self, value: ir.Value, place: int) -> Path:
        number = self._numbers.setdefault(value, len(self._numbers))
        return self._folder / f"{number}_{place}"

    def _keep(self, value: ir.Value, place: int, array: Array) -> None:
        file = self._file(value, place)
        array.tofile(file)
        self._types[value], self._shapes[file] = array.dtype, array.shape

    def _load(self, value: ir.Value, place: int) -> Array:
        file = self._file(value, place)
        return np.fromfile(file, self._types[value]).reshape(self._shapes[file])


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node and its subgraphs read."""
    yield from (value for value in node.inputs if value is not None)
    for graph in subgraphs(node):
        for inner in graph.all_nodes():
            yield from (value for value in inner.inputs if value is not None and value.graph is node.graph)
