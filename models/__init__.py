"""Reference networks in plain torch, exported to ONNX for the tests, the benchmarks and the demo.

Run from the repository root, for example ``python -m models.export resnet50 -o resnet50.onnx``.
"""

from __future__ import annotations

__all__: list[str] = []
