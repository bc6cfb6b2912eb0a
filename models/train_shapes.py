"""Train the demo's network on drawn shapes, export it, and write its card: ``python -m models.train_shapes``.

No image is seen twice: every step draws its own batch. On one core this takes about eight minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from models.export import export_module
from models.resnet import shapes_resnet
from onnx_mdp.shapes_data import CLASSES, shapes

__all__ = ["class_accuracies", "main", "train"]

_DEMO = Path(__file__).resolve().parent.parent / "onnx_mdp" / "demo_model"
_BATCH, _PEAK_RATE, _DECAY = 32, 2e-3, 0.05
# Step s of seed k draws from seed k * 10**6 + s, so no training shorter than a million steps meets this one.
_HELD_OUT_SEED, _HELD_OUT_IMAGES = 999_999, 5000

_CARD = """# shapes_resnet

A small residual network that names the shape in a 64 x 64 colour picture: the model that the demo prunes.

| | |
|---|---|
| task | one of {class_count} classes: {classes} |
| input | `image`, float32 [batch, 3, 64, 64], 8-bit colours / 255, minus 0.5, divided by 0.25 |
| output | `logits`, float32 [batch, {class_count}] |
| network | a pooled stem, three stages of two basic blocks of 48, 64, 80 channels; BatchNorm folded |
| parameters | {parameters:,} |
| file | `shapes_resnet.onnx`, opset {opset}, {megabytes:.2f} MB |
| training data | {seen:,} pictures by `onnx_mdp.shapes_data`, seeds {first_seed} to {last_seed}, each once |
| training | {steps:,} steps of {batch}, AdamW, peak rate {rate:g}, weight decay {decay:g}, one cosine cycle |
| licence | Apache-2.0, the weights and the pictures alike; no third-party data or weights were used |

Accuracy: {accuracy:.2f} % of {held_out:,} held-out pictures (`shapes({held_out}, seed={held_out_seed})`),
measured with ONNX Runtime on the exported file.

| class | accuracy |
|---|---|
{rows}

To make it again, from the root of the repository:

    {command}

The last bits of the weights depend on the processor and on the version of torch, and with them the last
tenths of the accuracy.
"""


def train(steps: int, seed: int) -> nn.Module:
    """Return `shapes_resnet` after ``steps`` batches of 32 fresh images, on one thread and from one seed."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    module: nn.Module = shapes_resnet().train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=_PEAK_RATE, weight_decay=_DECAY)
    schedule = OneCycleLR(optimiser, _PEAK_RATE, total_steps=steps, pct_start=0.2)
    started = time.perf_counter()
    for step in range(steps):
        images, labels = (torch.from_numpy(array) for array in shapes(_BATCH, seed * 10**6 + step))
        loss = _loss(module, images, labels)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True)
    return module


def _loss(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    # Channels last trains a fifth faster here.
    logits: Tensor = module(images.contiguous(memory_format=torch.channels_last))
    return functional.cross_entropy(logits, labels)


def class_accuracies(path: Path | str, count: int, seed: int) -> np.ndarray:
    """Return float64[10], the share of ``shapes(count, seed)`` that the file gets right, class by class."""
    images, labels = shapes(count, seed)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batches = [images[start : start + 100] for start in range(0, count, 100)]
    logits = np.concatenate([session.run(None, {"image": batch})[0] for batch in batches])
    right = logits.argmax(axis=1) == labels
    return np.array([right[labels == label].mean() for label in range(len(CLASSES))])


def _card(path: Path, steps: int, seed: int, command: str) -> str:
    model = onnx.load(path)
    accuracies = class_accuracies(path, _HELD_OUT_IMAGES, _HELD_OUT_SEED)
    shares = zip(CLASSES, accuracies, strict=True)
    return _CARD.format(
        class_count=len(CLASSES),
        classes=", ".join(CLASSES),
        parameters=sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer),
        opset=model.opset_import[0].version,
        megabytes=path.stat().st_size / 1e6,
        seen=steps * _BATCH,
        first_seed=seed * 10**6,
        last_seed=seed * 10**6 + steps - 1,
        steps=steps,
        batch=_BATCH,
        rate=_PEAK_RATE,
        decay=_DECAY,
        # Classes are balanced, so the mean over classes is the mean over images.
        accuracy=100 * accuracies.mean(),
        held_out=_HELD_OUT_IMAGES,
        held_out_seed=_HELD_OUT_SEED,
        rows="\n".join(f"| {name} | {100 * share:.1f} % |" for name, share in shares),
        command=command,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line: train, export, measure, write ``shapes_resnet.onnx`` and ``MODEL_CARD.md``."""
    parser = argparse.ArgumentParser(prog="python -m models.train_shapes", description=__doc__)
    parser.add_argument("--steps", type=int, default=2600, help="batches of 32 (default: 2600)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the images")
    parser.add_argument("-o", "--output", type=Path, default=_DEMO, help="a folder (default: the package's)")
    given = parser.parse_args(argv)
    given.output.mkdir(parents=True, exist_ok=True)
    module = train(given.steps, given.seed)
    path = given.output / "shapes_resnet.onnx"
    export_module(module, (3, 64, 64), path, "torchscript", dynamic_batch=True)
    command = f"python -m models.train_shapes --steps {given.steps} --seed {given.seed}"
    card = _card(path, given.steps, given.seed, command)
    (given.output / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    print(next(line for line in card.splitlines() if line.startswith("Accuracy")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
