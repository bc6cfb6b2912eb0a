"""The commands of `lut`: thin declarations, as those of `cli`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnx_mdp.cli.parameters import Overwrite, given, store_options

if TYPE_CHECKING:
    from onnx_mdp.cli.options import Options

__all__ = ["lut"]

lut = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at and move the measured latencies."
)

Only = Annotated[
    str, typer.Option(metavar="PATTERN", help="Only tables whose device, provider or model holds this.")
]


@lut.command("ls")
@given(options=store_options)
def ls(options: "Options", only: Only = "") -> None:
    """List the stored tables, and where and when they were measured."""
    from onnx_mdp.cli.lut_commands import run_lut_list

    raise typer.Exit(run_lut_list(options, only))


@lut.command("export")
@given(options=store_options)
def export(
    output: Annotated[Path, typer.Argument(metavar="FILE.jsonl")],
    options: "Options",
    only: Only = "",
    overwrite: Overwrite = False,
) -> None:
    """Write measurements as JSON lines."""
    from onnx_mdp.cli.lut_commands import run_lut_export

    raise typer.Exit(run_lut_export(output, options, only, overwrite=overwrite))


@lut.command("merge")
@given(options=store_options)
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="FILE.jsonl...")], options: "Options"
) -> None:
    """Read measurements that other machines exported; merging again changes nothing."""
    from onnx_mdp.cli.lut_commands import run_lut_merge

    raise typer.Exit(run_lut_merge(sources, options))


@lut.command("gc")
@given(options=store_options)
def gc(
    options: "Options",
    only: Only = "",
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Only tables with nothing newer.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
) -> None:
    """Remove stored tables and give their space back."""
    from onnx_mdp.cli.lut_commands import run_lut_clear

    raise typer.Exit(run_lut_clear(options, only, older_than, dry_run=dry_run))
