"""Laws on models of the ``transformers`` package, of random weights, as users export them.

Each is built from a tiny configuration, nothing is downloaded. The exporter on torch.export takes seconds a
model, so all but the static TorchScript files are slow tests.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo import analyse, informative, prune_checked, random_plan

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.plan import PruningPlan

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models.export import export_module  # noqa: E402 - needs torch

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
DINO = {**{k: v for k, v in VIT.items() if k != "intermediate_size"}, "mlp_ratio": 2, "layerscale_value": 0.5}
STAGES = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
}
REDUCED = {**STAGES, "sr_ratios": [2, 1], "num_attention_heads": [2, 4]}
WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
}
DETR = {
    "use_timm_backbone": False,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 6,
}
BACKBONE = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "out_features": ["stage2"],
}


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model class with its configuration, how many dimensions of each kind it has, and its blocks."""

    kind: str
    config: Mapping[str, Any]
    dimensions: str
    blocks: str
    image: int = 32
    output: str = "logits"

    def build(self, eager: bool) -> Any:
        name = re.sub(r"(For[A-Z]|Model)\w*$", "", self.kind)
        given = dict(self.config) | ({"attn_implementation": "eager"} if eager else {})
        if name == "Detr":
            given["backbone_config"] = transformers.ResNetConfig(**BACKBONE)
        config = getattr(transformers, f"{name}Config")(**given, num_labels=5)
        return getattr(transformers, self.kind)(config)


ENCODER = "embedding 1, heads 2, qk 2, value 2, mlp 2"
PYRAMID = "embedding 2, heads 2, qk 2, value 2, mlp 2, channel 1"
MODELS = {
    "ViT": Tiny("ViTForImageClassification", VIT, ENCODER, "attention mlp " * 2),
    "DeiT": Tiny("DeiTForImageClassificationWithTeacher", VIT, ENCODER, "attention mlp " * 2),
    "BEiT": Tiny(
        "BeitForImageClassification",
        {**VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.5},
        ENCODER,
        "attention mlp " * 2,
    ),
    "DINOv2": Tiny("Dinov2ForImageClassification", DINO, ENCODER, "attention mlp " * 2),
    "DINOv2 with SwiGLU": Tiny(
        "Dinov2ForImageClassification", {**DINO, "use_swiglu_ffn": True}, ENCODER, "attention mlp " * 2
    ),
    "CLIP": Tiny(
        "CLIPVisionModelWithProjection",
        {**VIT, "projection_dim": 5},
        ENCODER,
        "attention mlp " * 2,
        output="image_embeds",
    ),
    "SigLIP": Tiny(
        "SiglipVisionModel",
        VIT,
        # The pooling head has one projection for key and value, and a learned query.
        "embedding 1, heads 3, qk 3, value 3, mlp 3, channel 1",
        "attention mlp attention mlp mlp",
        output="pooler_output",
    ),
    "SegFormer": Tiny("SegformerForImageClassification", REDUCED, PYRAMID, "attention conv " * 2),
    "SegFormer, segmenting": Tiny(
        "SegformerForSemanticSegmentation",
        {**REDUCED, "decoder_hidden_size": 16},
        "embedding 2, heads 2, qk 2, value 2, mlp 2, channel 4",
        "attention conv " * 2,
    ),
    "PVT v2": Tiny("PvtV2ForImageClassification", REDUCED, PYRAMID, "attention conv " * 2),
    "Swin": Tiny(
        "SwinForImageClassification",
        WINDOWS,
        "embedding 2, heads 4, qk 4, value 4, mlp 4",
        "attention mlp " * 4,
    ),
    "Swin V2": Tiny(
        "Swinv2ForImageClassification",
        WINDOWS,
        # TorchScript leaves the coordinates that the bias network reads to be cut.
        "embedding 2, heads 4, qk 4, value 4, mlp 12",
        "attention mlp " * 4,
    ),
    "ConvNeXt": Tiny(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "layer_scale_init_value": 0.5},
        "embedding 2, mlp 3",
        "conv " * 3,
    ),
    "ConvNeXt V2": Tiny(
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
        "embedding 2, mlp 3",
        "conv " * 3,
    ),
    "PoolFormer": Tiny(
        "PoolFormerForImageClassification",
        {
            **{k: v for k, v in STAGES.items() if k != "mlp_ratios"},
            "padding": [2, 1],
            "mlp_ratio": 2.0,
            "layer_scale_init_value": 0.5,
        },
        "channel 4",
        "conv " * 2,
    ),
    "MobileViT": Tiny(
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "num_attention_heads": 4,
        },
        "embedding 3, heads 9, qk 9, value 9, mlp 9, channel 22",
        "conv " * 3 + "attention mlp " * 9,
        image=64,
    ),
    "DETR": Tiny(
        "DetrForObjectDetection",
        DETR,
        "embedding 2, heads 5, qk 5, value 5, mlp 3, channel 4",
        "conv attention mlp attention mlp attention attention mlp",
    ),
}
# Where exporters differ, by static or dynamic batch: the rotation of windows becomes a table of indices that
# changes with the batch, constants are folded, or each reader of learned queries may keep other columns.
DEVIATIONS = {
    ("Swin", "dynamo", True): "embedding 1, heads 4, qk 4, value 4, mlp 4",
    ("Swin V2", "dynamo", True): "embedding 1, heads 4, qk 4, value 4, mlp 8",
    ("Swin V2", "dynamo", False): "embedding 2, heads 4, qk 4, value 4, mlp 8",
    ("DETR", "torchscript", False): "embedding 2, heads 5, qk 5, value 5, mlp 3, channel 7",
    ("DETR", "dynamo", False): "embedding 2, heads 4, qk 4, value 4, mlp 3, channel 5",
}
FROZEN = r"graph output logits|Gather 'node_as_strided' selects .* at run time|.* along another axis"


class OneOutput(torch.nn.Module):  # type: ignore[misc]
    """The tensor of a model's output that ``export_module`` compares."""

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, image: Any) -> Any:
        return getattr(self.model(pixel_values=image), self.output)


@functools.cache
def built(name: str, eager: bool) -> Any:
    """Weights large enough for the outputs to depend on the input, and statistics of these weights."""
    torch.manual_seed(0)
    tiny = MODELS[name]
    model = tiny.build(eager).eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=(2 / max(1, weight[0].numel())) ** 0.5)
            elif "norm" not in key.lower():
                weight.normal_(std=0.1).add_(0.5 if weight.ndim == 0 or "scale" in key else 0)
        for norm in norms:
            norm.train().momentum = None
        if norms:
            model(pixel_values=torch.randn(8, 3, tiny.image, tiny.image))
    return OneOutput(model.eval(), tiny.output)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export one model once."""
    folder = tmp_path_factory.mktemp("hf")

    def exported_file(name: str, exporter: str, opset: int, dynamic: bool) -> Path:
        path: Path = folder / f"{name}_{exporter}_{opset}_{dynamic}.onnx"
        if not path.is_file():
            size = MODELS[name].image
            module = built(name, opset < 14)  # the fused kernel needs opset 14
            export_module(module, (3, size, size), path, exporter, dynamic, opset=opset)  # type: ignore[arg-type]
        return path

    return exported_file


SLOW_STATIC = ("MobileViT", "Swin", "Swin V2")
FORMS = [("torchscript", 17, False), ("torchscript", 17, True), ("torchscript", 13, True)]
FORMS += [("dynamo", 18, True), ("dynamo", 23, False), ("dynamo", 23, True)]
EXPORTS = [
    pytest.param(
        name,
        exporter,
        opset,
        dynamic,
        id=f"{name}-{exporter}-{opset}-{'dynamic' if dynamic else 'static'}",
        marks=[pytest.mark.slow] if dynamic or exporter == "dynamo" or name in SLOW_STATIC else [],
    )
    for name in MODELS
    for exporter, opset, dynamic in FORMS
]


def kinds(structure: Structure) -> str:
    """How many prunable dimensions there are of each kind."""
    order = ("embedding", "heads", "qk", "value", "mlp", "channel")
    found = Counter(structure.dimensions[i].kind for i in structure.prunable)
    assert set(found) <= set(order)
    return ", ".join(f"{kind} {found[kind]}" for kind in order if found[kind])


@pytest.mark.parametrize(("name", "exporter", "opset", "dynamic"), EXPORTS)
def test_everything_is_found_and_the_law_holds(
    name: str, exporter: str, opset: int, dynamic: bool, hf: Callable[..., Path]
) -> None:
    model, structure = analyse(hf(name, exporter, opset, dynamic))
    assert structure.graph.unsupported == {}
    assert kinds(structure) == DEVIATIONS.get((name, exporter, dynamic), MODELS[name].dimensions)
    assert [block.kind for block in structure.blocks] == MODELS[name].blocks.split()
    assert all(re.fullmatch(FROZEN, d.frozen) for d in structure.dimensions if d.frozen)
    informed = 0
    for seed in range(4):
        plan = random_plan(structure, np.random.default_rng(seed), least=0.3, blocks=seed % 2 == 1)
        pruned, evidence = prune_checked(model, structure, plan)
        assert evidence.worst <= 1e-5
        assert evidence.inputs_tried == (5 if dynamic else 4)
        informed += informative(pruned, structure)
    assert informed >= 2
    for block in structure.blocks:
        prune_checked(model, structure, PruningPlan(keep={}, removed_blocks=(block.name,)))
