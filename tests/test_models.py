"""Laws of the drawn data set, of the embedded demo model, and of the reference exports.

Data: the same seed gives the same bytes, a smaller count a prefix, and the classes are balanced.
Demo: the file is what its card says. Exports: what ONNX Runtime computes is what torch computes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import onnx_mdp
from onnx_mdp.shapes_data import CLASSES, shapes

DEMO = Path(onnx_mdp.__file__).parent / "demo_model"
SMALL = (
    "resnet18_small",
    "resnet50_small",
    "resnet101_small",
    "mobilenet_v1_small",
    "mobilenet_v2_small",
    "efficientnet_b0_small",
    "regnet_y_small",
    "densenet121_small",
    "shufflenet_v2_small",
    "deeplab_small",
    "cifar_resnet8_small",
    "cifar_resnet8_pad_small",
    "deit_micro",
    "deit_distilled_micro",
    "convnext_micro",
    "swin_micro",
    "pvt_micro",
    "detr_micro",
    "streampetr_micro",
    "ssd512_small",
    "yolov8n_small",
    "retinanet_small",
    "unet_small",
    "vit_micro",
)
# Of thousands of outputs, some lie at the edge of a map, or are a fine box beside coarse ones.
DENSE = {"yolov8n_small", "retinanet_small", "unet_small"}
# The exporter on torch.export takes seconds a model, and so do the deepest models.
DEEP = {"resnet101_small", "resnet50_small", "efficientnet_b0_small"}
FAST = {("torchscript", name) for name in SMALL if name not in DEEP} | {
    ("dynamo", "cifar_resnet8_pad_small"),
    ("dynamo", "deit_micro"),
}
EXPORTS = [
    pytest.param(exporter, name, marks=() if (exporter, name) in FAST else pytest.mark.slow)
    for exporter in ("torchscript", "dynamo")
    for name in SMALL
]


def run(path: Path, image: Any) -> Any:
    """Return the only output of an ONNX file."""
    return run_all(path, [image])[0]


def run_all(path: Path, inputs: Any) -> Any:
    """Return every output of an ONNX file."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {n: np.asarray(x) for n, x in zip(names, inputs, strict=True)})


def outputs_of(module: Any, inputs: Any) -> Any:
    """Return what a torch module makes of the inputs, as a sequence."""
    import torch

    with torch.no_grad():
        made = module(*inputs)
    return [made] if isinstance(made, torch.Tensor) else made


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference as a share of the largest expected magnitude."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_same_seed_same_bytes_and_another_seed_other_bytes() -> None:
    first, again, other = (shapes(25, seed)[0].tobytes() for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("count", [0, 1, 10, 33])
def test_a_smaller_count_is_a_prefix(count: int) -> None:
    images, labels = shapes(count, 5)
    more_images, more_labels = shapes(40, 5)
    assert np.array_equal(images, more_images[:count])
    assert np.array_equal(labels, more_labels[:count])


def test_every_ten_images_hold_every_class_once() -> None:
    _, labels = shapes(200, 6)
    assert (np.sort(labels.reshape(-1, 10), axis=1) == np.arange(len(CLASSES))).all()


def test_images_are_standardised_eight_bit_colours() -> None:
    images, labels = shapes(100, 7)
    assert images.shape == (100, 3, 64, 64)
    assert (images.dtype.name, labels.dtype.name) == ("float32", "int64")
    levels = (images * 0.25 + 0.5) * 255
    assert np.abs(levels - np.rint(levels)).max() < 1e-3
    assert levels.min() >= -1e-3
    assert levels.max() <= 255 + 1e-3
    assert abs(images.mean()) < 0.2
    assert 0.8 < images.std() < 1.2


def test_labels_do_not_follow_from_colour() -> None:
    images, labels = shapes(600, 8)
    means = images.mean(axis=(2, 3))
    by_class = np.stack([means[labels == label].mean(axis=0) for label in range(len(CLASSES))])
    # Sixty images a class: class means of independent colours lie within four standard errors.
    assert np.abs(by_class - means.mean(axis=0)).max() < 4 * means.std(axis=0).max() / np.sqrt(60)


def test_demo_model_is_as_accurate_as_its_card_says() -> None:
    card = (DEMO / "MODEL_CARD.md").read_text(encoding="utf-8")
    stated = re.search(r"Accuracy: ([\d.]+) %", card)
    assert stated
    images, labels = shapes(300, 424_242)
    accuracy = 100 * (run(DEMO / "shapes_resnet.onnx", images).argmax(axis=1) == labels).mean()
    assert accuracy == pytest.approx(float(stated[1]), abs=3)


def test_demo_model_has_the_stated_interface_and_folded_batchnorm() -> None:
    path = DEMO / "shapes_resnet.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    signature = [
        (value.name, value.type.tensor_type.shape.dim[0].dim_param)
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert signature == [("image", "batch"), ("logits", "batch")]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert path.stat().st_size < 2_000_000


def test_small_names_are_the_small_half_of_the_catalog() -> None:
    pytest.importorskip("torch")
    from models.catalog import CATALOG

    small = [name for name in CATALOG if name.endswith(("_small", "_micro"))]
    assert (*SMALL, "deit_small") == tuple(sorted(small, key=lambda name: name == "deit_small"))


@pytest.mark.slow
@pytest.mark.parametrize(("exporter", "name"), EXPORTS)
def test_export_equals_torch_at_another_batch(exporter: Any, name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from models.catalog import CATALOG, build
    from models.export import export

    path = export(name, tmp_path / "model.onnx", exporter, dynamic_batch=True)
    inputs = CATALOG[name].inputs(3, torch.Generator().manual_seed(9))
    for actual, expected in zip(run_all(path, inputs), outputs_of(build(name), inputs), strict=True):
        assert relative_error(actual, expected.numpy()) < 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    weights = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)
    assert 4 * weights < 1_000_000


@pytest.mark.parametrize("name", SMALL)
def test_random_networks_stay_of_order_one_and_depend_on_their_input(name: str) -> None:
    torch = pytest.importorskip("torch")
    from models.catalog import CATALOG, build

    inputs = CATALOG[name].inputs(8, torch.Generator().manual_seed(9))
    for output in outputs_of(build(name), inputs):
        assert 0.1 < output.abs().max() < 100
        least = 0.001 if name in DENSE else 0.01
        assert (output.std(dim=0) > least * output.abs().max()).all()


def test_build_follows_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch = pytest.importorskip("torch")
    from models.catalog import build

    before = torch.random.get_rng_state()
    first, again, other = (build("cifar_resnet8_small", seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_unknown_name_lists_the_catalog() -> None:
    pytest.importorskip("torch")
    from models.catalog import build

    with pytest.raises(KeyError, match="resnet50"):
        build("resnet51")


@pytest.mark.parametrize("exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_batchnorm_is_kept_on_request(exporter: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from models.catalog import build
    from models.export import export

    path = export("cifar_resnet8_small", tmp_path / "model.onnx", exporter, fold_batchnorm=False)
    kept = [node.op_type for node in onnx.load(path).graph.node].count("BatchNormalization")
    layers = build("cifar_resnet8_small").modules()
    assert kept == sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in layers)
