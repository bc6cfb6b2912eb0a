"""Weights of a pruned model that answer as the original did, without training."""

__all__: list[str] = []
