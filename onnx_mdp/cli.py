"""The command line: thin declarations whose heavy imports happen when a command runs.

Exit codes: 0 done · 1 a gate failed (over target, verification) · 2 usage or unreadable model · 3 missing
backend or extra · 4 infeasible target · 130 interrupted. stdout carries results, stderr progress.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from onnx_mdp._version import __version__
from onnx_mdp.errors import MdpError

if TYPE_CHECKING:
    from onnx_mdp.commands import Options

__all__ = ["app", "main"]

_INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Give it an ONNX file and a latency; get a slimmer ONNX file that runs in that time, with proof.",
)
_lut = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at and move the measured latencies."
)
app.add_typer(_lut, name="lut")

Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The ONNX file.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--input-shape", metavar="NAME:1,3,224,224", help="Size to prune a symbolic input for."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Size of a symbolic first dimension.")]
Provider = Annotated[str, typer.Option("--ep", help="Execution provider: cpu, or a full name.")]
ProviderOption = Annotated[
    list[str] | None, typer.Option("--ep-option", metavar="KEY=VALUE", help="Provider option; repeatable.")
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random choice.")]
Store = Annotated[
    Path | None, typer.Option("--store", metavar="FILE", help="Where measured latencies are kept.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")]
Data = Annotated[
    Path | None, typer.Option(help="Calibration inputs: an .npz of named inputs or a folder of images.")
]
Preprocess = Annotated[str | None, typer.Option(help="How images become inputs, such as imagenet.")]
Choices = Annotated[int, typer.Option("--choices", min=2, max=256, help="Most widths offered a dimension.")]


def _options(
    *,
    as_json: bool,
    quiet: bool,
    shapes: list[str] | None = None,
    batch: int = 1,
    provider: str = "cpu",
    provider_options: list[str] | None = None,
    threads: int = 1,
    seed: int = 0,
    store: Path | None = None,
) -> Options:
    from onnx_mdp.commands import Options
    from onnx_mdp.console import Screen

    return Options(
        screen=Screen(quiet=quiet, as_json=as_json),
        input_shapes=tuple(shapes or ()),
        batch=batch,
        provider=provider,
        provider_options=tuple(provider_options or ()),
        threads=threads,
        seed=seed,
        store=store,
    )


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def analyze(
    model: Model,
    input_shape: Shapes = None,
    batch: Batch = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what can be pruned, what is frozen and why."""
    from onnx_mdp.commands import run_analyze

    options = _options(as_json=as_json, quiet=quiet, shapes=input_shape, batch=batch)
    raise typer.Exit(run_analyze(model, options))


@app.command()
def profile(
    model: Model,
    input_shape: Shapes = None,
    batch: Batch = 1,
    ep: Provider = "cpu",
    ep_option: ProviderOption = None,
    threads: Threads = 1,
    choices: Choices = 16,
    seed: Seed = 0,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure the latency table of a model on this machine; a second run measures nothing."""
    from onnx_mdp.commands import run_profile

    options = _options(
        as_json=as_json,
        quiet=quiet,
        shapes=input_shape,
        batch=batch,
        provider=ep,
        provider_options=ep_option,
        threads=threads,
        seed=seed,
        store=store,
    )
    raise typer.Exit(run_profile(model, options, choices=choices))


@app.command()
def prune(
    model: Model,
    target_ms: Annotated[float | None, typer.Option(help="Latency to reach, in milliseconds.")] = None,
    target_ratio: Annotated[
        float | None, typer.Option(help="Latency to reach, relative to the model's.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: MODEL.pruned.onnx.")] = None,
    criterion: Annotated[
        str | None, typer.Option(help="magnitude, activation or drift; default: drift with --data.")
    ] = None,
    data: Data = None,
    preprocess: Preprocess = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples to use.")] = 64,
    solver: Annotated[str, typer.Option(help="highs, or exhaustive for tiny models.")] = "highs",
    time_limit: Annotated[float, typer.Option(min=0.1, help="Seconds for one solve.")] = 60.0,
    gap: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Relative gap at which a solve may stop.")
    ] = 1e-4,
    choices: Choices = 16,
    input_shape: Shapes = None,
    batch: Batch = 1,
    ep: Provider = "cpu",
    ep_option: ProviderOption = None,
    threads: Threads = 1,
    seed: Seed = 0,
    store: Store = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write files.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model until it meets a latency on this machine, and prove the result."""
    from onnx_mdp.commands import PruneOptions, run_prune

    options = _options(
        as_json=as_json,
        quiet=quiet,
        shapes=input_shape,
        batch=batch,
        provider=ep,
        provider_options=ep_option,
        threads=threads,
        seed=seed,
        store=store,
    )
    wanted = PruneOptions(
        target_ms=target_ms,
        target_ratio=target_ratio,
        output=output,
        criterion=criterion,
        data=data,
        preprocess=preprocess,
        samples=samples,
        solver=solver,
        time_limit=time_limit,
        gap=gap,
        choices=choices,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    raise typer.Exit(run_prune(model, options, wanted))


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="What `prune` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the pruned model.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Replay a plan: the same file, bit for bit, verified again."""
    from onnx_mdp.commands import run_apply

    options = _options(as_json=as_json, quiet=quiet)
    raise typer.Exit(run_apply(model, plan, output, options, overwrite=overwrite))


@app.command()
def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL.onnx", help="The unpruned model.")],
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED.onnx", help="The pruned model.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="What `prune` wrote.")],
    max_ms: Annotated[float | None, typer.Option(help="Fail if the pruned model is slower.")] = None,
    data: Data = None,
    preprocess: Preprocess = None,
    ep: Provider = "cpu",
    ep_option: ProviderOption = None,
    threads: Threads = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check that a pruned file computes what the masked original computes."""
    from onnx_mdp.commands import run_verify

    options = _options(as_json=as_json, quiet=quiet, provider=ep, provider_options=ep_option, threads=threads)
    code = run_verify(original, pruned, plan, options, max_ms=max_ms, data=data, preprocess=preprocess)
    raise typer.Exit(code)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "onnx-mdp-demo"
    ),
    target_ratio: Annotated[float, typer.Option(help="Latency to reach, relative to the model's.")] = 0.7,
    store: Store = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune the small trained model that comes with the package, and show what it cost."""
    from onnx_mdp.demo import run_demo

    options = _options(as_json=as_json, quiet=quiet, store=store)
    raise typer.Exit(run_demo(output, target_ratio, options, overwrite=overwrite))


@_lut.command("ls")
def lut_list(store: Store = None, as_json: AsJson = False) -> None:
    """List the stored tables."""
    from onnx_mdp.commands import run_lut_list

    raise typer.Exit(run_lut_list(_options(as_json=as_json, quiet=False, store=store)))


@_lut.command("export")
def lut_export(
    output: Annotated[Path, typer.Argument(metavar="FILE.jsonl")],
    store: Store = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write all measurements as JSON lines."""
    from onnx_mdp.commands import run_lut_export

    options = _options(as_json=as_json, quiet=False, store=store)
    raise typer.Exit(run_lut_export(output, options, overwrite=overwrite))


@_lut.command("merge")
def lut_merge(
    source: Annotated[Path, typer.Argument(metavar="FILE.jsonl")],
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Read measurements that another machine exported."""
    from onnx_mdp.commands import run_lut_merge

    raise typer.Exit(run_lut_merge(source, _options(as_json=as_json, quiet=False, store=store)))


def main() -> None:
    """Run the command line; every expected failure is one sentence on stderr and an exit code."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as stop:
        # Typer turns Ctrl-C into a silent exit.
        if stop.code == _INTERRUPTED:
            _interrupted()
        raise
    except MdpError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {_harmless(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


def _interrupted() -> NoReturn:
    print("interrupted: finished measurements are kept, the same command goes on from there", file=sys.stderr)
    sys.exit(_INTERRUPTED)


def _harmless(text: str) -> str:
    """Escape, line by line, what a name in a message could steer the terminal with."""
    from onnx_mdp.report import printable

    return "\n".join(printable(line) for line in text.split("\n"))
