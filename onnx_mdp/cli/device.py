"""The commands that are about devices and not about one model: thin declarations, as those of `cli`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnx_mdp.cli.parameters import (
    Choices,
    Overwrite,
    given,
    measuring_options,
    runtime_options,
    store_options,
)

if TYPE_CHECKING:
    from onnx_mdp.cli.options import Options

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
    from onnx_mdp.cli.device_commands import run_bench

    raise typer.Exit(run_bench(jobs, output, options))


@device.command()
@given(options=store_options)
def doctor(options: "Options") -> None:
    """Show what runs on this machine, how steadily it measures, and what is missing."""
    from onnx_mdp.cli.doctor_commands import run_doctor

    raise typer.Exit(run_doctor(options))


@device.command()
@given(options=measuring_options)
def fleet(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL.onnx...", help="The ONNX files.")],
    options: "Options",
    devices: Annotated[
        list[str], typer.Option("--device", metavar="NAME", help="A custom resource of nodes; repeatable.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="For the tables.")],
    address: Annotated[str, typer.Option(help="Of the Ray cluster.")] = "auto",
    choices: Choices = 16,
    patience: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for a device that was lost.")
    ] = 600.0,
    overwrite: Overwrite = False,
) -> None:
    """Measure the tables of models on the devices of a Ray cluster, into one store."""
    from onnx_mdp.cli.fleet_commands import FleetOptions, run_fleet

    wanted = FleetOptions(
        devices=tuple(devices),
        output=output,
        address=address,
        choices=choices,
        patience_s=patience,
        overwrite=overwrite,
    )
    raise typer.Exit(run_fleet(models, options, wanted))
