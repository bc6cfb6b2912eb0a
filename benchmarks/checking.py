"""A second look at a pruned file, with nothing of what the tool said about it taken for granted."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from benchmarks.metered import run_metered
from onnx_mdp.running.runtime import Runtime, import_onnxruntime
from onnx_mdp.tables.variants import measure_models

__all__ = ["Look", "input_shapes", "look_at", "parameters"]

_PROCESSES = 3
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True, slots=True)
class Look:
    """What was found: ``ratio`` and ``noise`` of latencies, and None where checker and runtime are content.

    ``law_error`` is the distance to the masked original as a share of the scale: infinite where the command
    could not tell, with its complaint. ``params`` are counted before and after.
    """

    ratio: float
    noise: float
    law_error: float
    complaint: str
    checker: str | None
    runtime: str | None
    params: tuple[int, int]


def look_at(original: Path, pruned: Path, threads: int, seed: int) -> Look:
    """Check a pruned file beside its original; its plan lies beside it, where ``prune`` wrote it."""
    law_error, complaint = _law(original, pruned)
    checker, runtime = _checker(pruned), _runtime(pruned)
    ratio, noise = _ratio(original, pruned, threads, seed) if runtime is None else (math.inf, 0.0)
    params = parameters(original), parameters(pruned)
    return Look(ratio, noise, law_error, complaint, checker, runtime, params)


def _law(original: Path, pruned: Path) -> tuple[float, str]:
    plan = pruned.with_suffix(".plan.json")
    command = (sys.executable, "-m", "onnx_mdp", "verify", str(original), str(pruned), str(plan), "--json")
    done = run_metered(*command)
    if done.code:
        return math.inf, f"(verify exits with {done.code}: {done.complaint})"
    found = json.loads(done.stdout)
    return float(found["max_error"] / max(found["scale"], 1e-30)), ""


def _checker(path: Path) -> str | None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error).strip().splitlines()[0]
    return None


def _runtime(path: Path) -> str | None:
    """Run the file once in a plain session: why that fails, or None."""
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal(s, np.float32) for n, s in input_shapes(path).items()}
    try:
        session = import_onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs = session.run(None, feeds)
    except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
        return str(error).strip().splitlines()[0]
    return None if all(np.isfinite(output).all() for output in outputs) else "an output is not finite"


def _ratio(original: Path, pruned: Path, threads: int, seed: int) -> tuple[float, float]:
    """Latency as a share of the original's, the median of three fresh processes, and its noise.

    Memory lies differently in every process, and small models feel it: the noise is half the range of the
    three, or the largest split-half error F within one if that is more.
    """
    ratios, errors = [], []
    for again in range(_PROCESSES):
        command = (sys.executable, "-m", "benchmarks.checking", str(original), str(pruned), str(threads))
        done = run_metered(*command, str(seed + again))
        if done.code:
            return math.inf, 0.0
        ratio, error = json.loads(done.stdout)
        ratios.append(ratio)
        errors.append(error)
    middle = float(np.median(ratios))
    return middle, max((max(ratios) - min(ratios)) / 2 / middle, *errors)


def _measure(original: str, pruned: str, threads: str, seed: str) -> int:
    """Print the ratio of two latencies and F."""
    models = [Path(original).read_bytes(), Path(pruned).read_bytes()]
    runtime, shapes = Runtime(threads=int(threads)), input_shapes(Path(original))
    timing = measure_models(models, shapes, runtime, seed=int(seed) + 1000, budget_s=3.0)
    print(json.dumps([timing.ms[1] / timing.ms[0], timing.noise]))
    return 0


def input_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each input of a file, with 1 for what is symbolic."""
    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    return {
        value.name: tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
        for value in graph.input
        if value.name not in stored
    }


def parameters(path: Path) -> int:
    """Floats in the initializers and constants of a file."""
    graph = onnx.load(path).graph
    constants = (a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value")
    tensors = (*graph.initializer, *constants)
    return sum(math.prod(t.dims) for t in tensors if t.data_type in _FLOATS)


if __name__ == "__main__":
    sys.exit(_measure(*sys.argv[1:]))
