"""What the commands are told: common options, how a plan is made, and the model and data they name."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_mdp.analysis.binding import graph_inputs
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.api.stages import chosen_criterion
from onnx_mdp.cli.console import Screen
from onnx_mdp.data.calibration import CalibrationData, load_data
from onnx_mdp.data.feeds import input_types
from onnx_mdp.errors import UsageError
from onnx_mdp.importance.gradient_scores import GRADIENT_CRITERIA, LOSSES
from onnx_mdp.importance.scoring import CRITERIA, Criterion
from onnx_mdp.large_models import for_session
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze
from onnx_mdp.plan import PruningPlan, plan_inputs
from onnx_mdp.planning.formulation import Caps
from onnx_mdp.planning.ignored_scope import IgnoredScope, held_by
from onnx_mdp.planning.problem import SolveLimits
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.reports.report import printable
from onnx_mdp.running.accelerators import gpu_of
from onnx_mdp.running.placement import fallback_of
from onnx_mdp.running.runtime import Runtime, runtime
from onnx_mdp.solvers import SOLVERS
from onnx_mdp.surgery.attention_scale import unit_products
from onnx_mdp.surgery.verification import Evidence
from onnx_mdp.tables.table_file import load_table
from onnx_mdp.torch_backend import require_torch

__all__ = [
    "Options",
    "PlanOptions",
    "accepted_fallback",
    "calibration",
    "command_line",
    "load_structure",
    "parse_shapes",
    "read_inputs",
    "tell_of_evidence",
    "width_rules",
    "with_plan_inputs",
]


@dataclass(frozen=True, slots=True)
class Options:
    """What all commands that read a model share."""

    screen: Screen = field(default_factory=Screen)
    input_shapes: tuple[str, ...] = ()
    batch: int = 1
    states: tuple[str, ...] = ()
    provider: str = "cpu"
    provider_options: tuple[str, ...] = ()
    threads: int = 1
    seed: int = 0
    store: Path | None = None
    provider_library: Path | None = None
    allow_fallback: bool = False
    provider_precision: str = "float32"

    def runtime(self) -> Runtime:
        """The runtime that models are measured on."""
        pairs = [option.partition("=") for option in self.provider_options]
        if any(not equals for _, equals, _ in pairs):
            raise UsageError("--ep-option takes KEY=VALUE")
        return runtime(
            self.provider,
            self.threads,
            [(key, value) for key, _, value in pairs],
            library="" if self.provider_library is None else str(self.provider_library),
            allow_fallback=self.allow_fallback,
            precision=self.provider_precision,
            store="" if self.store is None else str(self.store),
        )


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How units are ranked, what may be cut, what else is limited, and how it is solved.

    Patterns are shell patterns of names; ``least`` and ``fixed`` hold ``PATTERN=WIDTH``, ``also`` holds
    ``TABLE.json=MS``.
    """

    criterion: str | None = None
    data: Path | None = None
    preprocess: str | None = None
    samples: int = 64
    loss: str = "auto"
    labels: str | None = None
    scores: Path | None = None
    solver: str = "exact"
    time_limit: float = 60.0
    gap: float = 1e-6
    exclude: tuple[str, ...] = ()
    least: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    multiple: int = 1
    tie_blocks: bool = False
    rescale_attention: bool = False
    max_params: float | None = None
    max_macs: float | None = None
    max_memory: float | None = None
    also: tuple[str, ...] = ()
    ignored: IgnoredScope = field(default_factory=IgnoredScope)

    @property
    def limits(self) -> SolveLimits:
        """What one solve may spend."""
        return SolveLimits(self.time_limit, self.gap)

    def check(self, *, labelled: bool = False) -> None:
        """Refuse wrong options before minutes of measuring; training and reports take labels too."""
        if self.solver not in SOLVERS:
            raise UsageError(f"unknown solver {self.solver!r}; choose one of {', '.join(sorted(SOLVERS))}")
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise UsageError(
                f"unknown criterion {self.criterion!r}; choose one of {', '.join(sorted(CRITERIA))}"
            )
        if self.data is None and self.criterion not in (None, "magnitude"):
            raise UsageError(f"criterion {self.criterion!r} needs calibration inputs; pass --data")
        if self.data is None and self.preprocess is not None:
            raise UsageError("--preprocess says how --data images become inputs; pass --data too")
        self._check_gradients(labelled)
        self.rules()

    def _check_gradients(self, labelled: bool) -> None:
        if self.criterion not in GRADIENT_CRITERIA:
            given = {"--loss": self.loss != "auto", "--scores": self.scores is not None}
            given["--labels"] = self.labels is not None and not labelled
            unused = next((name for name, is_given in given.items() if is_given), None)
            if unused is not None:
                raise UsageError(
                    f"{unused} is for --criterion {' or '.join(GRADIENT_CRITERIA)}; pass one too"
                )
            return
        if self.loss not in LOSSES and ":" not in self.loss:
            raise UsageError(f"unknown loss {self.loss!r}; choose {', '.join(LOSSES)} or module:function")
        if self.scores is None or not self.scores.exists():
            require_torch(f"criterion {self.criterion!r}")

    def scorer(self, data: CalibrationData | None, seed: int, repair: Sequence[str] = ()) -> str | Criterion:
        """The criterion, with the loss, the labels and the file of those that are made of gradients."""
        return chosen_criterion(
            self.criterion, data, repair=repair, loss=self.loss, scores=self.scores, seed=seed
        )

    def rules(self) -> WidthRules:
        """The widths that the options allow."""
        least = tuple((p, float(_number("--min-width", t, v))) for t, p, v in map(_pair, self.least))
        fixed = tuple((p, int(_number("--width", t, v))) for t, p, v in map(_pair, self.fixed))
        return WidthRules(self.exclude, least, fixed, self.multiple, self.tie_blocks)

    def rescales(self, structure: Structure) -> bool:
        """Whether scores are rescaled; refused where there are none, or none in float32."""
        if self.rescale_attention and not structure.shadow.plain:
            raise UsageError("--rescale-attention needs a model in float32; leave it out")
        if self.rescale_attention and not unit_products(structure):
            raise UsageError("--rescale-attention: the model has no product of query and key to rescale")
        return self.rescale_attention

    def caps(self, structure: Structure) -> Caps:
        """The limits beside the latency; reads the further tables."""
        tables = []
        for text, path, ms in map(_pair, self.also):
            tables.append((load_table(Path(path), structure), _number("--also", text, ms)))
        return Caps(self.max_params, self.max_macs, self.max_memory, tuple(tables))


def _pair(text: str) -> tuple[str, str, str]:
    """``(text, name, value)`` of ``NAME=VALUE``."""
    name, _, value = text.rpartition("=")
    return text, name, value


def _number(option: str, text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf or text.startswith("="):
        raise UsageError(f"{option} {text!r} is not NAME=NUMBER with a number larger than 0")
    return number


def load_structure(path: Path, options: Options) -> tuple[ir.Model, Structure]:
    model = load_model(path)
    shapes = parse_shapes(options.input_shapes, model)
    structure = analyze(model, shapes, options.batch, _parse_states(options.states))
    bound = {name: shape for name, shape in structure.shadow.inputs.items() if _symbolic(model, name)}
    for name, shape in bound.items():
        options.screen.note(f"input {printable(name)} is symbolic: pruning for the shape {list(shape)}")
    for key in structure.graph.unsupported:
        options.screen.warn(f"no rule for operator {printable(key)}: what it touches is not pruned")
    return model, structure


def width_rules(model: ir.Model, structure: Structure, plan: PlanOptions, options: Options) -> WidthRules:
    """The widths that the options allow, with what the ignored nodes of the model hold."""
    held = held_by(model, structure, plan.ignored)
    if held.nodes:
        options.screen.note(
            f"ignored nodes: {held.nodes}; held for them: {len(held.dimensions)} of "
            f"{len(structure.prunable)} dimensions, {len(held.blocks)} of {len(structure.blocks)} blocks"
        )
    return replace(plan.rules(), held=held)


def accepted_fallback(model: ir.Model, structure: Structure, options: Options) -> dict[str, Any]:
    """What of the model the CPU computes, if that is accepted: a warning, and keys for the document.

    Where a GPU computes, its name and clock are told before.
    """
    _tell_of_gpu(options)
    if not options.allow_fallback:
        return {}
    found = fallback_of(for_session(model), options.runtime(), structure.shadow.inputs)
    if found is None:
        return {"fallback": None}
    options.screen.warn(f"{printable(str(found))}; accepted")
    nodes = [list(node) for node in found.nodes]
    return {"fallback": {"nodes": nodes, "of_nodes": found.total, "share_of_time": found.share}}


def _tell_of_gpu(options: Options) -> None:
    """Say on which GPU, and at which clock, is measured."""
    runtime_ = options.runtime()
    gpu = gpu_of(runtime_.provider, runtime_.options)
    if gpu is not None:
        clock = f", clock {gpu.clock_mhz} of {gpu.most_mhz} MHz" if gpu.most_mhz else ""
        options.screen.note(f"{printable(gpu.name)}, driver {printable(gpu.driver)}{clock}")


def tell_of_evidence(evidence: Evidence, options: Options) -> None:
    """Say how it was compared, and of outputs that no input changes that they would hide a wrong cut."""
    if evidence.judged is not None:
        options.screen.note(evidence.judged)
    if evidence.constant:
        names = ", ".join(map(printable, evidence.constant))
        options.screen.warn(
            f"the inputs tried hardly change {names}, so comparing it proves little; pass inputs with --data"
        )


def with_plan_inputs(options: Options, plan: PruningPlan) -> Options:
    """Take the states of a plan, and the input shapes that it was made with unless others were given."""
    options = replace(options, states=tuple(f"{name}={target}" for name, target in plan.states.items()))
    shapes = plan_inputs(plan)
    if options.input_shapes:
        return options
    texts = tuple(f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items())
    return replace(options, input_shapes=texts)


def _symbolic(model: ir.Model, name: str) -> bool:
    value = next(v for v in graph_inputs(model) if v.name == name)
    return value.shape is None or any(not isinstance(d, int) or d < 1 for d in value.shape)


def parse_shapes(texts: Sequence[str], model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Read ``NAME:1,3,224,224``; a model with one input may leave the name out."""
    names = [str(v.name) for v in graph_inputs(model)]
    shapes = {}
    for text in texts:
        name, colon, dims = text.rpartition(":")
        if not colon and len(names) != 1:
            example = names[0] if names else "NAME"
            raise UsageError(f"--input-shape must name the input, such as {example}:1,3,224,224")
        try:
            shapes[name if colon else names[0]] = tuple(int(d) for d in dims.split(","))
        except ValueError:
            raise UsageError(f"--input-shape {text!r} is not NAME:1,3,224,224") from None
    return shapes


def _parse_states(texts: Sequence[str]) -> dict[str, str]:
    """Read ``INPUT=OUTPUT``; names may hold a colon or a slash, but no equals sign."""
    states: dict[str, str] = {}
    for text in texts:
        source, _, target = text.partition("=")
        if not source or not target or source in states:
            raise UsageError(f"--state {text!r} is not INPUT=OUTPUT, each input once")
        states[source] = target
    return states


def command_line() -> str:
    """The command as it was typed, with names of files and no folders."""
    return shlex.join([Path(sys.argv[0]).name, *(Path(a).name for a in sys.argv[1:])])


def calibration(
    structure: Structure, model: ir.Model, plan: PlanOptions, options: Options, *, labelled: bool = False
) -> CalibrationData | None:
    """The inputs that units are ranked by, with labels if a report wants them; a warning without inputs."""
    if plan.data is None:
        options.screen.warn(
            "no --data: units are ranked by weight magnitude alone, which costs accuracy; "
            "pass calibration inputs (an .npz or a folder of images)"
        )
        return None
    labels = plan.labels if labelled or plan.criterion in GRADIENT_CRITERIA else None
    return read_inputs(structure, model, plan.data, plan.preprocess, plan.samples, options, labels)


def read_inputs(
    structure: Structure,
    model: ir.Model,
    source: Path,
    preprocess: str | None,
    samples: int,
    options: Options,
    labels: str | None = None,
) -> CalibrationData:
    shapes, types = structure.shadow.inputs, input_types(model)
    data = load_data(source, shapes, types, preprocess=preprocess, samples=samples, labels=labels)
    options.screen.note(f"calibration: {printable(data.source)}")
    return data
