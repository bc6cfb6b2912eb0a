"""Files whose weights changed after the slicing was verified: their mark, and what can still be checked.

A plan says which graph it leaves, with which shapes. A repair or fine-tuning gives that graph other numbers,
and then it no longer computes what the masked original computes, on purpose. What is left to check is
everything else: the nodes, the shapes, and each number that stands for a size or a place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_mdp.analysis.states import kept_feeds, kept_shapes
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MdpError, VerificationError
from onnx_mdp.model_io import clone, topology_hash
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.running.computation import Computation
from onnx_mdp.running.runtime import one_line
from onnx_mdp.running.timing import random_feeds

__all__ = [
    "ADDED_BIAS",
    "ChangedWeights",
    "how_weights_changed",
    "mark_weights",
    "require_finite",
    "weights_apart",
]

Feeds = Mapping[str, npt.NDArray[Any]]

ADDED_BIAS = "__bias"  # ends the name of a bias that a layer did not have
_MARK = "onnx_mdp.weights"


@dataclass(frozen=True, slots=True)
class ChangedWeights:
    """How many of the float tensors of a file hold other numbers than the plan leaves, and ``how`` so."""

    how: str
    changed: int
    total: int


def mark_weights(model: ir.Model, how: str) -> None:
    """Note in a model, in place, that its weights changed, such as ``repaired: lstsq``."""
    before = how_weights_changed(model)
    model.metadata_props[_MARK] = how if before is None else f"{before}; {how}"


def how_weights_changed(model: ir.Model) -> str | None:
    """What `mark_weights` noted, or None where a model is as it was sliced."""
    return model.metadata_props.get(_MARK)


def weights_apart(sliced: ir.Model, found: ir.Model) -> ChangedWeights:
    """Compare a file with what its plan leaves.

    Raises:
        VerificationError: it has other nodes or shapes, or other integers.
    """
    if topology_hash(sliced) != topology_hash(_without_added(sliced, found)):
        raise VerificationError("the file has other nodes or shapes than the plan leaves of the original")
    changed = total = 0
    for name, value in sliced.graph.initializers.items():
        before, after = value.const_value, found.graph.initializers[name].const_value
        if before is None or after is None or before.dtype == ir.DataType.STRING:
            continue
        same = np.array_equal(before.numpy(), after.numpy())
        if not (same or before.dtype.is_floating_point()):
            raise VerificationError(f"the integers in {name!r} are not those that the plan leaves")
        total += before.dtype.is_floating_point()
        changed += not same
    return ChangedWeights(how_weights_changed(found) or "changed weights", changed, total)


def require_finite(structure: Structure, plan: PruningPlan, model: ir.Model, feeds: Sequence[Feeds]) -> None:
    """Run a model on inputs of the unpruned model, by default random ones.

    Raises:
        VerificationError: it does not run, or gives something that is no number.
    """
    removed = removed_classes(plan, structure)
    computation = Computation(model)
    drawn = random_feeds(computation.inputs, kept_shapes(structure, removed), seed=0)
    for feed in [kept_feeds(structure, feed, removed) for feed in feeds] or [drawn]:
        try:
            outputs = computation.run(computation.tensors, feed)
        except MdpError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            raise VerificationError(f"the file does not run: {one_line(error)}") from error
        if not all(np.isfinite(y).all() for y in outputs if y.dtype.kind == "f"):
            raise VerificationError("the file gives outputs that are no finite numbers")


def _without_added(sliced: ir.Model, found: ir.Model) -> ir.Model:
    """A copy without the biases that layers got."""
    bare = clone(found)
    for name, value in list(bare.graph.initializers.items()):
        if name in sliced.graph.initializers or not name.endswith(ADDED_BIAS):
            continue
        for node, slot in [(use.node, use.idx) for use in value.uses()]:
            if node.op_type in ("Conv", "ConvTranspose", "Gemm") and slot == 2:
                node.replace_input_with(2, None)
                node.resize_inputs(2)
        if not list(value.uses()):
            del bare.graph.initializers[name]
    return bare
