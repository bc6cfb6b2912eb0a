"""Layers of a compiled graph by what oneDNN prints: reading, matching with layers, and tables from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_placement import needs
from zoo import analyse, zoo_structure

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MeasurementError
from onnx_mdp.running.runtime import context, runtime
from onnx_mdp.tables import latency
from onnx_mdp.tables.calibrating import Calibration
from onnx_mdp.tables.cost_terms import Layer, cost_terms, held
from onnx_mdp.tables.latency import build_table
from onnx_mdp.tables.lut_records import Run
from onnx_mdp.tables.lut_store import open_store
from onnx_mdp.tables.primitives import (
    ModelRun,
    Primitive,
    profile_primitives,
    read_runs,
    samples_of,
    shows_primitives,
)
from onnx_mdp.tables.variants import Variant, full_variant, random_variant

DEMO = Path(__file__).resolve().parents[1] / "onnx_mdp" / "demo_model" / "shapes_resnet.onnx"
HEAD = "onednn_verbose,v1,primitive,exec,cpu"
FORMATS = (
    "forward_inference,src:f32::blocked:acdb::f0 wei:f32:a:blocked:Acdb16a::f0 dst:f32::blocked:acdb::f0"
)
CONV = f"{HEAD},convolution,brg_conv_fwd:avx512_core,{FORMATS},attr-scratchpad:user attr-post-ops:"
PRINTED = f"""onednn_verbose,v1,info,oneDNN v3.8.0
{CONV}eltwise_relu,alg:convolution_direct,mb1_ic3oc16_ih32oh32kh3sh1dh0ph1_iw32ow32kw3sw1dw0pw1,9.0
onnx-mdp run 0
{HEAD},reorder,jit:uni,undef,src:f32::blocked:acdb::f0 dst:f32::blocked:abcd::f0,,,1x64x1x1,0.0195
{CONV}eltwise_relu,alg:convolution_direct,mb1_ic3oc16_ih32oh32kh3sh1dh0ph1_iw32ow32kw3sw1dw0pw1,0.5
{CONV}sum:1:0:f32+eltwise_relu,alg:convolution_direct,g8mb1_ic8oc8_ih32oh16kh3sh2dh0ph1_iw32ow16kw3sw2dw0pw1,0.25
onednn_verbose,v1,primitive,exec
{HEAD},convolution,no number
{HEAD},pooling,jit:avx512_core,{FORMATS},,alg:pooling_max,mb1ic64_ih112oh56kh3sh2dh0ph1_iw112ow56kw3sw2dw0pw1,0.125
something else of the runtime
onnx-mdp end 1.5
{CONV}eltwise_relu,alg:convolution_direct,mb1_ic3oc16_ih32oh32kh3sh1dh0ph1_iw32ow32kw3sw1dw0pw1,9.0
onnx-mdp run 1
onnx-mdp end 0.75
"""


def test_only_what_is_printed_within_a_run_belongs_to_it() -> None:
    first, second = read_runs(PRINTED.splitlines())
    assert (first.model, first.ms) == (0, 1.5)
    assert [p for p in first.primitives if len(p.signature) > 1] == [
        Primitive(("convolution", 1, 3, 16, 32, 32, 32, 32, 3, 3), False, 0.5),
        Primitive(("convolution", 8, 8, 8, 32, 32, 16, 16, 3, 3), True, 0.25),
        Primitive(("pooling", 64, 112, 112, 56, 56, 3, 3), False, 0.125),
    ]
    assert first.shown_ms == pytest.approx(0.0195 + 0.5 + 0.25 + 0.125)
    assert second == ModelRun(1, [], 0.75)


@pytest.fixture(scope="module", params=["demo", "cifar10/resnet20.onnx", "imagenet/mobilenet_v2_tv.onnx"])
def structure(request: pytest.FixtureRequest) -> Structure:
    return analyse(DEMO)[1] if request.param == "demo" else zoo_structure(request.param)[1]


def a_variant(structure: Structure, seed: int) -> Variant:
    choices = {i: tuple(range(1, structure.dimensions[i].count + 1)) for i in structure.prunable}
    return random_variant(structure, choices, np.random.default_rng(seed))


def convolutions(structure: Structure, variant: Variant) -> list[Layer]:
    layers = held(structure, cost_terms(structure), variant.kept, variant.removed_blocks)
    return [layer for layer in layers if '"op":"Conv"' in layer[0]]


def primitive(layer: Layer, ms: float) -> Primitive:
    key, a, b = layer
    about = json.loads(key)
    depthwise = about["kind"] == "depthwise"
    groups, read = (b, b) if depthwise else (int(about["kind"].split()[1]), a)
    sizes = (*about["in"][2:], *about["out"][2:], *about["weight"])
    return Primitive(("convolution", groups, read, b, *sizes), about["add"], ms)


def runs_of(layers: Sequence[Layer], ms: Sequence[float], seed: int) -> list[ModelRun]:
    """Three runs that print the primitives in another order each, 10 % slower and faster in two of them."""
    rng, runs = np.random.default_rng(seed), []
    for factor in (0.9, 1.0, 1.1):
        shown = [primitive(layer, factor * each) for layer, each in zip(layers, ms, strict=True)]
        runs.append(ModelRun(0, [shown[i] for i in rng.permutation(len(shown))]))
    return runs


@pytest.mark.parametrize("seed", range(3))
def test_each_layer_gets_the_time_of_the_primitives_of_its_sizes(structure: Structure, seed: int) -> None:
    layers = convolutions(structure, a_variant(structure, seed))
    ms = np.random.default_rng(seed).uniform(0.1, 1.0, len(layers)).tolist()
    wanted: dict[tuple[object, ...], list[float]] = {}
    for layer, each in zip(layers, ms, strict=True):
        found = primitive(layer, each)
        wanted.setdefault((*found.signature, found.adds), []).append(each)
    samples = samples_of(layers, runs_of(layers, ms, seed))
    assert sum(sample.ms for sample in samples) == pytest.approx(sum(ms))
    for sample in samples:
        like = primitive((sample.key, int(sample.a), int(sample.b)), 0.0)
        assert sample.ms == pytest.approx(np.mean(wanted[(*like.signature, like.adds)]))


def test_sums_that_the_provider_puts_elsewhere_are_shared_by_layers_of_the_same_sizes(
    structure: Structure,
) -> None:
    layers = convolutions(structure, full_variant(structure))
    runs = runs_of(layers, [1.0] * len(layers), 0)
    for run in runs:
        run.primitives = [replace(p, adds=False) for p in run.primitives]
    assert [sample.ms for sample in samples_of(layers, runs)] == pytest.approx([1.0] * len(layers))


def test_a_layer_that_is_not_seen_in_all_runs_has_no_time(structure: Structure) -> None:
    layers = convolutions(structure, full_variant(structure))
    runs = runs_of(layers, [1.0] * len(layers), 0)
    lost = runs[1].primitives.pop()
    there = {(sample.key, sample.a, sample.b) for sample in samples_of(layers, runs)}
    for layer in layers:
        assert (layer in there) == (primitive(layer, 1.0).signature != lost.signature)


def test_a_variant_that_cannot_be_run_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    _, structure = analyse(DEMO)
    missing = replace(runtime("openvino"), provider="NowhereExecutionProvider")
    with pytest.raises(MeasurementError, match=r"cannot run a variant in a process of its own: .*Nowhere"):
        profile_primitives(
            structure, cost_terms(structure), full_variant(structure), missing, number=0, seed=0
        )


def test_a_provider_without_primitives_shows_none() -> None:
    _, structure = analyse(DEMO)
    assert not shows_primitives(structure, cost_terms(structure), runtime("cpu"))
    run = profile_primitives(
        structure, cost_terms(structure), full_variant(structure), runtime("cpu"), number=0, seed=0
    )
    assert run.samples == ()
    assert run.plain_ms > 0
    with pytest.raises(MeasurementError, match="now does not"):
        profile_primitives(
            structure, cost_terms(structure), full_variant(structure), runtime("cpu"), number=1, seed=0
        )


def test_runs_of_primitives_are_kept_apart_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, structure = analyse(DEMO)
    asked: list[int] = []

    def shown(
        structure: Structure, terms: Sequence[object], variant: Variant, *_: object, number: int, seed: int
    ) -> Run:
        asked.append(number)
        layers = convolutions(structure, variant)
        samples = samples_of(layers, runs_of(layers, [float(b) for _, _, b in layers], seed))
        spent = sum(sample.ms for sample in samples)
        payload = {"kept": {str(k): v for k, v in variant.kept.items()}, "share": 0.5 if number else 1.0}
        return Run(number, seed, spent, spent, len(samples), 0.0, samples, payload)

    monkeypatch.setattr(latency, "_way", lambda *_: "primitives")
    monkeypatch.setattr(latency, "profile_primitives", shown)
    monkeypatch.setattr(
        latency, "calibrate_in_place", lambda *_: Calibration(1.0, 0.0, 1.0, 0.0, 0.0, 0.0, shares=(1.0, 0.5))
    )
    with open_store(tmp_path / "store.sqlite") as store:
        tables = [build_table(structure, runtime(), store, variants=2) for _ in range(2)]
        assert asked == [0, 1]
        assert [table.measured for table in tables] == [2, 0]
        assert tables[0].coefficients == tables[1].coefficients
        assert store.runs(context(runtime()), tables[0].key) == ()
        assert len(store.runs(context(runtime()), f"{tables[0].key}.primitives")) == 2


@pytest.mark.openvino
def test_openvino_shows_the_convolutions_of_a_network() -> None:
    needs("OpenVINOExecutionProvider")
    structure = zoo_structure("cifar10/resnet20.onnx")[1]
    variant = a_variant(structure, 0)
    layers = convolutions(structure, variant)
    run = profile_primitives(structure, cost_terms(structure), variant, runtime("openvino"), number=2, seed=0)
    assert {sample.key for sample in run.samples} >= {key for key, _, _ in layers}
    assert 0.5 * run.plain_ms < run.sum_ms < run.plain_ms
    assert 0 < run.payload["share"] < 1
