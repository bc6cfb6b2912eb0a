"""What the commands of `config` do; a recipe is one of `prune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from onnx_mdp.cli.options import Options
from onnx_mdp.cli.pruning_recipe import commented, load_recipe, recipe_form, schema
from onnx_mdp.files import write_text
from onnx_mdp.yaml_input import yaml_text

__all__ = ["run_check", "run_init", "run_schema"]


def run_schema(context: Any, options: Options) -> int:
    """Print the JSON Schema; with ``--json`` too, it is one."""
    document = schema(_form(context))
    options.screen.result(json.dumps(document, indent=2), document)
    return 0


def run_check(context: Any, path: Path, options: Options) -> int:
    """Print a recipe with all defaults."""
    tree = load_recipe(path, _form(context)).model_dump(mode="json")
    options.screen.result(yaml_text(tree).rstrip(), {"schema_version": 1, "recipe": tree})
    return 0


def run_init(context: Any, options: Options, output: Path | None, *, overwrite: bool) -> int:
    """Print or write a recipe in which every key stands as a comment."""
    text = commented(_form(context))
    if output is not None:
        write_text(text, output, overwrite=overwrite)
    line = text.rstrip() if output is None else f"wrote {output}"
    options.screen.result(line, {"schema_version": 1, "recipe": text, "output": output and str(output)})
    return 0


def _form(context: Any) -> type[BaseModel]:
    return recipe_form(context.find_root().command.commands["prune"])
