"""How much each unit matters: importance criteria, by name or as the user's own function.

``magnitude`` (no data) is the share of squared weights that a unit owns, summed over the tensors that it
cuts. ``activation`` (needs inputs) is the share of a layer's input energy that is lost with the unit,

    I(u) = Σ_consumers ω · E[x_u²]·‖W_u‖² / Σ_v E[x_v²]·‖W_v‖²

where ``ω`` is what the consumer's residual branch adds to the energy of its stream (1 outside of blocks);
query and key units, which meet in a product, have a share of its ``E[q_u²]·E[k_u²]``.
``drift`` (needs inputs) orders units by ``activation`` and scales each dimension and block by how far the
outputs really move without it. All are relative, so that units of different layers compare.
``refit`` (needs inputs) does so too, by how far they move once the layers near the cut are refitted by least
squares: it is for weights that will be, by ``lstsq``, and cuts what the rest can stand for after that only.
``taylor`` and ``hessian`` (need inputs and torch) order units by gradients, and scale them as ``drift`` does:
a derivative at the whole model says which unit goes first, and not what many of them cost together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_mdp.analysis.shadow import Operation
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UnsupportedModelError, UsageError
from onnx_mdp.importance.gradient_scores import GradientOptions, gradient_scores
from onnx_mdp.importance.output_drift import block_drifts, unit_steps
from onnx_mdp.large_models import for_session
from onnx_mdp.numerics.precision import in_float32, widened
from onnx_mdp.rules import Labels, Site, varying
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.surgery.attention_scale import unit_products

__all__ = [
    "CRITERIA",
    "MEASURED",
    "Criterion",
    "Importance",
    "Scores",
    "activation",
    "criterion_name",
    "default_criterion",
    "drift",
    "gradient_criterion",
    "hessian",
    "magnitude",
    "ranked_rows",
    "ranking",
    "refit",
    "rescaled",
    "score",
    "taylor",
]

Vector = npt.NDArray[np.float64]
Feeds = Sequence[Mapping[str, npt.NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Importance:
    """Scores by dimension index, ``float64[units]`` each, higher keeps; not negative.

    ``blocks`` is added once for a block that is kept, beside the scores of its inner units; it may be
    negative, where the block as a whole is worth less than its units one by one. A head is worth its own
    score and those of its kept widths; ``inner`` is what the widths of each head sum to.
    """

    criterion: str
    units: Mapping[int, Vector]
    blocks: Mapping[str, float] = field(default_factory=dict)
    inner: Mapping[int, Vector] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The importance of the unpruned model."""
        return float(sum(vector.sum() for vector in self.units.values())) + sum(self.blocks.values())


@dataclass(frozen=True, slots=True)
class Scores:
    """What a criterion returns: ``float64[classes]``, and what each block is worth beside its units."""

    classes: Vector
    blocks: Mapping[str, float] = field(default_factory=dict)


Progress = Callable[[str, int, int], None]
Criterion = Callable[[Structure, Feeds, Progress], Scores]
"""A function of the structure, the calibration feeds and a progress callback."""


def _silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""


def score(
    structure: Structure, criterion: str | Criterion, feeds: Feeds = (), progress: Progress = _silent
) -> Importance:
    """Score every prunable unit.

    Raises:
        UsageError: an unknown criterion, or one that needs data without data.
    """
    name = criterion_name(criterion)
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise UsageError(f"unknown criterion {name!r}; choose one of {', '.join(sorted(CRITERIA))}")
        criterion = CRITERIA[name]
    scores = criterion(structure, feeds, progress)
    classes = scores.classes
    if classes.shape != (structure.graph.classes,) or not np.isfinite(classes).all():
        raise UsageError(f"criterion {name!r} must return one finite number for each index class")
    units = {i: np.maximum(classes[list(structure.dimensions[i].units)], 0.0) for i in structure.prunable}
    inner: dict[int, Vector] = {}
    for index, dimension in enumerate(structure.dimensions):
        if dimension.heads in units:
            found = np.maximum(classes[list(dimension.units)], 0.0).reshape(dimension.rows, -1).sum(1)
            # A width that nobody chooses is worth what its head is worth.
            into = inner if index in units else units
            into[dimension.heads] = into.get(dimension.heads, np.zeros(dimension.rows)) + found
    return Importance(name, units, dict(scores.blocks), inner)


def ranking(importance: Importance, index: int) -> npt.NDArray[np.int64]:
    """Units of a dimension from the most to the least important; ties keep the earlier unit."""
    return np.argsort(-(importance.units[index] + importance.inner.get(index, 0.0)), kind="stable")


def ranked_rows(structure: Structure, importance: Importance, index: int) -> npt.NDArray[np.int64]:
    """``int64[rows, count]``: the units of each head of a width from the most to the least important.

    Any other dimension has one row.
    """
    dimension = structure.dimensions[index]
    if dimension.rows == 1:
        return ranking(importance, index)[None]
    scores = importance.units[index].reshape(dimension.rows, -1)
    first = np.arange(dimension.rows)[:, None] * dimension.count
    return np.asarray(np.argsort(-scores, axis=1, kind="stable") + first)


def magnitude(structure: Structure, feeds: Feeds = (), progress: Progress = _silent) -> Scores:
    """Share of the squared weights, with a following BatchNormalization multiplied in."""
    scores = np.zeros(structure.graph.classes)
    for site in structure.graph.sites:
        energy = _energy(structure, site)
        if energy is not None:
            if site.role != "in":
                energy = energy * _batchnorm_gain(structure, site)
            scores += _share(structure, site.labels, energy)
    return Scores(scores)


def activation(structure: Structure, feeds: Feeds, progress: Progress = _silent) -> Scores:
    """Share of the energy that the consumers of a unit receive from it.

    Raises:
        UsageError: no calibration data.
    """
    if not feeds:
        raise UsageError("criterion 'activation' needs calibration inputs; pass --data")
    sites = [s for s in structure.graph.sites if s.role == "in"]
    blocks = structure.blocks
    operations = structure.shadow.operations
    wanted = {_data_input(structure, s) for s in sites}
    products = unit_products(structure)
    wanted |= {name for index in products for name in operations[index].inputs[:2]}
    wanted |= {b.branch for b in blocks} | {operations[b.joint].outputs[0] for b in blocks}
    energies = _mean_squares(structure, sorted(wanted), feeds)
    weight = np.ones(len(operations))
    for block in blocks:
        branch = float(energies[block.branch].sum())
        stream = float(energies[operations[block.joint].outputs[0]].sum())
        weight[list(block.operations)] = min(1.0, branch / max(stream, 1e-30))
    scores = np.zeros(structure.graph.classes)
    for site in sites:
        norms = _energy(structure, site)
        if norms is not None:
            received = _by_index(energies[_data_input(structure, site)].reshape(-1), len(site.labels))
            scores += weight[site.operation] * _share(structure, site.labels, norms * received)
    for index in products:
        query, key = operations[index].inputs[:2]
        labels = structure.graph.tensors[query]
        met = energies[query] * _laid_along(energies[key], operations[index], energies[query].shape)
        scores += weight[index] * _share(structure, labels, np.broadcast_to(met, labels.shape))
    return Scores(scores)


def drift(structure: Structure, feeds: Feeds, progress: Progress = _silent) -> Scores:
    """Activation's order of units, scaled by the measured drift of the outputs.

    Raises:
        UsageError: no calibration data.
    """
    if not feeds:
        raise UsageError("criterion 'drift' needs calibration inputs; pass --data")
    return _anchored(structure, activation(structure, feeds, progress), feeds, progress)


def refit(structure: Structure, feeds: Feeds, progress: Progress) -> Scores:
    """Activation's order of units, scaled by the drift that is left after a refit.

    Raises:
        UsageError: too little calibration data.
        UnsupportedModelError: the model is not in float32.
    """
    if not feeds:
        raise UsageError("criterion 'refit' needs calibration inputs; pass --data")
    if len(feeds) < _LEAST_TO_REFIT:
        raise UsageError(
            f"criterion 'refit' needs {_LEAST_TO_REFIT} calibration inputs or more, not {len(feeds)}"
        )
    if not structure.shadow.plain:
        raise UnsupportedModelError("criterion 'refit' is for models in float32; use drift")
    return _anchored(structure, activation(structure, feeds, progress), feeds, progress, refitted=True)


def _anchored(
    structure: Structure, order: Scores, feeds: Feeds, progress: Progress, *, refitted: bool = False
) -> Scores:
    """Units in the order of other scores, each dimension and block scaled by its measured drift."""
    ranked = score(structure, lambda *_: order)
    rows = {i: ranked_rows(structure, ranked, i) for i in structure.prunable}
    steps = unit_steps(structure, rows, feeds, progress, refitted=refitted)
    classes = np.zeros(structure.graph.classes)
    inner = {block.name: 0.0 for block in structure.blocks}
    # Widths first: a head is worth what it moves beyond the widths that go with it.
    for index in sorted(steps, key=lambda i: structure.dimensions[i].heads is None):
        dimension, values = structure.dimensions[index], steps[index]
        for other in structure.dimensions:
            if other.heads == index:
                values = values - classes[list(other.units)].reshape(other.rows, -1).sum(1)
        classes[list(dimension.units)] = np.maximum(values, 0.0)
        if dimension.block is not None:
            inner[dimension.block] += float(np.maximum(values, 0.0).sum())
    measured = block_drifts(structure, feeds, progress, refitted=refitted)
    return Scores(classes, {name: measured[name] - inner[name] for name in measured})


def criterion_name(criterion: str | Criterion) -> str:
    """What plans and reports call a criterion."""
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom")


def default_criterion(inputs: int, repair: Sequence[str] = ()) -> str:
    """The best criterion that so many inputs allow, for weights that are repaired by these methods."""
    if "lstsq" in repair and inputs >= _LEAST_TO_REFIT:
        return "refit"
    return "drift" if inputs else "magnitude"


def gradient_criterion(name: str, options: GradientOptions = GradientOptions()) -> Criterion:
    """``taylor`` or ``hessian`` with a loss, labels, or a file of scores."""

    def criterion(structure: Structure, feeds: Feeds, progress: Progress) -> Scores:
        def finish(means: Vector) -> tuple[Vector, Vector]:
            found = _anchored(structure, Scores(means), feeds, progress)
            return found.classes, np.asarray([found.blocks[block.name] for block in structure.blocks])

        classes, worth = gradient_scores(structure, name, feeds, options, finish, progress)
        names = [block.name for block in structure.blocks]
        return Scores(classes, dict(zip(names, worth.tolist(), strict=True)))

    criterion.__name__ = name
    return criterion


def taylor(structure: Structure, feeds: Feeds, progress: Progress) -> Scores:
    """Mean over samples of |s|, s the gradient at the gate of a unit, scaled by measured drift.

    Raises:
        UsageError: no calibration data.
        MissingBackendError: torch is not installed.
    """
    return gradient_criterion("taylor")(structure, feeds, progress)


def hessian(structure: Structure, feeds: Feeds, progress: Progress) -> Scores:
    """Mean over samples of s², s the gradient at the gate of a unit, scaled by measured drift.

    Raises:
        UsageError: no calibration data.
        MissingBackendError: torch is not installed.
    """
    return gradient_criterion("hessian")(structure, feeds, progress)


def rescaled(structure: Structure, order: Importance, scale: Importance) -> Importance:
    """Units in one order, each worth what the unit of its rank is worth in another importance."""
    units = {}
    for index, worth in scale.units.items():
        rank = ranked_rows(structure, order, index)
        units[index] = np.empty_like(worth)
        units[index][rank] = -np.sort(-worth.reshape(rank.shape), axis=1)
    return replace(scale, criterion=order.criterion, units=units)


CRITERIA: dict[str, Criterion] = {
    "activation": activation,
    "drift": drift,
    "hessian": hessian,
    "magnitude": magnitude,
    "refit": refit,
    "taylor": taylor,
}
_LEAST_TO_REFIT = 4  # two to refit on, one of them held out, and two to compare
MEASURED = frozenset(("drift", "hessian", "refit", "taylor"))  # scaled by what the outputs do
_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"))


def _data_input(structure: Structure, site: Site) -> str:
    """The activation that a weight is multiplied with."""
    return structure.shadow.operations[site.operation].inputs[1 - site.slot if site.slot < 2 else 0]


def _energy(structure: Structure, site: Site) -> Vector | None:
    """Squared norm of a weight at each index of the site's axis; None for vectors such as a bias."""
    operation = structure.shadow.operations[site.operation]
    weight = structure.shadow.constants.get(operation.inputs[site.slot])
    if weight is None or weight.ndim < 2 or operation.op_type not in _WEIGHTED:
        return None
    squares = weight.astype(np.float64) ** 2
    return np.asarray(squares.sum(axis=tuple(a for a in range(weight.ndim) if a != site.axis)))


def _laid_along(key: Vector, operation: Operation, shape: tuple[int, ...]) -> Vector:
    """Energies of the key where the query of this shape meets them; a key head serves a group of heads."""
    if operation.op_type == "MatMul":
        return np.swapaxes(key, -1, -2)
    if key.ndim == 3:
        heads, groups = (operation.attributes[name] for name in ("q_num_heads", "kv_num_heads"))
        return key.reshape(groups, -1).repeat(heads // groups, 0).reshape(1, 1, -1)
    return key.repeat(shape[1] // key.shape[1], 1)


def _share(structure: Structure, labels: Labels, energy: Vector) -> Vector:
    """Sum over the indices of each class, as a share of the total of the axis."""
    total = float(energy.sum())
    if total <= 0:
        return np.zeros(structure.graph.classes)
    shares = np.zeros(structure.graph.classes)
    np.add.at(shares, labels, energy / total)
    shares[0] = 0.0
    return shares


def _batchnorm_gain(structure: Structure, site: Site) -> Vector | float:
    """``γ² / (σ² + ε)`` of a BatchNormalization that reads the operation's output alone."""
    output = structure.shadow.operations[site.operation].outputs[0]
    readers = [op for op in structure.shadow.operations if output in op.inputs]
    if len(readers) != 1 or readers[0].op_type != "BatchNormalization":
        return 1.0
    values = [structure.shadow.constants.get(name) for name in readers[0].inputs]
    if len(values) < 5 or values[1] is None or values[4] is None or len(values[1]) != len(site.labels):
        return 1.0
    epsilon = readers[0].attributes.get("epsilon", 1e-5)
    return np.asarray(values[1].astype(np.float64) ** 2 / (values[4].astype(np.float64) + epsilon))


def _by_index(energy: Vector, count: int) -> Vector:
    """Channel energies laid along a weight axis (grouped weights see each group in turn)."""
    if len(energy) == count:
        return energy
    return np.asarray(energy.reshape(-1, count).mean(0)) if len(energy) % count == 0 else np.ones(count)


def _mean_squares(structure: Structure, names: Sequence[str], feeds: Feeds) -> dict[str, Vector]:
    """``E[x²]`` of tensors over all feeds, by index of their labelled axes; the others have extent 1."""
    session = open_session(for_session(in_float32(structure.shadow.model), names), Runtime())
    sums = {name: np.zeros(1) for name in names}
    for feed in feeds:
        for name, value in zip(names, session.run(list(names), widened(feed)), strict=True):
            others = tuple(a for a in range(value.ndim) if a not in _axes(structure, name))
            sums[name] = sums[name] + np.square(value, dtype=np.float64).mean(axis=others, keepdims=True)
    return {name: total / len(feeds) for name, total in sums.items()}


def _axes(structure: Structure, name: str) -> tuple[int, ...]:
    labels = structure.graph.tensors.get(name)
    if labels is not None and varying(labels):
        return varying(labels)
    return (min(1, len(structure.shadow.shapes[name]) - 1),)
