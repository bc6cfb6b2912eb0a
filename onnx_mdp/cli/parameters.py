"""The parameters that several commands share, in groups: declared once, lent to each command by `given`."""

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnx_mdp.errors import MissingBackendError

if TYPE_CHECKING:
    from onnx_mdp.cli.options import Options, PlanOptions

__all__ = [
    "AsJson",
    "Choices",
    "Data",
    "Labels",
    "Model",
    "Overwrite",
    "Preprocess",
    "Repair",
    "Samples",
    "Table",
    "TargetMs",
    "TargetRatio",
    "given",
    "measuring_options",
    "model_options",
    "output_options",
    "plan_options",
    "runtime_options",
    "seeded_options",
    "serving_options",
    "store_options",
]


def _read_recipe(context: typer.Context, path: Path | None) -> Path | None:
    """Let a recipe say what the command line does not; the other options are read after this."""
    if path is not None and not context.resilient_parsing:
        try:
            from onnx_mdp.cli.pruning_recipe import option_defaults
        except ModuleNotFoundError as error:  # a board
            raise MissingBackendError(
                "recipes need pydantic and pyyaml: run `pip install pydantic pyyaml`"
            ) from error
        context.default_map = option_defaults(path, context)
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="onnx-mdp.yaml",
        is_eager=True,
        callback=_read_recipe,
        help="A recipe: options, for the command line to override.",
    ),
]
Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The ONNX file.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--input-shape", metavar="NAME:1,3,224,224", help="Size to prune a symbolic input for."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Size of a symbolic first dimension.")]
State = Annotated[
    list[str] | None,
    typer.Option(metavar="IN=OUT", help="An input that is this output one frame later; repeatable."),
]
Provider = Annotated[
    str, typer.Option("--ep", help="Execution provider: cpu, openvino, cuda, tensorrt …, or a full name.")
]
ProviderOption = Annotated[
    list[str] | None, typer.Option("--ep-option", metavar="KEY=VALUE", help="Provider option; repeatable.")
]
ProviderLibrary = Annotated[
    Path | None, typer.Option("--ep-library", metavar="FILE", help="Shared library of a plugin provider.")
]
ProviderPrecision = Annotated[
    str,
    typer.Option("--ep-precision", help="What the provider is told to compute in: float32, float16 or int8."),
]
AllowFallback = Annotated[
    bool, typer.Option("--allow-fallback", help="Accept nodes that the provider leaves to the CPU.")
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
Criterion = Annotated[
    str | None,
    typer.Option(
        help="magnitude, activation, drift, refit, taylor or hessian; default with --data: drift, or refit "
        "for --repair lstsq."
    ),
]
Loss = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Of taylor and hessian: auto, labels, fisher, projection, or module:function.",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        help="Classes: an array of an .npz; of images, `folder` (a class is a subfolder), a .csv or a .json."
    ),
]
ScoresFile = Annotated[
    Path | None,
    typer.Option("--scores", metavar="FILE.npz", help="Keep what taylor and hessian cost for later calls."),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration samples to use.")]
SolverName = Annotated[
    str, typer.Option("--solver", help="exact, highs, mindtpy, greedy, linear, or exhaustive.")
]
TimeLimit = Annotated[float, typer.Option(min=0.1, help="Seconds for one solve.")]
Gap = Annotated[float, typer.Option(min=0.0, max=0.5, help="Relative gap at which a solve may stop.")]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave these dimensions and blocks alone; repeatable."),
]
IgnoreName = Annotated[
    list[str] | None,
    typer.Option(metavar="NODE", help="Leave this node of the file as it is; repeatable."),
]
IgnorePattern = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX", help="The same for nodes whose name matches, from its start on; repeatable."
    ),
]
IgnoreType = Annotated[
    list[str] | None,
    typer.Option(metavar="OPERATOR", help="The same for all nodes of an operator, such as Softmax."),
]
MinWidth = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=N", help="Least channels, or a share below 1; repeatable."),
]
FixedWidth = Annotated[
    list[str] | None, typer.Option("--width", metavar="PATTERN=N", help="Exactly so many channels.")
]
Multiple = Annotated[int, typer.Option(min=1, help="Keep only multiples of so many channels.")]
TieBlocks = Annotated[
    bool, typer.Option("--tie-blocks", help="Remove attention and MLP of a layer together or not at all.")
]
RescaleAttention = Annotated[
    bool, typer.Option("--rescale-attention", help="Scale scores by the new width; default: as before.")
]
MaxParams = Annotated[float | None, typer.Option(min=0, help="Most parameters, such as 2e6.")]
MaxMacs = Annotated[float | None, typer.Option(min=0, help="Most multiply-accumulates.")]
MaxMemory = Annotated[
    float | None, typer.Option(min=0, help="Most bytes of activations alive at once, none reused in place.")
]
Also = Annotated[
    list[str] | None,
    typer.Option(metavar="TABLE.json=MS", help="Meet this latency by this table too; repeatable."),
]
Repair = Annotated[
    str,
    typer.Option(metavar="METHODS", help="Then change weights: none, or of bias, bn, lstsq."),
]
TargetMs = Annotated[float | None, typer.Option(help="Latency to reach, in milliseconds.")]
TargetRatio = Annotated[float | None, typer.Option(help="Latency to reach, relative to the model's.")]
Table = Annotated[Path, typer.Argument(metavar="TABLE.json", help="What `profile -o` wrote.")]
Choices = Annotated[int, typer.Option("--choices", min=2, max=256, help="Most widths offered a dimension.")]


def output_options(as_json: AsJson = False, quiet: Quiet = False) -> "Options":
    """Where a command prints."""
    from onnx_mdp.cli.console import Screen
    from onnx_mdp.cli.options import Options

    return Options(screen=Screen(quiet=quiet, as_json=as_json))


def model_options(
    config: Config = None,
    input_shape: Shapes = None,
    batch: Batch = 1,
    state: State = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> "Options":
    """How a model is read, without measuring it; a recipe has set defaults by now."""
    return replace(
        output_options(as_json, quiet),
        input_shapes=tuple(input_shape or ()),
        batch=batch,
        states=tuple(state or ()),
        seed=seed,
    )


def seeded_options(
    input_shape: Shapes = None, seed: Seed = 0, as_json: AsJson = False, quiet: Quiet = False
) -> "Options":
    """How a model is read by what trains it."""
    return replace(output_options(as_json, quiet), input_shapes=tuple(input_shape or ()), seed=seed)


def store_options(store: Store = None, as_json: AsJson = False, quiet: Quiet = False) -> "Options":
    """Where measurements are kept."""
    return replace(output_options(as_json, quiet), store=store)


def runtime_options(
    ep: Provider = "cpu",
    ep_option: ProviderOption = None,
    ep_precision: ProviderPrecision = "float32",
    ep_library: ProviderLibrary = None,
    allow_fallback: AllowFallback = False,
    threads: Threads = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> "Options":
    """What a model is measured on."""
    return replace(
        output_options(as_json, quiet),
        provider=ep,
        provider_options=tuple(ep_option or ()),
        provider_precision=ep_precision,
        provider_library=ep_library,
        allow_fallback=allow_fallback,
        threads=threads,
    )


def serving_options(
    input_shape: Shapes = None,
    ep: Provider = "cpu",
    ep_precision: ProviderPrecision = "float32",
    threads: Threads = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> "Options":
    """What a server runs a model on, and what it is warmed up with."""
    return replace(
        output_options(as_json, quiet),
        input_shapes=tuple(input_shape or ()),
        provider=ep,
        provider_precision=ep_precision,
        threads=threads,
    )


def measuring_options(
    config: Config = None,
    input_shape: Shapes = None,
    batch: Batch = 1,
    state: State = None,
    ep: Provider = "cpu",
    ep_option: ProviderOption = None,
    ep_precision: ProviderPrecision = "float32",
    ep_library: ProviderLibrary = None,
    allow_fallback: AllowFallback = False,
    threads: Threads = 1,
    seed: Seed = 0,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> "Options":
    """How a model is read and measured; a recipe has set defaults by now."""
    return replace(
        runtime_options(ep, ep_option, ep_precision, ep_library, allow_fallback, threads, as_json, quiet),
        input_shapes=tuple(input_shape or ()),
        batch=batch,
        states=tuple(state or ()),
        seed=seed,
        store=store,
    )


def plan_options(
    criterion: Criterion = None,
    data: Data = None,
    preprocess: Preprocess = None,
    samples: Samples = 64,
    loss: Loss = "auto",
    labels: Labels = None,
    scores: ScoresFile = None,
    solver: SolverName = "exact",
    time_limit: TimeLimit = 60.0,
    gap: Gap = 1e-6,
    exclude: Exclude = None,
    ignore_name: IgnoreName = None,
    ignore_pattern: IgnorePattern = None,
    ignore_type: IgnoreType = None,
    min_width: MinWidth = None,
    width: FixedWidth = None,
    multiple: Multiple = 1,
    tie_blocks: TieBlocks = False,
    rescale_attention: RescaleAttention = False,
    max_params: MaxParams = None,
    max_macs: MaxMacs = None,
    max_memory: MaxMemory = None,
    also: Also = None,
) -> "PlanOptions":
    """How a plan is made."""
    from onnx_mdp.cli.options import PlanOptions
    from onnx_mdp.planning.ignored_scope import IgnoredScope

    return PlanOptions(
        criterion=criterion,
        data=data,
        preprocess=preprocess,
        samples=samples,
        loss=loss,
        labels=labels,
        scores=scores,
        solver=solver,
        time_limit=time_limit,
        gap=gap,
        exclude=tuple(exclude or ()),
        least=tuple(min_width or ()),
        fixed=tuple(width or ()),
        multiple=multiple,
        tie_blocks=tie_blocks,
        rescale_attention=rescale_attention,
        max_params=max_params,
        max_macs=max_macs,
        max_memory=max_memory,
        also=tuple(also or ()),
        ignored=IgnoredScope(tuple(ignore_name or ()), tuple(ignore_pattern or ()), tuple(ignore_type or ())),
    )


def given(**groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the parameters of each group, and what the group makes of them under its name.

    Groups may share a parameter, which must be the same in each.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
        lent = {name: list(inspect.signature(group).parameters.values()) for name, group in groups.items()}
        shared = {p.name: p for p in itertools.chain(*lent.values())}
        assert all(shared[p.name].annotation is p.annotation for p in itertools.chain(*lent.values()))
        every = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *shared.values())]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = {
                name: groups[name](*(values[p.name] for p in parameters)) for name, parameters in lent.items()
            }
            command(**{name: value for name, value in values.items() if name not in shared}, **made)

        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in every}
        return run

    return decorate
