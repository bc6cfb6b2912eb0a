"""The house rules that a machine can check: layering, sizes, exact ``__all__``, lint, types, no surprises."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "onnx_mdp"

# The reading order: a module imports only modules that stand before it. The package itself ("") is what a
# library user sees, so it stands after `api` and before the command line.
ORDER = (
    "errors",
    "_version",
    "files",
    "untrusted",
    "supervision",
    "concurrency",
    "json_input",
    "yaml_input",
    "document_forms",
    "protobuf_forms",
    "model_io",
    "large_models",
    "numerics",
    "numerics.independence",
    "numerics.integer_form",
    "numerics.qdq_form",
    "numerics.precision",
    "numerics.double_precision",
    "running",
    "running.accelerators",
    "running.provider_options",
    "running.providers",
    "running.runtime",
    "running.computation",
    "running.bound_session",
    "running.timing",
    "running.placement",
    "analysis",
    "analysis.binding",
    "analysis.static_shapes",
    "analysis.stored_weights",
    "analysis.projections",
    "analysis.normal_form",
    "analysis.shadow",
    "rules.labelling",
    "rules.movement",
    "rules.elementwise",
    "rules.quantisation",
    "rules.attention",
    "rules.einsum",
    "rules.contraction",
    "rules.statistics",
    "rules.selection",
    "rules",
    "analysis.stored_axes",
    "analysis.operator_coverage",
    "analysis.coupling",
    "analysis.labels",
    "analysis.blocks",
    "analysis.structure",
    "analysis.states",
    "plan",
    "surgery",
    "surgery.fusion",
    "surgery.attention_scale",
    "surgery.operand_patches",
    "surgery.rewriting",
    "surgery.masking",
    "surgery.gating",
    "surgery.ties",
    "surgery.comparison",
    "surgery.verification",
    "surgery.changed_weights",
    "torch_backend",
    "training.kernels.registry",
    "training.kernels.elementwise",
    "training.kernels.convolutions",
    "training.kernels.pooling",
    "training.kernels.normalisation",
    "training.kernels.attention",
    "training.kernels.recurrence",
    "training.kernels.movement",
    "training.kernels.selection",
    "training.kernels.reduction",
    "training.kernels.resampling",
    "training.kernels.regions",
    "training.kernels",
    "training.trainable",
    "training.program",
    "training.fixed_sizes",
    "training.interpreter",
    "training.bridge",
    "training.batchnorm",
    "training.score_losses",
    "training.gradients",
    "repairing",
    "repairing.stepwise",
    "repairing.linear_layers",
    "repairing.layer_samples",
    "repairing.output_moments",
    "repairing.least_squares",
    "repairing.nearby",
    "importance",
    "importance.score_file",
    "importance.gradient_scores",
    "importance.output_drift",
    "importance.scoring",
    "data",
    "data.images",
    "data.targets",
    "data.calibration",
    "data.feeds",
    "repairing.repair",
    "training.augmentation",
    "training.batches",
    "training.sources",
    "training.loaders",
    "training.data",
    "training.recipes",
    "training.losses",
    "training.batched",
    "training.agreement",
    "training.distributed",
    "training.checkpoint",
    "training.interruption",
    "training.optimizers",
    "training.masks",
    "training.loop",
    "training.finetuning",
    "training.preparation",
    "training",
    "tables",
    "tables.nonnegative",
    "tables.lut_records",
    "tables.lut_file",
    "tables.lut_store",
    "tables.session",
    "tables.cost_terms",
    "tables.memory",
    "tables.profiling",
    "tables.granularity",
    "tables.variants",
    "tables.staircases",
    "tables.memory_fit",
    "tables.related",
    "tables.primitive_worker",
    "tables.primitives",
    "tables.windows",
    "tables.compiled_profiling",
    "tables.window_fit",
    "tables.calibrating",
    "tables.latency",
    "planning",
    "planning.problem",
    "solvers.buckets",
    "solvers.network",
    "solvers.compilation",
    "solvers.dual",
    "solvers.compiled",
    "solvers.incumbent",
    "solvers.beliefs",
    "solvers.labels",
    "solvers.pareto_labels",
    "solvers.deepening",
    "solvers.search",
    "solvers.exact",
    "solvers.exhaustive",
    "solvers.greedy",
    "solvers.linear",
    "solvers.milp_tables",
    "solvers.pyomo_milp",
    "solvers.mindtpy",
    "solvers",
    "solvers.fronts",
    "planning.ignored_scope",
    "planning.width_rules",
    "planning.resources",
    "planning.formulation",
    "planning.solution_plan",
    "planning.programs",
    "planning.explain",
    "tables.table_file",
    "planning.closed_loop",
    "bench",
    "handover",
    "pipeline",
    "serving",
    "serving.signature",
    "serving.batching",
    "serving.triton",
    "serving.golden_outputs",
    "serving.mlflow_model",
    "training.soft_masking",
    "reports",
    "reports.frozen_parts",
    "reports.time_shares",
    "reports.fidelity",
    "reports.documents",
    "reports.report",
    "reports.repair_report",
    "reports.figures",
    "reports.plan_report",
    "machine",
    "reports.report_file",
    "reports.report_contents",
    "reports.pages",
    "reports.quantities",
    "reports.report_evidence",
    "reports.report_sections",
    "reports.inline_svg",
    "reports.html_page",
    "reports.markdown_page",
    "reports.verify_summary",
    "reports.result_files",
    "api",
    "api.stages",
    "api.pruning",
    "api.training",
    "",
    "integrations",
    "integrations.olive_data",
    "integrations.olive_parameters",
    "integrations.olive_pass",
    "integrations.olive_workflow",
    "cli",
    "cli.console",
    "cli.recipe_layout",
    "cli.pruning_recipe",
    "cli.options",
    "cli.finetune_commands",
    "cli.mask_commands",
    "cli.commands",
    "cli.verify_commands",
    "cli.export_commands",
    "cli.report_commands",
    "cli.prune_commands",
    "cli.lut_commands",
    "doctor",
    "cli.device_commands",
    "cli.doctor_commands",
    "fleet",
    "cli.fleet_commands",
    "cli.repair_commands",
    "cli.olive_commands",
    "cli.plan_commands",
    "shapes_data",
    "demo",
    "cli.parameters",
    "cli.finetune_parameters",
    "cli.lut",
    "cli.recipe_commands",
    "cli.recipe",
    "cli.device",
    "cli.export",
    "cli.app",
    "__main__",
)
MAX_LINES = 400
REGISTRIES = {
    "app.callback",
    "app.command",
    "config.command",
    "device.command",
    "export.command",
    "kernel",
    "lut.command",
    "rule",
}
# Modules that another package loads, and no module of ours that it does not.
LOADED_BY = {
    "integrations.olive_data": "olive",
    "integrations.olive_parameters": "olive",
    "integrations.olive_pass": "olive",
}
MAY_PRINT = {"cli.app", "cli.console", "supervision"}
FORBIDDEN_IMPORTS = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "torch"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


EXAMPLES = PACKAGE / "docs" / "examples"  # scripts that a reader copies, and no part of the package
MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if EXAMPLES not in path.parents}


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(module: ast.Module, package: str = "onnx_mdp") -> Iterator[tuple[str, str]]:
    """(module, name) of every import that can run; ``import a.b`` gives ``("a.b", "")``.

    Imports inside functions count, those under ``if TYPE_CHECKING`` do not.
    """
    skipped = {
        id(inner)
        for node in ast.walk(module)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in (n for n in ast.walk(module) if id(n) not in skipped):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the absolute name"
            yield from ((str(node.module), alias.name) for alias in node.names)


def own_imports(name: str) -> set[str]:
    """Modules of the package that a module imports."""
    found = set()
    for module, imported in imports(tree(name)):
        if module.partition(".")[0] == "onnx_mdp":
            inner = module.removeprefix("onnx_mdp").removeprefix(".")
            deeper = f"{inner}.{imported}".removeprefix(".")
            found.add(deeper if deeper in MODULES else inner)
    return found


def test_the_order_names_every_module_once() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downhill(name: str) -> None:
    before = set(ORDER[: ORDER.index(name)])
    uphill = own_imports(name) - before
    assert not uphill, f"{name or 'onnx_mdp'} imports {sorted(uphill)}, which stand after it"


def test_the_layering_check_sees_lazy_imports_and_skips_type_checking() -> None:
    text = (
        "if TYPE_CHECKING:\n    from onnx_mdp.cli.app import app\n"
        "def f():\n    from onnx_mdp.cli.commands import run_prune\n    import pickle as p\n"
    )
    assert list(imports(ast.parse(text))) == [("onnx_mdp.cli.commands", "run_prune"), ("pickle", "")]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_at_most_400_lines(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", MODULES)
def test_the_first_docstring_line_states_the_idea(name: str) -> None:
    doc = ast.get_docstring(tree(name))
    assert doc, "no module docstring"
    assert doc.splitlines()[0].rstrip().endswith((".", ":", ",")) or "." in doc, doc.splitlines()[0]


def public_definitions(module: ast.Module) -> set[str]:
    """Functions, classes and constants of a module that do not begin with an underscore.

    A function under ``@rule(...)`` or ``@app.command(...)`` is reached through its registry. An alias of a
    type (``Vector = npt.NDArray[...]``: a subscript, a union or a dotted name in CamelCase) abbreviates
    annotations. Either is public only where ``__all__`` says so.
    """
    found: set[str] = set()
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            decorators = {ast.unparse(d).partition("(")[0] for d in node.decorator_list}
            if not decorators & REGISTRIES:
                found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {t.id for t in targets if isinstance(t, ast.Name)}
            alias = isinstance(node.value, (ast.Subscript, ast.BinOp, ast.Attribute, ast.Name))
            found |= {n for n in names if not (alias and not n.isupper())}
    return {name for name in found if not name.startswith("_")}


def declared_all(module: ast.Module) -> list[str] | None:
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            value = ast.literal_eval(node.value)
            assert isinstance(value, list)
            return value
    return None


# Ruff's RUF022 order: SCREAMING_CASE, then CamelCase, then the rest.
def isort_key(name: str) -> tuple[int, str]:
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("name", [n for n in MODULES if n not in ("__main__", "_version", "")])
def test_all_is_exact_and_sorted(name: str) -> None:
    module = tree(name)
    declared = declared_all(module) or []
    assert declared == sorted(declared, key=isort_key)
    assert len(declared) == len(set(declared))
    if in_training(name) or name in LOADED_BY:
        pytest.importorskip(LOADED_BY.get(name, "torch"))
    loaded = importlib.import_module(f"onnx_mdp.{name}")
    assert [n for n in declared if not hasattr(loaded, n)] == []
    assert public_definitions(module) - set(declared) == set()


def test_the_publicity_check_can_fail() -> None:
    text = (
        "A = 1\n_B = 2\nVector = npt.NDArray[float]\ndef f(): ...\nclass C: ...\napp = Typer()\n"
        "@rule('Conv')\ndef conv(): ...\n@dataclass(frozen=True)\nclass D: ...\n"
    )
    assert public_definitions(ast.parse(text)) == {"A", "f", "C", "D", "app"}


@pytest.mark.parametrize("name", MODULES)
def test_only_the_screen_prints(name: str) -> None:
    calls = [
        node.lineno
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls or name in MAY_PRINT, f"print() on lines {calls}"


def in_training(name: str) -> bool:
    """Whether a module belongs to the only package that may import torch."""
    return name.partition(".")[0] == "training"


@pytest.mark.parametrize("name", MODULES)
def test_no_pickle_and_torch_only_in_training(name: str) -> None:
    roots = {module.partition(".")[0] for module, _ in imports(tree(name))}
    assert not roots & (FORBIDDEN_IMPORTS - ({"torch"} if in_training(name) else set()))


@pytest.mark.parametrize("name", [n for n in MODULES if not in_training(n)])
def test_what_needs_no_torch_imports_training_only_inside_functions(name: str) -> None:
    above = [s for s in tree(name).body if isinstance(s, (ast.Import, ast.ImportFrom))]
    assert not [statement for statement in above if "onnx_mdp.training" in ast.unparse(statement)]


@pytest.mark.parametrize("name", MODULES)
def test_what_another_package_loads_is_loaded_by_nothing_else(name: str) -> None:
    needs = LOADED_BY.get(name)
    roots = {module.partition(".")[0] for module, _ in imports(tree(name))}
    assert not roots & (set(LOADED_BY.values()) - {needs})
    assert needs or not own_imports(name) & set(LOADED_BY)


def test_everything_else_loads_where_torch_cannot() -> None:
    elsewhere = {name for name in MODULES if in_training(name)} | set(LOADED_BY) | {"__main__"}
    names = [f"onnx_mdp.{name}".rstrip(".") for name in MODULES if name not in elsewhere]
    code = f"""
import importlib, sys, onnx_mdp
class WithoutTorch:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *more):
        return None if name.partition(".")[0] == "torch" else self.finder.find_spec(name, *more)
sys.meta_path[:] = map(WithoutTorch, sys.meta_path)
for name in {names}:
    importlib.import_module(name)
try:
    onnx_mdp.to_torch("model.onnx")
except onnx_mdp.errors.MissingBackendError as error:
    assert "pip install 'onnx-mdp[torch]'" in str(error)
else:
    sys.exit("no error without torch")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_executes_text_or_unpickles(name: str) -> None:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "os.system"), f"line {node.lineno}: {called}"
            options = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
            assert options.get("shell") != "True", f"line {node.lineno}: a shell"
            assert options.get("allow_pickle") != "True", f"line {node.lineno}: a pickle"


def checked(*command: str) -> None:
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed: pip install -e .[dev]")
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_check() -> None:
    checked("ruff", "check", "onnx_mdp", "tests")


def test_ruff_format() -> None:
    checked("ruff", "format", "--check", "onnx_mdp", "tests")


def test_mypy_strict() -> None:
    checked("mypy", "--strict", "-p", "onnx_mdp")
