"""Ignored nodes: whatever is solved, they stay in the file with the weights and the shapes that they had."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from command_line import Run, is_refused
from test_planning import DEMO, EXACT, made_up_table
from zoo import SMALL_MODELS, SmallModel, analyse, small_model, zoo_structure

from onnx_mdp.analysis.shadow import prepare
from onnx_mdp.analysis.states import kept_shapes
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.importance.scoring import score
from onnx_mdp.plan import PruningPlan, removed_classes
from onnx_mdp.planning.formulation import formulate, to_ns
from onnx_mdp.planning.ignored_scope import IgnoredScope, held_by
from onnx_mdp.planning.solution_plan import plan_from_choice
from onnx_mdp.planning.width_rules import WidthRules
from onnx_mdp.solvers import solve
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.table_file import table_json

ZOO = ("cifar10/resnet20.onnx", "imagenet/mobilenet_v2_tv.onnx", "detect/fastestdet.onnx")
IMITATED = {made.architecture: made for made in SMALL_MODELS if made.exporter == "imitation"}


def called(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name)


def weights(node: ir.Node) -> dict[int, bytes]:
    values = {slot: v.const_value for slot, v in enumerate(node.inputs) if v is not None}
    return {slot: tensor.numpy().tobytes() for slot, tensor in values.items() if tensor is not None}


def smallest_plan(model: ir.Model, structure: Structure, scope: IgnoredScope) -> PruningPlan:
    """Half of the units of every dimension, and no block, but for what the ignored nodes hold."""
    held = held_by(model, structure, scope)
    dimensions = {d.name: d for i, d in enumerate(structure.dimensions) if i in structure.prunable}
    around = {d.block for name, d in dimensions.items() if name in held.dimensions}
    keep = {
        name: tuple(u + row * d.count for row in range(d.rows) for u in range(d.count // 2))
        for name, d in dimensions.items()
        if name not in held.dimensions
    }
    blocks = {block.name for block in structure.blocks} - held.blocks - around
    return PruningPlan(keep=keep, removed_blocks=tuple(sorted(blocks)))


def assert_untouched(
    structure: Structure, plan: PruningPlan, ignored: Sequence[ir.Node], pruned: ir.Model
) -> None:
    """The pruned model holds the nodes with equal weights; their tensors have the shapes that they had."""
    shapes = prepare(pruned, kept_shapes(structure, removed_classes(plan, structure))).shapes
    makers = {str(value.name): node for node in pruned.graph for value in node.outputs}
    for node in ignored:
        for name in (str(v.name) for v in (*node.outputs, *node.inputs) if v is not None and v.name):
            if name in shapes and name in structure.shadow.shapes:
                assert shapes[name] == structure.shadow.shapes[name], (called(node), name)
        output = str(node.outputs[0].name)
        if output not in structure.shadow.constants:
            assert makers[output].op_type == node.op_type
            assert weights(node).items() <= weights(makers[output]).items(), called(node)


@pytest.mark.parametrize("made", IMITATED.values(), ids=str)
def test_ignored_nodes_of_small_models_are_untouched(made: SmallModel, tmp_path: Path) -> None:
    law(*analyse(small_model(made, tmp_path)), rounds=2)


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_ignored_nodes_of_real_models_are_untouched(name: str) -> None:
    law(*zoo_structure(name), rounds=2)


@pytest.mark.slow
@pytest.mark.parametrize("made", [m for m in SMALL_MODELS if m.exporter != "imitation"], ids=str)
def test_ignored_nodes_of_exported_models_are_untouched(made: SmallModel, tmp_path: Path) -> None:
    law(*analyse(small_model(made, tmp_path)), rounds=4)


def law(model: ir.Model, structure: Structure, rounds: int) -> None:
    rng, nodes = np.random.default_rng(0), list(model.graph)
    for _ in range(rounds):
        names = {called(nodes[i]) for i in rng.choice(len(nodes), size=min(len(nodes), 2), replace=False)}
        plan = smallest_plan(model, structure, IgnoredScope(names=tuple(sorted(names))))
        # What stood for an unfolded node has other operators; its tensors are compared below all the same.
        ignored = [node for node in nodes if called(node) in names and not structure.shadow.unfolded]
        assert_untouched(structure, plan, ignored, rewrite(structure, plan))


SCOPES = (
    IgnoredScope(names=("/stage2/stage2.1/branch/a/conv/Conv",)),
    IgnoredScope(patterns=(r"/stage3/.*shortcut",)),
    IgnoredScope(types=("Gemm", "MaxPool")),
)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_a_solve_at_half_the_latency_leaves_them(scope: IgnoredScope) -> None:
    model, structure = analyse(DEMO)
    table, importance = made_up_table(structure), score(structure, "magnitude")
    rules = WidthRules(held=held_by(model, structure, scope))
    formulation = formulate(structure, importance, table, rules)
    solution = solve(formulation.problem, to_ns(0.5 * table.base_ms), "exact", EXACT)
    assert solution.choice is not None
    plan = plan_from_choice(structure, formulation, importance, solution.choice)
    ignored = [
        node
        for node in model.graph
        if called(node) in scope.names
        or node.op_type in scope.types
        or any(re.match(p, called(node)) for p in scope.patterns)
    ]
    assert ignored
    assert plan.keep
    assert_untouched(structure, plan, ignored, rewrite(structure, plan))


def test_a_node_of_a_function_or_a_body_stands_for_what_holds_it() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "mine": 1]>
        main (float[1,3,4,4] x, float[8,3,1,1] u, float[8,8,1,1] v, float[3,8,1,1] w) => (float[1,3,4,4] y)
        { [stem] h = Conv(x, u) [call] a = mine.layer(h, v) [last] y = Conv(a, w) }
        <opset_import: ["": 17], domain: "mine">
        layer (p, q) => (r) { [inner] t = Conv(p, q) [act] r = Relu(t) }"""
    )
    rng = np.random.default_rng(0)
    for value in list(model.graph.input)[1:]:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        model.graph.input.remove(value)
    loaded, structure = analyse(model)
    every = {structure.dimensions[i].name for i in structure.prunable}
    assert len(every) == 2
    for name in ("call", "inner", "act"):
        assert held_by(loaded, structure, IgnoredScope(names=(name,))).dimensions == every
    held = held_by(loaded, structure, IgnoredScope(names=("last",)))
    assert len(held.dimensions) == 1


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--ignore-name", "/head/fc/Gem"), ("ignored name '/head/fc/Gem'", "did you mean '/head/fc/Gemm'?")),
        (("--ignore-pattern", "fc"), ("'fc' matches no node", "from the start of a name")),
        (("--ignore-pattern", "("), ("'(' is no regular expression",)),
        (("--ignore-type", "Conv2D"), ("ignored type 'Conv2D'", "did you mean 'Conv'?")),
        (("--ignore-type", "Conv", "--width", "*=8"), ("an ignored node holds it",)),
    ],
)
def test_what_ignores_nothing_is_refused(run: Run, options: Sequence[str], fragments: Sequence[str]) -> None:
    _, structure = analyse(DEMO)
    Path("table.json").write_text(table_json(structure, made_up_table(structure)))
    outcome = run("solve", DEMO, "table.json", "--target-ratio", 0.5, "-o", "plan.json", *options)
    is_refused(outcome, 2, *fragments)
    assert not Path("plan.json").exists()


def test_a_note_says_what_is_held(run: Run) -> None:
    _, structure = analyse(DEMO)
    Path("table.json").write_text(table_json(structure, made_up_table(structure)))
    outcome = run("solve", DEMO, "table.json", "--target-ratio", 0.8, "--ignore-type", "Gemm")
    assert outcome.code == 0
    assert "ignored nodes: 1; held for them: 1 of 9 dimensions, 0 of 4 blocks" in outcome.err
