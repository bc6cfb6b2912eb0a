"""Prune ONNX vision models to a latency, with proof."""
