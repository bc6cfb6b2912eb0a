"""Choices by score: what a TopK chooses among scores that rounding alone tells apart.

Nine hundred queries have scores so close that two runs which round otherwise, as the masked original and the
pruned model do, may choose or order them otherwise; every output from there on then differs, and nothing is
wrong. The other way round, a wrong model must not be excused because it has a TopK. So where two runs differ,
the model is compared *following* the choices of the reference:

- the scores that it chooses from must be those of the reference, as any output must;
- so must the values that its own TopK returns: the j-th largest of a list moves by no more than its entries
  do, so these agree however ties are broken, and disagree if it chose from other scores, or other many;
- what the TopK returns to the rest of the model is replaced by what the reference's returned, and all outputs
  must agree.

Together these say that the model differs from the reference in the order of nearly equal scores, or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
from onnx import helper

from onnx_mdp.running.computation import weightless, with_weights

__all__ = ["Choice", "choices", "following"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One TopK: the scores that it reads, and the values and places that it returns."""

    scores: str
    values: str
    places: str

    @property
    def observed(self) -> tuple[str, str, str]:
        """The tensors of the reference that are compared, in the order of `compared`, and the places."""
        return self.scores, self.values, self.places

    @property
    def compared(self) -> tuple[str, str]:
        """The outputs of a model that follows: its scores, and the values that it would have chosen."""
        return f"{self.values}__scores", f"{self.values}__own"

    def told(self, values: Any, places: Any) -> Mapping[str, Any]:
        """The inputs of a model that follows: what the reference chose."""
        return {f"{self.values}__chosen": values, f"{self.places}__chosen": places}


def choices(*models: ir.Model) -> tuple[Choice, ...]:
    """The choices that all of these models make, which call what they return alike.

    The order of an unsorted TopK says nothing, so there is nothing to follow.
    """
    made = [{c.values: c for node in model.graph for c in _choice(node)} for model in models]
    return tuple(c for name, c in made[0].items() if all(name in others for others in made[1:]))


def _choice(node: ir.Node) -> tuple[Choice, ...]:
    ordered = node.attributes.get_int("sorted", 1)
    if node.op_type != "TopK" or node.domain or not ordered or node.inputs[0] is None:
        return ()
    values, places = (str(v.name or "") for v in node.outputs)
    return (Choice(str(node.inputs[0].name), values, places),) if values and places else ()


def following(model: ir.Model, made: Sequence[Choice]) -> ir.Model:
    """A copy that takes what it chooses as inputs, and says what it would choose; it shares the weights."""
    proto, weights = weightless(model)
    by_values = {choice.values: choice for choice in made}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        choice = by_values.get(node.output[0]) if node.output else None
        if choice is None:
            nodes.append(node)
            continue
        scores, own = choice.compared
        nodes += [
            helper.make_node("Identity", [node.input[0]], [scores]),
            helper.make_node("Identity", [f"{choice.values}__chosen"], [choice.values]),
            helper.make_node("Identity", [f"{choice.places}__chosen"], [choice.places]),
        ]
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        nodes[-1].output[:] = [own, f"{choice.places}__own"]
        types = (choice.values, onnx.TensorProto.FLOAT), (choice.places, onnx.TensorProto.INT64)
        proto.graph.input.extend(
            helper.make_tensor_value_info(f"{name}__chosen", kind, None) for name, kind in types
        )
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in (scores, own))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    return with_weights(proto, weights)
