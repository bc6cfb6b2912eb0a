"""The commands that are about devices and not about one model: thin declarations, as those of `cli`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnx_mdp.cli_parameters import given, runtime_options, store_options

if TYPE_CHECKING:
    from onnx_mdp.command_options import Options

__all__ = ["device"]

device = typer.Typer(rich_markup_mode=None)


@device.command()
@given(options=runtime_options)
def bench(
    options: "Options",
    jobs: Annotated[Path, typer.Option(metavar="JOBS.jsonl", help="What `prune --handover` wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="RESULTS.jsonl", help="Where results are added.")
    ],
) -> None:
    """Time a list of models on this device, each beside its original; stopped, the same command goes on."""
    from onnx_mdp.device_commands import run_bench

    raise typer.Exit(run_bench(jobs, output, options))


@device.command()
@given(options=store_options)
def doctor(options: "Options") -> None:
    """Show what runs on this machine, how steadily it measures, and what is missing."""
    from onnx_mdp.doctor_commands import run_doctor

    raise typer.Exit(run_doctor(options))
