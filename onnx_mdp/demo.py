"""The demo: prune the embedded model to a share of its latency, and measure its accuracy before and after."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnx_mdp.cli.options import Options, PlanOptions
from onnx_mdp.cli.prune_commands import PruneOptions, run_prune
from onnx_mdp.errors import OutputError
from onnx_mdp.files import write_files
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.shapes_data import shapes

__all__ = ["accuracy", "run_demo"]

_CALIBRATION_SEED, _EVALUATION_SEED = 20_000, 20_001
_PICTURES = 400


def run_demo(folder: Path, target_ratio: float, options: Options, *, overwrite: bool = False) -> int:
    """Prune the embedded shapes classifier into ``folder`` and report its accuracy."""
    screen = options.screen
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give another folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create {folder}: {error.strerror}; choose a writable folder with -o"
        ) from error
    with ExitStack() as stack:
        model = stack.enter_context(as_file(files("onnx_mdp") / "demo_model" / "shapes_resnet.onnx"))
        slim, data = folder / "shapes_resnet.pruned.onnx", folder / "calibration.npz"
        pictures, labels = shapes(_PICTURES, _EVALUATION_SEED)
        before = accuracy(model, pictures, labels)
        screen.note(f"the embedded model names {before:.1%} of {_PICTURES} held-out pictures")
        inputs = shapes(64, _CALIBRATION_SEED)[0]
        write_files({data: lambda file: np.savez(file, image=inputs)})
        wanted = PruneOptions(
            target_ratio=target_ratio, output=slim, plan=PlanOptions(data=data), overwrite=overwrite
        )
        code = run_prune(model, options, wanted)
        if code == 0 and slim.is_file():
            after = accuracy(slim, pictures, labels)
            line = (
                f"accuracy {before:.1%} → {after:.1%} without any fine-tuning; "
                f"see {folder / 'shapes_resnet.pruned.structure.svg'}"
            )
            if screen.as_json:
                screen.note(line)
            else:
                screen.result(line, {})
    return code


def accuracy(model: Path, pictures: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Share of pictures, ``float32[n, 3, 64, 64]``, whose label the model names."""
    session = open_session(model, Runtime())
    batches = range(0, len(pictures), 50)
    logits = [session.run(None, {"image": pictures[start : start + 50]})[0] for start in batches]
    return float((np.concatenate(logits).argmax(1) == labels).mean())
