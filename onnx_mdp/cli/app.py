"""The command line: thin declarations whose heavy imports happen when a command runs.

Exit codes: 0 done · 1 a gate failed (over target, verification) · 2 usage or unreadable model · 3 missing
backend or extra · 4 infeasible target · 130 interrupted. stdout carries results, stderr progress.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from onnx_mdp._version import __version__
from onnx_mdp.cli.device import device
from onnx_mdp.cli.export import export
from onnx_mdp.cli.finetune_parameters import masking_options, training_options
from onnx_mdp.cli.lut import lut as lut_group
from onnx_mdp.cli.parameters import (
    Choices,
    Data,
    Model,
    Overwrite,
    Preprocess,
    Repair,
    Samples,
    Table,
    TargetMs,
    TargetRatio,
    given,
    measuring_options,
    model_options,
    output_options,
    plan_options,
    runtime_options,
    seeded_options,
    store_options,
)
from onnx_mdp.cli.recipe import config as config_group
from onnx_mdp.errors import MdpError

if TYPE_CHECKING:
    from onnx_mdp.cli.finetune_commands import FinetuneOptions
    from onnx_mdp.cli.mask_commands import MaskOptions
    from onnx_mdp.cli.options import Options, PlanOptions

__all__ = ["app", "main"]

_INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Give it an ONNX file and a latency; get a slimmer ONNX file that runs in that time, with proof.",
)
app.add_typer(device)
app.add_typer(lut_group, name="lut")
app.add_typer(config_group, name="config")
app.add_typer(export, name="export")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
@given(options=model_options)
def analyze(
    model: Model,
    options: "Options",
    table: Annotated[
        Path | None, typer.Option(metavar="TABLE.json", help="Say in milliseconds what frozen parts hold.")
    ] = None,
) -> None:
    """Show what can be pruned, what is frozen and why."""
    from onnx_mdp.cli.commands import run_analyze

    raise typer.Exit(run_analyze(model, options, table))


@app.command()
@given(options=output_options)
def operators(options: "Options") -> None:
    """List the operators that have a rule, what becomes of units there, and what is frozen."""
    from onnx_mdp.analysis.operator_coverage import operators_document, operators_markdown

    options.screen.result(operators_markdown(), operators_document())


@app.command()
@given(options=measuring_options)
def profile(
    model: Model,
    options: "Options",
    choices: Choices = 16,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the table as JSON.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure the latency table of a model on this machine; a second run measures nothing."""
    from onnx_mdp.cli.commands import run_profile

    raise typer.Exit(run_profile(model, options, choices=choices, output=output, overwrite=overwrite))


@app.command()
@given(plan=plan_options, training=training_options, masks=masking_options, options=measuring_options)
def prune(
    context: typer.Context,
    model: Model,
    plan: "PlanOptions",
    training: "FinetuneOptions",
    masks: "MaskOptions",
    options: "Options",
    target_ms: TargetMs = None,
    target_ratio: TargetRatio = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: MODEL.pruned.onnx.")] = None,
    choices: Choices = 16,
    repair: Repair = "none",
    lut: Annotated[
        Path | None, typer.Option(metavar="TABLE.json", help="Use this table instead of measuring one.")
    ] = None,
    handover: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Let `bench` measure candidates on --lut's device.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also write OUTPUT.report.html, .md and .json.")
    ] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write files.")] = False,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Then train the weights, with the original as teacher.")
    ] = False,
    train: Annotated[
        str | None, typer.Option(metavar="DATA", help="What --finetune trains on; default: --data.")
    ] = None,
    train_preprocess: Annotated[
        str | None, typer.Option(help="How its images become inputs; default: --preprocess; or none.")
    ] = None,
) -> None:
    """Prune a model until it meets a latency on this machine, and prove the result."""
    from onnx_mdp.cli.finetune_commands import training_of
    from onnx_mdp.cli.prune_commands import PruneOptions, run_prune

    wanted = PruneOptions(
        target_ms=target_ms,
        target_ratio=target_ratio,
        output=output,
        plan=plan,
        choices=choices,
        repair=repair,
        overwrite=overwrite,
        dry_run=dry_run,
        finetune=training_of(training, train, train_preprocess, plan, wanted=finetune),
        masks=masks,
        lut=lut,
        handover=handover,
        report=report,
        parameters=context.params,
    )
    raise typer.Exit(run_prune(model, options, wanted))


@app.command("report")
@given(options=output_options)
def report_(
    report: Annotated[Path, typer.Argument(metavar="REPORT.json", help="What `prune --report` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="An .html or an .md file.")],
    options: "Options",
    overwrite: Overwrite = False,
) -> None:
    """Write the report of a prune again, from its JSON."""
    from onnx_mdp.cli.report_commands import render_report

    render_report(report, output, overwrite=overwrite)
    options.screen.result(f"written → {output}", {"schema_version": 1, "output": str(output)})
    raise typer.Exit(0)


@app.command("solve")
@given(plan=plan_options, options=model_options)
def solve_(
    model: Model,
    table: Table,
    plan: "PlanOptions",
    options: "Options",
    target_ms: TargetMs = None,
    target_ratio: TargetRatio = None,
    min_importance: Annotated[
        float | None, typer.Option(help="Instead: the fastest plan that keeps this share of the importance.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan as JSON.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Choose widths and blocks by a table, measuring nothing, and say why; `apply` makes the model."""
    from onnx_mdp.cli.plan_commands import SolveOptions, run_solve

    wanted = SolveOptions(
        target_ms=target_ms,
        target_ratio=target_ratio,
        min_importance=min_importance,
        output=output,
        overwrite=overwrite,
        plan=plan,
    )
    raise typer.Exit(run_solve(model, table, options, wanted))


@app.command()
@given(plan=plan_options, options=model_options)
def pareto(
    model: Model,
    table: Table,
    plan: "PlanOptions",
    options: "Options",
    targets: Annotated[
        str, typer.Option(help="Ratios of the model's latency: a list, or from:to:count.")
    ] = "0.3:0.9:13",
    milliseconds: Annotated[
        bool, typer.Option("--ms", help="The targets are milliseconds, not ratios.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Draw the front as SVG.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show what every latency costs in importance: the whole front, by a table, measuring nothing."""
    from onnx_mdp.cli.plan_commands import FrontOptions, run_pareto

    wanted = FrontOptions(
        targets=targets, milliseconds=milliseconds, output=output, overwrite=overwrite, plan=plan
    )
    raise typer.Exit(run_pareto(model, table, options, wanted))


@app.command()
@given(options=output_options)
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="What `prune` or `solve` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the pruned model.")],
    options: "Options",
    overwrite: Overwrite = False,
) -> None:
    """Replay a plan: the same file, bit for bit, verified again."""
    from onnx_mdp.cli.commands import run_apply

    raise typer.Exit(run_apply(model, plan, output, options, overwrite=overwrite))


@app.command()
@given(options=output_options)
def repair(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL.onnx", help="The unpruned model.")],
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED.onnx", help="The pruned model.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="What `prune` wrote.")],
    data: Annotated[Path, typer.Option(help="Calibration inputs: an .npz or a folder of images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the repaired model.")],
    options: "Options",
    methods: Annotated[
        str, typer.Option("--repair", metavar="METHODS", help="Of bias, bn and lstsq, in this order.")
    ] = "lstsq",
    preprocess: Preprocess = None,
    samples: Samples = 64,
    overwrite: Overwrite = False,
) -> None:
    """Change the weights of a pruned model so that its layers give what the original's gave; no labels."""
    from onnx_mdp.cli.repair_commands import RepairOptions, run_repair

    wanted = RepairOptions(
        methods=methods,
        data=data,
        output=output,
        preprocess=preprocess,
        samples=samples,
        overwrite=overwrite,
    )
    raise typer.Exit(run_repair(original, pruned, plan, options, wanted))


@app.command()
@given(options=runtime_options)
def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL.onnx", help="The unpruned model.")],
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED.onnx", help="The pruned model.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="What `prune` wrote.")],
    options: "Options",
    max_ms: Annotated[float | None, typer.Option(help="Fail if the pruned model is slower.")] = None,
    data: Data = None,
    preprocess: Preprocess = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Also write a summary for a pull request; - prints it."),
    ] = None,
) -> None:
    """Check that a pruned file computes what the masked original computes."""
    from onnx_mdp.cli.verify_commands import VerifyOptions, run_verify

    wanted = VerifyOptions(original, pruned, plan, max_ms, data, preprocess, markdown)
    raise typer.Exit(run_verify(wanted, options))


@app.command()
@given(training=training_options, options=seeded_options)
def finetune(
    model: Annotated[Path, typer.Argument(metavar="SLIM.onnx", help="What `prune` or `apply` wrote.")],
    data: Annotated[
        str, typer.Option(help="An .npz of named inputs and labels, a folder of images, or module:function.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the trained model.")],
    training: "FinetuneOptions",
    options: "Options",
    teacher: Annotated[
        Path | None, typer.Option(metavar="ORIGINAL.onnx", help="The unpruned model, to learn from.")
    ] = None,
    preprocess: Preprocess = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train the weights of a pruned model, by its original, by labels, or by both; also under torchrun."""
    from onnx_mdp.cli.finetune_commands import run_finetune

    wanted = replace(training, data=data, preprocess=preprocess, resume=resume)
    raise typer.Exit(run_finetune(model, teacher, output, options, wanted, overwrite=overwrite))


@app.command()
@given(options=store_options)
def demo(
    options: "Options",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "onnx-mdp-demo"
    ),
    target_ratio: Annotated[float, typer.Option(help="Latency to reach, relative to the model's.")] = 0.7,
    overwrite: Overwrite = False,
) -> None:
    """Prune the small trained model that comes with the package, and show what it cost."""
    from onnx_mdp.demo import run_demo

    raise typer.Exit(run_demo(output, target_ratio, options, overwrite=overwrite))


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
    except MemoryError:
        print("error: the memory is exhausted; choose smaller inputs with --input-shape", file=sys.stderr)
        sys.exit(MdpError.exit_code)


def _interrupted() -> NoReturn:
    print("interrupted: what was finished is kept, the same command goes on from there", file=sys.stderr)
    sys.exit(_INTERRUPTED)


def _harmless(text: str) -> str:
    """Escape, line by line, what a name in a message could steer the terminal with."""
    from onnx_mdp.reports.report import printable

    return "\n".join(printable(line) for line in text.split("\n"))
