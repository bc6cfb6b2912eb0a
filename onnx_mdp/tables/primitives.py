"""The time of each layer of a graph that OpenVINO compiled, as oneDNN prints it.

OpenVINO shows ONNX Runtime one node. What its convolutions and poolings run on a processor are primitives of
oneDNN, which prints the shape and the time of each where ``ONEDNN_VERBOSE`` is ``profile_exec``
(https://uxlfoundation.github.io/oneDNN/dev_guide_verbose.html). A convolutional network takes nearly all of
its time there; what is not a primitive is left to the calibration. A transformer takes half of it elsewhere,
and is measured by windows.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MeasurementError
from onnx_mdp.files import scratch_folder
from onnx_mdp.large_models import save_model
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.providers import SHORT_NAMES
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.running.timing import random_feeds, run_times
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.cost_terms import CostTerm, Layer, held
from onnx_mdp.tables.lut_records import Run, Sample
from onnx_mdp.tables.primitive_worker import MARK
from onnx_mdp.tables.variants import Variant, full_variant, plan_of_variant, whole_model

__all__ = ["ModelRun", "Primitive", "profile_primitives", "read_runs", "samples_of", "shows_primitives"]

_VERBOSE = {"ONEDNN_VERBOSE": "profile_exec"}
_COVERED = 0.85  # of the unpruned latency, at least, has to be primitives that belong to a layer
_ROUNDS, _WARM_UP, _COUNTED = 5, 3, 3
_NUMBER = re.compile(r"([a-z]+)(\d+)")
_ADDS = re.compile(r"post-ops:\S*\b(?:sum|binary_add)\b")
_CONV, _POOL = "convolution", "pooling"
_SIZES = {
    _CONV: ("g", "ic", "oc", "ih", "iw", "oh", "ow", "kh", "kw"),
    _POOL: ("ic", "ih", "iw", "oh", "ow", "kh", "kw"),
}

Signature = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Primitive:
    """What was run: its kind and sizes, whether it adds another feature map to its own, and how long."""

    signature: Signature
    adds: bool
    ms: float


@dataclass(slots=True)
class ModelRun:
    """One run of the model with this number: its primitives in order, and all of its milliseconds."""

    model: int
    primitives: list[Primitive] = field(default_factory=list)
    ms: float = 0.0

    @property
    def shown_ms(self) -> float:
        """The sum of its primitives."""
        return sum(primitive.ms for primitive in self.primitives)


def shows_primitives(structure: Structure, terms: Sequence[CostTerm], runtime: Runtime) -> bool:
    """Whether the primitives that the unpruned model prints are nearly all of its latency."""
    if runtime.provider != SHORT_NAMES["openvino"] or not runtime.on_cpu:
        return False
    run = profile_primitives(structure, terms, full_variant(structure), runtime, number=0, seed=0)
    model = whole_model(structure, PruningPlan(keep={}))
    session = open_placed(model, runtime, structure.shadow.inputs)
    feeds = random_feeds(session, structure.shadow.inputs, 0)
    # Beside the same model in silence: printing takes a fifth of the time of a small one.
    plain = run_times(session, feeds, _WARM_UP + _ROUNDS * _COUNTED)[0][_WARM_UP:]
    return run.sum_ms > _COVERED * float(np.median(plain))


def profile_primitives(
    structure: Structure,
    terms: Sequence[CostTerm],
    variant: Variant,
    runtime: Runtime,
    *,
    number: int,
    seed: int,
) -> Run:
    """Run a variant beside the unpruned model, which is number 0, in a process that prints primitives.

    The run says what share of the unpruned model's primitives those of the variant take.

    Raises:
        MeasurementError: the provider cannot run the variant, or prints nothing.
    """
    started = time.perf_counter()
    wanted = [variant, full_variant(structure)] if number else [variant]
    runs = read_runs(_printed(structure, wanted, runtime, seed).splitlines())
    own, *beside = (_calm([run for run in runs if run.model == n]) for n in range(len(wanted)))
    samples = samples_of(held(structure, terms, variant.kept, variant.removed_blocks), own)
    if beside and not _shown_ms(beside[0]):
        raise MeasurementError(
            f"{runtime.provider} printed the times of its primitives once, and now does not"
        )
    share = _shown_ms(own) / _shown_ms(beside[0]) if beside else 1.0
    return Run(
        number,
        seed,
        plain_ms=float(np.mean([run.ms for run in own])),
        sum_ms=sum(sample.ms for sample in samples),
        nodes=len(samples),
        seconds=time.perf_counter() - started,
        samples=samples,
        payload={
            "kept": {str(k): v for k, v in variant.kept.items()},
            "removed": sorted(variant.removed_blocks),
            "share": share,
        },
    )


def _printed(structure: Structure, variants: Sequence[Variant], runtime: Runtime, seed: int) -> str:
    with scratch_folder() as folder:
        files = [folder / f"{number}.onnx" for number in range(len(variants))]
        for file, variant in zip(files, variants, strict=True):
            save_model(rewrite(structure, plan_of_variant(structure, variant), split=True), file)
        asked = {
            "models": [str(file) for file in files],
            "shapes": structure.shadow.inputs,
            "runtime": asdict(runtime),
            "seed": seed,
            "rounds": _ROUNDS,
            "warm_up": _WARM_UP,
            "counted": _COUNTED,
        }
        done = subprocess.run(
            [sys.executable, "-m", "onnx_mdp.tables.primitive_worker"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **_VERBOSE},
            check=False,
        )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise MeasurementError(f"{runtime.provider} cannot run a variant in a process of its own: {said}")
    return done.stdout


def read_runs(lines: Iterable[str]) -> list[ModelRun]:
    """The runs that a worker marked, each with the primitives that the library printed within."""
    runs: list[ModelRun] = []
    inside = False
    for line in lines:
        if line.startswith(f"{MARK} run "):
            runs.append(ModelRun(int(line.split()[2])))
            inside = True
        elif line.startswith(f"{MARK} end ") and inside:
            runs[-1].ms = float(line.split()[2])
            inside = False
        elif inside and (primitive := _primitive(line)) is not None:
            runs[-1].primitives.append(primitive)
    return runs


def _primitive(line: str) -> Primitive | None:
    """Of a line such as ``onednn_verbose,v1,primitive,exec,cpu,convolution,…,mb1_ic3oc16_ih32…,0.05``."""
    fields = line.split(",")
    if fields[0] != "onednn_verbose" or "exec" not in fields:
        return None
    try:
        kind, sizes, ms = fields[fields.index("exec") + 2], fields[-2], float(fields[-1])
    except (IndexError, ValueError):
        return None
    known = {name: int(size) for name, size in _NUMBER.findall(sizes)}
    signature: Signature = (kind, *(known.get(name, 1) for name in _SIZES.get(kind, ())))
    return Primitive(signature, _ADDS.search(line) is not None, ms)


def samples_of(layers: Sequence[Layer], runs: Sequence[ModelRun]) -> tuple[Sample, ...]:
    """The times of those layers whose primitives all runs show.

    Layers of the same sizes take the mean of their primitives; those that add a feature map are told apart
    where as many primitives do.
    """
    alike: dict[Signature, list[Layer]] = {}
    for layer in layers:
        signature = _signature(*layer)
        if signature is not None:
            alike.setdefault(signature, []).append(layer)
    samples = []
    for signature, group in alike.items():
        shown = [[p for p in run.primitives if p.signature == signature] for run in runs]
        if any(len(found) != len(group) for found in shown):
            continue
        add = [_adds(key) for key, _, _ in group]
        apart = all(sum(p.adds for p in found) == sum(add) for found in shown)
        for (key, a, b), adds in zip(group, add, strict=True):
            times = [p.ms for p in chain(*shown) if not apart or p.adds == adds]
            samples.append(Sample(key, float(a), float(b), float(np.mean(times)), 1))
    return tuple(samples)


def _signature(key: str, a: int, b: int) -> Signature | None:
    """The kind and sizes of the primitive that computes a layer; None for what is no such primitive."""
    layer = _described(key)
    read, made = layer["in"], layer["out"]
    if len(read) != 4 or len(made) != 4:
        return None
    if layer["op"] == "Conv":
        depthwise = layer["kind"] == "depthwise"
        groups = b if depthwise else int(layer["kind"].split()[1])
        return (_CONV, groups, b if depthwise else a, b, *read[2:], *made[2:], *layer["weight"])
    if layer["op"] in ("AveragePool", "MaxPool"):
        return (_POOL, b, *read[2:], *made[2:], *layer["kernel_shape"])
    return None


def _adds(key: str) -> bool:
    return bool(_described(key).get("add"))


@lru_cache(maxsize=4096)
def _described(key: str) -> Mapping[str, Any]:
    return dict(json.loads(key))


def _calm(runs: Sequence[ModelRun]) -> list[ModelRun]:
    """The faster half, because disturbances only ever add time."""
    if not runs:
        raise MeasurementError("a process that was to run a model did not")
    limit = float(np.median([run.shown_ms for run in runs]))
    return [run for run in runs if run.shown_ms <= limit]


def _shown_ms(runs: Sequence[ModelRun]) -> float:
    return float(np.mean([run.shown_ms for run in runs]))
