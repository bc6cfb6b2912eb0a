"""Where an 85 % reduction of latency cuts: the paper's figure 6.

Claim: the blocks on the largest feature maps keep a smaller share of their multiply-accumulates than those on
the smallest, because their milliseconds buy the least importance. A stem has no blocks; it is shown.

A plan for 0.15 of the predicted latency, by a table built from nothing and importance by ``drift``: ResNet-56
with published weights on images, and ResNet-50 with random weights on noise, where what is seen is the pull
of the latency. For each resolution: the shares of blocks, of channels and of multiply-accumulates that stay.
The structure is drawn beside the result, layer by layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.contenders import Contest
from benchmarks.harness import Verdict, arguments, combined, note, print_table, publish, run_main
from onnx_mdp.analysis.structure import Structure, operation_macs
from onnx_mdp.errors import UsageError
from onnx_mdp.files import write_text
from onnx_mdp.pipeline import analyze
from onnx_mdp.plan import PruningPlan, kept_count
from onnx_mdp.planning.formulation import to_ns
from onnx_mdp.planning.programs import Programs
from onnx_mdp.planning.solution_plan import plan_from_choice
from onnx_mdp.reports.figures import structure_svg
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.latency import predict_ms
from onnx_mdp.tables.variants import full_variant

__all__ = ["Row", "judged", "main", "stages_of"]


@dataclass(frozen=True, slots=True)
class Row:
    """One resolution of one model: what it has, and the shares that stay."""

    model: str
    side: int
    blocks: int
    blocks_kept: int
    channels: float
    work: float
    verdict: Verdict = "pass"


def stages_of(model: str, structure: Structure, plan: PruningPlan) -> Iterator[Row]:
    """The resolutions from the largest; a layer belongs to that of its output."""
    operations, shapes = structure.shadow.operations, structure.shadow.shapes
    slim = _analysed_again(structure, plan)
    sides = sorted({_side(structure, d.producer) for d in structure.dimensions} - {0}, reverse=True)
    for side in sides:
        blocks = [b for b in structure.blocks if _side(structure, b.joint) == side]
        inside = [i for i in structure.prunable if _side(structure, structure.dimensions[i].producer) == side]
        whole = sum(structure.dimensions[i].count for i in inside)
        kept = sum(
            0 if structure.dimensions[i].block in plan.removed_blocks else kept_count(plan, structure, i)
            for i in inside
        )
        before = sum(operation_macs(o, shapes) for o in operations if _last(shapes, o.outputs[0]) == side)
        after = sum(
            operation_macs(o, slim.shadow.shapes)
            for o in slim.shadow.operations
            if _last(slim.shadow.shapes, o.outputs[0]) == side
        )
        gone = sum(block.name in plan.removed_blocks for block in blocks)
        if whole and before:
            yield Row(model, side, len(blocks), len(blocks) - gone, kept / whole, after / before)


def _analysed_again(structure: Structure, plan: PruningPlan) -> Structure:
    return analyze(rewrite(structure, plan), {})


def _side(structure: Structure, operation: int) -> int:
    return _last(structure.shadow.shapes, structure.shadow.operations[operation].outputs[0])


def _last(shapes: Mapping[str, tuple[int, ...]], tensor: str) -> int:
    shape = shapes.get(tensor, ())
    return shape[-1] if len(shape) == 4 and shape[-1] > 1 else 0


def judged(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows of one model, largest resolution first, with what came of the claim."""
    with_blocks = [row for row in rows if row.blocks]
    verdict: Verdict = "pass" if with_blocks[0].work < with_blocks[-1].work else "fail"
    return (replace(row, verdict=verdict) for row in rows)


def _planned(name: str, given: argparse.Namespace) -> tuple[Structure, PruningPlan]:
    contest = Contest(name, given.threads, given.seed)
    structure, importance, table = contest.structure, contest.importance, contest.table
    whole = predict_ms(table, structure, full_variant(structure))
    answer = Programs(structure, importance, table).solve(to_ns(given.ratio * whole))
    choice = answer.solution.choice
    if choice is None:
        raise UsageError(f"{name}: no plan reaches {given.ratio:g} of the latency; choose a larger --ratio")
    return structure, plan_from_choice(structure, answer.formulation, importance, choice)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ("resnet50_torchscript", "resnet56"))
    parser.add_argument("--ratio", type=float, default=0.15, help="of the unpruned latency (default: 0.15)")
    given = parser.parse_args(argv)
    rows: list[Row] = []
    for name in given.models:
        structure, plan = _planned(name, given)
        rows += judged(list(stages_of(name, structure, plan)))
        given.output.mkdir(parents=True, exist_ok=True)
        figure = given.output / f"pruned_structure_{name}.svg"
        write_text(structure_svg(structure, plan), figure, overwrite=True)
        note(f"figure → {figure}")
    columns: Mapping[str, Callable[[Row], str]] = {
        "model": lambda r: r.model,
        "feature maps": lambda r: f"{r.side} × {r.side}",
        "blocks": lambda r: f"{r.blocks_kept} of {r.blocks}",
        "channels": lambda r: f"{r.channels:.0%}",
        "MACs": lambda r: f"{r.work:.1%}",
        "verdict": lambda r: r.verdict,
    }
    table = print_table(f"what stays at {given.ratio:g} of the latency", columns, rows)
    ends = [(row.model, row.side, row.work) for row in rows]
    summary = ", ".join(f"{model} {side}²: {work:.0%}" for model, side, work in ends)
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
