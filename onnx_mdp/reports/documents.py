"""The numbers of a report: what each dimension cuts, what a plan leaves, and the analysis as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.blocks import Block
from onnx_mdp.analysis.labels import keep_vector
from onnx_mdp.analysis.shadow import Operation, Shadow
from onnx_mdp.analysis.structure import Dimension, Structure, macs, operation_macs
from onnx_mdp.model_io import parameter_count
from onnx_mdp.numerics.precision import is_parameter
from onnx_mdp.pipeline import PruneResult
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.repairing.repair import Repaired
from onnx_mdp.reports.frozen_parts import FrozenPart, frozen_parts, held_macs, held_params
from onnx_mdp.rules import Site, varying
from onnx_mdp.surgery.changed_weights import ChangedWeights
from onnx_mdp.surgery.verification import Evidence
from onnx_mdp.tables.latency import LatencyTable

__all__ = [
    "Shares",
    "Totals",
    "analyze_document",
    "frozen_operators",
    "plan_totals",
    "profile_document",
    "prune_document",
    "repair_document",
    "shares",
    "verify_document",
]

_SCHEMA_VERSION = 1

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Shares:
    """Parts of the whole model, from 0 to 1.

    ``params[i]`` is the share of all float parameters that lie in an initializer which dimension ``i``
    cuts, ``macs[i]`` that of the multiply-accumulates of operations that read one. A weight between two
    dimensions counts for both, so these do not add up to 1; the ``prunable`` shares count it once.
    """

    params: tuple[float, ...]
    macs: tuple[float, ...]
    prunable_params: float
    prunable_macs: float


@dataclass(frozen=True, slots=True)
class Totals:
    """Float parameters and multiply-accumulates at the bound shapes, each before and after a plan."""

    params: tuple[int, int]
    macs: tuple[int, int]


def shares(structure: Structure) -> Shares:
    """How much of the model each dimension, and all prunable ones together, can make smaller."""
    shadow = structure.shadow
    whole_params, whole_macs = parameter_count(shadow.model), macs(shadow)

    def params_of(dimensions: Sequence[Dimension]) -> float:
        return _part(held_params(shadow, dimensions), whole_params)

    def macs_of(dimensions: Sequence[Dimension]) -> float:
        return _part(held_macs(shadow, dimensions), whole_macs)

    prunable = [structure.dimensions[index] for index in structure.prunable]
    return Shares(
        params=tuple(params_of([dimension]) for dimension in structure.dimensions),
        macs=tuple(macs_of([dimension]) for dimension in structure.dimensions),
        prunable_params=params_of(prunable),
        prunable_macs=macs_of(prunable),
    )


def analyze_document(structure: Structure, milliseconds: Mapping[int, float] | None = None) -> dict[str, Any]:
    """The analysis as plain JSON types, in graph order: what ``analyze --json`` prints.

    ``step`` is the number of channels that one unit spans, ``nodes`` the names of the operations that go
    with a block; ``frozen`` lists what froze dimensions and what these hold, the most first, and
    ``frozen_ops`` maps each operator without a rule to the dimensions that it freezes. ``milliseconds`` maps
    indices of operations to their time in the unpruned model.
    """
    part = shares(structure)
    return {
        "schema_version": _SCHEMA_VERSION,
        "inputs": {name: list(shape) for name, shape in structure.shadow.inputs.items()},
        "states": dict(structure.shadow.states),
        "params": parameter_count(structure.shadow.model),
        "macs": macs(structure.shadow),
        "dimensions": [
            _dimension_entry(structure, dimension, part.params[index], part.macs[index])
            for index, dimension in enumerate(structure.dimensions)
        ],
        "blocks": [_block_entry(block, structure.shadow) for block in structure.blocks],
        "frozen": [_frozen_entry(frozen) for frozen in frozen_parts(structure, milliseconds)],
        "frozen_ops": {key: list(names) for key, names in frozen_operators(structure).items()},
        "prunable_params_share": part.prunable_params,
        "prunable_macs_share": part.prunable_macs,
    }


def profile_document(structure: Structure, table: LatencyTable) -> dict[str, Any]:
    """A latency table as ``profile --json`` prints it; errors and noise are relative.

    ``memory`` is the cache that is left to the model (None where weights cost the same in every model), what
    a megabyte of weights takes that is not in it, and the share of the unpruned model's for which that holds.
    """
    calibration = table.calibration
    first = next(iter(structure.shadow.inputs.values()), (1,))
    return {
        "schema_version": _SCHEMA_VERSION,
        "provider": table.context["provider"],
        "device": table.context["device"],
        "threads": table.context["threads"],
        "batch": first[0] if first else 1,
        "granularity": table.granularity,
        "entries": len(table.coefficients),
        "profiled": table.measured,
        "shared": table.shared,
        "seconds": table.seconds,
        "base_ms": table.base_ms,
        "calibration": {
            "median_error": calibration.median_error,
            "worst_error": calibration.worst_error,
            "noise": calibration.noise,
        },
        "memory": {
            "cache_mb": calibration.cache_mb if calibration.ms_per_mb else None,
            "ms_per_mb": calibration.scale * calibration.ms_per_mb,
            "reread": table.reread,
        },
    }


def prune_document(result: PruneResult, written: Sequence[Path | None]) -> dict[str, Any]:
    """A prune as ``prune --json`` prints it; ``written`` holds the model, the plan and the figure."""
    evidence, plan = result.evidence, result.plan
    model, plan_file, figure = (None if path is None else str(path) for path in written)
    return {
        "schema_version": _SCHEMA_VERSION,
        "status": result.status,
        "target_ms": result.target_ms,
        "base_ms": result.base_ms,
        "base_now_ms": result.base_now_ms,
        "predicted_ms": result.predicted_ms,
        "measured_ms": result.measured_ms,
        "noise": result.noise,
        "iterations": result.iterations,
        "jobs": result.jobs,
        "fastest_ms": result.fastest_ms,
        "params": list(result.params),
        "macs": list(result.macs),
        "verified": None if evidence is None else evidence.verified,
        "max_error": None if evidence is None else evidence.max_error,
        "scale": None if evidence is None else evidence.scale,
        "constant_outputs": [] if evidence is None else list(evidence.constant),
        "judged": None if evidence is None else evidence.judged,
        "gap": None if plan is None else plan.gap,
        "solver": None if plan is None else plan.solver,
        "importance_share": None if plan is None else plan.importance_share,
        "removed_blocks": [] if plan is None else list(plan.removed_blocks),
        "repair": None if result.repaired is None else repair_document(result.repaired),
        "output": model,
        "plan": plan_file,
        "report": figure,
        "seconds": dict(result.seconds),
    }


def repair_document(repaired: Repaired) -> dict[str, Any]:
    """What a repair did: the drift of the outputs before and after each method, and each layer's error."""
    return {
        "methods": list(repaired.methods),
        "output_drifts": list(repaired.drifts),
        "layers": [asdict(layer) for layer in repaired.layers],
    }


def verify_document(
    evidence: Evidence, measured_ms: float | None, weights: ChangedWeights | None = None
) -> dict[str, Any]:
    """A verification as ``verify --json`` prints it; ``weights`` where they changed after the slicing."""
    return {
        "schema_version": _SCHEMA_VERSION,
        "verified": evidence.verified,
        "max_error": evidence.max_error,
        "scale": evidence.scale,
        "inputs_tried": evidence.inputs_tried,
        "runtime_noise": evidence.runtime_noise,
        "checker": evidence.checker,
        "constant_outputs": list(evidence.constant),
        "judged": evidence.judged,
        "followed_choices": evidence.followed,
        "drift": {n: {"cosine": d.cosine, "max_abs": d.max_abs} for n, d in evidence.drift.items()},
        "measured_ms": measured_ms,
        "weights": None if weights is None else asdict(weights),
    }


def frozen_operators(structure: Structure) -> dict[str, tuple[str, ...]]:
    """Operators without a rule (``domain::Operator`` outside ONNX's) and the dimensions that they read."""
    return {key: _touched(structure, key) for key in sorted(structure.graph.unsupported)}


def plan_totals(structure: Structure, plan: PruningPlan) -> Totals:
    """The size of the model before and after a plan, without rewriting it."""
    shadow = structure.shadow
    removed = removed_classes(plan, structure)
    gone = {
        index
        for block in structure.blocks
        if block.name in plan.removed_blocks
        for index in (*block.operations, block.joint)
    }
    left = [operation for operation in shadow.operations if operation.index not in gone]
    masks = _weight_masks(structure.graph.sites, removed)
    stored = _weight_masks(structure.graph.cuts, removed)
    return Totals(
        params=(parameter_count(shadow.model), _kept_params(shadow, left, stored)),
        macs=(
            macs(shadow),
            sum(operation_macs(op, _kept_shapes(structure, op, masks, removed)) for op in left),
        ),
    )


def _part(amount: int, whole: int) -> float:
    return amount / whole if whole else 0.0


def _parameter_sizes(shadow: Shadow) -> dict[str, int]:
    """Elements of each initializer of parameters."""
    initializers = shadow.model.graph.initializers
    return {
        name: array.size
        for name, array in shadow.constants.items()
        if name in initializers and is_parameter(array.dtype)
    }


def _frozen_entry(part: FrozenPart) -> dict[str, Any]:
    return {**asdict(part), "nodes": list(part.nodes), "dimensions": list(part.dimensions)}


def _dimension_entry(
    structure: Structure, dimension: Dimension, share_params: float, share_macs: float
) -> dict[str, Any]:
    by = None if dimension.frozen_by is None else structure.shadow.operations[dimension.frozen_by]
    return {
        "name": dimension.name,
        "kind": dimension.kind,
        "size": dimension.size,
        "step": dimension.channels,
        "heads": dimension.rows,
        "frozen": dimension.frozen,
        "frozen_by": by and {"operator": by.op_type, "node": by.name or by.outputs[0]},
        "members": [{"tensor": member.tensor, "axis": member.axis} for member in dimension.members],
        "share_params": share_params,
        "share_macs": share_macs,
    }


def _block_entry(block: Block, shadow: Shadow) -> dict[str, Any]:
    operations = [shadow.operations[index] for index in block.operations]
    return {
        "name": block.name,
        "kind": block.kind,
        "nodes": [operation.name or operation.outputs[0] for operation in operations],
        # Branches that cannot be bypassed never become blocks; the key is part of the contract.
        "removable": True,
    }


def _touched(structure: Structure, key: str) -> tuple[str, ...]:
    domain, _, op_type = key.rpartition("::")
    owners: set[int] = set()
    for operation in structure.shadow.operations:
        if (operation.domain, operation.op_type) == (domain, op_type):
            for name in (*operation.inputs, *operation.captured):
                labels = structure.graph.tensors.get(name)
                if labels is not None:
                    owners.update(structure.dimension_of[labels[labels > 0]].tolist())
    return tuple(structure.dimensions[index].name for index in sorted(owners - {-1}))


_WeightMasks = Mapping[tuple[int, int], Mapping[int, Mask]]


def _weight_masks(sites: Sequence[Site], removed: Mask) -> _WeightMasks:
    """By operation and input slot: which indices of each cut axis of a weight stay."""
    masks: dict[tuple[int, int], dict[int, Mask]] = {}
    for site in sites:
        masks.setdefault((site.operation, site.slot), {})[site.axis] = keep_vector(site.labels, removed)
    return masks


def _kept_params(shadow: Shadow, left: Iterable[Operation], masks: _WeightMasks) -> int:
    """Readers that keep other indices of a shared weight get a copy each, as the rewriter makes them."""
    sizes = _parameter_sizes(shadow)
    versions = {(name, b""): sizes[name] for name in shadow.outputs if name in sizes}
    for operation in left:
        for name in operation.captured:
            versions[name, b""] = sizes.get(name, 0)
        for slot, name in enumerate(operation.inputs):
            cut = {a: m for a, m in masks.get((operation.index, slot), {}).items() if not m.all()}
            key = b"".join(bytes([axis]) + np.packbits(cut[axis]).tobytes() for axis in sorted(cut))
            kept = [int(cut[a].sum()) if a in cut else n for a, n in enumerate(shadow.shapes.get(name, ()))]
            versions[name, key] = math.prod(kept) if name in sizes else 0
    return sum(versions.values())


def _kept_shapes(
    structure: Structure, operation: Operation, masks: _WeightMasks, removed: Mask
) -> dict[str, tuple[int, ...]]:
    """The shapes of what one operation reads and makes, after the cut."""
    shapes = {
        name: _kept_shape(structure, name, removed)
        for name in (*operation.inputs, *operation.outputs)
        if name
    }
    for slot, name in enumerate(operation.inputs):
        for axis, mask in masks.get((operation.index, slot), {}).items():
            shape = shapes[name]
            shapes[name] = (*shape[:axis], int(mask.sum()), *shape[axis + 1 :])
    return shapes


def _kept_shape(structure: Structure, name: str, removed: Mask) -> tuple[int, ...]:
    shape = list(structure.shadow.shapes.get(name, ()))
    labels = structure.graph.tensors.get(name)
    for axis in () if labels is None else varying(labels):
        shape[axis] = int(structure.graph.keep(name, axis, removed).sum())
    return tuple(shape)
