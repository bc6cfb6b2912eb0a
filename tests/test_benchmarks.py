"""Laws of the benchmarks: what a verdict may say, what a process is charged with, what a second look sees."""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest

import onnx_mdp
from benchmarks import (
    ablations,
    attempts,
    configurations,
    drift_correction,
    equal_latency,
    fleet_cost,
    full_size,
    harness,
    latency_prediction,
    paper_figures,
    prune_cells,
    pruned_structure,
    result_tables,
    sized_models,
    targets,
    warm_up,
    zoo_coverage,
)
from benchmarks import run as suite
from benchmarks.checking import Look, input_shapes, parameters
from benchmarks.harness import NOISE_LIMIT, Verdict, combined, judge
from benchmarks.layered_module import layered_module
from benchmarks.measuring import Ratios, measured_ratios, table_from_nothing
from benchmarks.metered import Metered, run_metered
from benchmarks.model_files import model_path
from benchmarks.prediction_figure import prediction_svg
from benchmarks.rival_predictions import linear_ratios, macs_ratios, table_ratios
from benchmarks.samples import divergence, samples_for, top1
from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MeasurementError, UsageError, VerificationError
from onnx_mdp.model_io import load_model, parameter_count
from onnx_mdp.numerics.double_precision import run_in_double
from onnx_mdp.pipeline import analyze
from onnx_mdp.plan import PruningPlan
from onnx_mdp.running.runtime import Runtime, open_session
from onnx_mdp.surgery.rewriting import rewrite
from onnx_mdp.tables.variants import plan_of_variant, random_variant
from tests.zoo import run, text_model, zoo_path

FOLDER = Path(harness.__file__).parent
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "run_main(main)" in path.read_text())
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))
DEMO = Path(onnx_mdp.__file__).parent / "demo_model" / "shapes_resnet.onnx"
TABLE = harness.Printed("title", ("model", "ms"), (("a|b", "1.5"),))
VERDICTS: tuple[Verdict, ...] = ("pass", "fail", "inconclusive")


@dataclass(frozen=True)
class Row:
    number: float
    verdict: Verdict = "pass"


@pytest.fixture(scope="module")
def demo() -> Structure:
    return analyze(load_model(DEMO), {})


def given(output: Path) -> argparse.Namespace:
    return harness.arguments("Title.\n\nClaim: it\nholds.\n\nMore.", ["m"]).parse_args(
        ["--output", str(output)]
    )


def test_the_benchmarks_are_scripts() -> None:
    assert SCRIPTS == [
        "ablations",
        "accuracy_after_repair",
        "accuracy_before_finetuning",
        "accuracy_by_stage",
        "cifar_accuracy",
        "cold_and_warm",
        "drift_correction",
        "equal_latency",
        "fleet_cost",
        "full_size",
        "granularity",
        "latency_prediction",
        "native_networks",
        "paper_figures",
        "peers_on_transformers",
        "prune_cells",
        "pruned_structure",
        "related_networks",
        "run",
        "scaling",
        "soft_masking",
        "solver",
        "targets",
        "torch_roundtrip",
        "warm_up",
        "zoo_coverage",
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_states_its_claim_and_explains_its_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "torch_roundtrip":
        pytest.importorskip("torch")
    script = importlib.import_module(f"benchmarks.{name}")
    assert len(harness.claim(script.__doc__)) > len("Claim: something")
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert "Claim:" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short_and_their_all_is_exact(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = {n.name for n in ast.parse(text).body if isinstance(n, kinds) and not n.name.startswith("_")}
    loaded = importlib.import_module("benchmarks" if name == "__init__" else f"benchmarks.{name}")
    assert defined - set(loaded.__all__) == set()
    assert all(hasattr(loaded, public) for public in loaded.__all__)


@pytest.mark.parametrize("holds", [True, False])
def test_a_noisy_machine_neither_passes_nor_fails(holds: bool) -> None:
    for noise in (1.001 * NOISE_LIMIT, 1.0, float("inf"), float("nan")):
        assert judge(holds, noise) == "inconclusive"
    for noise in (0.0, NOISE_LIMIT):
        assert judge(holds, noise) == ("pass" if holds else "fail")


def test_a_failure_is_never_hidden_and_a_pass_needs_all() -> None:
    for count in range(4):
        for verdicts in itertools.product(VERDICTS, repeat=count):
            whole = combined(verdicts)
            assert (whole == "fail") == ("fail" in verdicts)
            assert (whole == "pass") == (verdicts.count("pass") == count > 0)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_only_a_broken_claim_exits_with_1(
    verdict: Verdict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row(1.5), Row(float("inf"), verdict)]
    code = harness.publish("some/where/name.py", given(tmp_path / "new"), rows, TABLE, verdict, "summary")
    assert code == (verdict == "fail")
    assert capsys.readouterr().out.startswith(f"{verdict.upper()}  summary")
    document = json.loads((tmp_path / "new" / "name.json").read_text())
    assert document["claim"] == "Claim: it holds."
    assert document["rows"] == [{"number": 1.5, "verdict": "pass"}, {"number": None, "verdict": verdict}]
    assert sorted(document["header"]) == ["cpus", "date", "device", "onnxruntime", "python", "threads"]


def test_an_expected_error_is_one_line_and_never_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> int:
        raise MeasurementError("the machine is on fire")

    with pytest.raises(SystemExit, match="2"):
        harness.run_main(failing)
    assert capsys.readouterr().err == "error: the machine is on fire\n"


def test_a_piped_table_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    harness.print_table("", {f"column {n}": lambda row: str(row.number) for n in range(20)}, [Row(1.25)])
    assert capsys.readouterr().out.count("1.25") == 20


def test_a_process_is_charged_with_its_own_memory() -> None:
    held = np.ones(50_000_000)  # 400 MB that the child must not inherit
    small = run_metered(sys.executable, "-c", "import sys; print('out'); sys.exit('no')")
    large = run_metered(sys.executable, "-c", "x = b'1' * 200_000_000")
    assert held.nbytes == 4e8
    assert (small.code, small.stdout, small.complaint) == (1, "out\n", "no")
    assert small.peak_mb < 100
    assert 200 < large.peak_mb < 300
    assert 0 < small.seconds < 60


def test_unknown_models_and_a_missing_zoo_are_usage_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONNX_MDP_ZOO", str(tmp_path))
    for name in ("nonsense", "resnet20", "absent.onnx"):
        with pytest.raises(UsageError):
            model_path(name)
    assert model_path(str(DEMO)) == DEMO


def test_a_second_look_counts_what_the_package_counts() -> None:
    assert parameters(DEMO) == parameter_count(load_model(DEMO))
    assert list(input_shapes(DEMO).values()) == [(1, 3, 64, 64)]


SOUND = Look(ratio=0.59, noise=0.01, law_error=1e-7, complaint="", checker=None, runtime=None, params=(10, 9))
DONE = Metered(code=0, seconds=1.0, peak_mb=1.0, stdout="{}", stderr="")
FOUND = {"status": "met", "measured_ms": 6.0, "target_ms": 6.0}


@pytest.mark.parametrize(
    "broken",
    [
        {"law_error": 2e-5},
        {"law_error": float("nan")},
        {"checker": "invalid"},
        {"runtime": "does not load"},
        {"params": (10, 10)},
    ],
    ids=str,
)
def test_every_broken_promise_is_a_flaw_whatever_the_noise(broken: dict[str, Any]) -> None:
    assert prune_cells.flaws_of(DONE, FOUND, SOUND) == ()
    assert len(prune_cells.flaws_of(DONE, FOUND, replace(SOUND, noise=0.5, **broken))) == 1


def test_an_exit_code_is_a_flaw_unless_only_the_target_was_missed() -> None:
    failed = replace(DONE, code=1)
    assert prune_cells.flaws_of(failed, FOUND, SOUND)
    assert prune_cells.flaws_of(failed, {}, None)
    assert prune_cells.flaws_of(replace(DONE, code=4), {"status": "infeasible"}, None)
    assert prune_cells.flaws_of(failed, {"status": "missed"}, None) == ()
    assert prune_cells.missed_target({"status": "missed"}, None, 0.6, 0.0)


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.02), (0.01, 0.02), (0.015, 0.03)])
def test_the_target_must_hold_in_both_measurements(noise: float, tolerance: float) -> None:
    for off, missed in ((0.99 * tolerance, False), (1.01 * tolerance, True)):
        late = {**FOUND, "measured_ms": 6.0 * (1 + off)}
        assert prune_cells.missed_target(late, SOUND, 0.6, noise) is missed
        again = replace(SOUND, ratio=0.6 * (1 + off))
        assert prune_cells.missed_target(FOUND, again, 0.6, noise) is missed


def test_both_exporters_make_one_cell() -> None:
    verdicts: dict[tuple[str, float], Verdict] = {("a_dynamo", 0.6): "fail"}
    rows = [
        prune_cells.Row(
            name, ratio, False, {}, None, (), False, 0.0, 1.0, 1.0, verdicts.get((name, ratio), "pass")
        )
        for name in ("a_torchscript", "a_dynamo", "b")
        for ratio in (0.8, 0.6)
    ]
    assert prune_cells.summary(rows) == "3/4 cells (5/6 rows, 0 inconclusive)"


def test_the_full_size_benchmark_notices_what_is_wrong(
    demo: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(DEMO)
    assert max(full_size.plan_errors(model, demo, 2, 0)) <= 1e-5
    errors, idle = full_size.block_errors(model, demo, 0)
    assert (max(errors), len(errors), idle) == (0, len(demo.blocks), [])
    wrong = PruningPlan(keep={}, removed_blocks=(demo.blocks[0].name,))
    monkeypatch.setattr(full_size, "rewrite", lambda structure, plan: rewrite(structure, wrong))
    assert [error > 1e-5 for error in full_size.block_errors(model, demo, 0)[0]] == [
        block != demo.blocks[0] for block in demo.blocks
    ]
    with pytest.raises(VerificationError):
        full_size.plan_errors(model, demo, 1, 0)


def test_the_coverage_of_the_zoo_counts_what_is_wrong(
    demo: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(DEMO)
    assert zoo_coverage.frozen_reasons(demo) == {"graph output": 1}
    plan = full_size.random_plan(demo, 1)
    law = zoo_coverage.check_plan(model, demo, plan, 0)
    assert (law.flaw, law.double) == (None, None)
    assert law.single <= 1e-5
    assert law.kept < 1
    monkeypatch.setattr(zoo_coverage, "TOLERANCE", 0.0)
    law = zoo_coverage.check_plan(model, demo, plan, 0)
    assert law.flaw is None
    assert law.double is not None
    assert law.double <= 1e-9
    wrong = rewrite(demo, PruningPlan(keep=plan.keep))
    monkeypatch.setattr(zoo_coverage, "rewrite", lambda structure, plan: wrong)
    assert "float64" in (zoo_coverage.check_plan(model, demo, plan, 0).flaw or "")


@pytest.mark.usefixtures("one_torch_thread")
def test_the_round_trip_notices_a_weight_that_did_not_come_back() -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.torch_roundtrip import agreement, train
    from onnx_mdp import to_torch, write_back

    model = load_model(DEMO)
    module, feeds = to_torch(model), {"image": np.random.default_rng(0).random((2, 3, 64, 64), np.float32)}
    assert agreement(model, module, feeds).holds
    assert train(module, feeds, 2) == len(module.weights())
    assert agreement(write_back(model, module), module, feeds).holds
    with torch.no_grad():
        next(iter(module.parameters())).mul_(1.01)
    assert not agreement(model, module, feeds).holds


def test_float64_computes_what_the_runtime_does() -> None:
    """Groups, strides, dilations, uneven padding, and a BatchNormalization of opset 9 with a momentum."""
    model = text_model(
        """(float[2,4,9,8] x) => (float[2,6,h,w] y) <
            float[6,2,3,2] a, float[6] b, float[6] s, float[6] t, float[6] m, float[6] var, float[6,3,2,3] c,
            float[6] d> {
            u = Conv<group=2, strides=[2,1], dilations=[1,2], pads=[1,0,0,2]>(x, a, b)
            v = BatchNormalization<momentum=0.9, epsilon=0.001>(u, s, t, m, var)
            y = ConvTranspose<group=2, strides=[2,3], dilations=[2,1], pads=[0,1,1,0],
                output_padding=[1,0]>(v, c, d)
        }""",
        opset=9,
    )
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4, 9, 8)).astype(np.float32)}
    (expected,), (actual,) = run(model, feeds), run_in_double(model, feeds)
    assert actual.dtype == np.float64
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def test_configurations_scale_each_stage_on_its_own(demo: Structure) -> None:
    choices = {i: tuple(range(1, len(demo.dimensions[i].units) + 1)) for i in demo.prunable}
    spreads = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        variant = configurations.heterogeneous_variant(demo, choices, rng)
        assert set(variant.removed_blocks) <= {block.name for block in demo.blocks}
        stages: dict[tuple[int, ...], list[float]] = {}
        for i in demo.prunable:
            producer = demo.shadow.operations[demo.dimensions[i].producer]
            size = len(demo.dimensions[i].units)
            share = variant.kept[i] / size
            assert 0.05 <= share <= 1
            shape = demo.shadow.shapes[producer.outputs[0]][2:]
            stages.setdefault(shape, []).append(share)
        for shares in stages.values():
            assert max(shares) / min(shares) < 2.2  # 1.25 / 0.8, and one unit of rounding
        middles = [float(np.median(shares)) for shares in stages.values()]
        spreads.append(max(middles) / min(middles))
    assert np.median(spreads) > 2.2


def test_ratios_keep_the_order_of_the_plans_over_several_groups(demo: Structure) -> None:
    rng = np.random.default_rng(0)
    choices = {i: (1, len(demo.dimensions[i].units)) for i in demo.prunable}
    small = plan_of_variant(demo, random_variant(demo, choices, rng, low=0.0, high=1e-9))
    plans = [*[small] * 12, PruningPlan(keep={})]
    found = measured_ratios(DEMO.read_bytes(), demo, plans, Runtime(), budget_s=0.1)
    assert len(found.values) == len(plans)
    assert int(np.argmax(found.values)) == 12
    assert 0.7 < found.values[12] < 1.4
    assert found.base_ms > 0


def test_two_measurements_that_disagree_are_noisy_however_quiet_each_was() -> None:
    found = Ratios((0.5, 0.2, 0.1), 0.001, 4.0).joined(Ratios((0.52, 0.2, 0.11), 0.002, 5.0))
    assert found.values == pytest.approx((0.51, 0.2, 0.105))
    assert found.noise == pytest.approx(0.02 / 0.51)
    assert found.base_ms == 4.5
    assert Ratios((0.5,), 0.003, 4.0).joined(Ratios((0.5,), 0.002, 4.0)).noise == 0.003


def test_the_divergence_is_that_of_the_classes() -> None:
    draw = np.random.default_rng(0)
    wanted, given = (draw.standard_normal((7, 5)).astype(np.float32) for _ in range(2))
    assert divergence(wanted, wanted + 3) == pytest.approx(0.0, abs=1e-6)
    p, q = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) for logits in (wanted, given))
    assert divergence(wanted, given) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert divergence(wanted, given) > 0


@pytest.mark.zoo
def test_calibration_and_evaluation_images_never_meet() -> None:
    path = zoo_path("cifar10/resnet20.onnx")
    samples = samples_for("resnet20", 200)
    evaluated = {image.tobytes() for image in samples.load(slice(0, 200))}
    assert not evaluated & {feed["input"].tobytes() for feed in samples.calibration}
    assert (len(samples.calibration), len(samples.labels)) == (64, 200)
    assert top1(path.read_bytes(), samples) > 0.85
    shuffled = replace(samples, labels=np.roll(samples.labels, 1))
    assert top1(path.read_bytes(), shuffled) < 0.3


@pytest.mark.slow
def test_the_prediction_benchmark_runs_and_leaves_few_configurations_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--models", str(DEMO), "--configs", "2", "--output", str(tmp_path)]
    assert latency_prediction.main(options) == 0
    assert "INCONCLUSIVE" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "latency_prediction.json").read_text())["rows"]
    assert {name: len(errors) for name, errors in row["errors"].items()} == {
        "base_only": 2,
        "calibrated": 2,
        "isolated": 2,
        "linear": 2,
        "macs": 2,
    }
    assert all(0 < ratio < 2 for ratio in row["measured"])


def cell(distance: float, noise: float = 0.005, measurements: int = 1) -> targets.Cell:
    return targets.Cell("m", "cpu", 0.8, 5.0, distance, noise, measurements, 1.0)


@pytest.mark.parametrize(
    ("cells", "verdict"),
    [
        ([cell(-0.01)] * 9 + [cell(-0.05)], "pass"),
        ([cell(-0.01)] * 8 + [cell(-0.05)] * 2, "fail"),
        ([cell(-0.01)] * 9 + [cell(0.03)], "fail"),
        ([cell(-0.01)] * 9 + [cell(0.0, measurements=5)], "fail"),
        ([cell(-0.01)] * 9 + [cell(0.5, noise=0.1)], "inconclusive"),
        ([cell(-0.01)] * 8 + [cell(-0.01, noise=0.03)] * 2, "inconclusive"),
    ],
)
def test_a_tenth_of_the_targets_may_be_missed_from_below_and_none_from_above(
    cells: list[targets.Cell], verdict: Verdict
) -> None:
    assert targets.combined_cells(cells) == verdict


def test_the_linear_rival_sees_no_saving_in_what_a_layer_reads(demo: Structure) -> None:
    table = table_from_nothing(demo, Runtime(), 0)
    choices = {i: (1, demo.dimensions[i].count) for i in demo.prunable}
    small = random_variant(demo, choices, np.random.default_rng(0), low=0.0, high=1e-9)
    (linear,), (ours,) = (f(demo, table, [small]) for f in (linear_ratios, table_ratios))
    assert macs_ratios(demo, [small])[0] < linear < 1
    assert 0 < ours < 1


def test_the_figure_of_predictions_shows_every_model_and_method() -> None:
    errors = {"calibrated": (0.01, -0.02), "linear": (0.5, 1.0), "macs": (0.1, -0.3)}
    rows = [
        latency_prediction.Prediction(name, "CPUExecutionProvider", 1.0, 1.0, 0.0, (0.2, 0.9), errors, "pass")
        for name in "ab"
    ]
    root = ElementTree.fromstring(prediction_svg(rows))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"onnx-mdp", "a", "b", "measured / unpruned"} <= {text for text in texts if text}


def test_documents_say_what_the_results_say() -> None:
    assert result_tables.stale_documents() == [], "run `python -m benchmarks.run --documents`"


def test_a_table_that_was_edited_is_found_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path / "results")
    harness.publish("name.py", given(tmp_path / "results" / "quick"), [Row(1.5)], TABLE, "pass", "held")
    text = "before\n<!-- result: quick/name -->\nany\n<!-- end of result -->\nafter\n"
    full = result_tables.filled(text)
    assert "| a\\|b | 1.5 |" in full
    assert "PASS: held." in full
    assert full.startswith("before\n")
    assert full.endswith("\nafter\n")
    short = result_tables.filled(text.replace("result: quick", "overview: quick"))
    assert "| a\\|b | 1.5 |" in short
    assert result_tables.filled(full) == full
    assert result_tables.filled(full.replace("1.5", "1.4")) == full
    with pytest.raises(UsageError, match="no result"):
        result_tables.filled(text.replace("quick/name", "quick/nonesuch"))


def test_sentences_and_overviews_are_made_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    harness.publish("name.py", given(tmp_path / "all"), [Row(1.5)], TABLE, "pass", "all held")
    path = tmp_path / "all" / "name.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 90}))
    text = "so <!-- summary: all/name -->old<!-- end --> and <!-- summary: all/overview -->\nold<!-- end -->."
    said = result_tables.filled(text)
    assert "<!-- summary: all/name -->all held<!-- end -->" in said
    assert said.endswith("-->1 benchmarks in 2 minutes: 1 pass<!-- end -->.")
    table = result_tables.filled("<!-- result: all/overview -->\n<!-- end of result -->")
    assert "| name | pass | 90 | all held |" in table


def test_attempts_are_taken_up_where_they_were_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[tuple[float, ...], tuple[str, ...]]] = []

    def run_them(name: str, ratios: Any, methods: Any, given: Any) -> list[attempts.Row]:
        tried.append((tuple(ratios), tuple(methods)))
        return [attempts.Row(name, ratio, method, 0.5) for ratio in ratios for method in methods]

    monkeypatch.setattr(attempts, "_tried", run_them)
    asked = {"output": tmp_path, "ratios": [0.8, 0.6], "methods": ["mdp", "mdp_lstsq", "onnxsim"]}
    rows = attempts.Attempts(argparse.Namespace(**asked, resume=False)).cell("m", 0.8)
    assert [row.method for row in rows] == asked["methods"]
    assert tried == [((0.8, 0.6), ("mdp", "mdp_lstsq")), ((0.8,), ("onnxsim",))]
    later = attempts.Attempts(argparse.Namespace(**asked, resume=True))
    assert later.cell("m", 0.8) == rows
    later.cell("m", 0.6)
    assert tried[2:] == [((0.6,), ("onnxsim",))]
    attempts.Attempts(argparse.Namespace(**asked, resume=False)).cell("m", 0.8)
    assert tried[3:] == tried[:2]


def test_a_tool_that_dies_leaves_a_row_that_says_so(tmp_path: Path) -> None:
    asked = {"output": tmp_path, "ratios": [0.8], "methods": ["onnxsim"], "threads": 1, "seed": 0}
    (row,) = attempts.Attempts(argparse.Namespace(**asked, resume=False)).cell("no such model", 0.8)
    assert row.measured is None
    assert row.remark.startswith("ended with")


def test_every_script_is_run_by_all_and_the_quick_arguments_are_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    every = {*suite.PARTS, *suite._WHOLE, *suite.NEEDS_DATA, "run"}
    assert every == set(SCRIPTS)
    for name, text in suite.PARTS.items():
        script = importlib.import_module(f"benchmarks.{name}")
        with pytest.raises(SystemExit, match="0"):
            script.main([*text.split(), "--help"])
        shown = capsys.readouterr().out
        assert [word for word in text.split() if word.startswith("--") and word not in shown] == []


def test_a_suite_keeps_results_and_tells_of_scripts_that_gave_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(suite, "refresh", lambda: None)
    monkeypatch.setattr(suite, "PARTS", {"good": "--a 1", "bad": ""})

    def ran(command: list[str], **_: Any) -> None:
        if command[-3:] == ["benchmarks.good", "--a", "1"]:
            harness.publish("good.py", given(tmp_path / "out" / "benchmarks"), [Row(1)], TABLE, "pass", "ok")

    monkeypatch.setattr(suite.subprocess, "run", ran)
    assert suite.main(["--quick"]) == 1
    assert "no result" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "results" / "quick").iterdir()] == ["good.json"]
    assert suite.main(["--quick", "--only", "good"]) == 0
    with pytest.raises(UsageError, match="nonesuch"):
        suite.main(["--quick", "--only", "nonesuch"])


@pytest.mark.parametrize(("name", "side"), [("", 64), ("imagenet/tf_efficientnet_lite0_dynamo.onnx", 224)])
def test_layers_of_a_file_compute_what_the_file_computes(name: str, side: int) -> None:
    torch = pytest.importorskip("torch")
    model = onnx.load(str(zoo_path(name) if name else DEMO))
    image = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    session = open_session(model.SerializeToString(), Runtime())
    expected = session.run(None, {model.graph.input[0].name: image})[0]
    with torch.no_grad():
        found = layered_module(model)(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_whole_method_is_asked_to_keep_the_most_of_those_that_are_as_fast() -> None:
    whole = ablations.Row("m", "everything", 0.6, 0.9, 0.6)
    linear = replace(whole, what="linear latency", importance=0.95, measured=0.8)
    greedy = replace(whole, what="greedy solver", importance=0.89)
    assert [r.verdict for r in ablations.verdicts([whole, linear, greedy])] == ["pass"] * 3
    assert next(ablations.verdicts([whole, replace(linear, measured=0.6)])).verdict == "fail"
    assert next(ablations.verdicts([replace(whole, importance=0.88), greedy])).verdict == "fail"
    elsewhere = replace(greedy, ratio=0.8, importance=0.99)
    assert next(ablations.verdicts([whole, elsewhere])).verdict == "pass"
    table = replace(whole, what="8 variants", importance=None, median_error=0.014)
    most = replace(table, what="32 variants", median_error=0.01)
    assert [r.verdict for r in ablations.verdicts([table, most])] == ["pass", "pass"]
    assert next(ablations.verdicts([replace(table, median_error=0.016), most])).verdict == "fail"


def test_stages_of_a_small_detector_are_timed_and_its_heads_are_found() -> None:
    structures = [analyze(load_model(sized_models.detector_with_heads(count)), {}) for count in (1, 5)]
    assert [len(structure.prunable) for structure in structures] == [4, 8]  # three of the stem, one a head
    table = sized_models.made_up_table(structures[1])
    assert set(table.choices) == set(structures[1].prunable)


def test_a_fleet_costs_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fleet_cost, "RESULTS", tmp_path)
    with pytest.raises(UsageError, match="latency_prediction"):
        fleet_cost.main(["--output", str(tmp_path / "out")])
    (tmp_path / "all").mkdir()
    kept = {
        "latency_prediction": [{"table_s": 30.0}, {"table_s": 36.0}, {"table_s": 99.0}],
        "related_networks": [{"seconds": [18.0, 36.0]}],
    }
    for name, rows in kept.items():
        (tmp_path / "all" / f"{name}.json").write_text(json.dumps({"rows": rows}))
    assert fleet_cost.main(["--output", str(tmp_path / "out")]) == 0
    assert "5.5 hours of each device, 275 of all" in capsys.readouterr().out
    assert fleet_cost.main(["--output", str(tmp_path / "out"), "--count", "10000"]) == 1


def test_what_was_not_run_is_missing_beside_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper_figures, "RESULTS", tmp_path)
    assert paper_figures.main(["--output", str(tmp_path / "out")]) == 0
    assert "0 of 0 that can be compared" in capsys.readouterr().out
    (tmp_path / "all").mkdir()
    errors = {"linear": [0.3, -0.5], "calibrated": [0.01, -0.02]}
    rows = [{"model": "resnet50_torchscript", "table_s": 30.0, "errors": errors}]
    (tmp_path / "all" / "latency_prediction.json").write_text(json.dumps({"rows": rows}))
    paper_figures.main(["--output", str(tmp_path / "out")])
    assert "2 of 2 that can be compared" in capsys.readouterr().out
    stages = [
        {"model": "resnet50_torchscript", "side": side, "work": work, "blocks": blocks}
        for side, work, blocks in ((112, 1.0, 0), (56, 0.4, 2), (7, 0.3, 2))
    ]
    (tmp_path / "all" / "pruned_structure.json").write_text(json.dumps({"rows": stages}))
    assert paper_figures.main(["--output", str(tmp_path / "out")]) == 1
    assert "40% of MACs stay at 56², 30% of MACs stay at 7²" in capsys.readouterr().out


def test_pruners_stand_side_by_side_with_what_they_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = attempts.Row("m", 0.6, equal_latency.REFITTED, 0.6, 0.0, 0.5, 0.9, 0.88)
    cell = [own, replace(own, method="mdp", measured=0.7, agreement=None), attempts.Row("m", 0.6, "greedy")]
    cell[2] = replace(cell[2], remark="ValueError: why")
    monkeypatch.setattr(attempts.Attempts, "cell", lambda *_: cell)
    asked = ["--models", "m", "--ratios", "0.6", "--output", str(tmp_path)]
    assert equal_latency.main([*asked, "--methods", *(row.method for row in cell)]) == 0
    shown = json.loads((tmp_path / "equal_latency.json").read_text())["overview"]
    assert shown["columns"] == ["model", "asked", "mdp_lstsq", "mdp", "greedy"]
    assert shown["cells"] == [["m", "0.6", "88.0", "(0.900 at 0.70)", "ValueError"]]


def test_each_resolution_has_the_share_that_stays(demo: Structure) -> None:
    keep = {demo.dimensions[i].name: (0,) for i in demo.prunable if demo.dimensions[i].block}
    rows = list(pruned_structure.stages_of("demo", demo, PruningPlan(keep=keep)))
    assert [row.side for row in rows] == sorted((row.side for row in rows), reverse=True)
    assert all(0 < row.channels <= 1 and 0 < row.work <= 1 for row in rows)
    assert min(row.channels for row in rows) < 0.6
    assert min(row.work for row in rows) < 0.6
    whole = list(pruned_structure.stages_of("demo", demo, PruningPlan(keep={})))
    assert all(row.channels == row.work == 1 and row.blocks == row.blocks_kept for row in whole)


def test_a_stem_does_not_count_as_a_resolution_with_blocks() -> None:
    stem, large, small = (
        pruned_structure.Row("m", side, blocks, blocks, 1.0, work)
        for side, blocks, work in ((112, 0, 1.0), (56, 2, 0.1), (7, 2, 0.2))
    )
    assert {row.verdict for row in pruned_structure.judged([stem, large, small])} == {"pass"}
    assert {row.verdict for row in pruned_structure.judged([stem, replace(large, work=0.3), small])} == {
        "fail"
    }


def test_the_verdict_asks_for_the_best_among_those_that_are_as_fast() -> None:
    own = attempts.Row("m", 0.6, equal_latency.REFITTED, 0.6, 0.0, 0.5, 0.9, 0.80)
    better = replace(own, method="other", agreement=0.9)
    assert equal_latency.verdict_of(own, [own]) == "pass"
    assert equal_latency.verdict_of(own, [own, better]) == "fail"
    assert equal_latency.verdict_of(own, [own, replace(better, measured=0.7)]) == "pass"  # it is slower
    assert equal_latency.verdict_of(own, [own, replace(better, method="mdp_refit")]) == "pass"  # ours too
    assert equal_latency.verdict_of(own, [own, replace(better, agreement=0.81)]) == "pass"  # tied
    assert equal_latency.verdict_of(replace(own, measured=0.7), [own]) == "fail"
    assert equal_latency.verdict_of(replace(own, measured=None), [own]) == "fail"
    assert equal_latency.verdict_of(better, [own, better]) == "pass"  # nothing is asked of others


def test_a_way_to_measure_is_asked_to_repeat_as_well_as_the_simpler_one() -> None:
    medians = [0.02, 0.01, 0.0105]
    rows = [drift_correction.Row("m", str(n), 2, median, 0.1) for n, median in enumerate(medians)]
    assert [row.verdict for row in drift_correction.judged(rows)] == ["pass"] * 3
    worse = replace(rows[2], median=0.03)
    assert [row.verdict for row in drift_correction.judged([*rows[:2], worse])] == ["pass", "pass", "fail"]
    assert drift_correction.spreads(np.array([[10.0, 5.0], [12.0, 6.0], [10.0, 5.5]])).round(3) == [0.05]


def test_what_is_left_of_a_cold_start_is_judged_where_the_tool_begins_to_time() -> None:
    cold = [1.5, 1.4, 1.3, 1.2, 1.1, 1.05, *[1.0] * 14]
    row = warm_up.row_of("m", cold)
    assert (row.ms, row.untimed, row.verdict) == (1.0, 6, "pass")
    assert warm_up.row_of("m", [1.5] * 8 + [1.0] * 12).verdict == "fail"
    large = warm_up.row_of("m", [100 * ms for ms in cold])
    assert (large.untimed, large.verdict) == (1, "fail")


@pytest.mark.slow
def test_a_cold_start_is_measured(tmp_path: Path) -> None:
    code = warm_up.main(["--models", str(DEMO), "--turns", "2", "--output", str(tmp_path)])
    document = json.loads((tmp_path / "warm_up.json").read_text())
    assert code == (document["verdict"] == "fail")
    assert [len(row["excess"]) for row in document["rows"]] == [20] * 3


@pytest.mark.slow
def test_ratios_are_measured_in_three_ways(tmp_path: Path) -> None:
    code = drift_correction.main(["--models", str(DEMO), "--turns", "2", "--output", str(tmp_path)])
    document = json.loads((tmp_path / "drift_correction.json").read_text())
    assert code == (document["verdict"] == "fail")
    assert len({row["way"] for row in document["rows"]}) == len(document["rows"]) == 3
    assert all(0 <= row["median"] <= row["worst"] for row in document["rows"])
