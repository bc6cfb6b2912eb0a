"""Cuts of weights where a file stores them: through DequantizeLinear, Cast and Transpose.

A weight ``w = (q - z) · s`` that is cut along an axis is cut in ``q``; where each index has a scale
of its own, in ``s`` and ``z`` too. Scales for blocks of indices cannot be cut along the axis of the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from onnx_mdp.analysis.shadow import Operation, Shadow
from onnx_mdp.rules import Site

__all__ = ["blocked_sites", "stored_sites"]


def stored_sites(shadow: Shadow, sites: Iterable[Site]) -> tuple[Site, ...]:
    """Where the rewriter cuts: the sites themselves, and for weights behind a chain what the chain reads."""
    if not shadow.chains:
        return tuple(sites)
    makers = {o: op for op in shadow.operations for o in op.outputs}
    return tuple(cut for site in sites for cut in _cuts(shadow, makers, site))


def blocked_sites(shadow: Shadow, sites: Iterable[Site]) -> Iterator[tuple[Site, str]]:
    """The sites that cannot be cut, because blocks of indices share a scale; and why."""
    makers = {o: op for op in shadow.operations for o in op.outputs if shadow.chains}
    for site in sites:
        for maker, axis in _chain(shadow, makers, site):
            if maker.attributes.get("block_size", 0) and axis == _scale_axis(shadow, maker):
                yield site, f"{maker} has a scale for each block of indices"


def _cuts(shadow: Shadow, makers: Mapping[str, Operation], site: Site) -> Iterator[Site]:
    stored = site
    scales: list[Site] = []
    for maker, axis in _chain(shadow, makers, site):
        stored = replace(site, operation=maker.index, slot=0, axis=axis)
        scales += _scales(shadow, maker, stored)
    name = shadow.operations[stored.operation].inputs[stored.slot]
    if stored is not site and name not in shadow.model.graph.initializers:
        yield site  # made of something else than a stored tensor: what the layer reads is cut at run time
        return
    yield stored
    yield from scales


def _chain(shadow: Shadow, makers: Mapping[str, Operation], site: Site) -> Iterator[tuple[Operation, int]]:
    """The operations between a site and the stored tensor, and the axis of their input that is cut."""
    name, axis = shadow.operations[site.operation].inputs[site.slot], site.axis
    while name in makers and name in shadow.chains:
        maker = makers[name]
        if maker.op_type == "Transpose":
            order = maker.attributes.get("perm") or tuple(reversed(range(len(shadow.shapes[name]))))
            axis = order[axis]
        yield maker, axis
        name = maker.inputs[0]


def _scale_axis(shadow: Shadow, maker: Operation) -> int:
    return int(maker.attributes.get("axis", 1)) % max(len(shadow.shapes[maker.inputs[0]]), 1)


def _scales(shadow: Shadow, maker: Operation, stored: Site) -> Iterator[Site]:
    if maker.op_type not in ("DequantizeLinear", "QuantizeLinear"):
        return
    shape = shadow.shapes[maker.inputs[1]]
    blocked = bool(maker.attributes.get("block_size", 0))
    if not shape or (not blocked and (shape[0] == 1 or stored.axis != _scale_axis(shadow, maker))):
        return
    for slot in (1, 2):
        if slot < len(maker.inputs) and maker.inputs[slot]:
            yield replace(stored, slot=slot, axis=stored.axis if blocked else 0, role="each")
