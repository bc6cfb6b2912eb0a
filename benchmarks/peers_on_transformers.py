"""What the neighbouring pruners make of transformers: how much they remove, and whether the result runs.

Claim: of every model and exporter below, onnx-mdp can prune at least 90 % of the parameters, and a random
plan of it runs and equals the masked original within 1e-5 of the scale.

Beside it stand onnxsim 0.8.1 (``apply_structured_pruning`` of the same file, sparsity 0.5) and, on the torch
module that the file was exported from, Torch-Pruning 1.6 (group magnitude, ratio 0.5, the classifier left
out, the number of heads given). Neither states what its result should equal, so only running is asked of
them: in ONNX Runtime, or in torch. ``pip install onnxsim==0.8.1 torch-pruning`` brings both. Each attempt
has a process of its own: a crash is a result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from benchmarks.harness import ROOT, Verdict, arguments, combined, note, print_table, publish, run_main
from benchmarks.model_files import model_path
from onnx_mdp.model_io import load_model, parameter_count
from onnx_mdp.pipeline import analyze
from onnx_mdp.reports.documents import shares
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import TOLERANCE, verify
from onnx_mdp.tables.variants import plan_of_variant, random_variant

__all__ = ["Attempt", "Row", "main", "onnxsim", "ours", "torch_pruning"]

_MODELS = ("deit_tiny", "vit_base", "swin_tiny", "convnext_tiny", "pvt_v2_b0", "detr")
_EXPORTERS = ("torchscript", "dynamo")
_PRUNABLE = 0.9
_SPARSITY = 0.5
_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """The share of parameters that went, whether the result runs, and what else is known."""

    removed: float
    runs: bool
    remark: str


@dataclass(frozen=True, slots=True)
class Row:
    """All attempts at one file."""

    model: str
    ours: Attempt
    onnxsim: Attempt
    torch_pruning: Attempt
    prunable: float
    verdict: Verdict


def ours(name: str) -> tuple[Attempt, float]:
    """A random plan (widths from 0.3 of the full ones), verified; and the share that is prunable."""
    model = load_model(model_path(name))
    structure = analyze(model, {})
    choices = {i: range(1, structure.dimensions[i].count + 1) for i in structure.prunable}
    variant = random_variant(structure, choices, np.random.default_rng(0), low=0.3)
    plan = plan_of_variant(structure, variant)
    pruned = rewrite(structure, plan)
    evidence = verify(model, structure, pruned, plan)
    error = evidence.max_error / max(evidence.scale, 1e-30)
    removed = 1 - parameter_count(pruned) / parameter_count(model)
    share = shares(structure).prunable_params
    remark = f"law {error:.0e}" if evidence.verified and error <= TOLERANCE else f"BROKEN, {error:.0e}"
    return Attempt(removed, evidence.verified, remark), share


def onnxsim(name: str) -> Attempt:
    """`apply_structured_pruning` of the file, and one run of the result."""
    from onnxsim import apply_structured_pruning  # type: ignore[import-not-found]

    before = onnx.load(str(model_path(name)))
    pruned = apply_structured_pruning(before, sparsity=_SPARSITY)
    removed = 1 - _initialised(pruned) / _initialised(before)
    session = open_session(pruned.SerializeToString(), Runtime())
    session.run(None, random_feeds(session, {}, 0))
    return Attempt(removed, True, "")


def _initialised(model: onnx.ModelProto) -> int:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
    return sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type in floats)


def torch_pruning(name: str) -> Attempt:
    """The group magnitude pruner on the module, and one run of the result."""
    import torch
    import torch_pruning as tp  # type: ignore[import-not-found]

    from models.catalog import CATALOG, build

    architecture = name.rpartition("_")[0]
    module = build(architecture, seed=0).eval()
    image = torch.randn(1, *CATALOG[architecture].input_shape)
    before = sum(p.numel() for p in module.parameters())
    last = [m for n, m in module.named_modules() if n.split(".")[-1] in ("head", "classes", "boxes")]
    heads = {
        layer: part.heads
        for part in module.modules()
        if hasattr(part, "heads")
        for name, layer in part.named_children()
        if name in ("qkv", "query", "key", "value", "kv")
    }
    pruner = tp.pruner.BasePruner(
        module,
        image,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=_SPARSITY,
        ignored_layers=last,
        num_heads=heads,
    )
    pruner.step()
    removed = 1 - sum(p.numel() for p in module.parameters()) / before
    with torch.no_grad():
        module(image)
    return Attempt(removed, True, "")


_PEERS: Mapping[str, Callable[[str], Attempt]] = {"onnxsim": onnxsim, "torch_pruning": torch_pruning}


def _attempt(peer: str, name: str) -> Attempt:
    """One attempt in a process of its own; the last line that it prints tells."""
    command = [sys.executable, "-m", "benchmarks.peers_on_transformers", "--one", peer, "--models", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return Attempt(0.0, False, f"more than {_SECONDS:g} s")
    if done.returncode == 0:
        return Attempt(**json.loads(done.stdout.strip().splitlines()[-1]))
    reason = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]
    return Attempt(0.0, False, reason[:70])


def _row(name: str) -> Row:
    note(f"{name} …")
    own, prunable = ours(name)
    holds = own.runs and own.remark.startswith("law") and prunable >= _PRUNABLE
    peers = {peer: _attempt(peer, name) for peer in _PEERS}
    return Row(name, own, peers["onnxsim"], peers["torch_pruning"], prunable, "pass" if holds else "fail")


def _cell(attempt: Attempt) -> str:
    return f"−{attempt.removed:.0%} {attempt.remark}" if attempt.runs else f"fails: {attempt.remark}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    names = [f"{model}_{exporter}" for model in _MODELS for exporter in _EXPORTERS]
    parser = arguments(__doc__, names)
    parser.add_argument("--one", choices=_PEERS, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.one:
        attempt = _PEERS[given.one](given.models[0])
        fields: dict[str, Any] = {"removed": attempt.removed, "runs": attempt.runs, "remark": attempt.remark}
        print(json.dumps(fields))
        return 0
    rows = [_row(name) for name in given.models]
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda r: r.model,
        "prunable": lambda r: f"{r.prunable:.1%}",
        "onnx-mdp, a random plan": lambda r: _cell(r.ours),
        "onnxsim": lambda r: _cell(r.onnxsim),
        "Torch-Pruning": lambda r: _cell(r.torch_pruning),
        "verdict": lambda r: r.verdict,
    }
    table = print_table("parameters removed, and whether the result runs", columns, rows)
    passed = sum(row.verdict == "pass" for row in rows)
    summary = f"onnx-mdp prunes and proves {passed} of {len(rows)} files"
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
