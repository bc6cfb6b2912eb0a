"""The law on models of full size: random plans, every block, and what a prune costs beside measuring.

Claim: under 20 random constrained plans each, and with every detected block removed singly, every model below
runs and equals the masked original (the branch zeroed) within 1e-5 of the scale; analysis, rewrite and
verification take at most 15 s and 3 GB for DeiT-Base, 20 s for Swin-T, 15 s for ConvNeXt-T, 6 GB for ViT-L;
analysis alone at most 20 s and 3 GB for SSD512 and the StreamPETR-style detector, whose queue is pruned too.

A plan keeps a random number of random units of every dimension, other units in each head but as many; every
second one removes blocks (with probability 0.4), and half of them keep query, key and value of an attention
equally wide, so that a fused projection is fused again. A zeroed branch is the original file with one more
node, a product with zero, and owes nothing to the rewriter. The costs are those of a fresh process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from benchmarks.harness import Verdict, arguments, combined, note, print_table, publish, run_main
from benchmarks.metered import run_metered
from benchmarks.model_files import model_path
from benchmarks.plans import random_plan
from onnx_mdp.analysis.blocks import Block
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.model_io import clone, load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.computation import Computation
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery.comparison import Trial, compare, distances
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import TOLERANCE, require, verify

__all__ = ["Row", "block_errors", "main", "plan_errors", "zeroed"]

_MODELS = "deit_tiny deit_small deit_base vit_base swin_tiny convnext_tiny pvt_v2_b0 detr vit_large".split()
_MODELS += "ssd512 yolov8n retinanet unet streampetr".split()
_EXPORTERS = ("torchscript", "dynamo")
_QUICK = ("deit_tiny_torchscript", "pvt_v2_b0_dynamo")
_PLANS = 20
_ANALYSIS: Mapping[str, tuple[float, float]] = {"ssd512": (20.0, 3000.0), "streampetr": (20.0, 3000.0)}
_STATES: Mapping[str, Mapping[str, str]] = {
    "streampetr": {"memory": "memory_out", "points": "points_out", "speed": "speed_out"}
}
_SECONDS: Mapping[str, float] = {"deit_base": 15.0, "swin_tiny": 20.0, "convnext_tiny": 15.0}
_MEGABYTES: Mapping[str, float] = {"deit_base": 3000.0, "vit_large": 6000.0}


@dataclass(frozen=True, slots=True)
class Row:
    """One file: what a prune cost, the worst error of each law as a share of the scale, and what is wrong."""

    model: str
    seconds: float
    peak_mb: float
    analysis_s: float
    plans: int
    plan_error: float
    blocks: int
    block_error: float
    flaws: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Nothing may be wrong."""
        return "fail" if self.flaws else "pass"


def plan_errors(model: ir.Model, structure: Structure, count: int, seed: int) -> list[float]:
    """The distance of each plan's model to its masked original, as a share of the scale.

    Raises:
        VerificationError: one of them is not the masked original, or fails the checker.
    """
    errors = []
    for number in range(count):
        plan = random_plan(structure, seed + number)
        evidence = verify(model, structure, rewrite(structure, plan), plan, seeds=(number,))
        require(evidence)
        errors.append(evidence.worst)
    return errors


def block_errors(model: ir.Model, structure: Structure, seed: int) -> tuple[list[float], list[str]]:
    """The distance of each single removal to the zeroed branch, and the blocks that change no output."""
    dense = Computation(model)
    feeds = random_feeds(dense.inputs, structure.shadow.inputs, seed)
    before = dense.run(dense.outputs, feeds)
    errors, idle = [], []
    for block in structure.blocks:
        pruned = rewrite(structure, PruningPlan(keep={}, removed_blocks=(block.name,)))
        found = compare(zeroed(model, structure, block), pruned, dense.outputs, [Trial(feeds)], TOLERANCE)
        errors.append(found.worst.ratio)
        if max(d.ratio for d in distances(found.expected[0][: len(before)], before)) == 0:
            idle.append(block.name)
    return errors, idle


def zeroed(model: ir.Model, structure: Structure, block: Block) -> ir.Model:
    """The original model with the branch of a block multiplied by zero."""
    copy = clone(model)
    output = structure.shadow.operations[block.joint].outputs[0]
    joint = next(node for node in copy.graph if output in [value.name for value in node.outputs])
    slot = [value.name for value in joint.inputs if value is not None].index(block.branch)
    zero = ir.Value(name="the_zero", const_value=ir.tensor(np.zeros((), np.float32), name="the_zero"))
    copy.graph.register_initializer(zero)
    product = ir.Node("", "Mul", [joint.inputs[slot], zero], name="zeroed")
    product.outputs[0].name = "zeroed"
    copy.graph.insert_before(joint, product)
    joint.replace_input_with(slot, product.outputs[0])
    return copy


def _analysed(name: str) -> tuple[ir.Model, Structure]:
    model = load_model(model_path(name))
    return model, analyze(model, {}, states=_STATES.get(name.rpartition("_")[0]))


def _once(name: str, stage: str) -> int:
    """What a prune does beside measuring, or the analysis alone, for the process that is metered."""
    model, structure = _analysed(name)
    if stage == "analysis":
        return 0
    plan = random_plan(structure, 0)
    require(verify(model, structure, rewrite(structure, plan), plan))
    return 0


def _row(name: str, plans: int, seed: int) -> Row:
    model_path(name)  # an export must not count as a cost
    note(f"{name} …")
    command = (sys.executable, "-m", "benchmarks.full_size", "--once", name)
    first, used = (run_metered(*command, stage) for stage in ("analysis", "all"))
    flaws = [run.complaint for run in (first, used) if run.code]
    model, structure = _analysed(name)
    drawn = plan_errors(model, structure, plans, seed)
    removed, idle = block_errors(model, structure, seed)
    architecture = name.rpartition("_")[0]
    cost, worst = (used.seconds, used.peak_mb), (max(drawn), max(removed, default=0.0))
    most_s, most_mb = _ANALYSIS.get(architecture, (np.inf, np.inf))
    wrong = {
        f"analysis: {first.seconds:.0f} s": first.seconds > most_s,
        f"analysis: {first.peak_mb:.0f} MB": first.peak_mb > most_mb,
        f"{cost[0]:.0f} s": cost[0] > _SECONDS.get(architecture, np.inf),
        f"{cost[1]:.0f} MB": cost[1] > _MEGABYTES.get(architecture, np.inf),
        f"plans: {worst[0]:.0e}": not worst[0] <= TOLERANCE,
        f"blocks: {worst[1]:.0e}": not worst[1] <= TOLERANCE,
        f"{len(idle)} blocks change nothing": bool(idle),
    }
    flaws += [flaw for flaw, holds in wrong.items() if holds]
    note(f"{name}: {cost[0]:.1f} s, {cost[1]:.0f} MB, {worst[0]:.1e}, {worst[1]:.1e}, {flaws or 'pass'}")
    return Row(name, *cost, first.seconds, len(drawn), worst[0], len(removed), worst[1], tuple(flaws))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    names = [f"{model}_{exporter}" for model in _MODELS for exporter in _EXPORTERS]
    parser = arguments(__doc__, names)
    parser.add_argument("--plans", type=int, default=_PLANS, help=f"of each model (default: {_PLANS})")
    parser.add_argument("--quick", action="store_true", help=f"two plans of {' and '.join(_QUICK)}")
    parser.add_argument("--once", nargs=2, metavar=("NAME", "STAGE"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.once:
        return _once(*given.once)
    chosen, plans = (_QUICK, 2) if given.quick else (given.models, given.plans)
    rows = [_row(name, plans, given.seed) for name in chosen]
    columns = {
        "model": lambda r: r.model,
        "seconds": lambda r: f"{r.seconds:.1f}",
        "of analysis": lambda r: f"{r.analysis_s:.1f}",
        "peak MB": lambda r: f"{r.peak_mb:.0f}",
        "plans": lambda r: str(r.plans),
        "worst": lambda r: f"{r.plan_error:.1e}",
        "blocks": lambda r: str(r.blocks),
        "worst block": lambda r: f"{r.block_error:.1e}",
        "verdict": lambda r: r.verdict if r.verdict == "pass" else ", ".join(r.flaws),
    }
    table = print_table("pruned = masked on full size", columns, rows)
    worst = max(max(row.plan_error, row.block_error) for row in rows)
    counts = f"{sum(row.plans for row in rows)} plans and {sum(row.blocks for row in rows)} single blocks"
    passed = sum(row.verdict == "pass" for row in rows)
    summary = f"{passed} of {len(rows)} files; {counts}, none further than {worst:.1e} of the scale"
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
