"""Recipes: each option of `prune` has one place there, faults are named, a resolved copy does the same."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from command_line import Run, is_refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_planning import DEMO, made_up_table
from zoo import analyse

import onnx_mdp
from onnx_mdp.cli import prune_commands
from onnx_mdp.cli.app import app
from onnx_mdp.cli.pruning_recipe import load_recipe, recipe_form, recipe_text, schema
from onnx_mdp.cli.recipe_layout import FORMS, leaves
from onnx_mdp.tables.table_file import table_json
from onnx_mdp.yaml_input import read_tree, yaml_text

COMMANDS: Any = typer.main.get_command(app)
PRUNE: Any = COMMANDS.commands["prune"]
FORM = recipe_form(PRUNE)


@pytest.fixture
def demo(run: Run) -> Run:
    """Run a command beside the demo network and its table."""
    _, structure = analyse(DEMO)
    Path("net.onnx").write_bytes(DEMO.read_bytes())
    Path("table.json").write_text(table_json(structure, made_up_table(structure)))
    return run


def options() -> dict[str, inspect.Parameter]:
    """The parameters of `prune` that a recipe can hold."""
    found = dict(inspect.signature(PRUNE.callback).parameters)
    return {name: p for name, p in found.items() if name not in ("config", "context")}


# --- the form ------------------------------------------------------------------------------------------


def test_a_recipe_holds_every_option_of_prune_once_and_nothing_else() -> None:
    assert sorted(parameter for _, parameter in leaves()) == sorted(options())


def test_every_key_is_described_and_names_its_option() -> None:
    flags = {flag for parameter in PRUNE.params for flag in parameter.opts}
    fields = [FORM.model_fields[key] for key in ("paths_from", "made_by")]
    assert all(field.description for field in fields)
    for dotted, parameter in leaves():
        form: Any = FORM
        *sections, key = dotted.split(".")
        for section in sections:
            form = form.model_fields[section].annotation
        field = form.model_fields[key]
        assert field.description
        assert field.json_schema_extra["x-option"] in flags | {"MODEL.onnx"}, parameter


def test_defaults_are_those_of_the_command() -> None:
    tree = yaml.safe_load(recipe_text({n: p.default for n, p in options().items()} | {"model": None}, "0"))
    defaults = FORM().model_dump()
    for key in ("paths_from", "made_by"):
        tree.pop(key), defaults.pop(key)
    assert tree == defaults


def test_the_schema_is_a_schema(run: Run) -> None:
    printed = json.loads(run("config", "schema").out)
    assert printed == schema(FORM)
    assert printed["additionalProperties"] is False
    assert printed["$defs"]["Device"]["properties"]["threads"]["minimum"] == 1


def test_the_example_holds_every_key_and_changes_nothing(run: Run) -> None:
    text = run("config", "init").out
    assert run("config", "init", "-o", "onnx-mdp.yaml").code == 0
    assert Path("onnx-mdp.yaml").read_text() == text
    is_refused(run("config", "init", "-o", "onnx-mdp.yaml"), 2, "onnx-mdp.yaml exists")
    assert load_recipe(Path("onnx-mdp.yaml"), FORM) == FORM()
    bare = "".join(line.partition("# ")[0] + line.partition("# ")[2] for line in text.splitlines(True))
    keys = {line.strip().partition(":")[0] for line in bare.splitlines()}
    assert {dotted.rpartition(".")[2] for dotted, _ in leaves()} <= keys


# --- faults --------------------------------------------------------------------------------------------

FAULTS = {
    "prunning: {}": "onnx-mdp.yaml: prunning is unknown; did you mean pruning?",
    "pruning: {min_widht: {a: 1}}": "pruning.min_widht is unknown; did you mean pruning.min_width?",
    "pruning: {ignored: {name: [a]}}": "pruning.ignored.name is unknown; did you mean pruning.ignored.names?",
    "threads: 4": "threads is unknown; did you mean device.threads?",
    "target-ms: 4": "target-ms is unknown; did you mean target.ms?",
    "ep: cuda": "ep is unknown; did you mean device.provider?",
    "preprocess: none": "preprocess is unknown; did you mean data.preprocess?",
    "ignored: {types: [Gemm]}": "ignored is unknown; did you mean pruning.ignored?",
    "pruning: {magic: 1}": "pruning.magic is unknown; known are exclude, ignored",
    "device: {threads: many}": "device.threads: input should be a valid integer, and not 'many'",
    "device: {threads: 0}": "device.threads: input should be greater than or equal to 1",
    "device: {threads: true}": "device.threads: input should be a valid integer",
    "solver: {gap: .inf}": "solver.gap: input should be a finite number",
    "solver: exact": "solver: input should be",
    "target: {ms: '3'}": "target.ms: input should be a valid number, and not '3'",
    "inputs: {shapes: {x: [1, a]}}": "inputs.shapes: input should be a valid integer",
    "- model": "onnx-mdp.yaml is no recipe",
    "": "onnx-mdp.yaml is no recipe",
    "seed: 1\nseed: 2": "line 2: the key 'seed' stands there twice",
    "model: [": "onnx-mdp.yaml is no YAML that can be read",
    "a: &x [1]\nb: [*x, *x]": "line 2: an alias",
    "a: !!python/object/apply:os.system [ls]": "tag",
    "a: !!binary aGFsbG8=": "tag",
    "? [a]\n: 1": "a key must be a word",
    "a: 1\n---\nb: 2": "onnx-mdp.yaml is no YAML that can be read",
    "[" * 5000: "nested more than 16 deep",
    "seed: " + "9" * 5000: "cannot be read",
    "model: \x07": "cannot be read",
    "# " + "x" * 2**18: "larger than 256 kB",
}


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: text[:30])
def test_a_fault_is_one_sentence_with_its_place(run: Run, text: str) -> None:
    Path("onnx-mdp.yaml").write_text(text)
    is_refused(run("config", "check", "onnx-mdp.yaml"), 2, FAULTS[text])
    is_refused(run("prune", DEMO, "--config", "onnx-mdp.yaml"), 2, FAULTS[text])


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('{"seed": 1, "seed": 2}', "the key 'seed' stands there twice"),
        ("[" * 100_000, "cannot be read"),
        ('{"target": {"ms": NaN}}', "target.ms: input should be a finite number"),
        ('{"sead": 1}', "onnx-mdp.json: sead is unknown; did you mean seed?"),
    ],
)
def test_json_is_read_as_strictly(run: Run, text: str, fragment: str) -> None:
    Path("onnx-mdp.json").write_text(text)
    is_refused(run("config", "check", "onnx-mdp.json"), 2, fragment)


def test_a_recipe_that_is_not_there_is_refused(run: Run) -> None:
    is_refused(run("prune", DEMO, "--config", "onnx-mdp.yaml"), 2, "onnx-mdp.yaml cannot be read")


# --- YAML ----------------------------------------------------------------------------------------------

TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="ascii")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@example(tree={"\x85": "a\u2028b", "c": ["\u2029", "d\ne"]})
@given(tree=TREES)
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.mktemp("yaml") / "tree.yaml"
    path.write_text(yaml_text(tree), encoding="utf-8")
    assert read_tree(path, "") == tree


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "tree.yaml"
    path.write_text("{a: no, b: 1e-6, c: 010, d: 12:30, e: 2020-01-01, f: ~, 7: on, <<: x}")
    expected = {
        "a": "no",
        "b": 1e-6,
        "c": 10,
        "d": "12:30",
        "e": "2020-01-01",
        "f": None,
        "7": "on",
        "<<": "x",
    }
    assert read_tree(path, "") == expected


# --- options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "texts"),
    [
        ("also", ["a=b.json=3"]),
        ("ep_option", ["device_id=1", "flags=a=b"]),
        ("input_shape", ["x:0:1,3,8,8", "y:4"]),
        ("input_shape", ["1,3,8,8"]),
        ("min_width", ["*=0.5", "stem=8"]),
        ("width", ["a=b=64"]),
        ("state", ["memory=memory/next=1"]),
        ("repair", "bias,bn"),
        ("repair", "none"),
        ("schedule", "0.33,0.67"),
    ],
)
def test_an_option_of_several_values_survives_a_recipe(parameter: str, texts: Any) -> None:
    form = FORMS[parameter]
    assert form.to_option(form.from_option(texts)) == texts


def test_of_two_entries_for_one_pattern_the_later_one_holds_at_its_place() -> None:
    assert list(FORMS["width"].from_option(["a=1", "*=2", "a=3"]).items()) == [("*", 2), ("a", 3)]


def solved(run: Run, *arguments: object) -> dict[str, Any]:
    outcome = run("solve", *arguments, "-o", "plan.json", "--overwrite", "--json")
    assert outcome.code == 0, outcome.err
    plan: dict[str, Any] = json.loads(Path("plan.json").read_text())
    return outcome.document | {"keep": plan["keep"]}


def test_the_command_line_goes_before_the_recipe_and_the_recipe_before_the_default(demo: Run) -> None:
    name = "/stage3/stage3.0/branch/a/conv/Conv"
    recipe = {
        "model": "net.onnx",
        "device": {"table": "table.json"},
        "target": {"ratio": 0.8},
        "solver": {"name": "greedy"},
        "pruning": {"exclude": [name]},
        "output": {"model": "slim.onnx", "overwrite": True},
    }
    Path("onnx-mdp.yaml").write_text(yaml_text(recipe))
    assert solved(demo, "--config", "onnx-mdp.yaml")["solver"] == "greedy"
    assert name not in solved(demo, "--config", "onnx-mdp.yaml")["keep"]
    assert not Path("slim.onnx").exists()
    assert solved(demo, "--solver", "exact", "--config", "onnx-mdp.yaml")["solver"] == "exact"
    by_flags = solved(demo, "net.onnx", "table.json", "--target-ratio", 0.6, "--exclude", "/stem*")
    by_both = solved(
        demo, "--config", "onnx-mdp.yaml", "--target-ratio", 0.6, "--exclude", "/stem*", "--solver", "exact"
    )
    assert by_both["keep"] == by_flags["keep"]


def test_a_target_of_the_command_line_takes_the_place_of_the_recipes(demo: Run) -> None:
    Path("onnx-mdp.yaml").write_text("{model: net.onnx, device: {table: table.json}, target: {ratio: 0.9}}")
    fast = solved(demo, "--config", "onnx-mdp.yaml", "--target-ms", 1.0)
    assert fast["predicted_ms"] <= 1.0
    cheap = solved(demo, "--config", "onnx-mdp.yaml", "--min-importance", 0.5)
    assert cheap["importance_share"] >= 0.5
    Path("onnx-mdp.yaml").write_text(
        "{model: net.onnx, device: {table: table.json}, target: {ms: 1, ratio: 1}}"
    )
    is_refused(demo("solve", "--config", "onnx-mdp.yaml"), 2, "give exactly one of")


def test_paths_start_from_the_folder_of_the_recipe(demo: Run) -> None:
    Path("recipes").mkdir()
    text = "{model: ../net.onnx, device: {table: ../table.json}, target: {ratio: 0.8}}"
    Path("recipes/onnx-mdp.yaml").write_text(text)
    assert solved(demo, "--config", "recipes/onnx-mdp.yaml")["keep"]
    Path("recipes/onnx-mdp.yaml").write_text(text.replace("..", ".")[:-1] + ", paths_from: working-folder}")
    assert solved(demo, "--config", "recipes/onnx-mdp.yaml")["keep"]


def test_other_commands_take_what_they_have(demo: Run) -> None:
    Path("onnx-mdp.yaml").write_text(
        "{model: net.onnx, inputs: {batch: 2}, device: {table: table.json}, finetune: {patience: 3},"
        " output: {overwrite: true}}"
    )
    assert "[2, 3, 64, 64]" in demo("analyze", "--config", "onnx-mdp.yaml").err
    assert demo("pareto", "--config", "onnx-mdp.yaml", "--batch", 1, "--targets", "0.8").code == 0
    is_refused(
        demo("pareto", "--config", "onnx-mdp.yaml", "--batch", 1, "-o", "table.json"), 2, "table.json exists"
    )


RICH = """
--target-ratio 0.8 --also a=b.json=3 --max-params 2e6 --seed 5 --input-shape image:1,3,64,64
--batch 2 --state a=b --ep openvino --ep-option device_type=NPU --ep-precision float16 --threads 3
--store s.db --lut t.json --choices 9 --data x.npz --samples 7 --labels y --criterion taylor
--loss fisher --scores s.npz --exclude a* --exclude b --ignore-name n --ignore-pattern p.*
--ignore-type Gemm --min-width *=0.5 --width c=8 --multiple 8
--tie-blocks --solver highs --time-limit 3 --gap 1e-3 --repair bias,bn --finetune --train t.npz --epochs 3
--features f* --lr 1e-3 --mode soft --schedule 0.3,0.6 --freeze-bn -o slim.onnx --overwrite --quiet
"""


@pytest.mark.parametrize("arguments", ["", RICH], ids=["defaults", "rich"])
def test_a_resolved_recipe_asks_for_the_same(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    asked: list[Any] = []

    def record(path: Path, options: Any, wanted: Any) -> int:
        asked.append((path, options, replace(wanted, parameters=None)))
        Path("slim.recipe.yaml").write_text(recipe_text(wanted.parameters, "0"))
        return 0

    monkeypatch.setattr(prune_commands, "run_prune", record)
    assert run("prune", "net.onnx", *arguments.split()).code == 0
    first = Path("slim.recipe.yaml").read_text()
    assert run("prune", "--config", "slim.recipe.yaml").code == 0
    assert asked[0] == asked[1]
    assert Path("slim.recipe.yaml").read_text() == first


def test_a_recipe_is_no_output_of_a_run_that_wrote_nothing(demo: Run) -> None:
    outcome = demo("prune", "net.onnx", "--target-ratio", 2.0, "--json")
    assert outcome.document["status"] == "nothing_to_do"
    assert outcome.document["recipe"] is None
    assert not list(Path().glob("*.recipe.yaml"))


def test_the_recipes_of_the_page_are_recipes(tmp_path: Path) -> None:
    page = (Path(onnx_mdp.__file__).parent / "docs" / "recipe.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "onnx-mdp.yaml").write_text(block)
        load_recipe(tmp_path / "onnx-mdp.yaml", FORM)
