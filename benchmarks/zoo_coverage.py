"""Every ONNX file of the development zoo: what can be pruned, why not the rest, and whether the law holds.

Claim: no analysis fails, at least 95 % of the files are pruned, and under 5 random constrained plans every
file passes the ONNX checker and equals its masked original: within 1e-5 of the scale in float32, or else
within 1e-9 in float64.

Most files were written by others: TorchScript of torch 1.2 to 2.13, dynamo, tf2onnx, Paddle, opset 9 to 20.
Normal noise drives some of them to where a sigmoid that saturates amplifies the rounding of float32; these
are computed in float64 (see `onnx_mdp.numerics.double_precision`).
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.harness import Verdict, arguments, combined, note, print_table, publish, run_main
from benchmarks.model_files import zoo_file, zoo_files
from benchmarks.plans import random_plan
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MdpError
from onnx_mdp.model_io import load_model, parameter_count
from onnx_mdp.numerics.double_precision import run_in_double
from onnx_mdp.pipeline import analyze
from onnx_mdp.plan import PruningPlan
from onnx_mdp.reports.documents import shares
from onnx_mdp.running.computation import Computation
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery.masking import masked_model
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import TOLERANCE, verify

__all__ = ["SHAPES", "Law", "Row", "check_plan", "frozen_reasons", "main"]

_PLANS = 5
_DOUBLE_TOLERANCE = 1e-9
# What the files leave symbolic, beside the batch.
SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "detect/yunet_n_dynamic.onnx": {"input": (1, 3, 96, 96)},
    "ocr/ppocr_mobile_v2_cls.onnx": {"x": (1, 3, 48, 192)},
    "ocr/ppocrv4_det.onnx": {"x": (1, 3, 96, 96)},
    "ocr/ppocrv4_rec.onnx": {"x": (1, 3, 48, 96)},
}


@dataclass(frozen=True, slots=True)
class Law:
    """One plan: the error in float32 and, where that is not below the tolerance, in float64; what stays."""

    single: float
    double: float | None
    kept: float
    flaw: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """One file; ``params`` is the share of the parameters that prunable dimensions cut."""

    file: str
    exporter: str
    dimensions: int
    prunable: int
    blocks: int
    params: float
    frozen: Mapping[str, int]
    laws: tuple[Law, ...]
    seconds: float
    flaws: tuple[str, ...]

    @property
    def pruned(self) -> bool:
        """Whether some plan removed parameters."""
        return any(law.kept < 1 for law in self.laws)

    @property
    def verdict(self) -> Verdict:
        """Nothing may be wrong."""
        return "fail" if self.flaws else "pass"


def frozen_reasons(structure: Structure) -> dict[str, int]:
    """How many dimensions are frozen for which reason, without the names in it."""
    stuck = [d for i, d in enumerate(structure.dimensions) if i not in structure.prunable]
    texts = ("one unit" if d.frozen is None else re.sub(r" '[^']*'", "", d.frozen) for d in stuck)
    return dict(Counter("graph output" if text.startswith("graph output") else text for text in texts))


def check_plan(model: ir.Model, structure: Structure, plan: PruningPlan, seed: int) -> Law:
    """Whether the model that a plan leaves is the masked original."""
    pruned = rewrite(structure, plan)
    kept = parameter_count(pruned) / parameter_count(model)
    evidence = verify(model, structure, pruned, plan, seeds=(seed,))
    if evidence.checker is not None:
        return Law(evidence.worst, None, kept, f"checker: {evidence.checker}")
    if evidence.worst <= TOLERANCE:
        return Law(evidence.worst, None, kept, None)
    feeds = random_feeds(Computation(model).inputs, structure.shadow.inputs, seed)
    expected, actual = (run_in_double(m, feeds) for m in (masked_model(model, structure, plan), pruned))
    error = max(
        float(np.abs(a - e).max(initial=0) / max(float(np.abs(e).max(initial=0)), 1e-30))
        for e, a in zip(expected, actual, strict=True)
    )
    holds = error <= _DOUBLE_TOLERANCE
    return Law(evidence.worst, error, kept, None if holds else f"float64: {error:.0e}")


def _exporter(model: ir.Model) -> str:
    name = f"{model.producer_name or 'unnamed'} {model.producer_version or ''}".split()
    return f"{' '.join(name[:2])}, {model.opset_imports['']}"


def _row(name: str, plans: int, seed: int) -> Row:
    note(f"{name} …")
    path = Path(name) if Path(name).is_file() else zoo_file(name)
    started = time.perf_counter()
    model = load_model(path)
    structure = analyze(model, SHAPES.get(name, {}))
    laws: list[Law] = []
    flaws: list[str] = []
    for number in range(plans if structure.prunable else 0):
        try:
            laws.append(check_plan(model, structure, random_plan(structure, seed + number), seed + number))
        except MdpError as error:
            flaws.append(str(error))
    return Row(
        file=name,
        exporter=_exporter(model),
        dimensions=len(structure.dimensions),
        prunable=len(structure.prunable),
        blocks=len(structure.blocks),
        params=shares(structure).prunable_params,
        frozen=frozen_reasons(structure),
        laws=tuple(laws),
        seconds=time.perf_counter() - started,
        flaws=(*flaws, *(law.flaw for law in laws if law.flaw)),
    )


def _law_text(row: Row) -> str:
    if row.flaws:
        return "; ".join(row.flaws)
    doubles = [law.double for law in row.laws if law.double is not None]
    single = [law.single for law in row.laws if law.double is None]
    parts = [f"{max(single):.0e} ({len(single)})"] if single else []
    return ", ".join([*parts, *([f"{max(doubles):.0e} in float64 ({len(doubles)})"] if doubles else [])])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = arguments(__doc__, ())
    parser.add_argument("--plans", type=int, default=_PLANS, help=f"of each file (default: {_PLANS})")
    given = parser.parse_args(argv)
    rows = [_row(name, given.plans, given.seed) for name in given.models or zoo_files()]
    columns = {
        "file": lambda r: r.file,
        "exporter, opset": lambda r: r.exporter,
        "prunable": lambda r: f"{r.prunable} of {r.dimensions}",
        "blocks": lambda r: str(r.blocks),
        "parameters": lambda r: f"{r.params:.0%}",
        "law (plans)": _law_text,
        "seconds": lambda r: f"{r.seconds:.0f}",
        "frozen": lambda r: "; ".join(f"{n} × {why}" for why, n in r.frozen.items()),
    }
    table = print_table("coverage of the development zoo", columns, rows)
    pruned = sum(row.pruned for row in rows)
    few: list[Verdict] = [] if pruned >= 0.95 * len(rows) else ["fail"]
    counts = f"{sum(r.prunable for r in rows)} of {sum(r.dimensions for r in rows)} dimensions"
    passed = sum(row.verdict == "pass" for row in rows)
    summary = f"{passed} of {len(rows)} files hold the law, {pruned} are pruned; {counts} can be"
    return publish(__file__, given, rows, table, combined([*(row.verdict for row in rows), *few]), summary)


if __name__ == "__main__":
    run_main(main)
