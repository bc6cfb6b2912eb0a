"""What there is to build: names, builders and input shapes, and random weights that behave like trained ones.

A fresh network is a poor test: its BatchNorms are the identity, so folding them or dropping a bias goes
unnoticed, and its activations grow or die with depth. `build` therefore draws the affine part of every
BatchNorm and measures its statistics on noise, layer by layer, with an error put on them on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.convnext import convnext
from models.convolutions import BareConv
from models.deeplab import deeplab
from models.densenet import densenet121
from models.detr import detr
from models.efficientnet import efficientnet_b0
from models.mobilenet import mobilenet_v1, mobilenet_v2
from models.pvt import pvt
from models.regnet import regnet_y
from models.resnet import cifar_resnet, resnet18, resnet50, resnet101, resnet152, shapes_resnet
from models.retinanet import retinanet
from models.shufflenet import shufflenet_v2
from models.ssd import ssd512
from models.streampetr import streampetr
from models.swin import swin
from models.unet import unet
from models.vit import deit, vit
from models.yolo import yolo

__all__ = ["CATALOG", "Architecture", "build"]

_IMAGENET = (3, 224, 224)
_NARROW = (8, 16, 16, 24)
# As many noise images as make this many pixels: the smaller the maps, the more images a statistic needs.
_CALIBRATION_PIXELS = 2**17
_FEWEST_VALUES = 8  # of a channel, for its variance to mean anything


@dataclass(frozen=True, slots=True)
class Architecture:
    """A builder without arguments and the shape [channels, height, width] of the input ``image``.

    ``others`` are further inputs, by name, and ``outputs`` the names of what the module returns. No shape
    counts the batch.
    """

    builder: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    outputs: tuple[str, ...] = ("logits",)
    others: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def inputs(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Noise for every input, the image first, ``float32[batch, *shape]``."""
        shapes = (self.input_shape, *(shape for _, shape in self.others))
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)


def _streampetr_inputs(cameras: int, memory: int, width: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Camera matrices, the motion since the last frame, and the queue."""
    queue = (("memory", (memory, width)), ("points", (memory, 3)), ("speed", (memory, 2)))
    return (("camera", (cameras, 4, 4)), ("motion", (3, 4)), *queue)


_STREAMPETR_OUTPUTS = ("classes", "boxes", "memory_out", "points_out", "speed_out")

# A small variant has every node of the full one, few channels and less than 1 MB of weights; transformers,
# whose papers call a size "small" already, have micro variants of two layers.
CATALOG: dict[str, Architecture] = {
    "resnet18": Architecture(resnet18, _IMAGENET),
    "resnet50": Architecture(resnet50, _IMAGENET),
    "resnet101": Architecture(resnet101, _IMAGENET),
    "resnet152": Architecture(resnet152, _IMAGENET),
    "mobilenet_v1": Architecture(mobilenet_v1, _IMAGENET),
    "mobilenet_v2": Architecture(mobilenet_v2, _IMAGENET),
    "efficientnet_b0": Architecture(efficientnet_b0, _IMAGENET),
    "regnet_y": Architecture(regnet_y, _IMAGENET),
    "densenet121": Architecture(densenet121, _IMAGENET),
    "shufflenet_v2": Architecture(shufflenet_v2, _IMAGENET),
    "deeplab": Architecture(deeplab, (3, 512, 512)),
    "cifar_resnet20": Architecture(partial(cifar_resnet, 20), (3, 32, 32)),
    "cifar_resnet56": Architecture(partial(cifar_resnet, 56), (3, 32, 32)),
    "shapes_resnet": Architecture(shapes_resnet, (3, 64, 64)),
    "deit_tiny": Architecture(partial(deit, 192, 3), _IMAGENET),
    "deit_small": Architecture(partial(deit, 384, 6), _IMAGENET),
    "deit_base": Architecture(partial(deit, 768, 12), _IMAGENET),
    "vit_base": Architecture(partial(vit, 768, 12), _IMAGENET),
    "vit_large": Architecture(partial(deit, 1024, 16, layers=24), _IMAGENET),
    "convnext_tiny": Architecture(convnext, _IMAGENET),
    "swin_tiny": Architecture(swin, _IMAGENET),
    "pvt_v2_b0": Architecture(pvt, _IMAGENET),
    "detr": Architecture(detr, (3, 256, 256)),
    "streampetr": Architecture(
        streampetr, (6, 3, 256, 704), _STREAMPETR_OUTPUTS, _streampetr_inputs(6, 512, 256)
    ),
    "ssd512": Architecture(ssd512, (3, 512, 512)),
    "yolov8n": Architecture(yolo, (3, 640, 640)),
    "retinanet": Architecture(retinanet, (3, 512, 512)),
    "unet": Architecture(unet, (3, 256, 256)),
    "resnet18_small": Architecture(partial(resnet18, _NARROW, 10), (3, 64, 64)),
    "resnet50_small": Architecture(partial(resnet50, _NARROW, 10), (3, 64, 64)),
    "resnet101_small": Architecture(partial(resnet101, (8, 8, 8, 16), 10), (3, 64, 64)),
    "mobilenet_v1_small": Architecture(partial(mobilenet_v1, 0.125, 10), (3, 64, 64)),
    "mobilenet_v2_small": Architecture(partial(mobilenet_v2, 0.25, 160, 10), (3, 64, 64)),
    "efficientnet_b0_small": Architecture(partial(efficientnet_b0, 0.125, 10), (3, 64, 64)),
    "regnet_y_small": Architecture(partial(regnet_y, (8, 16, 16, 24), (1, 1, 2, 2), 4, 8, 10), (3, 64, 64)),
    "densenet121_small": Architecture(partial(densenet121, 8, (2, 2, 3, 2), 10), (3, 64, 64)),
    "shufflenet_v2_small": Architecture(
        partial(shufflenet_v2, (8, 16, 24, 32, 48), (2, 2, 2), 10), (3, 64, 64)
    ),
    "deeplab_small": Architecture(
        partial(deeplab, (4, 8, 8, 8), (1, 2, 2, 1), 16, (2, 3, 4), 5), (3, 64, 64)
    ),
    "cifar_resnet8_small": Architecture(partial(cifar_resnet, 8, "projection"), (3, 32, 32)),
    "cifar_resnet8_pad_small": Architecture(partial(cifar_resnet, 8, "pad"), (3, 32, 32)),
    "deit_micro": Architecture(partial(deit, 24, 3, layers=2, image=32, patch=8, classes=10), (3, 32, 32)),
    "deit_distilled_micro": Architecture(
        partial(deit, 32, 4, layers=2, image=32, patch=8, classes=10, distilled=True), (3, 32, 32)
    ),
    "convnext_micro": Architecture(partial(convnext, (8, 16), (1, 2), 10), (3, 32, 32)),
    "swin_micro": Architecture(
        partial(swin, 16, (2, 2), (2, 4), window=4, image=32, classes=10), (3, 32, 32)
    ),
    "pvt_micro": Architecture(partial(pvt, (16, 24), (1, 2), (2, 3), 10), (3, 32, 32)),
    "detr_micro": Architecture(
        partial(detr, 8, 32, 4, 48, layers=2, queries=6, classes=5, image=32), (3, 32, 32)
    ),
    "streampetr_micro": Architecture(
        partial(
            streampetr,
            (8, 8, 8, 16),
            32,
            4,
            48,
            layers=2,
            queries=6,
            memory=12,
            propagated=4,
            best=4,
            classes=5,
            depths=4,
            image=(32, 64),
        ),
        (2, 3, 32, 64),
        _STREAMPETR_OUTPUTS,
        _streampetr_inputs(2, 12, 32),
    ),
    "ssd512_small": Architecture(
        partial(ssd512, (8, 8, 16, 16, 16), 32, ((8, 16), (8, 16), (8, 16)), 5, (4, 6, 6, 4, 4)),
        (3, 128, 128),
    ),
    "yolov8n_small": Architecture(
        partial(yolo, (8, 8, 16, 16, 32), classes=5, bins=4, image=64), (3, 64, 64)
    ),
    "retinanet_small": Architecture(
        partial(retinanet, (4, 4, 8, 8), 16, depth=2, classes=5, anchors=3), (3, 64, 64)
    ),
    "unet_small": Architecture(partial(unet, (8, 16, 32), 4, 5), (3, 32, 32)),
    "vit_micro": Architecture(partial(vit, 32, 4, layers=2, image=32, patch=8, classes=10), (3, 32, 32)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a network in evaluation mode whose weights and BatchNorm statistics follow from ``seed``.

    Every activation has a magnitude of order one and every output depends on the input.
    A ``KeyError`` lists the names where ``name`` is none of them.
    """
    if name not in CATALOG:
        raise KeyError(f"There is no model {name!r} in the catalog: take one of {', '.join(CATALOG)}.")
    architecture = CATALOG[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = architecture.builder().eval()
        for layer in module.modules():
            _randomise(layer)
        _shrink_branches(module)
        count = max(1, _CALIBRATION_PIXELS // math.prod(architecture.input_shape[-2:]))
        _calibrate(module, architecture.inputs(count))
    return module


def _randomise(layer: nn.Module) -> None:
    """Draw He-normal weights, small biases, and scales of normalisations in [0.5, 1.5]."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            layer.bias.normal_(0, 0.2)
    elif isinstance(layer, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm) and layer.weight is not None:
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_(0, 0.2)


def _shrink_branches(module: nn.Module) -> None:
    """Make every branch small beside its stream, or a deep network amplifies the rounding of each layer."""
    for block in module.modules():
        if isinstance(branch := getattr(block, "branch", None), nn.Module):
            *_, last = (layer for layer in branch.modules() if isinstance(layer, nn.BatchNorm2d))
            last.weight.mul_(0.3)


def _calibrate(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Set the statistics of every BatchNorm from what reaches it, the ones before it being set already.

    A bare convolution gets outputs of variance one and a small mean. One that is used several times keeps
    what its first use made of it.
    """
    done: set[nn.Module] = set()

    def measure(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if isinstance(layer, nn.BatchNorm2d):
            variance, mean = _statistics(inputs[0])
            layer.running_mean = mean + 0.2 * variance.sqrt() * torch.randn_like(mean)
            layer.running_var = variance * torch.empty_like(variance).uniform_(0.7, 1.4)

    def standardise(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if not isinstance(layer, BareConv) or layer in done or output[:, 0].numel() < _FEWEST_VALUES:
            return None
        done.add(layer)
        variance, mean = _statistics(output)
        scale, wanted = variance.rsqrt(), 0.2 * torch.randn_like(mean)
        layer.weight.mul_(scale[:, None, None, None])
        if layer.bias is not None:
            layer.bias.sub_(mean).mul_(scale).add_(wanted)
        return layer._conv_forward(inputs[0], layer.weight, layer.bias)

    hooks = [layer.register_forward_pre_hook(measure) for layer in module.modules()]
    hooks += [layer.register_forward_hook(standardise) for layer in module.modules()]
    module(*inputs)
    for hook in hooks:
        hook.remove()


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of each channel; one that is nearly constant over noise must not be blown up."""
    variance, mean = torch.var_mean(x, dim=(0, 2, 3))
    return variance.clamp(min=0.1 * float(variance.mean())), mean
