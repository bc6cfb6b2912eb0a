"""The commands of `export`: thin declarations, as those of `cli`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnx_mdp.cli.parameters import (
    Batch,
    Data,
    Model,
    Overwrite,
    Preprocess,
    Samples,
    Shapes,
    Store,
    TargetMs,
    TargetRatio,
    given,
    runtime_options,
    serving_options,
)

if TYPE_CHECKING:
    from onnx_mdp.cli.options import Options

__all__ = ["export"]

export = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Hand a model to a server, a tracker or another tool."
)


@export.command("triton")
@given(options=serving_options)
def triton(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="REPOSITORY", help="Model repository.")],
    options: "Options",
    name: Annotated[str | None, typer.Option(help="Name of the served model; default: the file's.")] = None,
    max_batch: Annotated[
        int, typer.Option(min=0, help="Most samples that the server joins; 0: requests stay as they are.")
    ] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a model into a model repository of Triton Inference Server, with config.pbtxt and warm-up."""
    from onnx_mdp.cli.export_commands import run_export_triton

    raise typer.Exit(run_export_triton(model, output, options, name, max_batch, overwrite=overwrite))


@export.command("polygraphy")
@given(options=serving_options)
def polygraphy(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder of both files.")],
    options: "Options",
    data: Data = None,
    preprocess: Preprocess = None,
    samples: Samples = 4,
    overwrite: Overwrite = False,
) -> None:
    """Write inputs and what ONNX Runtime makes of them, for `polygraphy run` to check the model anywhere."""
    from onnx_mdp.cli.export_commands import InputOptions, run_export_polygraphy

    wanted = InputOptions(data, preprocess, samples)
    raise typer.Exit(run_export_polygraphy(model, output, options, wanted, overwrite=overwrite))


@export.command("mlflow")
@given(options=serving_options)
def mlflow(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the model.")],
    options: "Options",
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="Keep with it how the plan was found.")
    ] = None,
    result: Annotated[
        Path | None, typer.Option(metavar="RESULT.json", help="And what `prune --json` printed.")
    ] = None,
    data: Data = None,
    preprocess: Preprocess = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a folder in MLflow's format, with signature, input example and where the model comes from."""
    from onnx_mdp.cli.export_commands import HistoryFiles, InputOptions, run_export_mlflow

    inputs, history = InputOptions(data, preprocess, 1), HistoryFiles(plan, result)
    raise typer.Exit(run_export_mlflow(model, output, options, inputs, history, overwrite=overwrite))


@export.command("olive")
@given(options=runtime_options)
def olive(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the files go.")],
    options: "Options",
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL.onnx", help="Write a workflow for this model too.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Package config to add to; default: Olive's own.")
    ] = None,
    target_ms: TargetMs = None,
    target_ratio: TargetRatio = None,
    data: Data = None,
    preprocess: Preprocess = None,
    samples: Samples = 64,
    input_shape: Shapes = None,
    batch: Batch = 1,
    store: Store = None,
    transformer: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Fuse as a transformer of this type: vit, bert …")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write what Microsoft's Olive needs to prune, then fuse, quantize and measure in one workflow."""
    from onnx_mdp.cli.olive_commands import OliveOptions, run_export_olive

    wanted = OliveOptions(
        output=output,
        base=config,
        target_ms=target_ms,
        target_ratio=target_ratio,
        data=data,
        preprocess=preprocess,
        samples=samples,
        transformer=transformer,
        overwrite=overwrite,
    )
    shapes = tuple(input_shape or ())
    options = replace(options, input_shapes=shapes, batch=batch, store=store)
    raise typer.Exit(run_export_olive(model, options, wanted))
