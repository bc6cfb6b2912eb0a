"""From a model to its structure: what can be pruned, and what goes with it."""

__all__: list[str] = []
