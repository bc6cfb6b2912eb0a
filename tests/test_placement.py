"""Placement: what a provider leaves to the CPU is an error that names it; plugins join or say why not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Outcome
from zoo import text_model

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.cli import commands
from onnx_mdp.errors import MissingBackendError
from onnx_mdp.running.accelerators import gpu_of
from onnx_mdp.running.placement import fallback_in, fallback_of, open_placed
from onnx_mdp.running.providers import SHORT_NAMES, add_plugin
from onnx_mdp.running.runtime import Runtime, import_onnxruntime, open_session, runtime
from onnx_mdp.running.timing import random_feeds, run_times
from onnx_mdp.tables.latency import LatencyTable, build_table
from onnx_mdp.tables.lut_store import LutStore

PARTS = """
(float[1,8,16,16] x) => (float[1,4,14,14] y) <float[8,8,3,3] w, float[4,8,1,1] v> {
  a = Conv <pads: ints = [1,1,1,1]> (x, w)
  b = LpPool <kernel_shape: ints = [3,3]> (a)
  y = Conv (b, v)
}"""
SHAPES = {"x": (1, 8, 16, 16)}


def parts(operator: str = "LpPool") -> bytes:
    return text_model(PARTS.replace("LpPool", operator)).SerializeToString()


def needs(provider: str) -> None:
    if provider not in import_onnxruntime().get_available_providers():
        pytest.skip(f"this ONNX Runtime does not contain {provider}")


def kernel(name: str, operator: str, provider: str, us: int, **shapes: str) -> Iterator[dict[str, Any]]:
    """Two runs of a node as ONNX Runtime's profiler writes them."""
    args = {"op_name": operator, "provider": provider, **shapes}
    for dur in (10 * us, us):
        yield {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": args}


def test_nodes_on_the_cpu_are_named_with_their_share_of_warm_time() -> None:
    events = [
        *kernel("OpenVINO-EP-subgraph_1_0", "OpenVINO-EP-subgraph_1", "OpenVINOExecutionProvider", 600),
        *kernel("pool", "LpPool", "CPUExecutionProvider", 100),
        *kernel("det", "Det", "CPUExecutionProvider", 300),
    ]
    found = fallback_in(events, "OpenVINOExecutionProvider")
    assert found is not None
    assert found.nodes == (("det", "Det"), ("pool", "LpPool"))
    assert (found.total, found.share) == (3, pytest.approx(0.4))
    assert str(found) == (
        "OpenVINOExecutionProvider leaves 2 of 3 nodes to the CPU, 40% of the time "
        "(1 Det, 1 LpPool: 'det', 'pool')"
    )


def test_shapes_are_read_as_json_too_and_nodes_without_arguments_are_the_provider_s() -> None:
    event = {"cat": "Node", "name": "DmlFusedNode_0_41_kernel_time", "dur": 378}
    shape = {"op_name": "Concat", "provider": "CPUExecutionProvider", "output_type_shape": [{"int64": [4]}]}
    concat = {"cat": "Node", "name": "concat_kernel_time", "dur": 2, "args": shape}
    pool = {**concat, "name": "pool_kernel_time", "args": {**shape, "output_type_shape": [{"float": [4]}]}}
    assert fallback_in([event, concat] * 2, "DmlExecutionProvider") is None
    found = fallback_in([event, concat, pool] * 2, "DmlExecutionProvider")
    assert found is not None
    assert (found.nodes, found.total) == ((("pool", "Concat"),), 3)


INTEGER = '[{"int64": [4]}]'


@pytest.mark.parametrize(
    ("operator", "reads", "makes", "counts"),
    [
        ("Shape", '[{"float": [1, 8, 16, 16]}]', INTEGER, False),
        ("Concat", '[{"int64": [1]}, {"int64": [3]}]', INTEGER, False),
        ("Gather", '[{"int64": [4]}, {"int64": []}]', '[{"int64": []}]', False),
        ("ArgMax", '[{"float": [1, 10]}]', '[{"int64": [1]}]', True),
        ("NonMaxSuppression", '[{"float": [1, 9, 4]}]', '[{"int64": [5, 3]}]', True),
        ("Gather", '[{"int64": [4]}, {"float": [2]}]', INTEGER, True),
    ],
)
def test_only_arithmetic_on_shapes_may_stay_on_the_cpu(
    operator: str, reads: str, makes: str, counts: bool
) -> None:
    shapes = {"input_type_shape": reads, "output_type_shape": makes}
    events = [
        *kernel("conv", "Conv", "CUDAExecutionProvider", 600),
        *kernel("node", operator, "CPUExecutionProvider", 5, **shapes),
    ]
    assert (fallback_in(events, "CUDAExecutionProvider") is not None) == counts


def test_the_profiler_writes_the_fields_that_are_read(tmp_path: Path) -> None:
    session = open_session(parts(), runtime(), profile_prefix=str(tmp_path / "profile"))
    run_times(session, random_feeds(session, SHAPES, 0), 2)
    found = fallback_in(json.loads(Path(session.end_profiling()).read_text()), "CUDAExecutionProvider")
    assert found is not None
    assert found.share == 1.0
    assert "LpPool" in {operator for _, operator in found.nodes}


def test_the_cpu_has_nowhere_to_fall_back_to() -> None:
    assert fallback_of(parts(), runtime(), SHAPES) is None
    assert open_placed(parts(), runtime(), SHAPES).get_providers() == ["CPUExecutionProvider"]


def test_a_provider_that_takes_nothing_is_refused_unless_that_is_accepted() -> None:
    needs("AzureExecutionProvider")
    with pytest.raises(MissingBackendError, match=r"(\d) of \1 nodes .*100% .*LpPool.*--allow-fallback"):
        open_placed(parts(), runtime("AzureExecutionProvider"), SHAPES)
    accepted = runtime("AzureExecutionProvider", allow_fallback=True)
    assert "AzureExecutionProvider" in open_placed(parts(), accepted, SHAPES).get_providers()


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_listed_provider_without_its_hardware_fails_loudly(name: str) -> None:
    needs(SHORT_NAMES[name])
    if gpu_of(SHORT_NAMES[name], ()) is not None:
        pytest.skip("there is a GPU")
    for accepts in (False, True):
        with pytest.raises(MissingBackendError, match=r"does not start|did not start"):
            open_placed(parts(), runtime(name, allow_fallback=accepts), SHAPES)


def test_the_command_line_exits_with_3_and_tells_of_what_is_accepted(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("AzureExecutionProvider")
    (tmp_path / "parts.onnx").write_bytes(parts())
    profile = ("profile", "parts.onnx", "--ep", "AzureExecutionProvider", "--json")
    refused = run(*profile)
    assert (refused.code, refused.out) == (3, "")
    assert "nodes to the CPU" in refused.err
    assert "Traceback" not in refused.err

    def quickly(structure: Structure, where: Runtime, store: LutStore, **options: Any) -> LatencyTable:
        return build_table(structure, Runtime(), store, variants=2, **options)

    monkeypatch.setattr(commands, "build_table", quickly)
    accepted = run(*profile, "--allow-fallback")
    assert accepted.code == 0, accepted.err
    assert "nodes to the CPU, 100% of the time" in accepted.err
    found = json.loads(accepted.out)["fallback"]
    assert (found["share_of_time"], len(found["nodes"])) == (1.0, found["of_nodes"])


@pytest.mark.openvino
def test_openvino_leaves_an_operator_to_the_cpu() -> None:
    needs("OpenVINOExecutionProvider")
    found = fallback_of(parts(), runtime("openvino"), SHAPES)
    assert found is not None
    assert "LpPool" in {operator for _, operator in found.nodes}
    assert 0 < found.share < 1
    with pytest.raises(MissingBackendError, match="1 LpPool"):
        open_placed(parts(), runtime("openvino"), SHAPES)
    assert (
        open_placed(parts("MaxPool"), runtime("openvino"), SHAPES).get_providers()[0]
        == SHORT_NAMES["openvino"]
    )


# --- plugins ----------------------------------------------------------------------------------------


class FakeRuntime:
    """The part of ``onnxruntime`` that plugins go through; a library offers the devices of one provider."""

    __version__ = "1.99"

    def __init__(self, offers: tuple[str, ...]) -> None:
        self.offers, self.devices, self.registered = offers, ["CPUExecutionProvider"], []

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if path.endswith(".txt"):
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : invalid ELF header")
        self.registered.append((name, path))
        self.devices += self.offers

    def get_ep_devices(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(ep_name=name) for name in self.devices]


class FakeOptions:
    def __init__(self) -> None:
        self.added: list[tuple[list[str], dict[str, str]]] = []

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        self.added.append(([device.ep_name for device in devices], options))


def test_a_plugin_is_registered_once_and_gives_a_session_all_its_devices() -> None:
    ort, options = FakeRuntime(("MyExecutionProvider",) * 2), FakeOptions()
    for _ in range(2):
        add_plugin(ort, options, "MyExecutionProvider", "lib.so", {"k": "v"})
    assert ort.registered == [("MyExecutionProvider", "lib.so")]
    assert options.added == [(["MyExecutionProvider"] * 2, {"k": "v"})] * 2


@pytest.mark.parametrize(
    ("library", "offers", "sentence"),
    [
        ("notes.txt", (), r"'notes\.txt' is no provider library .*invalid ELF header\."),
        ("lib.so", (), "offers no device on this machine"),
        ("lib.so", ("OtherExecutionProvider",), "offers OtherExecutionProvider, not MyExecutionProvider"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_sentence(
    library: str, offers: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(MissingBackendError, match=sentence):
        add_plugin(FakeRuntime(offers), FakeOptions(), "MyExecutionProvider", library, {})


def test_a_real_runtime_refuses_a_file_that_is_no_plugin(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    with pytest.raises(MissingBackendError, match=r"There is no provider library .*--ep-library"):
        open_session(parts(), runtime("MyExecutionProvider", library=str(library)))
    library.write_text("no library")
    with pytest.raises(MissingBackendError, match=r"'library\.so' is no provider library"):
        open_session(parts(), runtime("MyExecutionProvider", library=str(library)))
