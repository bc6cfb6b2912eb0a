"""A session whose inputs and outputs stay on the device, so that runs are timed without copies from the host.

The first run of a feed copies it to the device; a run ends when the device has finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx_mdp.running.runtime import InferenceSession, NodeArg, import_onnxruntime

__all__ = ["BoundSession", "device_of"]

_DEVICES = {
    "CUDAExecutionProvider": "cuda",
    "NvTensorRTRTXExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
}


def device_of(provider: str) -> str | None:
    """The name of the device whose memory a provider works in, None where that is the memory of the host."""
    return _DEVICES.get(provider)


class BoundSession:
    """A session for timing: ``run`` returns values on the device, which only the runtime can read."""

    def __init__(self, session: InferenceSession, device: str, number: int) -> None:
        """Wrap an open session; ``number`` is that of the device."""
        self._session: Any = session
        self._device, self._number = device, number
        self._feed: Mapping[str, Any] | None = None
        self._binding: Any = None

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]:
        """Compute all outputs; another feed than that of the last run is copied to the device first."""
        if self._feed is not input_feed:
            self._bind(input_feed)
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        outputs: list[Any] = self._binding.get_outputs()
        return outputs

    def _bind(self, feed: Mapping[str, Any]) -> None:
        make = import_onnxruntime().OrtValue.ortvalue_from_numpy
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, make(array, self._device, self._number))
        for output in self._session.get_outputs():
            binding.bind_output(output.name, self._device, self._number)
        binding.synchronize_inputs()
        self._binding, self._feed = binding, feed

    def get_inputs(self) -> list[NodeArg]:
        """Describe the inputs that a feed must hold."""
        return list(self._session.get_inputs())

    def get_outputs(self) -> list[NodeArg]:
        """Describe the outputs in the order of ``run``."""
        return list(self._session.get_outputs())

    def get_providers(self) -> list[str]:
        """Name the providers that really run the session, the preferred one first."""
        return list(self._session.get_providers())

    def end_profiling(self) -> str:
        """Write the profile and return its file name."""
        return str(self._session.end_profiling())
