"""The parameters of fine-tuning, shared by `finetune` and `prune --finetune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnx_mdp.cli.parameters import Labels

if TYPE_CHECKING:
    from onnx_mdp.cli.finetune_commands import FinetuneOptions
    from onnx_mdp.cli.mask_commands import MaskOptions

__all__ = ["masking_options", "training_options"]

_Float = float | None
Validation = Annotated[
    str | None, typer.Option("--val", metavar="DATA", help="Validation data; default: a share of the data.")
]
ValidationShare = Annotated[float, typer.Option("--val-share", help="Share of the data to validate on.")]
Augment = Annotated[str, typer.Option(help="none, flip, or crop (and flip).")]
RecipeName = Annotated[str, typer.Option("--recipe", help="default, resnet50, deit, ssd512 or streampetr.")]
Epochs = Annotated[_Float, typer.Option(help="Passes over the data.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the optimizer, instead of epochs.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Samples of a step, over all processes.")]
Rate = Annotated[_Float, typer.Option("--lr", help="Peak learning rate.")]
Optimizer = Annotated[str | None, typer.Option(help="adamw or sgd.")]
Momentum = Annotated[_Float, typer.Option(help="Of SGD, or the first beta of AdamW.")]
WeightDecay = Annotated[_Float, typer.Option(help="Of kernels and matrices; vectors never decay.")]
Decay = Annotated[str | None, typer.Option(help="Of the rate: cosine, linear, step or constant.")]
Warmup = Annotated[_Float, typer.Option(help="Share of the steps in which the rate rises.")]
Average = Annotated[
    _Float, typer.Option("--ema", help="Decay of the moving average of the weights; 0: none.")
]
Clip = Annotated[_Float, typer.Option(help="Largest norm of the gradient; 0: any.")]
Smoothing = Annotated[_Float, typer.Option("--label-smoothing", help="Share of a label spread over all.")]
Precision = Annotated[str | None, typer.Option(help="float32 or bfloat16 (autocast).")]
Alpha = Annotated[_Float, typer.Option(help="Weight of the original model against labels, 0 to 1.")]
Temperature = Annotated[_Float, typer.Option(help="Softens the class scores that are distilled.")]
Features = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Match these inner tensors of the original too; repeatable."),
]
FeatureWeight = Annotated[_Float, typer.Option("--feature-weight", help="Weight of --features.")]
Distill = Annotated[str, typer.Option(help="auto (KL for outputs [n, k], MSE for others), or mse for all.")]
FreezeNorm = Annotated[bool, typer.Option("--freeze-bn", help="Keep the statistics of batch norms.")]
InsertNorm = Annotated[
    bool, typer.Option("--insert-bn", help="Train with a batch norm behind each convolution, and fold it.")
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Let torch.compile make the steps: minutes once, then faster.")
]
Patience = Annotated[int | None, typer.Option(help="Validations without a better one before it ends.")]
Weights = Annotated[
    str | None, typer.Option(help="Which are written: best (in validation; the default) or last.")
]
CheckpointFolder = Annotated[
    Path | None, typer.Option("--checkpoint", metavar="DIR", help="Where the run is kept, to go on from.")
]
Every = Annotated[int | None, typer.Option("--checkpoint-every", min=1, help="Steps between checkpoints.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def training_options(
    val: Validation = None,
    val_share: ValidationShare = 0.1,
    labels: Labels = None,
    augment: Augment = "none",
    recipe: RecipeName = "default",
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    optimizer: Optimizer = None,
    momentum: Momentum = None,
    weight_decay: WeightDecay = None,
    decay: Decay = None,
    warmup: Warmup = None,
    ema: Average = None,
    clip: Clip = None,
    label_smoothing: Smoothing = None,
    precision: Precision = None,
    alpha: Alpha = None,
    temperature: Temperature = None,
    features: Features = None,
    feature_weight: FeatureWeight = None,
    distill: Distill = "auto",
    freeze_bn: FreezeNorm = False,
    insert_bn: InsertNorm = False,
    compiled: Compiled = False,
    patience: Patience = None,
    weights: Weights = None,
    checkpoint: CheckpointFolder = None,
    checkpoint_every: Every = None,
    device: Device = "auto",
) -> "FinetuneOptions":
    """How weights are trained; the data is the command's own."""
    from onnx_mdp.cli.finetune_commands import FinetuneOptions

    overrides = {
        "epochs": epochs,
        "steps": steps,
        "batch": batch_size,
        "lr": lr,
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "decay": decay,
        "warmup": warmup,
        "ema": ema,
        "clip": clip,
        "label_smoothing": label_smoothing,
        "precision": precision,
        "alpha": alpha,
        "temperature": temperature,
        "features": feature_weight,
        "patience": patience,
        "weights": weights,
    }
    return FinetuneOptions(
        validation=val,
        validation_share=val_share,
        labels=labels,
        augment=augment,
        recipe=recipe,
        overrides=overrides,
        features=tuple(features or ()),
        distill=distill,
        freeze_bn=freeze_bn,
        insert_bn=insert_bn,
        compiled=compiled,
        checkpoint=checkpoint,
        every=checkpoint_every,
        device=device,
    )


def masking_options(
    mode: Annotated[
        str,
        typer.Option(
            help="one-shot: prune, then train; soft or iterative: prune while training, with masks that are "
            "decided again; units may come back in soft."
        ),
    ] = "one-shot",
    redecide: Annotated[int | None, typer.Option(min=1, help="Steps between decisions.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="TIGHTEN,SETTLE",
            help="Shares of the steps until the budget is the target's, and until the structure is final.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
) -> "MaskOptions":
    """How pruning and training meet."""
    from onnx_mdp.cli.mask_commands import MaskOptions

    return MaskOptions(mode, redecide, schedule, resume)
