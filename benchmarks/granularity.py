"""What joint pruning is worth: the best plan of all dimensions beside the best of one kind of them.

Claim: the jointly optimal plan keeps at least as much importance as the best plan that cuts only MLP widths,
only heads, only query, key and value widths, only the embedding, or only whole blocks, and more than any of
them at 0.6 of the latency and below, which most of them do not reach.

All plans come from one table and one importance, and every solve is proven optimal. Beside the importance
stands the relative drift of the outputs on inputs that the importance never saw, without fine-tuning. The
weights of exported reference models are random; the claim is about the search, not about accuracy.
"""

from __future__ import annotations

import argparse
import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Verdict, arguments, combined, note, print_table, publish, run_main
from benchmarks.measuring import table_from_nothing
from benchmarks.model_files import model_path
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.importance.scoring import Importance, score
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.pipeline import analyze
from onnx_mdp.planning.formulation import to_ns
from onnx_mdp.planning.programs import Programs
from onnx_mdp.planning.solution_plan import plan_from_choice
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.solvers import SolveLimits
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.latency import LatencyTable, predict_ms
from onnx_mdp.tables.variants import full_variant

__all__ = ["Result", "main", "only"]

_KINDS: Mapping[str, tuple[str, ...]] = {
    "mlp": ("mlp",),
    "heads": ("heads",),
    "qk and value": ("qk", "value"),
    "embedding": ("embedding",),
    "blocks": (),
}
_NEARLY_ALL = 0.999999  # a share below 1 that only the full width reaches
_FEEDS = 8
_STRICTLY_MORE = 0.6  # at larger ratios a single kind may be the optimum
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Result:
    """One model at one ratio: importance kept and output drift by kind; None where a kind cannot reach it."""

    model: str
    ratio: float
    importance: Mapping[str, float | None]
    drift: Mapping[str, float | None]
    kinds_used: tuple[str, ...]
    verdict: Verdict


def only(structure: Structure, kind: str) -> WidthRules:
    """Rules that let nothing but one kind of dimension, or whole blocks, be cut."""
    dimensions = [structure.dimensions[index] for index in structure.prunable]
    others = [dimension.name for dimension in dimensions if dimension.kind not in _KINDS[kind]]
    blocks = [] if kind == "blocks" else [block.name for block in structure.blocks]
    return WidthRules(
        exclude=tuple(map(glob.escape, blocks)),
        least=tuple((glob.escape(name), _NEARLY_ALL) for name in others),
    )


def _results(name: str, given: argparse.Namespace) -> Iterator[Result]:
    note(f"{name}: table")
    model = load_model(model_path(name))
    structure, runtime = analyze(model, {}), Runtime(threads=given.threads)
    table = table_from_nothing(structure, runtime, given.seed)
    session = open_session(model_bytes(model), runtime)
    feeds = [random_feeds(session, structure.shadow.inputs, seed) for seed in range(2 * _FEEDS)]
    importance = score(structure, "activation", feeds[:_FEEDS])
    dense = [session.run(None, feed) for feed in feeds[_FEEDS:]]
    base_ms = predict_ms(table, structure, full_variant(structure))
    for ratio in given.ratios:
        found = {"all": _best(structure, table, importance, WidthRules(), ratio * base_ms)}
        for kind in _KINDS:
            note(f"{name}: {kind} at {ratio:g}")
            found[kind] = _best(structure, table, importance, only(structure, kind), ratio * base_ms)
        drifts = {
            kind: None if f is None else _drift(structure, f[1], feeds[_FEEDS:], dense)
            for kind, f in found.items()
        }
        values = {kind: None if f is None else f[0] for kind, f in found.items()}
        best = values["all"]
        single = [value for kind, value in values.items() if kind != "all" and value is not None]
        more = _ROUNDING if ratio <= _STRICTLY_MORE else -_ROUNDING
        holds = best is not None and all(best > value + more for value in single)
        used = () if found["all"] is None else _kinds_used(structure, found["all"][1])
        yield Result(name, ratio, values, drifts, used, "pass" if holds else "fail")


def _best(
    structure: Structure, table: LatencyTable, importance: Importance, rules: WidthRules, target_ms: float
) -> tuple[float, Any] | None:
    """The importance that the optimal plan within the rules keeps, and the plan."""
    answer = Programs(structure, importance, table, rules).solve(
        to_ns(target_ms), limits=SolveLimits(gap=0.0)
    )
    solution = answer.solution
    if solution.choice is None:
        return None
    return solution.value, plan_from_choice(structure, answer.formulation, importance, solution.choice)


def _drift(structure: Structure, plan: Any, feeds: Sequence[Any], dense: Sequence[Any]) -> float:
    """``Σ‖y − y₀‖² / Σ‖y₀‖²`` over the outputs."""
    session = open_session(model_bytes(rewrite(structure, plan)), Runtime())
    pairs = [
        (before, after)
        for outputs, feed in zip(dense, feeds, strict=True)
        for before, after in zip(outputs, session.run(None, feed), strict=True)
    ]
    return float(sum(((a - b) ** 2).sum() for b, a in pairs) / sum((b**2).sum() for b, _ in pairs))


def _kinds_used(structure: Structure, plan: Any) -> tuple[str, ...]:
    kinds = {d.kind for d in structure.dimensions if d.name in plan.keep}
    return (*sorted(kinds), *(["blocks"] if plan.removed_blocks else []))


def _cell(result: Result, kind: str) -> str:
    value, drift = result.importance[kind], result.drift[kind]
    return "out of reach" if value is None or drift is None else f"{value:.3f} ({drift:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ("deit_tiny_torchscript",))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.6, 0.4])
    given = parser.parse_args(argv)
    rows = [result for name in given.models for result in _results(name, given)]
    columns = {"model": lambda r: r.model, "ratio": lambda r: f"{r.ratio:g}"}
    for kind in ("all", *_KINDS):
        columns[kind] = lambda r, kind=kind: _cell(r, kind)
    columns["kinds used"] = lambda r: ", ".join(r.kinds_used)
    table = print_table("importance kept (output drift), by what may be cut", columns, rows)
    summary = (
        f"the joint plan keeps the most in {sum(r.verdict == 'pass' for r in rows)} of {len(rows)} cells"
    )
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
