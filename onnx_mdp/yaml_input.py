"""YAML from elsewhere: plain data of bounded size and depth, no key twice, no reference, no object.

Scalars are those of YAML 1.2's core schema, so that ``no`` is a text and ``1e-6`` a number. A key is always
the text that stands there: names of tensors are often numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from onnx_mdp.errors import UsageError
from onnx_mdp.json_input import read_text

__all__ = ["read_tree", "yaml_text"]

_MOST_BYTES = 2**18
_MOST_DEPTH = 16
_PREFIX = "tag:yaml.org,2002:"
_LINE_BREAKS = "\x85\u2028\u2029"
_SCALARS: Mapping[str, tuple[str, str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", "-+0123456789", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[inIN])", "", text)),
    ),
}


def read_tree(path: Path, what: str) -> Any:
    """The data of a .json file, or of a file of any other name in YAML; ``what`` says which one to give.

    Raises:
        UsageError: it cannot be read, is too large or too deep, or has one key twice.
    """
    text = read_text(path, what)
    if len(text) > _MOST_BYTES:
        raise UsageError(f"{path} is larger than {_MOST_BYTES >> 10} kB: {what}")
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        return yaml.load(text, _Loader)  # a loader that makes plain data and nothing else
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{path} is no YAML that can be read{where}: {error.problem}; {what}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = str(error).partition("\n")[0][:100]
        raise UsageError(f"{path} cannot be read: {why}; {what}") from error


def yaml_text(tree: Any) -> str:
    """Plain data as YAML that `read_tree`, and a reader of YAML 1.1 as well, read as the same data."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


class _Loader(yaml.SafeLoader):
    """Makes mappings, lists and scalars; refuses what could grow (aliases) and all tags but theirs."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[Any, Any]] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A part of the document; the composer calls this for each, within the one that holds it."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _fault("an alias (*name) is not allowed here; write it out", event)
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise _fault(f"it is nested more than {_MOST_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _fault(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _fault("a mapping is expected", node)
    found: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _fault("a key must be a word", key)
        if key.value in found:
            raise _fault(f"the key {key.value!r} stands there twice", key)
        found[key.value] = loader.construct_object(value, deep=True)
    return found


def _list(loader: _Loader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise _fault("a list is expected", node)
    return [loader.construct_object(item, deep=True) for item in node.value]


def _text(loader: _Loader, node: yaml.Node) -> str:
    return str(loader.construct_scalar(node))  # type: ignore[arg-type]


def _refused(loader: _Loader, node: yaml.Node) -> Any:
    raise _fault(f"the tag {node.tag[:60]!r} is not allowed here", node)


def _constructor(read: Callable[[str], Any]) -> Callable[[_Loader, yaml.Node], Any]:
    return lambda loader, node: read(_text(loader, node))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 would take for something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Double quotes for what breaks lines beside the newline: single ones would not keep it."""
        style = '"' if any(mark in data for mark in _LINE_BREAKS) else None
        return self.represent_scalar(f"{_PREFIX}str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _name, (_pattern, _first, _read) in _SCALARS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"{_PREFIX}{_name}", re.compile(f"(?:{_pattern})$"), [*_first, ""])
    _Loader.add_constructor(f"{_PREFIX}{_name}", _constructor(_read))
_Loader.add_constructor(f"{_PREFIX}str", _text)
_Loader.add_constructor(f"{_PREFIX}seq", _list)
_Loader.add_constructor(f"{_PREFIX}map", _mapping)
_Loader.add_constructor(None, _refused)
