"""The commands of `export`: thin declarations, as those of `cli`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnx_mdp.cli.parameters import Model, Overwrite, given, serving_options

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
