"""What providers are told: flags by precision, threads, caches of engines; and the GPU they run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from command_line import Outcome
from test_placement import needs, parts

from onnx_mdp.errors import UsageError
from onnx_mdp.running.accelerators import Gpu, gpu_of, parse_gpu
from onnx_mdp.running.bound_session import BoundSession, device_of
from onnx_mdp.running.provider_options import session_provider_options
from onnx_mdp.running.runtime import context, open_session, runtime
from onnx_mdp.running.timing import measure, random_feeds


def told(
    name: str, precision: str = "float32", model: bytes = b"", options: Mapping[str, str] | None = None
) -> dict[str, str]:
    wanted = runtime(name, 3, tuple((options or {}).items()), precision=precision)
    return session_provider_options(
        wanted.provider,
        wanted.options,
        threads=wanted.threads,
        precision=wanted.precision,
        store=wanted.store,
        model=model,
    )


def test_openvino_is_told_its_threads_and_precision_unless_the_user_says_other_ones() -> None:
    assert told("openvino") == {"device_type": "CPU", "num_of_threads": "3", "precision": "FP32"}
    assert told("openvino", "float16")["precision"] == "FP16"
    own = {"device_type": "GPU", "num_of_threads": "2", "precision": "ACCURACY"}
    assert told("openvino", options=own) == own


def test_the_cpu_is_told_nothing() -> None:
    assert told("cpu") == {}


def test_engines_of_two_models_never_meet_and_kernel_timings_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNX_MDP_STORE", str(tmp_path / "store.sqlite"))
    wide, slim, half = (
        told("tensorrt", model=b"wide"),
        told("tensorrt", model=b"slim"),
        told("tensorrt", "float16"),
    )
    assert wide["trt_engine_cache_path"] != slim["trt_engine_cache_path"]
    assert wide["trt_timing_cache_path"] == slim["trt_timing_cache_path"]
    assert Path(wide["trt_engine_cache_path"]).is_dir()
    assert Path(wide["trt_timing_cache_path"]).parent == tmp_path / "engines"
    assert "trt_fp16_enable" not in wide
    assert half["trt_fp16_enable"] == "1"
    assert told("tensorrt", options={"trt_engine_cache_path": "/mine"})["trt_engine_cache_path"] == "/mine"


@pytest.mark.parametrize(
    ("name", "precision", "sentence"),
    [
        ("cpu", "float16", "CPUExecutionProvider has no flag for float16"),
        ("openvino", "int8", "OpenVINOExecutionProvider has no flag for int8"),
        ("tensorrt", "int4", "Unknown precision 'int4'"),
    ],
)
def test_a_precision_without_a_flag_is_refused(name: str, precision: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        runtime(name, precision=precision)


def test_the_precision_is_part_of_the_key_of_measurements() -> None:
    keys = [context(runtime("openvino", precision=precision)) for precision in ("float32", "float16")]
    assert [key["precision"] for key in keys] == ["float32", "float16"]


def test_the_command_line_refuses_a_precision_in_one_sentence(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "parts.onnx").write_bytes(parts())
    refused = run("profile", "parts.onnx", "--ep-precision", "float16")
    assert (refused.code, refused.out) == (2, "")
    assert "--ep-precision" in refused.err


@pytest.mark.openvino
def test_openvino_computes_float32_alone_on_a_cpu() -> None:
    needs("OpenVINOExecutionProvider")
    open_session(parts("MaxPool"), runtime("openvino"))
    with pytest.raises(UsageError, match="does not compute in float16 on this device"):
        open_session(parts("MaxPool"), runtime("openvino", precision="float16"))


def test_a_bound_session_computes_the_same_and_takes_another_feed() -> None:
    plain = open_session(parts("MaxPool"), runtime())
    bound = BoundSession(plain, "cpu", 0)
    for seed in (0, 0, 1):
        feeds = random_feeds(bound, {}, seed)
        for _ in range(2):
            (found,), (expected,) = bound.run(None, feeds), plain.run(None, feeds)
            assert np.array_equal(found.numpy(), expected)
    assert measure([bound], [feeds], rounds=4, threads=1).ms[0] > 0
    assert device_of("CPUExecutionProvider") is None
    assert device_of("CUDAExecutionProvider") == "cuda"


def test_a_line_of_nvidia_smi_names_the_device_and_its_clocks() -> None:
    assert parse_gpu("NVIDIA H100 80GB HBM3, 570.86.15, 1980, 1980") == Gpu(
        "NVIDIA H100 80GB HBM3", "570.86.15", 1980, 1980
    )
    assert parse_gpu("Orin, 540.4.0, [N/A], [N/A]") == Gpu("Orin", "540.4.0", 0, 0)


def test_the_device_of_the_key_is_the_gpu_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Tesla T4, 550.1, 300, 1590'\necho 'NVIDIA A10, 550.1, 210, 1695'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    here = context(runtime("cuda", options=(("device_id", "1"),)))
    assert (here["device"], here["driver"]) == ("NVIDIA A10", "550.1")
    assert "driver" not in context(runtime("cpu"))
    assert gpu_of("CUDAExecutionProvider", (("device_id", "2"),)) is None
