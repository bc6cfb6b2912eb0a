"""Models to test on: pretrained files beside the checkout, exports of the catalog, and ONNX text.

The pretrained files lie in ``../shared/zoo`` or where ``ONNX_MDP_ZOO`` says; without them those tests skip.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from wild import WILD

from onnx_mdp.analysis.binding import bind_shapes
from onnx_mdp.analysis.shadow import prepare
from onnx_mdp.analysis.structure import Structure, analyze_shadow
from onnx_mdp.model_io import ModelLike, load_model, model_bytes
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.running.timing import random_feeds
from onnx_mdp.surgery import rewriting
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.surgery.verification import Evidence, verify

__all__ = [
    "CNNS",
    "SMALL_MODELS",
    "SmallModel",
    "analyse",
    "cut_wrongly",
    "informative",
    "operands",
    "prune_checked",
    "random_plan",
    "run",
    "small_model",
    "text_model",
    "zoo_path",
    "zoo_structure",
]

# The input shapes of files with symbolic sizes; an empty mapping where the file or the batch says it all.
CNNS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "cifar10/mlperf_resnet8_tf2onnx.onnx": {},
    "cifar10/resnet20.onnx": {},
    "cifar10/resnet56.onnx": {},
    "detect/fastestdet.onnx": {},
    "detect/ultraface_rfb320.onnx": {},
    "detect/yolox_nano.onnx": {},
    "detect/yunet_n_dynamic.onnx": {"input": (1, 3, 96, 96)},
    "imagenet/mobilenet_v1_0.5_160_tf2onnx.onnx": {},
    "imagenet/mobilenet_v2_tv.onnx": {},
    "imagenet/squeezenet1.1.onnx": {},
    "imagenet/tf_efficientnet_lite0_dynamo.onnx": {},
    "ocr/ppocr_mobile_v2_cls.onnx": {"x": (1, 3, 48, 192)},
    "ocr/ppocrv4_det.onnx": {"x": (1, 3, 96, 96)},
    "ocr/ppocrv4_rec.onnx": {"x": (1, 3, 48, 96)},
    "seg/agllnet_256_tf2onnx.onnx": {},
    "seg/deeplab_v3_mnv2_tf2onnx.onnx": {},
}


# Which opsets torch's exporter by tracing writes each small network at, and its successor.
_TORCHSCRIPT: Mapping[str, tuple[int, ...]] = {
    "resnet18_small": (9, 11, 13, 17),
    "resnet50_small": (10, 16),
    "mobilenet_v1_small": (9, 13, 20),
    "mobilenet_v2_small": (9, 12, 17),
    "efficientnet_b0_small": (9, 11, 17),
    "cifar_resnet8_small": (9, 15),
    "cifar_resnet8_pad_small": (10, 11, 13, 18),
    "regnet_y_small": (9, 14, 20),
    "densenet121_small": (9, 12, 17),
    "shufflenet_v2_small": (9, 11, 13, 17),
    "deeplab_small": (11, 13, 18),
    "ssd512_small": (11, 17),
    "yolov8n_small": (12, 17),
    "retinanet_small": (11, 16),
    "unet_small": (10, 17),
    "convnext_micro": (9, 11, 17, 20),
    "deit_micro": (14, 16, 20),
    "deit_distilled_micro": (15,),
    "vit_micro": (14, 18),
    "swin_micro": (11, 14, 17),
    "pvt_micro": (11, 14, 17),
    "detr_micro": (14, 17),
    "streampetr_micro": (17,),
}
_DYNAMO: Mapping[str, tuple[int, ...]] = {
    "resnet18_small": (18,),
    "mobilenet_v2_small": (20,),
    "efficientnet_b0_small": (21,),
    "cifar_resnet8_pad_small": (24,),
    "regnet_y_small": (19,),
    "densenet121_small": (22,),
    "shufflenet_v2_small": (23,),
    "deeplab_small": (19,),
    "yolov8n_small": (21,),
    "unet_small": (22,),
    "convnext_micro": (18,),
    "deit_micro": (23,),
    "vit_micro": (24,),
    "swin_micro": (21,),
    "pvt_micro": (22,),
    "detr_micro": (20,),
}


@dataclass(frozen=True, slots=True)
class SmallModel:
    """A small network as an exporter writes it at an opset."""

    architecture: str
    exporter: str
    opset: int

    def __str__(self) -> str:
        """The name of its test."""
        return f"{self.architecture}-{self.exporter}-{self.opset}"


SMALL_MODELS: tuple[SmallModel, ...] = (
    *(SmallModel(name, "imitation", opset) for name, (_, _, opsets) in WILD.items() for opset in opsets),
    *(SmallModel(name, "torchscript", opset) for name, opsets in _TORCHSCRIPT.items() for opset in opsets),
    *(SmallModel(name, "dynamo", opset) for name, opsets in _DYNAMO.items() for opset in opsets),
)


@functools.cache
def _network(name: str) -> Any:
    from models.catalog import build

    return build(name)


def small_model(made: SmallModel, folder: Path) -> ModelLike:
    """The model itself; exports of torch are written to ``folder``, every second one for any batch.

    A test that needs torch skips where it is absent.
    """
    if made.exporter == "imitation":
        text, finish, _ = WILD[made.architecture]
        return finish(text_model(text(made.opset), made.opset))
    pytest.importorskip("torch")
    from models.catalog import CATALOG
    from models.export import export_module

    entry, exporter = CATALOG[made.architecture], "dynamo" if made.exporter == "dynamo" else "torchscript"
    return export_module(
        _network(made.architecture),
        entry.input_shape,
        folder / f"{made}.onnx",
        exporter,
        made.opset % 2 == 1,
        True,
        made.opset,
        entry.outputs,
        entry.others,
    )


def zoo_path(name: str) -> Path:
    """The file called ``name`` (such as ``cifar10/resnet20.onnx``); skips the test where it is absent."""
    root = os.environ.get("ONNX_MDP_ZOO") or Path(__file__).resolve().parents[2] / "shared" / "zoo"
    path = Path(root) / name
    if not path.is_file():
        pytest.skip(f"no zoo file {path}; set ONNX_MDP_ZOO to the folder of the development zoo")
    return path


def analyse(
    model: ModelLike, shapes: Mapping[str, Sequence[int]] | None = None
) -> tuple[ir.Model, Structure]:
    """Load a model and analyse it at ``shapes``, with a batch of 1."""
    loaded = load_model(model)
    return loaded, analyze_shadow(prepare(loaded, bind_shapes(loaded, shapes or {})))


@functools.cache
def zoo_structure(name: str) -> tuple[ir.Model, Structure]:
    """A zoo file and its structure, analysed once a session."""
    return analyse(zoo_path(name), CNNS.get(name, {}))


def random_plan(
    structure: Structure,
    rng: np.random.Generator,
    *,
    blocks: bool = True,
    least: float = 0.0,
    fewest: int = 1,
    multiple: int = 1,
) -> PruningPlan:
    """Keep a random number of random units of every dimension, and remove blocks with probability 0.4.

    At least the share ``least`` and the number ``fewest`` of a dimension's units stay, a ``multiple`` where
    there are so many. In each head other units stay, but as many.
    """
    keep: dict[str, tuple[int, ...]] = {}
    for index in structure.prunable:
        dimension = structure.dimensions[index]
        size = dimension.count
        count = int(rng.integers(min(size, max(fewest, round(least * size))), size + 1))
        count = min(size, -(-count // multiple) * multiple)
        if count < size:
            drawn = [rng.choice(size, count, replace=False) + row * size for row in range(dimension.rows)]
            keep[dimension.name] = tuple(sorted(np.concatenate(drawn).tolist()))
    removed = tuple(b.name for b in structure.blocks if blocks and rng.random() < 0.4)
    return PruningPlan(keep=keep, removed_blocks=removed)


def prune_checked(model: ir.Model, structure: Structure, plan: PruningPlan) -> tuple[ir.Model, Evidence]:
    """Rewrite and assert the law."""
    pruned = rewrite(structure, plan)
    evidence = verify(model, structure, pruned, plan)
    assert evidence.verified, evidence
    return pruned, evidence


def run(model: ir.Model | onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    """All outputs of one inference, without graph optimisation."""
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model_bytes(model)
    return open_session(data, Runtime(), optimize=False).run(None, dict(feeds))


def informative(model: ir.Model, structure: Structure) -> bool:
    """Whether some output changes by more than 1e-3 of its scale between two random inputs.

    A pruned model whose outputs are constant agrees with anything that has the same constant.
    """
    session = open_session(model_bytes(model), Runtime(), optimize=False)
    first, second = (
        session.run(None, random_feeds(session, structure.shadow.inputs, seed)) for seed in (0, 1)
    )
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True)]
    floats = [(a, b) for a, b in pairs if a.dtype.kind == "f" and a.shape == b.shape and a.size]
    return any(float(np.abs(a - b).max()) > 1e-3 * float(np.abs(a).max()) for a, b in floats)


def operands(model: ir.Model) -> list[tuple[str, int, bytes]]:
    """(operator, slot, bytes) of each initializer that a node reads, in graph order; names play no part."""
    found: list[tuple[str, int, bytes]] = []
    for node in model.graph:
        for slot, value in enumerate(node.inputs):
            if value is not None and value.const_value is not None:
                array = value.const_value.numpy()
                found.append((f"{node.op_type} {array.dtype}{array.shape}", slot, array.tobytes()))
    return found


def cut_wrongly(
    monkeypatch: pytest.MonkeyPatch, structure: Structure, plan: PruningPlan, site: tuple[int, int, int]
) -> ir.Model:
    """Rewrite with as many indices as planned, but the wrong ones, along one (operation, slot, axis)."""
    operation, slot, axis = site
    tensor = structure.shadow.operations[operation].inputs[slot]
    true_slice = rewriting._sliced

    def wrong_slice(edit: Any, name: str, masks: Mapping[int, Any]) -> ir.Value:
        rolled = {a: np.roll(m, 1) if name == tensor and a == axis else m for a, m in masks.items()}
        return true_slice(edit, name, rolled)

    with monkeypatch.context() as patched:
        patched.setattr(rewriting, "_sliced", wrong_slice)
        return rewrite(structure, plan)


def text_model(
    text: str, opset: int = 17, seed: int = 0, domains: Mapping[str, int] | None = None
) -> onnx.ModelProto:
    """Parse ONNX text, ``(inputs) => (outputs) <weights> { nodes }``, and draw the weights without a value.

    Weights are He-normal, vectors N(0, 1) and those whose name begins with ``var`` in [0.5, 1.5].
    """
    imports = ", ".join(f'"{d}" : {v}' for d, v in {"": opset, **(domains or {})}.items())
    model = onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{imports}]>\nmodel {text}")
    rng = np.random.default_rng(seed)
    made = {output for node in model.graph.node for output in node.output}
    for info in [v for v in model.graph.value_info if v.name not in made]:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        draw = rng.standard_normal(shape) * np.sqrt(2 / max(1, np.prod(shape[1:])))
        array = rng.uniform(0.5, 1.5, shape) if info.name.startswith("var") else draw
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, np.float32), info.name))
        model.graph.value_info.remove(info)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type.lower()}_{index}"
    onnx.checker.check_model(model, full_check=True)
    return model
