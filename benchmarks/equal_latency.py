"""Pruned to the same measured milliseconds: which tool leaves most of the model.

Claim: of every model at every ratio of its latency, our plan refitted by ``lstsq`` agrees best with the
original, or as well as the best that is not planned for a refit: in the top-1 on images of classes that
nothing was calibrated on, and where there are no classes in the cosine of the outputs. No pruned model of
ours is slower than asked.

Each pruner's dial is turned until its file, measured beside the original in one interleaved run, takes the
wanted share of its time. `mdp`, `greedy`, `linear` (HALP's latency model) and `uniform` rank units by
``drift`` on 64 unlabelled inputs; `mdp_refit`, which must be asked for and needs images, by what a refit
leaves of it; Torch-Pruning takes magnitudes, or gradients with the labels of the same inputs; onnxsim takes
magnitudes.
Widths of `uniform` are those of the table, of Torch-Pruning multiples of 8, or any where these do not reach
the latency. ``kept`` is the share of squared weights that is left, a criterion that belongs to none of them.
ResNet-50, DeiT and YOLO have random weights: there it is about the search. Each attempt has a process of its
own: a crash is a result, and stays in the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from benchmarks.attempts import Attempts, Row
from benchmarks.contenders import FOR_REFIT, METHODS, REFITTED, Contest
from benchmarks.harness import (
    Verdict,
    arguments,
    combined,
    judge,
    print_table,
    publish,
    run_main,
    side_by_side,
)

__all__ = ["kept_energy", "main", "verdict_of"]

_MODELS = (
    "mobilenet_v2",
    "efficientnet_lite0",
    "resnet20",
    "resnet56",
    "resnet50_torchscript",
    "deit_small_torchscript",
    "yolov8n_torchscript",
)
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LONGEST = 90
_TIED = {"agreement": 0.02, "cosine": 0.01}  # 4 of 200 images
_CELL: Mapping[str, Callable[[Row], str]] = {
    "model": lambda r: r.model,
    "asked": lambda r: f"{r.ratio:g}",
}
_CLOSE = 0.03  # how far from the asked latency counts as equal


def kept_energy(base: bytes, model: bytes) -> float:
    """The share of the squared weights of layers that is left."""
    before, after = (
        sum(float(np.square(weight.astype(np.float64)).sum()) for weight in _layer_weights(data))
        for data in (base, model)
    )
    return after / before


def _layer_weights(model: bytes) -> Iterator[npt.NDArray[np.generic]]:
    """What is stored and read by layers; tables of places and anchors are none."""
    graph = onnx.load_from_string(model).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    stored |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    read = {name for n in graph.node if n.op_type in _LAYERS for name in n.input[:2]}
    return (numpy_helper.to_array(stored[name]) for name in sorted(read & stored.keys()))


def _row(contest: Contest, ratio: float, method: str) -> Row:
    """One attempt, in this process."""
    try:
        fast = contest.fast(method, 1 / ratio)
        like = contest.likeness(fast.model)
    except Exception as error:  # a tool may raise anything, and that is a result
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Row(contest.name, ratio, method, remark=told[:_LONGEST])
    return Row(
        contest.name,
        ratio,
        method,
        1 / fast.speedup,
        fast.noise,
        kept_energy(contest.base, fast.model),
        like.cosine,
        like.agreement,
        like.accuracy,
    )


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
                r
                for r in cell
                if r.method != FOR_REFIT and r.measured is not None and r.measured <= one.ratio * (1 + _CLOSE)
            ]
            best = max(getattr(row, figure) or 0.0 for row in equally_fast) if equally_fast else 0.0
            return judge(met and own >= best - tied, one.noise)
    return "fail"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, _MODELS)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.6])
    standing = [method for method in METHODS if method != FOR_REFIT]
    parser.add_argument("--methods", nargs="+", default=standing, choices=METHODS)
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    parser.add_argument("--inside", action="store_true", help="in this process, a line of JSON for each")
    given = parser.parse_args(argv)
    if given.inside:
        return _print_rows(given)
    found, rows = Attempts(given), list[Row]()
    for name, ratio in itertools.product(given.models, given.ratios):
        cell = found.cell(name, ratio)
        rows += [replace(row, verdict=verdict_of(row, cell)) for row in cell]
    columns: Mapping[str, Callable[[Row], str]] = {
        **_CELL,
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
    title = "the same answers in % of images, or the cosine; in brackets what misses the latency"
    overview = side_by_side(title, _CELL, lambda r: r.method, _likeness, rows)
    return publish(__file__, given, rows, table, combined(judged), summary, overview)


def _likeness(row: Row) -> str:
    if row.measured is None:
        return row.remark.partition(":")[0] or "nothing"
    shown = _shown(row.cosine, ".3f") if row.agreement is None else f"{100 * row.agreement:.1f}"
    return shown if row.measured <= row.ratio * (1 + _CLOSE) else f"({shown} at {row.measured:.2f})"


def _print_rows(given: argparse.Namespace) -> int:
    (name,) = given.models
    contest = Contest(name, given.threads, given.seed)
    for ratio, method in itertools.product(given.ratios, given.methods):
        print(json.dumps(asdict(_row(contest, ratio, method))), flush=True)
    return 0


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


if __name__ == "__main__":
    run_main(main)
