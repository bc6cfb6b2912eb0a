"""The library as its users call it: stages that fit together, and data and models in every form."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_mdp
from onnx_mdp.data.calibration import CalibrationData
from onnx_mdp.data.feeds import input_types, read_data
from onnx_mdp.errors import OutputError, UsageError
from onnx_mdp.model_io import load_model, model_bytes
from onnx_mdp.shapes_data import shapes
from onnx_mdp.tables.latency import predict_ms
from onnx_mdp.tables.variants import variant_of_plan

DEMO = Path(str(files("onnx_mdp") / "demo_model" / "shapes_resnet.onnx"))
IMAGES, LABELS = shapes(12, seed=3)
SHAPES, TYPES = {"image": (1, 3, 64, 64)}, {"image": np.dtype(np.float32)}


@pytest.fixture(scope="module")
def structure() -> onnx_mdp.Structure:
    return onnx_mdp.analyze(DEMO)


@pytest.fixture(scope="module")
def table(structure: onnx_mdp.Structure, tmp_path_factory: pytest.TempPathFactory) -> onnx_mdp.LatencyTable:
    return onnx_mdp.profile(structure, store=tmp_path_factory.mktemp("store") / "lut.sqlite")


def test_every_public_name_is_there_and_declared_for_type_checkers() -> None:
    assert [name for name in onnx_mdp.__all__ if getattr(onnx_mdp, name) is None] == []
    tree = ast.parse(Path(onnx_mdp.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.asname: f"{node.module.removeprefix('onnx_mdp.')}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    assert declared == onnx_mdp._HOMES
    assert sorted([*declared, "__version__"]) == sorted(onnx_mdp.__all__)
    with pytest.raises(AttributeError, match="nonesuch"):
        onnx_mdp.nonesuch  # noqa: B018


def test_the_import_loads_nothing_else() -> None:
    heavy = {"numpy", "onnx", "onnx_ir", "onnxruntime", "scipy", "pyomo", "pydantic", "rich", "torch"}
    code = f"import sys, onnx_mdp; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


class Reader:
    """A reader as ONNX Runtime's quantisation has them."""

    def __init__(self) -> None:
        self.left = [{"image": image[None]} for image in IMAGES]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop(0) if self.left else None


def batches() -> Iterator[dict[str, Any]]:
    yield {"image": IMAGES[:5]}
    yield {"image": IMAGES[5:]}


def archive(folder: Path) -> Path:
    np.savez(folder / "data.npz", image=IMAGES)
    return folder / "data.npz"


FORMS: dict[str, Callable[[Path], Any]] = {
    "path": archive,
    "text": lambda folder: str(archive(folder)),
    "dict": lambda folder: {"image": IMAGES},
    "array": lambda folder: IMAGES,
    "list": lambda folder: [{"image": image[None]} for image in IMAGES],
    "generator": lambda folder: batches(),
    "function": lambda folder: batches,
    "reader": lambda folder: Reader(),
    "double": lambda folder: {"image": IMAGES.astype(np.float64)},
    "loaded": lambda folder: read_data(IMAGES, SHAPES, TYPES),
}


@pytest.mark.parametrize("form", FORMS)
def test_data_in_every_form_gives_the_same_feeds(form: str, tmp_path: Path) -> None:
    feeds = read_data(FORMS[form](tmp_path), SHAPES, TYPES).feeds
    assert len(feeds) == len(IMAGES)
    for feed, image in zip(feeds, IMAGES, strict=True):
        np.testing.assert_array_equal(feed["image"], image[None])
        assert feed["image"].flags.c_contiguous


def test_labels_come_along_and_no_more_than_the_samples_are_read() -> None:
    def endless() -> Iterator[tuple[Any, Any]]:
        while True:
            yield IMAGES, LABELS

    data = read_data(endless, {"image": (2, 3, 64, 64)}, TYPES, samples=7)
    assert data.labels is not None
    assert [len(feed["image"]) for feed in data.feeds] == [2, 2, 2]  # an incomplete batch is dropped
    np.testing.assert_array_equal(np.concatenate(data.labels), LABELS[:6])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "0 samples do not fill a batch"),
        ({"picture": IMAGES}, "gives the inputs picture, but the model takes image"),
        ({"image": IMAGES[:, :2]}, "but the model takes"),
        ({"image": IMAGES.astype(str)}, "but the model takes"),
        ([(IMAGES, LABELS[:3])], "different numbers of rows"),
        (7, "cannot be iterated"),
        ("nowhere.npz", "does not exist"),
        ({"image": np.full((1, 3, 64, 64), 1e300)}, "no finite float32"),
    ],
)
def test_data_that_does_not_fit_is_refused(data: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        read_data(data, SHAPES, TYPES)


def test_models_in_every_form_are_analysed_alike(structure: onnx_mdp.Structure) -> None:
    model = load_model(DEMO)
    forms: list[Any] = [str(DEMO), onnx.load(DEMO), model]
    for form in forms:
        assert onnx_mdp.analyze(form).shadow.source == structure.shadow.source
    pytest.importorskip("onnx_graphsurgeon")
    graph = onnx_mdp.to_graph(model)
    assert len(onnx_mdp.analyze(graph).prunable) == len(structure.prunable)
    assert isinstance(onnx_mdp.to_proto(model), onnx.ModelProto)


def test_the_stages_give_what_the_whole_gives(
    structure: onnx_mdp.Structure, table: onnx_mdp.LatencyTable, tmp_path: Path
) -> None:
    seen: set[str] = set()
    importance = onnx_mdp.score(structure, IMAGES, criterion="activation")
    result = onnx_mdp.prune(
        DEMO,
        target_ratio=0.7,
        data=IMAGES,
        criterion="activation",
        table=table,
        progress=lambda stage, done, total: seen.add(stage),
    )
    assert {"measure", "verify"} <= seen
    assert result.plan is not None
    assert result.model is not None
    # What is best at some latency is best at its own; the loop only looks for which latency to ask for. What
    # weights cost may differ a little, for both come to the share that is read again from another side.
    own_ms = predict_ms(table, structure, variant_of_plan(structure, result.plan)) + 1e-5
    plan = onnx_mdp.solve(structure, importance, table, target_ms=own_ms)
    room = 5e-3 if table.calibration.ms_per_mb else 1e-9
    assert plan.importance_share == pytest.approx(result.plan.importance_share, abs=room)
    slim = onnx_mdp.rewrite(structure, plan)
    assert onnx_mdp.verify(DEMO, slim, plan, IMAGES).verified
    assert not onnx_mdp.verify(DEMO, _damaged(slim), plan).verified
    assert model_bytes(onnx_mdp.apply(DEMO, result.plan)) == model_bytes(result.model)
    if result.status == "met":
        model, plan_file, figure = onnx_mdp.save(result, tmp_path / "slim.onnx")
        assert figure.read_text(encoding="utf-8").lstrip().startswith("<?xml")
        assert model_bytes(onnx_mdp.apply(DEMO, plan_file)) == model.read_bytes()
        with pytest.raises(OutputError, match="exists"):
            onnx_mdp.save(result, model)


def _damaged(model: ir.Model) -> ir.Model:
    proto = onnx_mdp.to_proto(model)
    largest = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(largest).copy()
    values.reshape(-1)[: values.size // 2] += 1
    largest.CopyFrom(onnx.numpy_helper.from_array(values, largest.name))
    return load_model(proto)


def test_a_front_is_the_plans_one_by_one(structure: onnx_mdp.Structure, table: onnx_mdp.LatencyTable) -> None:
    importance = onnx_mdp.score(structure)
    targets = [ratio * table.base_ms for ratio in (0.01, 0.4, 0.7)]
    front = onnx_mdp.pareto(structure, importance, table, targets)
    assert [plan.status for plan in front] == ["infeasible", "optimal", "optimal"]
    assert front[0].fastest_ms is not None
    assert front[0].fastest_ms > targets[0]
    for plan, target in zip(front[1:], targets[1:], strict=True):
        alone = onnx_mdp.solve(structure, importance, table, target_ms=target)
        assert plan.predicted_ms is not None
        assert plan.predicted_ms <= target
        assert alone.importance_share == pytest.approx(plan.importance_share, abs=1e-9)


def test_a_table_travels(structure: onnx_mdp.Structure, table: onnx_mdp.LatencyTable, tmp_path: Path) -> None:
    onnx_mdp.save_table(structure, table, tmp_path / "table.json")
    read = onnx_mdp.load_table(tmp_path / "table.json", structure)
    assert read.coefficients == dict(table.coefficients)
    assert read.choices == dict(table.choices)


def test_a_repaired_file_is_verified_as_its_slicing(
    structure: onnx_mdp.Structure, table: onnx_mdp.LatencyTable
) -> None:
    plan = onnx_mdp.solve(structure, onnx_mdp.score(structure), table, target_ratio=0.6)
    slim = onnx_mdp.apply(DEMO, plan)
    repaired = onnx_mdp.repair(DEMO, slim, plan, IMAGES, methods=["bias"])
    assert model_bytes(repaired.model) != model_bytes(slim)
    assert onnx_mdp.verify(DEMO, repaired.model, plan).verified


def test_ignored_nodes_keep_their_weights(
    structure: onnx_mdp.Structure, table: onnx_mdp.LatencyTable
) -> None:
    importance = onnx_mdp.score(structure)
    free = onnx_mdp.solve(structure, importance, table, target_ratio=0.15)
    node = next(iter(free.keep))  # a dimension is called after the node that makes it
    ignored = onnx_mdp.IgnoredScope(names=(node,))
    rules = onnx_mdp.width_rules(DEMO, structure, None, ignored)
    assert node in rules.held.dimensions
    assert node not in onnx_mdp.solve(structure, importance, table, target_ratio=0.3, rules=rules).keep
    result = onnx_mdp.prune(DEMO, target_ratio=0.6, table=table, ignored=ignored)
    assert result.plan is not None
    assert rules.held.dimensions & set(result.plan.keep) == set()
    with pytest.raises(UsageError, match="Gemn"):
        onnx_mdp.width_rules(DEMO, structure, None, onnx_mdp.IgnoredScope(types=("Gemn",)))


@pytest.mark.parametrize("targets", [{}, {"target_ms": 1, "target_ratio": 1}, {"target_ms": -1}])
def test_a_prune_needs_one_target(targets: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="target"):
        onnx_mdp.prune(DEMO, **targets)


def test_what_met_no_target_is_not_saved(tmp_path: Path) -> None:
    result = onnx_mdp.prune(DEMO, target_ratio=3)
    with pytest.raises(OutputError, match="nothing_to_do"):
        onnx_mdp.save(result, tmp_path / "slim.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_torch_thread")
def test_training_by_a_function_is_training_by_a_file(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")

    def loader(request: onnx_mdp.LoaderRequest) -> list[Any]:
        rows = request.batch
        return [(IMAGES[start : start + rows], LABELS[start : start + rows]) for start in range(0, 12, rows)]

    np.savez(tmp_path / "val.npz", image=IMAGES, labels=LABELS)
    (tmp_path / "loader.py").write_text(
        "import numpy as np\n"
        f"held = np.load({str(tmp_path / 'val.npz')!r})\n"
        "def batches(request):\n"
        "    cuts = range(0, 12, request.batch)\n"
        "    return [tuple(held[k][c:c + request.batch] for k in ('image', 'labels')) for c in cuts]\n"
    )
    overrides = {"batch": 4, "steps": 3, "lr": 1e-3}
    told: list[str] = []
    one = onnx_mdp.finetune(DEMO, data=loader, overrides=overrides, report=told.append)
    two = onnx_mdp.finetune(DEMO, DEMO, data=f"{tmp_path / 'loader.py'}:batches", overrides=overrides)
    three = onnx_mdp.finetune(DEMO, data=f"{tmp_path / 'loader.py'}:batches", overrides=overrides)
    assert one.run.steps == 3
    assert any("learning from" in line for line in told)
    assert model_bytes(one.model) == model_bytes(three.model)
    assert "original" in two.objective


def test_the_types_of_inputs_are_those_of_the_file(structure: onnx_mdp.Structure) -> None:
    assert input_types(structure.shadow.model) == input_types(load_model(DEMO)) == TYPES
    assert isinstance(read_data(IMAGES, SHAPES, TYPES), CalibrationData)
