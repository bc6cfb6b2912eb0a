"""The commands of `export`: thin declarations, as those of `cli`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnx_mdp.cli.parameters import Data, Model, Overwrite, Preprocess, Samples, given, serving_options

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
