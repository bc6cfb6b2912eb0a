"""Pruned to the same measured milliseconds: which tool leaves most of the model.

Claim: of every model at every ratio of its latency, our plan refitted by ``lstsq`` agrees best with the
original, or as well as the best: in the top-1 on images of classes that nothing was calibrated on, and where
there are no classes in the cosine of the outputs. No pruned model of ours is slower than asked.

Each pruner's dial is turned until its file, measured beside the original in one interleaved run, takes the
wanted share of its time. `mdp`, `greedy`, `linear` (HALP's latency model) and `uniform` rank units by
``drift`` on 64 unlabelled inputs; Torch-Pruning takes magnitudes, or gradients with the labels of the same
inputs, and widths in multiples of 8; onnxsim takes magnitudes. ``kept`` is the share of squared weights that
is left, a criterion that belongs to none of them. ResNet-50, DeiT and YOLO have random weights: there it is
about the search. Each attempt has a process of its own: a crash is a result, and stays in the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.contenders import METHODS, REFITTED, Contest
from benchmarks.harness import ROOT, Verdict, arguments, combined, judge, note, print_table, publish, run_main

__all__ = ["Row", "kept_energy", "main", "verdict_of"]

_MODELS = (
    "mobilenet_v2",
    "efficientnet_lite0",
    "resnet20",
    "resnet56",
    "resnet50_torchscript",
    "deit_small_torchscript",
    "yolov8n_torchscript",
)
_SECONDS = 1800.0
_TIED = {"agreement": 0.02, "cosine": 0.01}  # 4 of 200 images
_CLOSE = 0.03  # how far from the asked latency counts as equal


@dataclass(frozen=True, slots=True)
class Row:
    """One tool on one model; shares of the original's, and None where the tool did not manage."""

    model: str
    ratio: float
    method: str
    measured: float | None = None
    noise: float = 0.0
    kept: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    remark: str = ""
    verdict: Verdict = "pass"


def kept_energy(base: bytes, model: bytes) -> float:
    """The share of the squared weights of layers that is left."""
    before, after = (
        sum(
            float(np.square(numpy_helper.to_array(tensor).astype(np.float64)).sum())
            for tensor in onnx.load_from_string(data).graph.initializer
            if len(tensor.dims) >= 2 and tensor.data_type == onnx.TensorProto.FLOAT
        )
        for data in (base, model)
    )
    return after / before


def _one(given: argparse.Namespace) -> Row:
    """One attempt, in this process."""
    (name,), (ratio,), method = given.models, given.ratios, given.one
    contest = Contest(name, given.threads, given.seed)
    fast = contest.fast(method, 1 / ratio)
    like = contest.likeness(fast.model)
    return Row(
        name,
        ratio,
        method,
        1 / fast.speedup,
        fast.noise,
        kept_energy(contest.base, fast.model),
        like.cosine,
        like.agreement,
        like.accuracy,
    )


def _attempt(name: str, ratio: float, method: str, given: argparse.Namespace) -> Row:
    """One attempt in a process of its own; the last line that it prints tells."""
    note(f"{name} at {ratio:g} by {method} …")
    command = [sys.executable, "-m", "benchmarks.equal_latency", "--one", method, "--models", name]
    command += ["--ratios", f"{ratio:g}", "--threads", str(given.threads), "--seed", str(given.seed)]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return Row(name, ratio, method, remark=f"more than {_SECONDS:g} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Row(**json.loads(lines[-1]))
    return Row(name, ratio, method, remark=lines[-1][:90] if lines else f"ended with {done.returncode}")


def verdict_of(one: Row, cell: Sequence[Row]) -> Verdict:
    """What the claim asks of the refitted plan; of the others nothing."""
    if one.method != REFITTED:
        return "pass"
    if one.measured is None:
        return "fail"
    met = one.measured <= one.ratio * (1 + max(0.02, 2 * one.noise))
    for figure, tied in _TIED.items():
        own = getattr(one, figure)
        if own is not None:
            equally_fast = [
                r for r in cell if r.measured is not None and r.measured <= one.ratio * (1 + _CLOSE)
            ]
            best = max(getattr(row, figure) or 0.0 for row in equally_fast) if equally_fast else 0.0
            return judge(met and own >= best - tied, one.noise)
    return "fail"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, _MODELS)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.6])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--one", choices=METHODS, help="one attempt in this process, as a line of JSON")
    given = parser.parse_args(argv)
    if given.one:
        return _print_one(given)
    rows: list[Row] = []
    for name in given.models:
        for ratio in given.ratios:
            cell = [_attempt(name, ratio, method, given) for method in given.methods]
            rows += [replace(row, verdict=verdict_of(row, cell)) for row in cell]
    columns: Mapping[str, Callable[[Row], str]] = {
        "model": lambda r: r.model,
        "asked": lambda r: f"{r.ratio:g}",
        "pruner": lambda r: r.method,
        "measured": lambda r: _shown(r.measured, ".3f"),
        "F": lambda r: f"{r.noise:.1%}",
        "kept": lambda r: _shown(r.kept, ".1%"),
        "cosine": lambda r: _shown(r.cosine, ".3f"),
        "agrees": lambda r: _shown(r.agreement, ".1%"),
        "top-1": lambda r: _shown(r.accuracy, ".1%"),
        "remark": lambda r: r.remark,
        "verdict": lambda r: r.verdict,
    }
    table = print_table("at equal measured latency, before fine-tuning", columns, rows)
    judged = [row.verdict for row in rows if row.method == REFITTED]
    summary = f"best or tied in {judged.count('pass')} of {len(judged)} cells"
    return publish(__file__, given, rows, table, combined(judged), summary)


def _print_one(given: argparse.Namespace) -> int:
    try:
        print(json.dumps(asdict(_one(given))))
    except Exception as error:  # a tool may raise anything, and that is a result
        print(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return 1
    return 0


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


if __name__ == "__main__":
    run_main(main)
