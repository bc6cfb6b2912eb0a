"""Laws of the clock: drift cancels, noise is told, and a session runs where it was asked to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_mdp.errors import MeasurementError, MissingBackendError, UsageError
from onnx_mdp.running import timing as timing_module
from onnx_mdp.running.runtime import context, device_name, import_onnxruntime, one_line, open_session, runtime
from onnx_mdp.running.timing import Samples, drift_correct, measure, random_feeds, run_times, undisturbed

TRUE_MS = np.geomspace(4.0, 80.0, 12)


def synthetic(rounds: int = 24, drift: float = 0.15, noise: float = 0.002, bursts: float = 0.1) -> Samples:
    """Sample TRUE_MS in random order under a slow wave; bursts double the wall time but not the CPU's."""
    rng = np.random.default_rng(3)
    model = np.concatenate([rng.permutation(len(TRUE_MS)) for _ in range(rounds)])
    wave = 1 + drift * np.sin(np.linspace(0, 2 * np.pi * 3.3, len(model)))
    cpu_ms = TRUE_MS[model] * wave * np.exp(noise * rng.standard_normal(len(model)))
    burst = rng.random(len(model)) < bursts
    return Samples(model, np.where(burst, 2 * cpu_ms, cpu_ms), cpu_ms)


def ratio_errors(ms: np.ndarray) -> np.ndarray:
    """Return the error of every latency after the common level is divided out."""
    ratio = np.asarray(ms) / TRUE_MS
    return np.abs(ratio / np.median(ratio) - 1)


def plain_medians(samples: Samples) -> np.ndarray:
    return np.array([np.median(samples.wall_ms[samples.model == index]) for index in range(len(TRUE_MS))])


def conv_model(width: int) -> bytes:
    """Return a 3×3 convolution of `width` channels at 48×48, about 0.1 ms at 32 channels."""
    text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        graph (float[1,{width},48,48] x, int64[2] unused, bool[N] flag) => (float[1,{width},48,48] y) {{
            y = Conv<pads=[1,1,1,1]>(x, w)
        }}"""
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((width, width, 3, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight / width, "w"))
    return model.SerializeToString()


def test_drift_and_bursts_cancel_where_a_plain_median_keeps_them() -> None:
    samples = synthetic()
    assert np.median(ratio_errors(plain_medians(samples))) > 0.005
    corrected = ratio_errors(np.array(drift_correct(samples).ms))
    assert np.median(corrected) < 0.005
    assert corrected.max() < 0.015


def test_without_the_cpu_filter_bursts_still_do_not_move_the_median() -> None:
    assert np.median(ratio_errors(np.array(drift_correct(synthetic(), filter_preempted=False).ms))) < 0.01


def test_the_level_is_that_of_the_quiet_quarter() -> None:
    ratio = np.array(drift_correct(synthetic()).ms) / TRUE_MS
    assert 0.85 < np.median(ratio) < 1.0


def test_noise_follows_the_white_noise_and_not_the_drift() -> None:
    still = drift_correct(synthetic(drift=0.0)).noise
    drifting = drift_correct(synthetic(drift=0.15)).noise
    noisy = drift_correct(synthetic(noise=0.1)).noise
    assert still < 0.003
    assert drifting < 0.006
    assert noisy > 0.015


def test_a_model_that_is_always_preempted_is_told_by_its_cpu_time() -> None:
    samples = synthetic()
    always = samples.model == 5
    wall_ms = np.where(always, 2 * samples.cpu_ms, samples.wall_ms)
    timing = drift_correct(Samples(samples.model, wall_ms, samples.cpu_ms))
    assert ratio_errors(np.array(timing.ms))[5] < 0.01


def test_halves_straddle_the_estimate_and_two_models_report_the_worse() -> None:
    samples = synthetic(noise=0.05)
    pair = samples.model < 2
    timing = drift_correct(Samples(samples.model[pair], samples.wall_ms[pair], samples.cpu_ms[pair]))
    odd, even = np.array(timing.half_ms)
    assert timing.noise == np.abs(odd / even - 1).max()
    assert timing.rounds == 24
    assert np.all(np.minimum(odd, even) <= timing.ms)
    assert np.all(timing.ms <= np.maximum(odd, even))


def test_a_run_is_disturbed_when_the_cpu_worked_less_than_the_clock() -> None:
    assert undisturbed(np.array([10.0, 10.0]), np.array([9.9, 9.8])).tolist() == [True, False]


def test_a_bigger_model_takes_longer() -> None:
    models = [conv_model(32), conv_model(64)]
    sessions = [open_session(model, runtime("cpu")) for model in models]
    feeds = [random_feeds(session, {"flag": (3,)}, seed=0) for session in sessions]
    seen: list[tuple[int, int]] = []
    timing = measure(sessions, feeds, rounds=8, threads=1, on_round=lambda *done: seen.append(done))
    assert timing.ms[1] / timing.ms[0] > 1.5
    assert seen == [(done, 8) for done in range(1, 9)]


def test_a_fast_model_gets_enough_rounds_of_long_samples_whatever_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing_module, "_UNSTEADY", np.inf)
    session = open_session(conv_model(32), runtime("cpu"))
    timing = measure([session], [random_feeds(session, {"flag": (0,)}, seed=0)], budget_s=0.01, threads=1)
    assert timing.rounds == 25
    assert 0 < timing.ms[0] < 2


def test_an_unsteady_machine_is_measured_three_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(conv_model(32), runtime("cpu"))
    feeds = random_feeds(session, {"flag": (0,)}, seed=0)
    for unsteady, rounds in ((-1.0, 75), (np.inf, 25)):
        monkeypatch.setattr(timing_module, "_UNSTEADY", unsteady)
        timing = measure([session], [feeds], budget_s=0.01, threads=1)
        assert timing.rounds == rounds
        assert 0 < timing.ms[0] < 2


class Machine:
    """A clock that only runs move, and a cache that each session has to fill again after another one ran."""

    def __init__(self) -> None:
        self.now, self.last, self.in_a_row = 0.0, None, 0

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter

    def run(self, session: object, ms: float) -> None:
        self.in_a_row = self.in_a_row + 1 if session is self.last else 1
        self.last = session
        self.now += 1e-3 * ms * (1.4, 1.3, 1.1, 1.05, 1.01, 1.0)[min(self.in_a_row, 6) - 1]


class Simulated:
    def __init__(self, machine: Machine, ms: float) -> None:
        self.machine, self.ms = machine, ms

    def run(self, outputs: None, feeds: object) -> None:
        self.machine.run(self, self.ms)


@pytest.mark.parametrize("ms", [(0.3, 2.0, 4.0), (6.0, 12.0, 16.0)])
def test_models_beside_each_other_take_what_each_takes_in_a_loop_of_its_own(
    ms: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    monkeypatch.setattr(timing_module, "time", machine)
    sessions = [Simulated(machine, each) for each in ms]
    timing = measure(sessions, [{}] * len(ms), rounds=6, threads=1, on_cpu=True)
    assert timing.ms == pytest.approx(ms, rel=1e-6)


def test_run_times_counts_wall_and_cpu() -> None:
    session = open_session(conv_model(32), runtime("cpu"))
    wall_ms, cpu_ms = run_times(session, random_feeds(session, {"flag": (1,)}, seed=0), 5)
    assert wall_ms.shape == cpu_ms.shape == (5,)
    assert np.all(wall_ms > 0)


def test_feeds_take_the_dtypes_and_shapes_of_the_inputs() -> None:
    session = open_session(conv_model(4), runtime("cpu"))
    feeds = random_feeds(session, {"flag": (3,)}, seed=1)
    again = random_feeds(session.get_inputs(), {"flag": (3,)}, seed=1)
    assert {name: (array.dtype.name, array.shape) for name, array in feeds.items()} == {
        "x": ("float32", (1, 4, 48, 48)),
        "unused": ("int64", (2,)),
        "flag": ("bool", (3,)),
    }
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)
    assert abs(float(np.std(feeds["x"].astype(float))) - 1) < 0.05
    assert not feeds["unused"].any()
    assert not feeds["flag"].any()
    with pytest.raises(MeasurementError, match="'flag' has the dynamic shape"):
        random_feeds(session, {}, seed=1)


def test_a_size_that_the_model_states_holds() -> None:
    session = open_session(conv_model(4), runtime("cpu"))
    full = random_feeds(session, {"flag": (3,)}, seed=0)
    again = random_feeds(session, {"flag": (3,), "x": (1, 5, 48, 48)}, seed=0)
    assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in full.items()}


def test_a_feed_that_does_not_fit_is_one_sentence() -> None:
    session = open_session(conv_model(4), runtime("cpu"))
    feeds = random_feeds(session, {"flag": (3,)}, seed=0) | {"x": np.zeros((1, 5, 48, 48), np.float32)}
    with pytest.raises(MeasurementError, match="cannot run the model: Got invalid dimensions") as caught:
        measure([session], [feeds], threads=1)
    assert "\n" not in str(caught.value)


def test_too_few_rounds_and_missing_feeds_are_refused() -> None:
    session = open_session(conv_model(4), runtime("cpu"))
    with pytest.raises(UsageError, match="3 rounds"):
        measure([session], [{}], rounds=3, threads=1)
    with pytest.raises(UsageError, match="1 sessions with 0 feeds"):
        measure([session], [], threads=1)


def test_an_absent_provider_fails_loudly(capfd: pytest.CaptureFixture[str]) -> None:
    if "TensorrtExecutionProvider" in import_onnxruntime().get_available_providers():
        pytest.skip("this ONNX Runtime contains TensorRT")
    with pytest.raises(MissingBackendError, match=r"onnx-mdp\[gpu\]"):
        open_session(conv_model(4), runtime("tensorrt"))
    assert capfd.readouterr() == ("", "")


def test_reasons_lose_codes_source_lines_and_signatures() -> None:
    text = (
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : /onnxruntime_src/onnxruntime/core/a.cc:12 "
        "void onnxruntime::Register(Options&, const onnxruntime::Map&) Install (the) library.\nStack trace"
    )
    assert one_line(RuntimeError(text)) == "Install (the) library."
    assert one_line(ValueError()) == "ValueError."


def test_a_missing_onnxruntime_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingBackendError, match=r"pip install onnx-mdp\[cpu\]"):
        open_session(b"", runtime("cpu"))


def test_the_runtime_is_imported_only_when_a_session_is_opened() -> None:
    code = "import sys; from onnx_mdp.running import runtime, timing; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("as_path", [True, False])
def test_a_text_file_is_no_model(tmp_path: Path, as_path: bool, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.onnx"
    path.write_text("hello world, this is text")
    with pytest.raises(MeasurementError, match=r"cannot load 'notes\.onnx' .*Protobuf") as caught:
        open_session(path if as_path else str(path), runtime("cpu"))
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_operator_is_named() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Foo(x) }'
    with pytest.raises(MeasurementError, match="No Op registered for Foo"):
        open_session(onnx.parser.parse_model(text).SerializeToString(), runtime("cpu"))


def test_optimisation_is_on_unless_refused_and_the_result_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "optimized.onnx"
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        graph (float[1,3,8,8] x, float[4,3,1,1] w) => (float[1,4,8,8] y) { z = Conv(x, w) y = Relu(z) }"""
    model = onnx.parser.parse_model(text).SerializeToString()
    for optimize, relu_left in ((True, False), (False, True)):
        open_session(model, runtime("cpu"), optimize=optimize, optimized_model_path=path)
        assert ("Relu" in {node.op_type for node in onnx.load(path).graph.node}) == relu_left


def test_profiling_writes_node_times(tmp_path: Path) -> None:
    session = open_session(conv_model(4), runtime("cpu"), profile_prefix=str(tmp_path / "profile"))
    session.run(None, random_feeds(session, {"flag": (1,)}, seed=0))
    assert "_kernel_time" in Path(session.end_profiling()).read_text()


def test_short_names_and_options_have_one_canonical_form() -> None:
    short = runtime("CPU", threads=2, options=(("b", "1"), ("a", "2")))
    assert short == runtime("CPUExecutionProvider", 2, (("a", "2"), ("b", "1")))
    with pytest.raises(UsageError, match="Unknown provider 'gpu0'"):
        runtime("gpu0")
    with pytest.raises(UsageError, match="0 threads"):
        runtime("cpu", threads=0)


def test_the_context_states_all_that_a_latency_depends_on() -> None:
    here = context(runtime("cpu", threads=1, options=(("arena", "0"),)))
    assert here == {
        "device": device_name(),
        "options": "arena=0",
        "ort_version": import_onnxruntime().__version__,
        "precision": "float32",
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "timing": 3,
    }
    assert "cpus)" in device_name()
