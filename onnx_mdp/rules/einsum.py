"""The rule of Einsum: a product with a weight, a product of two activations, or a sum, by its letters.

Frozen, with a reason: a letter twice in one operand, more than two operands, a sum over more than one letter
of two activations, and a weight that is contracted with labels over two axes.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.rules.attention import Side, multiply_sides
from onnx_mdp.rules.labelling import Labelling, Labels, Role, rule, squash, varying

__all__ = ["letters"]


def letters(equation: str, ranks: Sequence[int]) -> tuple[tuple[str, ...], str]:
    """The letters of each operand and of the output; an ellipsis becomes capital letters of its own.

    >>> letters("...ij,jk", (3, 2))
    (('Aij', 'jk'), 'Aik')
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [letter for letter in string.ascii_uppercase if letter not in equation]
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    wide = "".join(
        free[: max((n for n, term in zip(hidden, terms, strict=True) if "..." in term), default=0)]
    )
    named = tuple(
        term.replace("...", wide[len(wide) - count :]) if "..." in term else term
        for term, count in zip(terms, hidden, strict=True)
    )
    if not arrow:
        every = "".join(named)
        right = "..." + "".join(sorted(c for c in set(every) - set(wide) if every.count(c) == 1))
    return named, right.replace("...", wide)


@rule("Einsum")
def einsum(state: Labelling, operation: Operation) -> None:
    """A product with a weight, or of two activations, as in MatMul; a sum of one operand.

    Frozen: diagonals, three operands, and a sum over several letters of two activations.
    """
    equation = operation.attributes["equation"]
    equation = equation.decode() if isinstance(equation, bytes) else equation
    shapes = [state.shape(name) for name in operation.inputs]
    operands, output = letters(equation, [len(shape) for shape in shapes])
    constant = [state.is_constant(name) for name in operation.inputs]
    extents = {
        pair for term, shape in zip(operands, shapes, strict=True) for pair in zip(term, shape, strict=True)
    }
    if len(extents) > len(set("".join(operands))):
        state.freeze_inputs(operation, f"{operation} repeats an axis of an operand")
    elif len(operands) > 2 or any(len(set(term)) < len(term) for term in (*operands, output)):
        state.freeze_inputs(operation, f"{operation} has a diagonal or more than two operands")
    elif len(operands) == 1:
        _sum(state, operation, operands[0], output)
    elif any(constant):
        weight = 1 if constant[1] else 0
        _by_weight(state, operation, operands, output, weight)
    else:
        _two_activations(state, operation, operands, output)


def _sum(state: Labelling, operation: Operation, term: str, output: str) -> None:
    labels = state.labels(operation.inputs[0])
    summed = [axis for axis in varying(labels) if term[axis] not in output]
    if summed and len(summed) < len(varying(labels)):
        state.freeze_inputs(operation, f"{operation} sums over one of two prunable axes")
        return
    if summed:
        state.reduces(operation, 0)
        labels = np.zeros((1,) * labels.ndim, np.int32)
    order = [term.index(letter) for letter in output]
    rest = [axis for axis in range(labels.ndim) if axis not in order]
    state.emit(operation, labels.transpose(order + rest).reshape([labels.shape[a] for a in order]))


def _by_weight(
    state: Labelling, operation: Operation, operands: Sequence[str], output: str, slot: int
) -> None:
    """The last letter that only the weight has is made; it is cut along the letter that is labelled."""
    weight, data = operands[slot], operands[1 - slot]
    shape = state.shape(operation.inputs[slot])
    labels = state.single(
        state.labels(operation.inputs[1 - slot]), f"{operation} contracts two prunable axes"
    )
    made = [letter for letter in output if letter not in data]
    along = [data[axis] for axis in varying(labels)]
    if any(letter in output for letter in along):
        if any(letter not in weight for letter in along):
            made = []  # labels of tokens pass: the weight makes none of its own
        elif made:
            state.freeze(labels, f"{operation} has a weight for each prunable index")
            return
    result = [np.zeros(1, np.int32)] * len(output)
    for letter in along:
        vector = labels.reshape(-1)
        if letter in weight:
            role: Role = "each" if letter in output else "in"
            state.site(operation, slot, weight.index(letter), vector, role)
        if letter in output:
            result[output.index(letter)] = vector
        else:
            state.reduces(operation, 1 - slot)
    if made:
        fresh = state.fresh(shape[weight.index(made[-1])])
        state.site(operation, slot, weight.index(made[-1]), fresh, "out")
        result[output.index(made[-1])] = fresh
    shaped = np.zeros((1,) * len(output), np.int32)
    for axis, vector in enumerate(result):
        if len(vector) > 1:
            shaped = vector.reshape([-1 if a == axis else 1 for a in range(len(output))])
    state.emit(operation, shaped)


def _two_activations(state: Labelling, operation: Operation, operands: Sequence[str], output: str) -> None:
    """As ``[batch, m, k] · [batch, k, n]``; a letter more on one side is a batch of extent 1 on the other."""
    left, right = operands
    summed = [c for c in left if c in right and c not in output]
    dropped = [c for c in left + right if c not in output and (c in left) != (c in right)]
    own = [
        [c for c in output if c in term and c not in other] for term, other in ((left, right), (right, left))
    ]
    if len(summed) != 1 or dropped or not all(own):
        state.freeze_inputs(operation, f"{operation} is no product of matrices")
        return
    rows, columns = own[0][-1], own[1][-1]
    batch = [c for c in output if c not in (rows, columns)]
    a = _side(state, operation, 0, left, [*batch, rows, *summed])
    b = _side(state, operation, 1, right, [*batch, *summed, columns])
    product = multiply_sides(state, operation, a, b)
    order = [[*batch, rows, columns].index(letter) for letter in output]
    state.emit(operation, product.transpose(order))


def _side(state: Labelling, operation: Operation, slot: int, term: str, wanted: Sequence[str]) -> Side:
    """An operand with its axes in the order ``wanted``, of extent 1 where it has no such letter."""
    name = operation.inputs[slot]

    def arranged(extents: tuple[int, ...]) -> list[int]:
        return [extents[term.index(c)] if c in term else 1 for c in wanted]

    labels: Labels = state.labels(name)
    order = [term.index(letter) for letter in wanted if letter in term]
    moved = labels.transpose(order).reshape(arranged(labels.shape))
    return Side(squash(moved), tuple(arranged(state.shape(name))))
