"""`doctor` says what is there, and of what is not it says so: never a traceback, whatever a system hides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import Run

from onnx_mdp import doctor, machine
from onnx_mdp.cli import doctor_commands
from onnx_mdp.errors import MissingBackendError
from onnx_mdp.tables.lut_store import open_store


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time the convolution for a moment only."""
    full = doctor.clock
    monkeypatch.setattr(doctor_commands, "clock", lambda provider, cpus: full(provider, cpus, 0.05))


def test_what_runs_here_is_said_in_a_document_and_in_a_table(run: Run) -> None:
    outcome = run("doctor", "--json")
    assert outcome.code == 0
    document = outcome.document
    by_name = {provider["name"]: provider for provider in document["providers"]}
    assert by_name["CPUExecutionProvider"]["runs"]
    assert by_name["CPUExecutionProvider"]["granularity"] >= 4
    assert all(provider["runs"] != bool(provider["detail"]) for provider in by_name.values())
    assert document["ready"]
    assert document["clock"]["ms"] > 0
    assert 0 <= document["clock"]["noise"] < 1
    assert document["machine"]["usable_cpus"] >= 1
    assert document["packages"]["numpy"]
    assert not document["store"]["exists"]
    assert not Path(document["store"]["path"]).exists(), "looking makes no store"
    table = run("doctor")
    assert table.code == 0
    for word in ("CPUExecutionProvider", "noise F", "not made yet", "ready: CPUExecutionProvider"):
        assert word in table.out


def test_a_board_that_hides_everything_is_described_all_the_same(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def locked(*_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine, "_ROOT", tmp_path / "nothing")
    monkeypatch.setattr("os.getloadavg", locked)
    monkeypatch.setattr("os.sched_getaffinity", locked, raising=False)
    outcome = run("doctor", "--json")
    assert outcome.code == 0
    found = outcome.document["machine"]
    assert [found[name] for name in ("governor", "turbo", "load", "memory_gb")] == [None] * 4
    monkeypatch.setattr(Path, "glob", locked)
    monkeypatch.setattr(Path, "read_text", locked)
    assert machine.machine().governor is None
    assert "the system does not say" in run("doctor").out


@pytest.mark.parametrize(
    ("file", "text", "turbo"),
    [("intel_pstate/no_turbo", "0\n", True), ("intel_pstate/no_turbo", "1", False),
     ("cpufreq/boost", "1\n", True), ("cpufreq/boost", "?", None)],
)  # fmt: skip
def test_clocks_are_read_where_linux_keeps_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, text: str, turbo: bool | None
) -> None:
    cpus = tmp_path / "sys/devices/system/cpu"
    for name, content in {
        file: text,
        "cpu0/cpufreq/scaling_governor": "powersave\n",
        "cpu1/cpufreq/scaling_governor": "performance\n",
        "cpu2/cpufreq/scaling_governor": "powersave\n",
    }.items():
        (cpus / name).parent.mkdir(parents=True, exist_ok=True)
        (cpus / name).write_text(content)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:        4000000 kB\nMemFree: 1 kB\n")
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    found = machine.machine()
    assert (found.governor, found.turbo, found.memory_gb) == ("powersave, performance", turbo, 4.0)


def test_without_a_runtime_nothing_can_be_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise MissingBackendError("ONNX Runtime is not installed: run `pip install onnx-mdp[cpu]`.")

    monkeypatch.setattr(doctor, "import_onnxruntime", missing)
    outcome = run("doctor", "--json")
    assert outcome.code == 3
    document = outcome.document
    assert (document["ready"], document["providers"], document["clock"]) == (False, [], None)
    assert "pip install" in document["onnxruntime"]["fault"]
    assert "nothing can be measured" in run("doctor").out


def test_a_provider_that_fails_in_its_own_way_is_a_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("driver\nof another time")

    monkeypatch.setattr(doctor, "open_placed", broken)
    outcome = run("doctor", "--json")
    assert outcome.code == 3
    assert {provider["detail"] for provider in outcome.document["providers"]} == {"driver."}


def test_a_damaged_store_is_said(run: Run, tmp_path: Path) -> None:
    with open_store(tmp_path / "lut.sqlite") as store:
        store.put_calibration({"device": "x"}, "m", {"scale": 1.0})
    healthy = run("doctor", "--json").document["store"]
    assert (healthy["exists"], healthy["fault"], healthy["tables"]) == (True, None, 0)
    whole = (tmp_path / "lut.sqlite").read_bytes()
    (tmp_path / "lut.sqlite").write_bytes(whole[: len(whole) // 2] + b"?" * (len(whole) // 2))
    outcome = run("doctor", "--json")
    assert outcome.code == 0
    assert outcome.document["store"]["fault"]
    assert "damaged" in run("doctor").out


def test_what_is_missing_comes_with_the_command_that_installs_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = ["numpy>=1.26", "ray>=2; extra == 'ray'", "onnxruntime>=1.20; extra == 'cpu'"]
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda name: stated)
    monkeypatch.setattr(machine, "_version", {"onnxruntime": "1", "onnxruntime-gpu": "2"}.get)
    document = run("doctor", "--json").document
    assert document["extras"] == [
        {"name": "ray", "missing": ["ray"], "command": "pip install 'onnx-mdp[ray]'"}
    ]
    shown = " ".join(run("doctor").out.split())
    assert "pip uninstall" in shown, "two packages own one module"
    assert "onnx-mdp[ray]" in shown
