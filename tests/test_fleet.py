"""A local Ray cluster of two nodes: one job a device at a time, a node that is lost, and one store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, is_refused
from test_cli import TINY
from zoo import text_model

from onnx_mdp.tables.latency import VARIANTS
from onnx_mdp.tables.lut_store import open_store

CLUSTER = """
import json, os, subprocess, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster

here = Path.cwd()

def node(device, amount=1, number=0):
    store = {{"ONNX_MDP_STORE": str(here / f"{{device}}{{number}}.sqlite")}}
    return cluster.add_node(num_cpus=2, resources={{device: amount}}, env_vars=store)

def start(*more):
    return subprocess.Popen(
        [sys.executable, "-m", "onnx_mdp", "fleet", "a.onnx", "b.onnx", "--address", cluster.address,
         "-o", "tables", "--json", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )

def finish(child):
    out, err = child.communicate(timeout=500)
    print(json.dumps({{"code": child.returncode, "out": out, "err": err}}), flush=True)

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1}})
try:
{body}
finally:
    cluster.shutdown()
"""


def in_a_cluster(folder: Path, body: str) -> list[dict[str, Any]]:
    """Run a script beside a cluster; return what each command said."""
    pytest.importorskip("ray", reason="a fleet needs Ray: pip install 'onnx-mdp[ray]'")
    for name in ("a", "b"):
        (folder / f"{name}.onnx").write_bytes(text_model(TINY).SerializeToString())
    script = CLUSTER.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={
            **os.environ,
            "ONNX_MDP_STORE": str(folder / "host.sqlite"),
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]


@pytest.mark.slow
def test_a_fleet_fills_one_store_and_one_job_runs_on_a_device_at_a_time(tmp_path: Path) -> None:
    first, again, absent, many = in_a_cluster(
        tmp_path,
        """
        node("jetson"); node("server")
        finish(start("--device", "jetson", "--device", "server"))
        finish(start("--device", "jetson", "--device", "server", "--overwrite"))
        finish(start("--device", "phone", "--overwrite"))
        node("pair", amount=2)
        finish(start("--device", "pair", "--overwrite"))
        """,
    )
    assert first["code"] == 0, first["err"]
    tables = json.loads(first["out"])["tables"]
    assert [(t["model"], t["device"]) for t in tables] == [
        (model, device) for model in "ab" for device in ("jetson", "server")
    ]
    for device in ("jetson", "server"):
        one, other = sorted((t["started"], t["finished"]) for t in tables if t["device"] == device)
        assert one[1] <= other[0], "one job a device at a time"
        assert (tmp_path / f"{device}0.sqlite").exists(), "each device has a store of its own"
    for table in tables:
        command = [
            sys.executable,
            "-m",
            "onnx_mdp",
            "solve",
            "a.onnx",
            table["output"],
            "--target-ratio",
            "0.7",
        ]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    with open_store(tmp_path / "host.sqlite") as store:
        assert [row.runs for row in store.summary()] == [VARIANTS], (
            "the models have one topology, the devices one CPU"
        )
    assert again["code"] == 0, again["err"]
    assert [t["profiled"] for t in json.loads(again["out"])["tables"]] == [0] * 4
    assert absent["code"] == many["code"] == 2
    assert "no node offers 'phone' (there are jetson, server)" in absent["err"]
    assert "a node offers 2 of 'pair'" in many["err"]


@pytest.mark.slow
def test_a_job_whose_node_is_lost_runs_where_the_device_comes_back(tmp_path: Path) -> None:
    (done,) = in_a_cluster(
        tmp_path,
        """
        lost = node("jetson")
        child = start("--device", "jetson")
        store, limit = here / "jetson0.sqlite", time.monotonic() + 200
        while not store.exists() and child.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.5)
        cluster.remove_node(lost, allow_graceful=False)
        time.sleep(1)
        node("jetson", number=1)
        finish(child)
        """,
    )
    assert done["code"] == 0, done["err"]
    assert [(t["model"], t["device"]) for t in json.loads(done["out"])["tables"]] == [
        ("a", "jetson"),
        ("b", "jetson"),
    ]
    assert (tmp_path / "jetson1.sqlite").exists()


def test_without_ray_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    Path("a.onnx").write_bytes(b"")
    is_refused(run("fleet", "a.onnx", "--device", "jetson", "-o", "tables"), 3, "pip install 'onnx-mdp[ray]'")
    is_refused(run("fleet", "nope.onnx", "--device", "jetson", "-o", "tables"), 2, "nope.onnx")
    Path("b").mkdir()
    Path("b/a.onnx").write_bytes(b"")
    is_refused(run("fleet", "a.onnx", "b/a.onnx", "--device", "jetson", "-o", "tables"), 2, "one name")
    is_refused(run("fleet", "a.onnx", "--device", "jetson", "-o", "a.onnx"), 2, "a.onnx is no folder")
    Path("b/a.jetson.json").write_text("")
    is_refused(run("fleet", "a.onnx", "--device", "jetson", "-o", "b"), 2, "a.jetson.json exists")
