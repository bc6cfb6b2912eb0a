"""How seconds and memory grow with the model, stage by stage, and what the neighbours' analysis takes.

Claim: along each series (ResNet-18 to -152, DeiT-Tiny to ViT-L, a detector with 1 to 100 heads) no stage
besides measuring grows faster than the 1.5th power of the number of operations or of the parameters,
whichever grows more.

Analysis, scoring by weights, formulation and solve at 0.6 of a made-up latency, rewriting and verification
are timed inside one fresh process, whose peak memory is reported; measuring is left out, for it is the
device's. The exponent of a series is the slope of logarithms. Beside it, in processes of their own: onnxsim
0.8.1 (`apply_structured_pruning`) on the same file, and Torch-Pruning 1.6 (one step of its magnitude pruner)
on the module that it was exported from.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.harness import Verdict, arguments, combined, note, print_table, publish, run_main
from benchmarks.metered import run_metered
from benchmarks.pruners import onnxsim
from benchmarks.sized_models import made_up_table, sized_model
from benchmarks.torch_pruning_peer import torch_pruning
from onnx_mdp.importance.scoring import score
from onnx_mdp.model_io import load_model, parameter_count
from onnx_mdp.pipeline import analyze
from onnx_mdp.planning.formulation import formulate
from onnx_mdp.planning.solution_plan import plan_from_choice
from onnx_mdp.solvers import solve
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import require, verify

__all__ = ["SERIES", "Row", "exponent", "main"]

SERIES: Mapping[str, tuple[str, ...]] = {
    "ResNet": tuple(f"resnet{depth}_torchscript" for depth in (18, 50, 101, 152)),
    "ViT": (
        "deit_tiny_torchscript",
        "deit_small_torchscript",
        "deit_base_torchscript",
        "vit_large_torchscript",
    ),
    "heads": ("heads_1", "heads_4", "heads_20", "heads_100"),
}
_STAGES = ("analyze", "score", "solve", "rewrite", "verify")
_STEEPEST = 1.5
_PEERS = ("onnxsim", "torch_pruning")


@dataclass(frozen=True, slots=True)
class Row:
    """One model: seconds by stage, the process's peak, and the seconds of peers, None where they failed."""

    series: str
    model: str
    operations: int
    params: int
    seconds: Mapping[str, float]
    peak_mb: float
    peers: Mapping[str, float | None]
    steepest: float | None = None
    verdict: Verdict = "pass"


def _once(name: str) -> int:
    """Time the stages in this process, and print them as a line of JSON."""
    laps, last = {}, time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        laps[stage], last = now - last, now

    model = load_model(sized_model(name))
    structure = analyze(model, {})
    lap("analyze")
    importance = score(structure, "magnitude")
    lap("score")
    formulation = formulate(structure, importance, made_up_table(structure))
    full = tuple(len(variable.widths) - 1 for variable in formulation.problem.variables)
    budget = round(0.6 * formulation.problem.evaluate(full)[1])
    found = solve(formulation.problem, budget)
    assert found.choice is not None
    plan = plan_from_choice(structure, formulation, importance, found.choice)
    lap("solve")
    slim = rewrite(structure, plan)
    lap("rewrite")
    require(verify(model, structure, slim, plan))
    lap("verify")
    sizes = {"operations": len(structure.shadow.operations), "params": parameter_count(model)}
    print(json.dumps({"seconds": laps, **sizes}))
    return 0


def _peer_once(peer: str, name: str) -> int:
    """Let a neighbour prune half of a model, and print its seconds without loading."""
    base = sized_model(name).read_bytes()
    pruner = onnxsim(base)
    if peer == "torch_pruning":
        (shape,) = analyze(load_model(sized_model(name)), {}).shadow.inputs.values()
        pruner = torch_pruning(name, shape, "magnitude", lambda: [])
    started = time.perf_counter()
    pruner(0.5)
    print(json.dumps(time.perf_counter() - started))
    return 0


def _row(series: str, name: str) -> Row:
    note(f"{name} …")
    sized_model(name)  # an export must not count as a cost
    command = (sys.executable, "-m", "benchmarks.scaling", "--once", name)
    used = run_metered(*command, "ours")
    if used.code:
        raise RuntimeError(f"{name}: {used.complaint}")
    found = json.loads(used.stdout.strip().splitlines()[-1])
    peers: dict[str, float | None] = {}
    for peer in _PEERS:
        tried = run_metered(*command, peer)
        peers[peer] = float(tried.stdout.strip().splitlines()[-1]) if tried.code == 0 else None
    return Row(series, name, found["operations"], found["params"], found["seconds"], used.peak_mb, peers)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of the logarithms.

    >>> round(exponent([1, 10, 100], [0.5, 5, 50]), 6)
    1.0
    """
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(seconds, 1e-3)), 1)[0])


def _judged(rows: Sequence[Row]) -> Iterator[Row]:
    """Each series with its steepest stage; what takes less than a tenth of a second at most is not one."""
    grown = {size: getattr(rows[-1], size) / getattr(rows[0], size) for size in ("operations", "params")}
    sizes = [getattr(row, max(grown, key=lambda size: grown[size])) for row in rows]
    slopes = {
        stage: exponent(sizes, [row.seconds[stage] for row in rows])
        for stage in _STAGES
        if len(rows) > 1 and max(row.seconds[stage] for row in rows) > 0.1
    }
    steepest = max(slopes.values(), default=math.nan)
    for row in rows:
        yield replace(row, steepest=steepest, verdict="fail" if steepest > _STEEPEST else "pass")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, [name for names in SERIES.values() for name in names])
    parser.add_argument("--once", nargs=2, metavar=("NAME", "WHO"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.once:
        name, who = given.once
        return _once(name) if who == "ours" else _peer_once(who, name)
    rows: list[Row] = []
    for series, names in SERIES.items():
        rows += _judged(drawn) if (drawn := [_row(series, n) for n in names if n in given.models]) else []
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda r: r.model,
        "operations": lambda r: str(r.operations),
        "parameters": lambda r: f"{r.params / 1e6:.1f} M",
        **{stage: (lambda r, stage=stage: f"{r.seconds[stage]:.2f} s") for stage in _STAGES},
        "peak": lambda r: f"{r.peak_mb:.0f} MB",
        **{peer: (lambda r, peer=peer: _shown(r.peers[peer])) for peer in _PEERS},
        "steepest exponent": lambda r: f"{r.steepest:.2f}",
        "verdict": lambda r: r.verdict,
    }
    table = print_table("seconds by stage, without measuring", columns, rows)
    steep = {row.series: row.steepest for row in rows}
    summary = "steepest exponents: " + ", ".join(f"{series} {slope:.2f}" for series, slope in steep.items())
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


def _shown(seconds: float | None) -> str:
    return "failed" if seconds is None else f"{seconds:.1f} s"


if __name__ == "__main__":
    run_main(main)
