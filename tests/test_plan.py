"""Laws of plans: JSON round trip, compact ranges, and one sentence for each malformed plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo import analyse, random_plan, text_model

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import UsageError
from onnx_mdp.model_io import content_hash
from onnx_mdp.plan import (
    PruningPlan,
    check_plan,
    from_ranges,
    kept_units,
    load_plan,
    plan_json,
    removed_classes,
    to_ranges,
)
from onnx_mdp.surgery.rewriting import rewrite

FULL = PruningPlan(
    keep={"conv_0": (0, 1, 2, 5), "conv_7": (3,)},
    removed_blocks=("add_3",),
    predicted_ms=1.25,
    importance_share=0.75,
    status="optimal",
    bound=0.75,
    gap=0.0,
    solver="exact",
    seconds=0.5,
    fastest_ms=0.25,
    provenance={"model": "0123456789abcdef", "threads": 1, "notes": ["a", "ü"]},
)


def structure() -> Structure:
    return analyse(
        text_model(
            """(float[1,3,4,4] x) => (float[1,4,4,4] y) <
                float[8,3,1,1] a, float[8,8,1,1] b, float[4,8,1,1] c> {
                t = Conv(x, a)
                v = Conv(t, b)
                s = Add(v, t)
                y = Conv(s, c)
            }"""
        )
    )[1]


# -- ranges -------------------------------------------------------------------------------------------------


def test_ranges_are_inverted() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        units = tuple(np.flatnonzero(rng.random(rng.integers(1, 40)) < rng.random()).tolist()) or (0,)
        assert from_ranges(to_ranges(units)) == units


def test_a_range_is_as_short_as_it_gets() -> None:
    assert to_ranges(range(512)) == "0-511"
    assert to_ranges([3]) == "3"
    assert to_ranges([1, 3, 4, 9]) == "1,3-4,9"


@pytest.mark.parametrize(
    "text",
    ["", "a", "1-", "-1", "2-1", "1,1", "3,2", "0-4,4-5", "1,,2", "1;2", " 1", "1.5", "0x1", "1--2", "²"],
)
def test_malformed_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="the plan"):
        from_ranges(text)


def test_an_absurd_range_is_refused_before_it_is_made() -> None:
    with pytest.raises(UsageError, match="too large"):
        from_ranges("0-999999999999")
    with pytest.raises(UsageError):
        from_ranges("0-8", limit=8)


# -- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [FULL, PruningPlan(keep={}), PruningPlan(keep={"a/b:0": (0,)})])
def test_json_round_trip(plan: PruningPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_json(plan))
    assert load_plan(path) == plan


def test_json_is_stable_and_made_for_review() -> None:
    text = plan_json(FULL)
    assert text == plan_json(PruningPlan(**{f: getattr(FULL, f) for f in FULL.__slots__}))
    assert '"conv_0": "0-2,5"' in text
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))


def refusal(path: Path, data: Any) -> str:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(UsageError) as caught:
        load_plan(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        ({"keep": None}, "keep"),
        ({"keep": {"conv_0": [0, 1]}}, "keep.conv_0"),
        ({"keep": {"conv_0": "9-1"}}, "9-1"),
        ({"keep": {"conv_0": ""}}, "range"),
        ({"removed_blocks": "add_3"}, "removed_blocks"),
        ({"removed_block": []}, "removed_block"),
        ({"status": "great"}, "status"),
        ({"predicted_ms": "fast"}, "predicted_ms"),
        ({"schema_version": 999}, "newer onnx-mdp"),
        ({"schema_version": "one"}, "schema_version"),
        ({"provenance": []}, "provenance"),
    ],
)
def test_a_malformed_plan_is_refused_in_one_sentence(edit: dict[str, Any], word: str, tmp_path: Path) -> None:
    document = {**json.loads(plan_json(FULL)), **edit}
    assert word in refusal(tmp_path / "plan.json", document)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "{}", '"plan"', "\x00", '{"keep": {}}'])
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    assert "plan" in refusal(tmp_path / "plan.json", text)


def test_a_missing_plan_a_folder_and_a_model_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "model.onnx"
    binary.write_bytes(b"\xff\xfe\x00" * 30)
    for path in (tmp_path / "none.json", tmp_path, binary):
        with pytest.raises(UsageError, match="cannot be read"):
            load_plan(path)


# -- plan and model -----------------------------------------------------------------------------------------


def test_kept_and_removed_complement_each_other() -> None:
    found = structure()
    for seed in range(5):
        plan = random_plan(found, np.random.default_rng(seed))
        removed = removed_classes(plan, found)
        assert not removed[0]
        for index, dimension in enumerate(found.dimensions):
            gone = {u for u in range(len(dimension.units)) if removed[dimension.units[u]]}
            assert gone | set(kept_units(plan, found, index)) == set(range(len(dimension.units)))
            assert not gone & set(kept_units(plan, found, index))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (PruningPlan(keep={"none": (0,)}), "'none', which the model does not have"),
        (PruningPlan(keep={"conv_3": (0,)}), "frozen: graph output y"),
        (PruningPlan(keep={"conv_0": ()}), "'conv_0'"),
        (PruningPlan(keep={"conv_0": (0, 8)}), "do not exist; it has 8"),
        (PruningPlan(keep={"conv_0": (-1,)}), "'conv_0'"),
        (PruningPlan(keep={"conv_0": (9, 0)}), "'conv_0'"),
        (PruningPlan(keep={"conv_0": (1, 0)}), "'conv_0'"),
        (PruningPlan(keep={"conv_0": (1, 1)}), "'conv_0'"),
        (PruningPlan(keep={}, removed_blocks=("none",)), "block 'none', which the model does not have"),
        (PruningPlan(keep={}, provenance={"model": "0" * 16}), "made for another model"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: PruningPlan, words: str) -> None:
    found = structure()
    for refuse in (check_plan, lambda p, s: rewrite(s, p)):
        with pytest.raises(UsageError, match=words):
            refuse(plan, found)


def test_a_plan_for_this_model_fits() -> None:
    found = structure()
    provenance = {"model": content_hash(found.shadow.model)}
    check_plan(PruningPlan(keep={"conv_0": (0,)}, provenance=provenance), found)


def test_an_empty_plan_says_so() -> None:
    assert PruningPlan(keep={}).empty
    assert not PruningPlan(keep={"conv_0": (0,)}).empty
    assert not PruningPlan(keep={}, removed_blocks=("add_2",)).empty


@pytest.mark.parametrize(
    "text",
    [
        '{"schema_version": 1, "keep": {"a": "' + "9" * 5000 + '"}}',
        '{"schema_version": 1, "keep": {"a": "0-16777215", "b": "0-16777215"}}',
        '{"schema_version": 1, "keep": {"a": "٣"}}',
        '{"schema_version": 1, "keep": {}, "predicted_ms": NaN}',
        '{"schema_version": 1, "keep": {}, "bound": 1e999}',
        '{"schema_version": 1, "keep": {}, "provenance": ' + '{"a":' * 100_000 + "}",
        '{"schema_version": 1e400, "keep": {}}',
        "[" * 100_000,
        "1" * 100_000,
    ],
    ids="digits units numerals nan infinity deep exponent brackets number".split(),
)
def test_hostile_json_is_refused_at_once(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_plan(path)
    assert len(str(caught.value)) < 600


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_an_endless_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no plain file"):
        load_plan(Path("/dev/zero"))
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match="larger than"):
        load_plan(tmp_path / "plan.json")
