"""ONNX Runtime: providers, sessions that run where they were asked to, and how long they take."""

__all__: list[str] = []
