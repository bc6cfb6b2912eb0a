"""Which widths and block removals a user allows, by name patterns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from onnx_mdp.analysis.structure import Dimension, Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.planning.ignored_scope import Held

__all__ = ["WidthRules", "allowed_widths", "kept_blocks", "tied_blocks"]


@dataclass(frozen=True, slots=True)
class WidthRules:
    """Shell patterns over names of dimensions and blocks, widths in channels; later entries win.

    ``exclude`` keeps dimensions and blocks as they are. ``least`` gives dimensions a minimum: a share of
    their channels below 1, else a number of channels. ``fixed`` gives them one width. ``multiple`` lets all
    others have only multiples of it, besides their full width. ``tie_blocks`` lets the branches of a
    transformer layer go together or not at all. ``held`` names, without patterns, what stays as it is.
    """

    exclude: tuple[str, ...] = ()
    least: tuple[tuple[str, float], ...] = ()
    fixed: tuple[tuple[str, int], ...] = ()
    multiple: int = 1
    tie_blocks: bool = False
    held: Held = field(default_factory=Held)


def allowed_widths(
    structure: Structure, choices: Mapping[int, tuple[int, ...]], rules: WidthRules
) -> dict[int, tuple[int, ...]]:
    """The widths in units that the rules leave to each dimension of ``choices``; never none.

    Raises:
        UsageError: a pattern matches nothing, or a width does not exist.
    """
    _check_patterns(structure, rules)
    return {
        index: _allowed(structure.dimensions[index], offered, rules) for index, offered in choices.items()
    }


def kept_blocks(structure: Structure, rules: WidthRules) -> frozenset[str]:
    """The blocks that may not go: those excluded or held, and those around such or a fixed dimension."""
    patterns = [*rules.exclude, *(pattern for pattern, _ in rules.fixed)]
    kept = {block.name for block in structure.blocks if _matches(block.name, rules.exclude)}
    kept |= rules.held.blocks
    kept |= {
        d.block
        for d in structure.dimensions
        if d.block is not None and (d.name in rules.held.dimensions or _matches(d.name, patterns))
    }
    for tied in tied_blocks(structure, rules):
        if kept & set(tied):
            kept |= set(tied)
    return frozenset(kept)


def tied_blocks(structure: Structure, rules: WidthRules) -> list[tuple[str, ...]]:
    """The blocks that go together: where the rules tie them, those of a layer, else each alone.

    A layer is a run of attention branches with the MLP branch that follows.
    """
    layers: list[tuple[str, ...]] = []
    attention: list[str] = []
    for block in structure.blocks:
        if rules.tie_blocks and block.kind == "attention":
            attention.append(block.name)
        elif block.kind == "mlp":
            layers.append((*attention, block.name))
            attention = []
        else:
            layers.append((block.name,))
    return [*layers, *((name,) for name in attention)]


def _allowed(dimension: Dimension, offered: tuple[int, ...], rules: WidthRules) -> tuple[int, ...]:
    full, step = dimension.count, dimension.channels
    for pattern, channels in reversed(rules.fixed):
        if fnmatchcase(dimension.name, pattern):
            units, rest = divmod(channels, step)
            if rest or not 1 <= units <= full:
                raise UsageError(
                    f"{dimension.name} cannot have {channels} channels: "
                    f"it has {full * step}, in steps of {step}"
                )
            if units < full and dimension.name in rules.held.dimensions:
                raise UsageError(
                    f"{dimension.name} cannot have {channels} channels: an ignored node holds it"
                )
            return (units,)
    if dimension.name in rules.held.dimensions or _matches(dimension.name, rules.exclude):
        return (full,)
    least = 0.0
    for pattern, wanted in rules.least:
        if fnmatchcase(dimension.name, pattern):
            least = wanted * full * step if wanted < 1 else wanted
    if least > full * step:
        raise UsageError(f"{dimension.name} cannot keep {least:g} channels: it has {full * step}")
    return tuple(
        units
        for units in offered
        if units == full or (units * step >= least and units * step % rules.multiple == 0)
    )


def _matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(structure: Structure, rules: WidthRules) -> None:
    dimensions = [structure.dimensions[index].name for index in structure.prunable]
    blocks = [block.name for block in structure.blocks]
    if rules.tie_blocks and max(map(len, tied_blocks(structure, rules)), default=0) < 2:
        raise UsageError("--tie-blocks: the model has no attention block with an MLP block after it")
    wanted = [("exclude", pattern, [*dimensions, *blocks]) for pattern in rules.exclude]
    wanted += [("min-width", pattern, dimensions) for pattern, _ in rules.least]
    wanted += [("width", pattern, dimensions) for pattern, _ in rules.fixed]
    for option, pattern, names in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"--{option} {pattern!r} matches no prunable dimension or block; "
                "`onnx-mdp analyze` lists them"
            )
