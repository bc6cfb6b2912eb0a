"""What a model uses besides time, as functions of the kept widths: parameters, operations, memory.

Each is a sum of products, ``unit · Π extents``, one for each weight, operation or activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.analysis.structure import Extent, Structure, extent, input_extent, label_extent, operation_macs
from onnx_mdp.numerics.precision import is_parameter

__all__ = ["Product", "mac_products", "memory_moments", "parameter_products"]


@dataclass(frozen=True, slots=True)
class Product:
    """``unit · Π extents``; it goes with the block around ``operation`` (None: it always stays)."""

    unit: float
    extents: tuple[Extent, ...]
    operation: int | None


def parameter_products(structure: Structure) -> tuple[Product, ...]:
    """One product for each initializer of parameters, and for each further cut that a reader needs of it."""
    shadow = structure.shadow
    initializers = shadow.model.graph.initializers
    cuts: dict[tuple[int, int], dict[int, Extent]] = {}
    for site in structure.graph.cuts:
        cuts.setdefault((site.operation, site.slot), {})[site.axis] = label_extent(structure, site.labels)
    versions: dict[tuple[str, tuple[Extent, ...]], Product] = {}
    for operation in shadow.operations:
        named = [*enumerate(operation.inputs), *((-1, name) for name in operation.captured)]
        for slot, name in named:
            if name not in initializers or not is_parameter(shadow.constants[name].dtype):
                continue
            cut = cuts.get((operation.index, slot), {})
            shape = shadow.constants[name].shape
            extents = tuple(cut.get(axis, Extent(size, ())) for axis, size in enumerate(shape))
            shared = versions.get((name, extents))
            owner = operation.index if shared is None else None
            versions[name, extents] = Product(1.0, extents, owner)
    return tuple(versions.values())


def mac_products(structure: Structure) -> tuple[Product, ...]:
    """One product for each convolution and matrix product, two for attention: multiply-accumulates."""
    shapes = structure.shadow.shapes
    found: list[Product] = []
    for operation in structure.shadow.operations:
        if operation_macs(operation, shapes) and operation.op_type == "Attention":
            tokens = float(shapes[operation.inputs[1]][-2])
            for name in (operation.inputs[0], operation.outputs[0]):
                extents = tuple(extent(structure, name, axis) for axis in range(len(shapes[name])))
                found.append(Product(tokens, extents, operation.index))
        elif operation_macs(operation, shapes):
            found.append(Product(1.0, tuple(_mac_extents(structure, operation)), operation.index))
    return tuple(found)


def memory_moments(structure: Structure, bytes_each: int = 4) -> tuple[tuple[Product, ...], ...]:
    """For each operation, the bytes of every activation that is alive while it runs.

    An activation lives from the operation that makes it to the last that reads it; nothing is computed in
    place, so a runtime may need less.
    """
    shadow = structure.shadow
    born = {name: -1 for name in shadow.inputs}
    dies: dict[str, int] = {}
    for operation in shadow.operations:
        born |= {name: operation.index for name in operation.outputs if name}
        dies |= {name: operation.index for name in (*operation.inputs, *operation.captured) if name in born}
    dies |= {name: len(shadow.operations) for name in shadow.outputs if name in born}
    sizes = {
        name: Product(
            float(bytes_each),
            tuple(extent(structure, name, axis) for axis in range(len(shadow.shapes[name]))),
            None if index < 0 else index,
        )
        for name, index in born.items()
        if name in shadow.shapes and name not in shadow.constants
    }
    return tuple(
        tuple(size for name, size in sizes.items() if born[name] <= moment <= dies.get(name, born[name]))
        for moment in range(len(shadow.operations))
    )


def _mac_extents(structure: Structure, operation: Operation) -> Iterator[Extent]:
    shapes = structure.shadow.shapes
    source, weight, made = operation.inputs[0], operation.inputs[1], operation.outputs[0]
    if operation.op_type in ("Gemm", "MatMul"):
        transposed = operation.op_type == "Gemm" and operation.attributes.get("transA", 0)
        for axis in range(len(shapes[made])):
            yield extent(structure, made, axis)
        yield input_extent(structure, operation, 0, len(shapes[source]) - (2 if transposed else 1))
        return
    outer = source if operation.op_type == "ConvTranspose" else made
    for axis in range(len(shapes[outer])):
        yield extent(structure, outer, axis)
    inner = {
        site.axis: label_extent(structure, site.labels)
        for site in structure.graph.sites
        if (site.operation, site.slot) == (operation.index, 1)
    }
    for axis, size in list(enumerate(shapes[weight]))[1:]:
        yield inner.get(axis, Extent(size, ()))
