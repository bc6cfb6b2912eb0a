"""The commands of `config`, which are about recipes: thin declarations, as those of `cli`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnx_mdp.cli.parameters import Overwrite, given, output_options

if TYPE_CHECKING:
    from onnx_mdp.cli.options import Options

__all__ = ["config"]

config = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Write, check and describe recipes (onnx-mdp.yaml)."
)


@config.command("schema")
@given(options=output_options)
def schema(context: typer.Context, options: "Options") -> None:
    """Print the JSON Schema of a recipe."""
    from onnx_mdp.cli.recipe_commands import run_schema

    raise typer.Exit(run_schema(context, options))


@config.command("check")
@given(options=output_options)
def check(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="onnx-mdp.yaml", help="The recipe.")],
    options: "Options",
) -> None:
    """Refuse a recipe with a fault, or print it with all defaults."""
    from onnx_mdp.cli.recipe_commands import run_check

    raise typer.Exit(run_check(context, recipe, options))


@config.command("init")
@given(options=output_options)
def init(
    context: typer.Context,
    options: "Options",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to a file.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Print a recipe to begin with, in which every key is explained."""
    from onnx_mdp.cli.recipe_commands import run_init

    raise typer.Exit(run_init(context, options, output, overwrite=overwrite))
