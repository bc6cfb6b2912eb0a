"""The recipe of a prune, ``onnx-mdp.yaml``: every option of the command, in sections, read and written.

The form of a recipe is made of the declaration of `prune`, so both have the same options, defaults, limits
and descriptions. Unknown keys are refused. An option of the command line goes before the recipe's.
"""

from __future__ import annotations

import inspect
import platform
import typing
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from onnx_mdp._version import __version__
from onnx_mdp.cli.recipe_layout import FORMS, LAYOUT, SECTIONS, leaves, placed
from onnx_mdp.errors import UsageError
from onnx_mdp.running.runtime import has_onnxruntime, import_onnxruntime
from onnx_mdp.yaml_input import read_tree, yaml_text

__all__ = ["commented", "load_recipe", "option_defaults", "recipe_form", "recipe_text", "schema"]

_WHAT = "`onnx-mdp config init` prints a recipe, `onnx-mdp config schema` its form"
_CONFIG = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
# Of these a command takes one; one that is given takes the place of the others in a recipe.
_ALTERNATIVES = ({"target_ms", "target_ratio", "min_importance"}, {"epochs", "steps"})
# What the commands that plan by a table call it.
_ELSEWHERE = {"lut": "table"}
_PATHS = ("also", "labels", "train", "val")

_Parameters: TypeAlias = Mapping[str, inspect.Parameter]


# -- the form -----------------------------------------------------------------------------------------------


def recipe_form(command: Any) -> type[BaseModel]:
    """The pydantic model of the recipes of ``command``, a command as typer made it."""
    parameters = inspect.signature(command.callback).parameters
    fields = _fields(LAYOUT, parameters, "")
    fields["paths_from"] = (
        Literal["recipe", "working-folder"],
        Field("recipe", description="Where relative paths start: this file's folder, or that of the call."),
    )
    fields["made_by"] = (
        dict[str, str],
        Field({}, description="What made the copy beside an output; it changes nothing."),
    )
    return _model("Recipe", "A recipe of `onnx-mdp prune`.", fields)


def _model(name: str, about: str, fields: Mapping[str, Any]) -> type[BaseModel]:
    made: type[BaseModel] = create_model(name, __config__=_CONFIG, __doc__=about, **fields)
    return made


def _fields(layout: Mapping[str, Any], parameters: _Parameters, at: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in layout.items():
        if isinstance(inner, str):
            found[key] = _leaf(parameters[inner])
        else:
            about, name = SECTIONS[at + key], "".join(map(str.title, f"{at}{key}".split(".")))
            section = _model(name, about, _fields(inner, parameters, f"{at}{key}."))
            # A key with nothing below it but comments is null in YAML.
            kind: Any = Annotated[section, BeforeValidator(lambda given: {} if given is None else given)]
            found[key] = (kind, Field(default_factory=section, description=about))
    return found


def _leaf(parameter: inspect.Parameter) -> tuple[Any, Any]:
    """The type of an option, and its default, limits, description and flag."""
    kind, declared = typing.get_args(parameter.annotation)[:2]
    default = None if parameter.default is parameter.empty else parameter.default
    form = FORMS.get(parameter.name)
    if form is None:
        kind, optional = _plain(kind), default is None
    else:
        kind, optional = form.type, form.optional
        default = None if optional else form.from_option(default or [])
    limits = {"ge": declared.min, "le": declared.max}
    return kind | None if optional else kind, Field(
        default,
        description=declared.help.replace("; repeatable", ""),
        json_schema_extra={"x-option": _flag(parameter, declared)},
        **{name: limit for name, limit in limits.items() if limit is not None},
    )


def _flag(parameter: inspect.Parameter, declared: Any) -> str:
    """The option on the command line; of an argument, its place holder."""
    if parameter.default is parameter.empty:
        return str(declared.metavar)
    # In an annotation, typer holds the first of the flags where a default would be.
    given = [str(text) for text in (declared.default, *(declared.param_decls or ()))]
    named = f"--{parameter.name.replace('_', '-')}"
    return next((text for text in given if text.startswith("--")), named)


def _plain(annotation: Any) -> Any:
    """The type without None; a path is a text."""
    kinds = [k for k in typing.get_args(annotation) or (annotation,) if k is not type(None)]
    return str if kinds[0] is Path else kinds[0]


def schema(form: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a form."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **form.model_json_schema()}


# -- reading ------------------------------------------------------------------------------------------------


def load_recipe(path: Path, form: type[BaseModel]) -> BaseModel:
    """Read a recipe, in YAML, or in JSON if its name ends so.

    Raises:
        UsageError: it cannot be read, or holds what is not of the form; the first fault is named.
    """
    tree = read_tree(path, _WHAT)
    if not isinstance(tree, dict):
        raise UsageError(f"{path} is no recipe, for it holds no keys; {_WHAT}")
    try:
        return form.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_sentence(path, error, form)) from error


def _sentence(path: Path, error: ValidationError, form: type[BaseModel]) -> str:
    fault = error.errors(include_url=False)[0]
    known, section, place = form.model_fields, "", fault["loc"]
    keys = [str(key) for key in place]
    while len(keys) > 1 and keys[0] in known and _is_section(known[keys[0]].annotation):
        known, section = known[keys[0]].annotation.model_fields, f"{section}{keys[0]}."  # type: ignore[union-attr]
        keys = keys[1:]
    if fault["type"] == "extra_forbidden":
        return f"{path}: {section}{keys[0]!s} is unknown{_nearest(keys[0], list(known), section)}"
    message = str(fault["msg"])
    return f"{path}: {section}{keys[0]}: {message[0].lower()}{message[1:]}, and not {fault['input']!r:.60}"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _nearest(key: str, siblings: list[str], section: str) -> str:
    """What may have been meant: a key at the same place, at another one, or the option of a key."""
    elsewhere: dict[str, str] = {}
    for dotted, parameter in (*leaves(), *((name, name) for name in SECTIONS)):
        elsewhere.setdefault(dotted.rpartition(".")[2], dotted)
        elsewhere.setdefault(parameter, dotted)
    word = key.replace("-", "_")
    near = [section + name for name in get_close_matches(word, siblings, 1, 0.85)]
    near += [elsewhere[word]] if word in elsewhere else []
    near += [section + name for name in get_close_matches(word, siblings, 1)]
    near += [elsewhere[name] for name in get_close_matches(word, list(elsewhere), 1, 0.8)]
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(siblings)}"


# -- options ------------------------------------------------------------------------------------------------


def option_defaults(path: Path, context: Any) -> dict[str, Any]:
    """What a recipe says of the options of the command that is called, by the names of its parameters.

    A recipe is one of `prune`; another command takes what it has as well.

    Raises:
        UsageError: see `load_recipe`.
    """
    prune, command = context.find_root().command.commands["prune"], context.command
    recipe = load_recipe(path, recipe_form(prune))
    folder = path.parent if recipe.paths_from == "recipe" else Path()  # type: ignore[attr-defined]
    declared, own = (inspect.signature(c.callback).parameters for c in (prune, command))
    found: dict[str, Any] = {}
    for dotted, parameter in leaves():
        value, annotation = _value(recipe, dotted), declared[parameter].annotation
        name = parameter if command is prune else _elsewhere(parameter, annotation, own)
        if value is None or name is None:
            continue
        kind, form = typing.get_args(annotation)[0], FORMS.get(parameter)
        option = value if form is None else form.to_option(value)
        if Path in (kind, *typing.get_args(kind)) or parameter in _PATHS:
            option = placed(parameter, option, folder)
        found[name] = partial(_unless_given, context, _rivals(name), option)
    return found


def _elsewhere(parameter: str, annotation: Any, own: _Parameters) -> str | None:
    """What another command calls an option of `prune`; where that one writes is not for it."""
    if parameter in _ELSEWHERE and _ELSEWHERE[parameter] in own:
        return _ELSEWHERE[parameter]
    same = parameter in own and own[parameter].annotation is annotation and parameter != "overwrite"
    return parameter if same else None


def _value(recipe: BaseModel, dotted: str) -> Any:
    """The value that a recipe sets for a key; None if it sets none."""
    value: Any = recipe
    for key in dotted.split("."):
        if key not in value.model_fields_set:
            return None
        value = getattr(value, key)
    return value


def _rivals(name: str) -> set[str]:
    return next((names - {name} for names in _ALTERNATIVES if name in names), set())


def _unless_given(context: Any, rivals: set[str], value: Any) -> Any:
    """The value, or None where the command line, which is read before, gives a rival of it."""
    sources = [context.get_parameter_source(name) for name in rivals]
    return None if any(s is not None and s.name == "COMMANDLINE" for s in sources) else value


# -- writing ------------------------------------------------------------------------------------------------


def recipe_text(parameters: Mapping[str, Any], model: str) -> str:
    """The recipe that says what `prune` was told, defaults included, and which ``model`` (a hash) it met.

    Paths are as they were given, so it says nothing of this machine that the user did not.
    """
    tree = _sections(LAYOUT, lambda parameter: _written(parameter, parameters[parameter]))
    tree["paths_from"] = "working-folder"
    tree["made_by"] = {"model": model, "onnx_mdp": __version__, "python": platform.python_version()}
    if has_onnxruntime():
        tree["made_by"]["onnxruntime"] = str(import_onnxruntime().__version__)
    return f"# `onnx-mdp prune --config` with this file does the same again.\n{yaml_text(tree)}"


def _sections(layout: Mapping[str, Any], value: Callable[[str], Any]) -> dict[str, Any]:
    return {
        key: value(inner) if isinstance(inner, str) else _sections(inner, value)
        for key, inner in layout.items()
    }


def _written(parameter: str, value: Any) -> Any:
    form = FORMS.get(parameter)
    if form is not None and (value or not form.optional):
        return form.from_option(value or [])
    return value.as_posix() if isinstance(value, Path) else value


def commented(form: type[BaseModel]) -> str:
    """A recipe in which every key stands as a comment, with its default and what it means."""
    lines: list[str] = []

    def add(known: Mapping[str, Any], indent: str) -> None:
        for key, field in known.items():
            lines.append(f"{indent}# {field.description}")
            if _is_section(field.annotation):
                lines.append(f"{indent}{key}:")
                add(field.annotation.model_fields, indent + "  ")
            else:
                default = field.get_default(call_default_factory=True)
                lines.append(f"{indent}# {yaml_text({key: default}).strip()}")

    add(form.model_fields, "")
    return "\n".join(lines) + "\n"
