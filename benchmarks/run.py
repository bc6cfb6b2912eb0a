"""Run the benchmarks one after the other, keep their results, and fill the tables of README and pages.

Claim: ``--quick`` takes at most 15 minutes on two quiet cores, and what documents say between its marks is
what was measured.

``--quick`` takes a part of each that a laptop does in a quarter of an hour, ``--all`` everything that needs
no download; either keeps ``benchmarks/results/<quick or all>/<name>.json``. Measure on a quiet machine. What
fails is shown, and the rest goes on. ``--documents`` only fills the tables from the results that are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, note, print_table, run_main
from benchmarks.result_tables import RESULTS, refresh
from onnx_mdp.errors import UsageError
from onnx_mdp.files import write_text

__all__ = ["NEEDS_DATA", "PARTS", "Outcome", "main"]

# What `--quick` runs of each; `--all` runs each without arguments, whether it is named here or not.
PARTS: Mapping[str, str] = {
    "prune_cells": "--models mobilenet_v2 resnet56 --ratios 0.6",
    "latency_prediction": "--models mobilenet_v2",
    "targets": "--models mobilenet_v2 --ratios 0.8 0.6 --ep cpu",
    "equal_latency": "--models resnet20 --ratios 0.6 --methods mdp mdp_lstsq uniform onnxsim tp_magnitude",
    "accuracy_before_finetuning": "--models resnet20 --ratios 0.8 --images 2000 --criteria magnitude drift",
    "accuracy_after_repair": "--models resnet20 --ratios 0.65 --images 2000 --repairs bn lstsq",
    "solver": "--quick",
    "full_size": "--quick",
}
_WHOLE = (
    "ablations",
    "accuracy_by_stage",
    "cold_and_warm",
    "drift_correction",
    "granularity",
    "native_networks",
    "peers_on_transformers",
    "pruned_structure",
    "related_networks",
    "scaling",
    "torch_roundtrip",
    "warm_up",
    "zoo_coverage",
    "fleet_cost",  # these two read what the others found
    "paper_figures",
)
_RESUMABLE = ("equal_latency",)  # some hours; rows that are there are not measured again
# These train on all of CIFAR-10, for hours; `--data` says where it lies.
NEEDS_DATA = ("cifar_accuracy", "soft_masking")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one script ended; ``verdict`` is of its claim, or that it gave none."""

    name: str
    verdict: str
    seconds: float
    summary: str


def _run(name: str, arguments: Sequence[str], folder: Path) -> Outcome:
    """Run one script; its result replaces the one that is kept only if it wrote one."""
    note(f"── {name} {' '.join(arguments)}")
    draft = ROOT / "out" / "benchmarks" / f"{name}.json"
    draft.unlink(missing_ok=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=ROOT, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    if not draft.is_file():
        return Outcome(name, "no result", seconds, "see its messages above")
    found: Mapping[str, Any] = json.loads(draft.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    kept = json.dumps({**found, "seconds": round(seconds)}, indent=2) + "\n"
    write_text(kept, folder / draft.name, overwrite=True)
    return Outcome(name, found["verdict"], seconds, found["summary"])


def _wanted(given: argparse.Namespace) -> dict[str, list[str]]:
    """Arguments by script."""
    if given.quick:
        chosen = {name: arguments.split() for name, arguments in PARTS.items()}
    else:
        chosen = {name: [] for name in (*PARTS, *_WHOLE)}
        chosen |= {name: ["--data", str(given.data)] for name in NEEDS_DATA if given.data is not None}
    if given.resume:
        chosen |= {name: [*chosen[name], "--resume"] for name in _RESUMABLE}
    unknown = sorted(set(given.only or ()) - set(chosen))
    if unknown:
        raise UsageError(f"--only {unknown[0]}: there are {', '.join(sorted(chosen))}")
    return {name: arguments for name, arguments in chosen.items() if not given.only or name in given.only}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is wanted and return the exit code: 1 where a claim does not hold or a script gave nothing."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--quick", action="store_true", help="a part of each, in a quarter of an hour")
    which.add_argument("--all", action="store_true", help="everything, in some hours")
    which.add_argument("--documents", action="store_true", help="run nothing, fill the tables")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the scripts")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="all of CIFAR-10, for those that train")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run has measured")
    given = parser.parse_args(argv)
    outcomes = []
    if not given.documents:
        folder = RESULTS / ("quick" if given.quick else "all")
        outcomes = [_run(name, arguments, folder) for name, arguments in _wanted(given).items()]
        columns = {
            "benchmark": lambda o: o.name,
            "verdict": lambda o: o.verdict,
            "seconds": lambda o: f"{o.seconds:.0f}",
            "summary": lambda o: o.summary,
        }
        print_table(f"{sum(o.seconds for o in outcomes) / 60:.1f} minutes", columns, outcomes)
    refresh()
    return int(any(outcome.verdict in ("fail", "no result") for outcome in outcomes))


if __name__ == "__main__":
    run_main(main)
