"""Models to torch and back: small networks of both exporters, and every file of the development zoo.

Claim: every model becomes a module that computes what ONNX Runtime does, a gradient reaches every weight that
has one, and after 10 steps of SGD the weights, written back, do in ONNX Runtime what they do in torch: within
1e-5 of the scale in float32, or else within 1e-9 in float64.

Where rounding is amplified (a sigmoid that saturates, a network driven off balance by noise), both are
computed in float64, by torch and by the reference evaluator of ONNX.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.harness import Verdict, arguments, combined, note, print_table, publish, run_main
from benchmarks.model_files import model_path, zoo_file, zoo_files
from benchmarks.zoo_coverage import SHAPES
from onnx_mdp.analysis.binding import bind_shapes
from onnx_mdp.errors import MdpError
from onnx_mdp.model_io import load_model
from onnx_mdp.numerics.double_precision import run_in_double
from onnx_mdp.running.computation import Computation
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.training.bridge import to_torch, write_back
from onnx_mdp.training.interpreter import OnnxModule

__all__ = ["Agreement", "Row", "agreement", "main", "train"]

_SINGLE, _DOUBLE = 1e-5, 1e-9
_STEPS = 10
_SMALL = (
    "resnet18_small resnet50_small mobilenet_v1_small mobilenet_v2_small efficientnet_b0_small "
    "regnet_y_small densenet121_small shufflenet_v2_small cifar_resnet8_small cifar_resnet8_pad_small "
    "deeplab_small ssd512_small yolov8n_small retinanet_small unet_small convnext_micro deit_micro "
    "deit_distilled_micro vit_micro swin_micro pvt_micro detr_micro streampetr_micro"
).split()
# The first self-attention of DETR's decoder reads queries that are all zero: a weight of it has no gradient.
_WITHOUT_GRADIENT: Mapping[str, int] = {"detr_micro_torchscript": 1}

Feeds = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Agreement:
    """The largest difference relative to its output: in float32 and, where that is too large, in float64."""

    single: float
    double: float | None

    @property
    def holds(self) -> bool:
        """Whether either is within its tolerance."""
        return self.single <= _SINGLE or (self.double is not None and self.double <= _DOUBLE)

    def __str__(self) -> str:
        """The figure that decides."""
        return f"{self.single:.0e}" if self.double is None else f"{self.double:.0e} in float64"


@dataclass(frozen=True, slots=True)
class Row:
    """One model; ``trainable`` is the share of its float elements, ``reached`` counts weights."""

    model: str
    before: Agreement | None
    after: Agreement | None
    trainable: float
    weights: int
    reached: int
    seconds: float
    flaw: str | None

    @property
    def verdict(self) -> Verdict:
        """Nothing may be wrong."""
        held = self.before is not None and self.after is not None and self.before.holds and self.after.holds
        missing = self.weights - self.reached - _WITHOUT_GRADIENT.get(self.model, 0)
        return "pass" if held and missing <= 0 and self.flaw is None else "fail"


def _tensors(feeds: Feeds, kind: torch.dtype) -> dict[str, torch.Tensor]:
    found = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    return {name: x.to(kind) if x.is_floating_point() else x for name, x in found.items()}


def _largest(expected: Sequence[Any], actual: Sequence[Any]) -> float:
    return max(
        float(np.abs(a - e).max(initial=0)) / max(float(np.abs(e).max(initial=0)), 1e-30)
        for e, a in zip((np.asarray(e, np.float64) for e in expected), actual, strict=True)
    )


def agreement(model: ir.Model, module: OnnxModule, feeds: Feeds) -> Agreement:
    """How far a module is from ONNX Runtime."""
    with torch.no_grad():
        found = [y.numpy() for y in module.run(_tensors(feeds, torch.float32)).values()]
    single = _largest(Computation(model).run(module.output_names, feeds), found)
    if single <= _SINGLE:
        return Agreement(single, None)
    with torch.no_grad():
        wide = [y.numpy() for y in module.double().run(_tensors(feeds, torch.float64)).values()]
    module.float()
    return Agreement(single, _largest(run_in_double(model, feeds), wide))


def train(module: OnnxModule, feeds: Feeds, steps: int = _STEPS) -> int:
    """Train in place on random projections of the outputs; how many weights a gradient reached."""
    reached: set[str] = set()
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    module.train()
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        outputs = [y for y in module.run(_tensors(feeds, torch.float32)).values() if y.is_floating_point()]
        loss = torch.stack([(torch.randn(y.shape, generator=generator) * y).mean() for y in outputs]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        reached |= {n for n, w in module.weights().items() if w.grad is not None and bool(w.grad.any())}
        optimizer.step()
    module.eval()
    return len(reached)


def _row(name: str, path: Callable[[], Any], seed: int) -> Row:
    note(f"{name} …")
    started = time.perf_counter()
    before = after = flaw = None
    weights = reached = 0
    share = 0.0
    try:
        model = load_model(path())
        module = to_torch(model)
        feeds = random_feeds(Computation(model).inputs, bind_shapes(model, SHAPES.get(name, {})), seed)
        sizes = [sum(w.numel() for w in module.weights().values()), sum(b.numel() for b in module.buffers())]
        share, weights = sizes[0] / sum(sizes), len(module.weights())
        before = agreement(model, module, feeds)
        reached = train(module, feeds)
        after = agreement(write_back(model, module), module, feeds)
    except MdpError as error:
        flaw = str(error)
    return Row(name, before, after, share, weights, reached, time.perf_counter() - started, flaw)


def _models(names: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name in names:
        yield name, (lambda name=name: model_path(name))
    if not names:
        for name in (f"{name}_{exporter}" for name in _SMALL for exporter in ("torchscript", "dynamo")):
            yield name, (lambda name=name: model_path(name))
        for name in zoo_files():
            yield name, (lambda name=name: zoo_file(name))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    given = arguments(__doc__, ()).parse_args(argv)
    torch.set_num_threads(given.threads)
    rows = [_row(name, path, given.seed) for name, path in _models(given.models)]
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda r: r.model,
        "torch − runtime": lambda r: r.flaw or str(r.before),
        "trainable": lambda r: f"{r.trainable:.1%}",
        "gradient reaches": lambda r: f"{r.reached} of {r.weights}",
        "after 10 steps": lambda r: str(r.after),
        "seconds": lambda r: f"{r.seconds:.0f}",
    }
    table = print_table("to torch and back", columns, rows)
    passed = sum(row.verdict == "pass" for row in rows)
    reached, weights = sum(row.reached for row in rows), sum(row.weights for row in rows)
    summary = (
        f"{passed} of {len(rows)} models go to torch and back; gradients reach {reached} of {weights} weights"
    )
    return publish(__file__, given, rows, table, combined([row.verdict for row in rows]), summary)


if __name__ == "__main__":
    run_main(main)
