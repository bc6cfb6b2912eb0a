"""Residual blocks: branches that an ``Add`` joins to their own input and that can be bypassed.

A block is an ``Add(s, l)`` of two equally shaped activations where ``s`` is an ancestor of ``l``; its
branch is the region that goes dead when the ``Add`` becomes ``s``. It holds at least one Conv, Gemm or
MatMul and no graph output. Blocks that change the shape exclude themselves: their shortcut is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_mdp.analysis.shadow import Operation, Shadow

__all__ = ["Block", "find_blocks"]

_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))


@dataclass(frozen=True, slots=True)
class Block:
    """A removable residual branch; its kind is ``attention``, ``conv`` or ``mlp`` (linear layers alone).

    ``joint`` is the Add, ``shortcut`` the tensor that replaces its output, ``branch`` the input of the
    Add that the region computes, ``operations`` the region (the Add excluded), in graph order.
    """

    name: str
    kind: str
    joint: int
    shortcut: str
    branch: str
    operations: tuple[int, ...]


def find_blocks(shadow: Shadow) -> tuple[Block, ...]:
    """All removable blocks, in graph order; where two overlap, the smaller one."""
    producers = {o: op for op in shadow.operations for o in op.outputs if o}
    readers: dict[str, set[int]] = {}
    for operation in shadow.operations:
        for name in (*operation.inputs, *operation.captured):
            readers.setdefault(name, set()).add(operation.index)
    found = [
        block
        for operation in shadow.operations
        if operation.op_type == "Add"
        if (block := _block_at(shadow, operation, producers, readers)) is not None
    ]
    chosen: list[Block] = []
    for block in sorted(found, key=lambda b: (len(b.operations), b.joint)):
        if not any({*block.operations, block.joint} & {*b.operations, b.joint} for b in chosen):
            chosen.append(block)
    return tuple(sorted(chosen, key=lambda b: b.joint))


def _block_at(
    shadow: Shadow, joint: Operation, producers: Mapping[str, Operation], readers: Mapping[str, set[int]]
) -> Block | None:
    left, right = joint.inputs
    if shadow.shapes[left] != shadow.shapes[right]:
        return None
    for shortcut, branch in ((left, right), (right, left)):
        if shortcut in shadow.constants or branch not in producers or shortcut == branch:
            continue
        if not _depends(branch, shortcut, producers):
            continue
        region = _dead_region(shadow, joint, branch, shortcut, producers, readers)
        operations = [shadow.operations[i] for i in region]
        if any(op.op_type in _WEIGHTED for op in operations):
            name = joint.name or joint.outputs[0]
            return Block(name, _kind(operations), joint.index, shortcut, branch, tuple(region))
    return None


def _kind(operations: Sequence[Operation]) -> str:
    types = {operation.op_type for operation in operations}
    if types & {"Attention", "Softmax"}:
        return "attention"
    return "conv" if types & {"Conv", "ConvTranspose"} else "mlp"


def _depends(name: str, ancestor: str, producers: Mapping[str, Operation]) -> bool:
    stack, seen = [name], {name}
    while stack:
        current = stack.pop()
        if current == ancestor:
            return True
        for parent in producers[current].inputs if current in producers else ():
            if parent and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return False


def _dead_region(
    shadow: Shadow,
    joint: Operation,
    branch: str,
    shortcut: str,
    producers: Mapping[str, Operation],
    readers: Mapping[str, set[int]],
) -> list[int]:
    """Operations that nothing but the branch reads, once the joint reads only the shortcut."""
    dead = {joint.index}
    stack = [producers[branch]]
    while stack:
        operation = stack.pop()
        alive = (
            operation.index in dead
            or shortcut in operation.outputs
            or any(o in shadow.outputs for o in operation.outputs)
            or any(readers.get(o, set()) - dead for o in operation.outputs if o)
        )
        if not alive:
            dead.add(operation.index)
            stack += [producers[name] for name in operation.inputs if name in producers]
    return sorted(dead - {joint.index})
